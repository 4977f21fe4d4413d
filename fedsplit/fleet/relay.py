"""When turns start: a wave when the one before it is over, a turn of it at once."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


@dataclass(eq=False)
class Relay:
    """Hands time on from wave to wave, while visits to servers are being simulated.

    Parameters
    ----------
    branch : sequence of int
        Branch of each wave, ascending, shape ``[W]``.
    first : sequence of int
        Index of each wave's first turn, shape ``[W]``.
    before_s, after_s : sequence of float
        Time around each wave's turns, shape ``[W]``.
    alone_s : sequence of float
        How long each turn without visits takes, shape ``[T]``.
    trail_s : sequence of float
        How long each turn goes on after its last visit, shape ``[T]``.
    visit : sequence of int
        Index of each turn's first visit, -1 if it has none, shape ``[T]``.
    start_s, end_s, begin_s, done_s : list of float
        When each turn starts and ends, when its branch comes to each wave, and when the last turn
        of each wave ends; known once all visits have been made.
    """

    branch: Sequence[int]
    first: Sequence[int]
    before_s: Sequence[float]
    after_s: Sequence[float]
    alone_s: Sequence[float]
    trail_s: Sequence[float]
    visit: Sequence[int]
    start_s: list[float] = field(init=False)
    end_s: list[float] = field(init=False)
    begin_s: list[float] = field(init=False)
    done_s: list[float] = field(init=False)

    def __post_init__(self) -> None:
        n_turns, n_waves = len(self.visit), len(self.branch)
        self.start_s, self.end_s = [0.0] * n_turns, [0.0] * n_turns
        self.begin_s, self.done_s = [0.0] * n_waves, [0.0] * n_waves
        self._stop = [*self.first[1:], n_turns]
        self._running = [0] * n_waves
        sizes = np.diff([*self.first, n_turns])
        self._wave: list[int] = np.repeat(np.arange(n_waves), sizes).tolist()

    def begin(self) -> list[tuple[float, int]]:
        """Start every branch; return the turns' first visits, as (start of the turn, visit)."""
        found = []
        for wave, branch in enumerate(self.branch):
            if wave == 0 or branch != self.branch[wave - 1]:
                found += self._start(wave, 0.0)
        return found

    def followed(self) -> list[bool]:
        """Return for each turn whether a wave comes after its own."""
        return [self._is_followed(wave) for wave in self._wave]

    def leave(self, turn: int, time_s: float) -> list[tuple[float, int]]:
        """End the last visit of `turn`; return what starts by that, as `begin` does."""
        wave = self._wave[turn]
        self.end_s[turn] = time_s + self.trail_s[turn]
        self.done_s[wave] = max(self.done_s[wave], self.end_s[turn])
        self._running[wave] -= 1
        if self._running[wave] or not self._is_followed(wave):
            return []
        return self._start(wave + 1, self.done_s[wave] + self.after_s[wave])

    def _start(self, wave: int, time_s: float) -> list[tuple[float, int]]:
        """Start `wave`, and the ones after it for as long as they visit nobody."""
        while True:
            self.begin_s[wave] = time_s
            start_s = time_s + self.before_s[wave]
            done_s, found = start_s, []
            for turn in range(self.first[wave], self._stop[wave]):
                self.start_s[turn] = start_s
                if self.visit[turn] >= 0:
                    found.append((start_s, self.visit[turn]))
                else:
                    self.end_s[turn] = start_s + self.alone_s[turn]
                    done_s = max(done_s, self.end_s[turn])
            self.done_s[wave], self._running[wave] = done_s, len(found)
            if found or not self._is_followed(wave):
                return found
            time_s = done_s + self.after_s[wave]
            wave += 1

    def _is_followed(self, wave: int) -> bool:
        after = wave + 1
        return after < len(self.branch) and self.branch[after] == self.branch[wave]
