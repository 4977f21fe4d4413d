"""What became of a device's examples: how many were read, cut, dropped, and how long they are."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from fedsplit.errors import require

_LISTED = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Numbers of the training or the test examples of a device.

    Parameters
    ----------
    read : int
        Examples that the device holds: paragraphs, pairs, conversations, images.
    samples : int
        Samples made of them; packed texts make other numbers than they are.
    cut : int
        Examples that are longer than `data.seq_len` and lost their end.
    dropped : int
        Examples left out, since nothing is left to be learnt: empty, or all prompt.
    tokens : int
        Tokens of all samples, without padding; 0 for images.
    longest : int
        Tokens of the longest sample, without padding; 0 for images.
    left_over : int
        Tokens at the end of packed texts that fill no further sample.
    """

    read: int = 0
    samples: int = 0
    cut: int = 0
    dropped: int = 0
    tokens: int = 0
    longest: int = 0
    left_over: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        """Return the numbers of both together."""
        both = {name: value + getattr(other, name) for name, value in asdict(self).items()}
        return Counts(**{**both, "longest": max(self.longest, other.longest)})


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceCounts:
    """The `Counts` of a device: all that a server learns of its data."""

    train: Counts
    test: Counts

    def flat(self) -> dict[str, int]:
        """Return whole numbers by names such as "train-read", as they travel in a message."""
        parts = {"train": self.train, "test": self.test}
        return {
            f"{part}-{name}": value
            for part, counts in parts.items()
            for name, value in asdict(counts).items()
        }

    @classmethod
    def from_flat(cls, values: Mapping[str, object]) -> "DeviceCounts":
        """Return what `flat` was made of; other names in `values` do not matter.

        Raises
        ------
        FedsplitError
            If a number is missing, no whole number, or below 0.
        """
        parts = {}
        for part in ("train", "test"):
            numbers: dict[str, int] = {}
            for name in (field.name for field in fields(Counts)):
                value = values.get(f"{part}-{name}")
                whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
                require(whole, f"{part}-{name}", value, "a whole number, at least 0")
                numbers[name] = int(str(value))
            parts[part] = Counts(**numbers)
        return cls(**parts)


def describe(
    counts: Mapping[int, DeviceCounts], seq_len: int, left_out: Sequence[str] = ()
) -> list[str]:
    """Return lines on what devices read, and what of it was cut or left out.

    The first is of all devices; one more follows for each device that lost something, up to eight,
    and for each of the files `left_out`, up to eight.
    """
    nothing = Counts()
    everything = DeviceCounts(
        train=sum((item.train for item in counts.values()), nothing),
        test=sum((item.test for item in counts.values()), nothing),
    )
    lines = [f"data of {len(counts)} devices: {_line(everything, seq_len)}"]
    losers = {
        device: item
        for device, item in sorted(counts.items())
        if any(part.cut or part.dropped for part in (item.train, item.test))
    }
    for device, item in list(losers.items())[:_LISTED]:
        lines.append(f"device {device}: {_line(item, seq_len)}")
    if len(losers) > _LISTED:
        lines.append(f"and {len(losers) - _LISTED} more devices whose data were cut or left out")
    lines += [f"not read: {file}" for file in left_out[:_LISTED]]
    if len(left_out) > _LISTED:
        lines.append(f"and {len(left_out) - _LISTED} more files that were not read")
    return lines


def _line(counts: DeviceCounts, seq_len: int) -> str:
    both = counts.train + counts.test
    line = (
        f"{both.read} examples read; {counts.train.samples} samples to train on, "
        f"{counts.test.samples} to test on"
    )
    if both.cut:
        line += f"; {both.cut} cut to data.seq_len={seq_len}"
    if both.dropped:
        line += f"; {both.dropped} left out (empty, or no target within data.seq_len={seq_len})"
    if both.left_over:
        line += f"; {both.left_over} tokens left over at their ends"
    return line
