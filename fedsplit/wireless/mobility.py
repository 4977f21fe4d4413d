"""Where devices are at a given time: the random-waypoint model."""

import numpy as np

from fedsplit.arrays import Array
from fedsplit.seeds import generator


class RandomWaypoint:
    """Devices that walk straight to uniform random places of a square, one after the other.

    Each leg has its own uniform speed and ends with a pause (Johnson and Maltz 1996). The `k`-th
    leg of every device comes from the generator ("waypoint", k), so a position depends on the
    seed and the time alone, not on which times were asked for before.

    Parameters
    ----------
    start_m : ndarray
        Positions at time 0, shape ``[N, 2]``.
    side_m : float
        Side of the square, centred at the origin.
    speed_m_s : tuple of float
        Slowest and fastest leg; the slowest must be above 0, or devices come to rest for ever.
    pause_s : float
        Rest at each waypoint.
    seed : int
        Root of the draws.
    """

    def __init__(
        self,
        start_m: Array,
        side_m: float,
        speed_m_s: tuple[float, float],
        pause_s: float,
        seed: int,
    ) -> None:
        self._side_m, self._speed_m_s, self._pause_s, self._seed = side_m, speed_m_s, pause_s, seed
        # Leg k leads from points[k] to points[k + 1], from departure[k] at speed[k].
        self._points = [start_m]
        self._departure_s = [np.zeros(len(start_m))]
        self._speed: list[Array] = []

    def positions_m(self, time_s: float) -> Array:
        """Return where every device is at `time_s` >= 0, shape ``[N, 2]``."""
        while np.min(self._departure_s[-1], initial=np.inf) <= time_s:
            self._extend()
        position = self._points[0].copy()
        for k, speed in enumerate(self._speed):
            on_leg = (self._departure_s[k] <= time_s) & (time_s < self._departure_s[k + 1])
            start, way = self._points[k][on_leg], (self._points[k + 1] - self._points[k])[on_leg]
            length = np.maximum(np.linalg.norm(way, axis=1), 1e-12)
            walked = speed[on_leg] * (time_s - self._departure_s[k][on_leg])
            position[on_leg] = start + way * np.minimum(walked / length, 1.0)[:, None]
        return position

    def _extend(self) -> None:
        rng = generator(self._seed, "waypoint", len(self._speed))
        n_devices = len(self._points[0])
        goal = rng.uniform(-self._side_m / 2, self._side_m / 2, (n_devices, 2))
        speed = rng.uniform(*self._speed_m_s, n_devices)
        travel_s = np.linalg.norm(goal - self._points[-1], axis=1) / speed
        self._points.append(goal)
        self._speed.append(speed)
        self._departure_s.append(self._departure_s[-1] + travel_s + self._pause_s)
