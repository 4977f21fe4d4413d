"""What a model takes on a machine that was measured (`fedsplit.models.profile_measured`)."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fedsplit.errors import FedsplitError, require
from fedsplit.mapping import from_mapping
from fedsplit.profiles import ModelProfile


@dataclass(frozen=True, kw_only=True)
class MeasuredProfile:
    """How long a machine really takes for a model; a small file (`write`, `read`).

    Parameters
    ----------
    model : str
        The model's name.
    seq_len, batch : int
        The mini-batch that was timed.
    forward_s, backward_s : tuple of float
        Seconds of each unit for the whole mini-batch (embeddings, blocks, head); backward with the
        update of what the unit trains.
    memory_bytes : float or None
        Memory of the machine.
    power_w : float or None
        What it took meanwhile, where the board tells.
    """

    model: str
    seq_len: int
    batch: int
    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    memory_bytes: float | None = None
    power_w: float | None = None

    def __post_init__(self) -> None:
        for name in ("forward_s", "backward_s"):
            times = getattr(self, name)
            good = len(times) > 1 and all(0 <= one < float("inf") for one in times)
            require(good, f"measured.{name}", times, "finite seconds, at least 0, of every unit")
        same = len(self.forward_s) == len(self.backward_s)
        require(same, "measured.backward_s", len(self.backward_s), f"{len(self.forward_s)} units")
        for name in ("batch", "seq_len"):
            count = getattr(self, name)
            require(count >= 1, f"measured.{name}", count, "at least 1")
        for name in ("memory_bytes", "power_w"):
            value = getattr(self, name)
            allowed = value is None or 0 < value < 1e18
            require(allowed, f"measured.{name}", value, "null, or above 0 and below 1e18")

    def fits(self, profile: ModelProfile) -> bool:
        """Return whether it may be of the model of `profile`."""
        return len(self.forward_s) == len(profile.units) and self.seq_len == profile.seq_len

    def flops_per_s(self, profile: ModelProfile) -> float:
        """Return the speed at which the whole model takes the time measured; 0 if it takes none."""
        again = profile.recomputed * sum(self.forward_s[1:-1])
        seconds = sum(self.forward_s) + sum(self.backward_s) + again
        whole = profile.total()
        flops = float(self.batch * (whole.forward_flops + whole.backward_flops))
        return flops / seconds if seconds > 0 else 0.0

    def seconds(self, profile: ModelProfile) -> ModelProfile:
        """Return `profile` with seconds of a sample on this machine in place of its FLOPs.

        Raises
        ------
        FedsplitError
            If it is of a model with another number of blocks, or of another sequence length.
        """
        units = profile.units
        require(
            len(self.forward_s) == len(units),
            "measured units",
            len(self.forward_s),
            str(len(units)),
        )
        fits = self.seq_len == profile.seq_len
        require(fits, "measured.seq_len", self.seq_len, f"{profile.seq_len}, as the profile")
        again = [0.0, *(profile.recomputed * up for up in self.forward_s[1:-1]), 0.0]
        timed = [
            replace(unit, forward_flops=up / self.batch, backward_flops=(down + more) / self.batch)
            for unit, up, down, more in zip(
                units, self.forward_s, self.backward_s, again, strict=True
            )
        ]
        return replace(
            profile,
            embed=timed[0],
            blocks=tuple(timed[1:-1]),
            head=timed[-1],
            source="measured",
        )

    def write(self, path: str | Path) -> None:
        """Write the file, JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> "MeasuredProfile":
        """Read a file that `write` made.

        Raises
        ------
        FedsplitError
            If it cannot be read, or is not such a file.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise FedsplitError(f"measured profile {path}: {error}") from error
        try:
            return cls.parse(text)
        except FedsplitError as error:
            raise FedsplitError(f"measured profile {path}: {error}") from error

    @classmethod
    def parse(cls, text: str) -> "MeasuredProfile":
        """Return what the text of such a file says.

        Raises
        ------
        FedsplitError
            If it is not the text of such a file.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FedsplitError(f"measured={text!r:.40}: must be JSON ({error})") from error
        require(isinstance(values, dict), "measured", type(values).__name__, "a mapping")
        return from_mapping(cls, values, "measured")
