"""Samples as tensors, and batches of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fedsplit.data.counts import Counts
from fedsplit.data.examples import Picture
from fedsplit.errors import FedsplitError, require

IGNORED = -100

_STEP = 8  # tokens: lengths of padded batches are multiples of it


@dataclass(frozen=True)
class Batch:
    """What a model is called with, and which samples of the data set these are.

    `inputs` of a language model are int64 ``[batch, seq_len]``: `input_ids`, `labels` (-100 is not
    learnt; of a classifier ``[batch]``) and, only where there is padding, `attention_mask`; of an
    image classifier float32 `pixel_values` ``[batch, 3, image_size, image_size]`` and int64
    `labels` ``[batch]``.
    """

    inputs: dict[str, Tensor]
    samples: tuple[int, ...]


class Samples(Protocol):
    """The samples of one device, training or test."""

    @property
    def counts(self) -> Counts:
        """Return what was read for them, and what of it was cut or left out."""
        ...

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def select(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the model inputs of the samples `indices`, stacked."""
        ...


@dataclass(frozen=True)
class TokenSamples:
    """Token samples, each of `tensors` int64 ``[n_samples, seq_len]``, or ``[n_samples]``.

    With `to_longest` a selection is cut, where all of it is padding, to its longest sample.
    """

    tensors: dict[str, Tensor]
    counts: Counts = Counts()  # noqa: RUF009 - frozen
    to_longest: bool = False

    def __len__(self) -> int:
        return len(self.tensors["input_ids"])

    def select(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the rows `indices`."""
        rows = {name: tensor[list(indices)] for name, tensor in self.tensors.items()}
        if not (self.to_longest and "attention_mask" in rows):
            return rows
        longest = int(rows["attention_mask"].sum(1).max())
        length = -(-longest // _STEP) * _STEP
        return {
            name: tensor if tensor.dim() == 1 else tensor[:, :length]
            for name, tensor in rows.items()
        }


@dataclass(frozen=True)
class PictureSamples:
    """Images as they were read; `select` resizes, since `image_size` may be much larger."""

    pictures: Sequence[Picture]
    image_size: int

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def counts(self) -> Counts:
        """Return what was read: every image is a sample."""
        return Counts(read=len(self), samples=len(self))

    def select(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the images `indices`, resized bilinearly and scaled to -1..1."""
        chosen = [self.pictures[index] for index in indices]
        size = (self.image_size, self.image_size)
        images = [
            interpolate(torch.from_numpy(picture.pixels)[None].float(), size, mode="bilinear")
            for picture in chosen
        ]
        return {
            "pixel_values": torch.cat(images) / 127.5 - 1.0,
            "labels": torch.tensor([picture.group for picture in chosen]),
        }


def batches(
    samples: Samples,
    batch_size: int,
    rng: np.random.Generator | None = None,
    drop_last: bool = False,
    skipped: int = 0,
) -> Iterator[Batch]:
    """Yield every sample once, in random order (in the given one without `rng`).

    With `drop_last` a last batch of fewer than `batch_size` samples is left out, and so are the
    first `skipped` batches.

    Raises
    ------
    FedsplitError
        If `batch_size` is below 1.
    """
    require(batch_size >= 1, "batch_size", batch_size, "at least 1")
    order = np.arange(len(samples)) if rng is None else rng.permutation(len(samples))
    for start in range(skipped * batch_size, len(order), batch_size):
        indices = tuple(order[start : start + batch_size].tolist())
        if len(indices) == batch_size or not drop_last:
            yield Batch(samples.select(indices), indices)


def training_batches(
    samples: Samples, batch_size: int, rng: np.random.Generator, steps: int, skipped: int = 0
) -> Iterator[Batch]:
    """Yield `steps` batches of equal size, epoch after epoch, each epoch in a new random order.

    The samples that an epoch leaves over are dropped, so that every step costs the same; a batch
    never holds a sample twice. Fewer than `batch_size` samples make one batch of all. The first
    `skipped` batches are left out, without reading them.
    """
    size = min(batch_size, len(samples))
    per_epoch = max(len(samples) // max(size, 1), 1)

    def forever() -> Iterator[Batch]:
        for _ in range(skipped // per_epoch):
            rng.permutation(len(samples))
        yield from batches(samples, size, rng, drop_last=True, skipped=skipped % per_epoch)
        while True:
            yield from batches(samples, size, rng, drop_last=True)

    return islice(forever(), steps)


@dataclass(frozen=True)
class DrawnSamples:
    """Some of the samples of `whole`: those at `places`."""

    whole: Samples
    places: tuple[int, ...]

    @property
    def counts(self) -> Counts:
        """Return what was read for all of them."""
        return self.whole.counts

    def __len__(self) -> int:
        return len(self.places)

    def select(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the model inputs of the samples `indices` of those drawn."""
        return self.whole.select([self.places[index] for index in indices])


def draw(samples: Samples, count: int | None, rng: np.random.Generator) -> Samples:
    """Return `count` samples drawn without replacement, in their old order.

    All, if they are no more than that, or `count` is None.
    """
    if count is None or count >= len(samples):
        return samples
    places = np.sort(rng.permutation(len(samples))[:count])
    return DrawnSamples(samples, tuple(places.tolist()))


@dataclass(frozen=True)
class RowSamples:
    """Samples of a data set of the user's own, one mapping of model inputs for each.

    Parameters
    ----------
    rows : sequence of mapping
        Tensors, numbers or lists of them, of equal shapes in all rows.
    """

    rows: Sequence[Mapping[str, Any]]

    @property
    def counts(self) -> Counts:
        """Return how many rows there are; what they were made of is not known here."""
        return Counts(read=len(self.rows), samples=len(self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the rows `indices`, stacked.

        Raises
        ------
        FedsplitError
            If their shapes or names differ, or a value is no number.
        """
        chosen = [self.rows[int(index)] for index in indices]
        try:
            return {
                name: torch.stack([torch.as_tensor(row[name]) for row in chosen])
                for name in chosen[0]
            }
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise FedsplitError(f"samples {list(indices)}: cannot be a batch ({error})") from error
