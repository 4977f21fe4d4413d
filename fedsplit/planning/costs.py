"""What every cut of a model costs, as the arrays that all planners of this package read."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedsplit.arrays import Array
from fedsplit.errors import FedsplitError, require
from fedsplit.fleet.cost import training_memory_bytes
from fedsplit.planning.errors import InfeasibleError, checked
from fedsplit.profiles import ModelProfile, UnitProfile

Mask = NDArray[np.bool_]
WEIGHTS = ("parameter_bytes", "adapter_bytes", "optimizer_bytes")


@dataclass(frozen=True, eq=False, kw_only=True)
class CutCosts:
    """What a device's turn costs at each cut ``c = 0..L``; every array has shape ``[L + 1]``.

    Parameters
    ----------
    device_flops, server_flops : ndarray
        Forward and backward FLOPs of one mini-batch on each side.
    uplink_bits, downlink_bits : ndarray
        Raw boundary and its gradient for one mini-batch, bit.
    adapter_bits : ndarray
        Device-side adapters, sent once down and once up in a turn, bit.
    memory_bytes : ndarray
        Memory that the device side needs for training.
    possible : ndarray of bool, optional
        Which cuts the model allows; all by default.

    Raises
    ------
    FedsplitError
        If a value is NaN, negative or infinite, or the shapes differ.
    """

    device_flops: Array
    server_flops: Array
    uplink_bits: Array
    downlink_bits: Array
    adapter_bits: Array
    memory_bytes: Array
    possible: Mask | None = None

    def __post_init__(self) -> None:
        shape = np.shape(self.device_flops)
        require(len(shape) == 1 and shape[0] > 0, "device_flops shape", shape, "(blocks + 1,)")
        for field in fields(self):
            if field.name != "possible":
                value = checked(field.name, getattr(self, field.name), shape)
                object.__setattr__(self, field.name, value)
        if self.possible is not None:
            found = self.possible.shape
            require(found == shape, "possible shape", found, str(shape))

    @property
    def n_blocks(self) -> int:
        """Number of blocks L."""
        return len(self.device_flops) - 1

    @classmethod
    def from_profile(
        cls, profile: ModelProfile, batch: int, *, device_only: bool = False
    ) -> "CutCosts":
        """Return the costs of two-tier routes ``device[0:c] -> server[c:L]``.

        The embeddings are always on the device and the head on the server. A device part without
        trained parameters (cut 0, usually) needs no gradient back.

        Parameters
        ----------
        profile : ModelProfile
            The model.
        batch : int
            Samples in a mini-batch, at least 1.
        device_only : bool
            Whether cut L stands for a route that never leaves the device: the head is there too,
            and nothing crosses a cut.
        """
        require(batch >= 1, "batch", batch, "at least 1")
        units = [profile.embed, *profile.blocks]
        if device_only:
            units[-1] = replace(units[-1] + profile.head, boundary_bytes=0.0)

        def upto(name: str) -> Array:
            result: Array = np.cumsum([getattr(unit, name) for unit in units])
            for group in profile.shared if name in WEIGHTS else ():
                # A unit's second and later users on the device find its weights there.
                places = [unit for unit in group.units if device_only or unit < len(units)]
                for place in sorted(min(place, len(units) - 1) for place in places)[1:]:
                    result[place:] -= getattr(group, name)
            return result

        def flops(unit: UnitProfile) -> float:
            return unit.forward_flops + unit.backward_flops

        device_flops = batch * (upto("forward_flops") + upto("backward_flops"))
        behind = 0.0 if device_only else flops(profile.head)
        server_flops = batch * (behind + np.cumsum([0.0, *map(flops, units[:0:-1])])[::-1])
        boundary_bits = 8.0 * batch * np.array([unit.boundary_bytes for unit in units])
        adapter_bytes = upto("adapter_bytes")
        kept = upto("activation_bytes")
        kept[: len(kept) - device_only] *= profile.pace.at_once
        return cls(
            device_flops=device_flops,
            server_flops=server_flops,
            uplink_bits=boundary_bits,
            downlink_bits=np.where(adapter_bytes > 0, boundary_bits, 0.0),
            adapter_bits=8.0 * adapter_bytes,
            memory_bytes=training_memory_bytes(
                parameter_bytes=upto("parameter_bytes"),
                activation_bytes=kept,
                adapter_bytes=adapter_bytes,
                optimizer_bytes=upto("optimizer_bytes"),
                workspace_bytes=np.maximum.accumulate([unit.workspace_bytes for unit in units]),
                batch_size=batch,
            ),
        )

    def only(self, cuts: Sequence[int]) -> "CutCosts":
        """Return the same costs where the model can be cut at `cuts` alone."""
        return replace(self, possible=np.isin(np.arange(self.n_blocks + 1), cuts))

    def compressed(self, uplink_ratio: ArrayLike, downlink_ratio: ArrayLike = 1.0) -> "CutCosts":
        """Return the costs with a codec of these ratios (sent over raw), scalar or per cut."""
        shape = self.device_flops.shape
        return replace(
            self,
            uplink_bits=self.uplink_bits * checked("uplink_ratio", uplink_ratio, shape),
            downlink_bits=self.downlink_bits * checked("downlink_ratio", downlink_ratio, shape),
        )


@dataclass(frozen=True, eq=False)
class Devices:
    """The devices a plan is for; every array has shape ``[N]``.

    Parameters
    ----------
    flops_per_s : array_like
        Speed of each device.
    memory_bytes : array_like
        Memory for the model, scalar or per device; infinite by default.
    steps : array_like
        Mini-batches of each device's turn.

    Raises
    ------
    FedsplitError
        If a value is NaN, negative, or 0 where that makes no sense.
    """

    flops_per_s: Array
    memory_bytes: ArrayLike = np.inf
    steps: ArrayLike = 1.0

    def __post_init__(self) -> None:
        speed = checked("flops_per_s", np.atleast_1d(self.flops_per_s), positive=True)
        memory = checked("memory_bytes", self.memory_bytes, speed.shape, infinite=True)
        steps = checked("steps", self.steps, speed.shape, positive=True)
        object.__setattr__(self, "flops_per_s", speed)
        object.__setattr__(self, "memory_bytes", memory)
        object.__setattr__(self, "steps", steps)

    def __len__(self) -> int:
        return len(self.flops_per_s)

    def fitting_cuts(self, costs: CutCosts, min_cut: int = 0, max_cut: int | None = None) -> Mask:
        """Return the same without a word where a device has none."""
        cuts = np.arange(costs.n_blocks + 1)
        inside: Mask = (cuts >= min_cut) & (
            cuts <= (costs.n_blocks if max_cut is None else max_cut)
        )
        if costs.possible is not None:
            inside = inside & costs.possible
        fits: Mask = (costs.memory_bytes <= np.asarray(self.memory_bytes)[:, None]) & inside
        return fits

    def allowed_cuts(self, costs: CutCosts, min_cut: int = 0, max_cut: int | None = None) -> Mask:
        """Return which cuts each device may have, shape ``[N, L + 1]``.

        Parameters
        ----------
        costs : CutCosts
            The model.
        min_cut : int
            Privacy floor: at least this many blocks stay on the device.
        max_cut : int, optional
            At most this many do; all by default.

        Raises
        ------
        InfeasibleError
            If a device cannot hold even its smallest allowed part.
        FedsplitError
            If the model allows no cut in this range.
        """
        most = costs.n_blocks if max_cut is None else max_cut
        require(0 <= min_cut <= costs.n_blocks, "min_cut", min_cut, f"0 to {costs.n_blocks}")
        cuts = np.arange(costs.n_blocks + 1)
        inside: Mask = (cuts >= min_cut) & (cuts <= most)
        if costs.possible is not None:
            if not (inside & costs.possible).any():
                possible = ", ".join(map(str, np.flatnonzero(costs.possible[: most + 1])))
                raise FedsplitError(
                    f"min_cut={min_cut}: must leave a cut that the model allows: "
                    f"{possible or 'none'}"
                )
            inside = inside & costs.possible
        memory = np.asarray(self.memory_bytes)
        fits = self.fitting_cuts(costs, min_cut, most)
        stuck = np.flatnonzero(~fits.any(axis=1))
        if len(stuck):
            device = stuck[0]
            raise InfeasibleError(
                f"memory of device {device} at {min_cut} blocks or more",
                costs.memory_bytes[inside].min(),
                memory[device],
                "bytes",
            )
        return fits
