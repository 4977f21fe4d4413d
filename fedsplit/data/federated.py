"""A data set divided over devices."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from fedsplit.data.examples import Example, Text
from fedsplit.data.partition import Indices, divide
from fedsplit.data.samples import Samples, make_samples
from fedsplit.data.sources import read_corpus
from fedsplit.data.spec import DataSpec
from fedsplit.errors import require
from fedsplit.seeds import generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class FederatedData:
    """Who holds which examples. Samples are made when a device asks for its own.

    Parameters
    ----------
    spec : DataSpec
        What the data are.
    n_labels : int or None
        Number of image classes; None for text.
    train_indices, test_indices : tuple of int arrays
        Examples of each device.
    """

    spec: DataSpec
    n_labels: int | None
    train_indices: tuple[Indices, ...]
    test_indices: tuple[Indices, ...]
    _train: Sequence[Example] = field(repr=False)
    _test: Sequence[Example] = field(repr=False)
    _tokenizer: "PreTrainedTokenizerBase | None" = field(repr=False)

    @property
    def n_devices(self) -> int:
        """Number of devices."""
        return len(self.train_indices)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Training examples (paragraphs, pairs, images) of each device, before packing."""
        return tuple(len(indices) for indices in self.train_indices)

    def train(self, device: int) -> Samples:
        """Return the training samples of `device`."""
        return self._samples(self._train, self.train_indices, device)

    def test(self, device: int) -> Samples:
        """Return the test samples of `device`."""
        return self._samples(self._test, self.test_indices, device)

    def _samples(
        self, examples: Sequence[Example], indices: tuple[Indices, ...], device: int
    ) -> Samples:
        require(0 <= device < self.n_devices, "device", device, f"in 0..{self.n_devices - 1}")
        mine = [examples[index] for index in indices[device]]
        return make_samples(mine, self.spec, self._tokenizer)


def load_data(
    spec: DataSpec, tokenizer: "PreTrainedTokenizerBase | None", n_devices: int, seed: int
) -> FederatedData:
    """Read a data set and divide it over `n_devices`, the same way on every node.

    A source's own test set is dealt out evenly; where there is none, every device holds out
    `spec.test_fraction` of its examples, or of plain texts as many as make a sample.

    Parameters
    ----------
    spec : DataSpec
        What to read and how to divide it.
    tokenizer : PreTrainedTokenizerBase or None
        The model's tokenizer; None for images.
    n_devices : int
        Devices to divide over.
    seed : int
        Root of every draw.

    Raises
    ------
    FedsplitError
        If the source, a path or a column is missing, or there are too few examples.
    """
    corpus = read_corpus(spec)
    train = _draw(corpus.train, spec.max_samples, seed, "train")
    shares = divide(
        np.array([example.group for example in train]),
        n_devices,
        spec.partition,
        generator(seed, "data", "partition"),
        alpha=spec.alpha,
        shards_per_device=spec.shards_per_device,
        min_samples=spec.min_samples,
    )
    if corpus.test is None:
        held_out = [
            _hold_out(
                share,
                spec.test_fraction,
                generator(seed, "data", "test", device),
                lambda chosen: _fills_a_sample([train[i] for i in chosen], spec, tokenizer),
            )
            for device, share in enumerate(shares)
        ]
        kept = tuple(np.setdiff1d(*pair) for pair in zip(shares, held_out, strict=True))
        return FederatedData(spec, corpus.n_labels, kept, tuple(held_out), train, train, tokenizer)
    test = _draw(corpus.test, spec.max_samples, seed, "test")
    require(len(test) >= n_devices, "n_devices", n_devices, f"at most {len(test)}, for testing")
    dealt = tuple(np.arange(device, len(test), n_devices) for device in range(n_devices))
    return FederatedData(spec, corpus.n_labels, tuple(shares), dealt, train, test, tokenizer)


def _draw(
    examples: Sequence[Example], limit: int | None, seed: int, part: str
) -> Sequence[Example]:
    """Return at most `limit` random examples, in their order."""
    if limit is None or limit >= len(examples):
        return examples
    chosen = generator(seed, "data", "draw", part).choice(len(examples), limit, replace=False)
    return [examples[index] for index in np.sort(chosen)]


def _hold_out(
    share: Indices, fraction: float, rng: np.random.Generator, enough: Callable[[Indices], bool]
) -> Indices:
    """Return the random part of `share` to test on: at least one example, never all.

    Where `fraction` of it is not `enough`, it is the least that is.
    """
    most = len(share) - 1
    count = min(max(1, round(fraction * len(share))), most)
    chosen = rng.choice(share, count, replace=False)
    if not enough(chosen):
        rest = rng.permutation(np.setdiff1d(share, chosen))
        while len(chosen) < most and not enough(chosen):
            chosen, rest = np.append(chosen, rest[0]), rest[1:]
    return np.sort(chosen)


def _fills_a_sample(
    examples: Sequence[Example], spec: DataSpec, tokenizer: "PreTrainedTokenizerBase | None"
) -> bool:
    """Return whether a sample can be made of `examples`; only plain texts may be too short."""
    if tokenizer is None or not isinstance(examples[0], Text):
        return True
    texts = [example.text for example in examples if isinstance(example, Text)]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    return sum(map(len, encoded)) >= spec.seq_len
