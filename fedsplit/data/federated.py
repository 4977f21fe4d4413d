"""A data set divided over devices."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from fedsplit.data.counts import DeviceCounts
from fedsplit.data.examples import Chat, Example, Labelled, Pair, Picture, Text
from fedsplit.data.partition import LOCAL, Indices, divide
from fedsplit.data.samples import PictureSamples, Samples
from fedsplit.data.sources import read_corpus
from fedsplit.data.spec import FROM_FILES, LABEL, DataSpec
from fedsplit.data.tokens import classify, pack, pad, sizer
from fedsplit.errors import FedsplitError, require
from fedsplit.seeds import generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMED = 3  # files of a device that an error names


@dataclass(frozen=True)
class DeviceData:
    """What one device holds, ready for its model.

    Parameters
    ----------
    train, test : Samples
        Its samples. A data loader of your own gives these two.
    left_out : tuple of str
        Files that were not read, each with the reason. The server learns their names if it named
        the folder itself, not those of a device's own.
    """

    train: Samples
    test: Samples
    left_out: tuple[str, ...] = ()

    @property
    def counts(self) -> DeviceCounts:
        """What was read, cut and dropped: all that a server is told of these data."""
        return DeviceCounts(train=self.train.counts, test=self.test.counts)


@dataclass(frozen=True, kw_only=True)
class FederatedData:
    """Who holds which examples. What is asked for of a device is found out then.

    Parameters
    ----------
    spec : DataSpec
        What the data are.
    n_devices : int
        Number of devices.
    n_labels : int or None
        Number of classes; None where nothing is classified.
    left_out : tuple of str
        Files of a folder that were not read, each with the reason.
    """

    spec: DataSpec
    n_devices: int
    n_labels: int | None
    left_out: tuple[str, ...]
    _train: Sequence[Example] = field(repr=False)
    _test: Sequence[Example] = field(repr=False)
    _tokenizer: "PreTrainedTokenizerBase | None" = field(repr=False)
    _split: Callable[[int], tuple[Indices, Indices]] = field(repr=False)

    @property
    def train_indices(self) -> tuple[Indices, ...]:
        """Training examples of each device."""
        return tuple(self._split(device)[0] for device in range(self.n_devices))

    @property
    def test_indices(self) -> tuple[Indices, ...]:
        """Test examples of each device."""
        return tuple(self._split(device)[1] for device in range(self.n_devices))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Training examples (paragraphs, pairs, images) of each device, before packing."""
        return tuple(len(indices) for indices in self.train_indices)

    def groups(self, n_groups: int) -> tuple[Indices, ...]:
        """Return how many training examples of each class or origin, from 0, each device holds."""
        groups = np.array([example.group for example in self._train])
        return tuple(
            np.bincount(groups[indices], minlength=n_groups) for indices in self.train_indices
        )

    def train(self, device: int) -> Samples:
        """Return the training samples of `device`."""
        return self._samples(self._train, 0, device, "train")

    def test(self, device: int) -> Samples:
        """Return the test samples of `device`."""
        return self._samples(self._test, 1, device, "test")

    def device(self, device: int) -> DeviceData:
        """Return all that `device` holds."""
        return DeviceData(self.train(device), self.test(device), self.left_out)

    def counts(self) -> dict[int, DeviceCounts]:
        """Return what was read, cut and dropped of each device's data; makes all their samples.

        Raises
        ------
        FedsplitError
            If no sample can be made of a device's data; names the device and its files.
        """
        return {device: self.device(device).counts for device in range(self.n_devices)}

    def _samples(
        self,
        examples: Sequence[Example],
        part: int,
        device: int,
        purpose: str,
    ) -> Samples:
        require(0 <= device < self.n_devices, "device", device, f"in 0..{self.n_devices - 1}")
        mine = [examples[index] for index in self._split(device)[part]]
        return make_samples(
            mine, self.spec, self._tokenizer, whose=f"device {device} has to {purpose} on"
        )


def make_samples(
    examples: Sequence[Example],
    spec: DataSpec,
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    whose: str,
) -> Samples:
    """Turn examples of one kind into samples; `whose` they are is for errors.

    Raises
    ------
    FedsplitError
        If texts come without a tokenizer, or hold too little for one sample.
    """
    if isinstance(examples[0], Picture):
        return PictureSamples(cast("Sequence[Picture]", examples), spec.image_size)
    if tokenizer is None:
        raise FedsplitError(f"data.source={spec.source!r}: texts need a model with a tokenizer")
    files = list(dict.fromkeys(example.file for example in examples if example.file))
    if files:
        more = f" and {len(files) - _NAMED} more" if len(files) > _NAMED else ""
        whose += f" ({', '.join(files[:_NAMED])}{more})"
    if isinstance(examples[0], Text):
        texts = cast("Sequence[Text]", examples)
        to_longest = spec.padding == "longest"
        return pack(texts, tokenizer, spec.seq_len, to_longest=to_longest, whose=whose)
    if isinstance(examples[0], Labelled):
        return classify(cast("Sequence[Labelled]", examples), tokenizer, spec, whose=whose)
    return pad(cast("Sequence[Pair] | Sequence[Chat]", examples), tokenizer, spec, whose=whose)


def load_data(
    spec: DataSpec, tokenizer: "PreTrainedTokenizerBase | None", n_devices: int, seed: int
) -> FederatedData:
    """Read a data set and divide it over `n_devices`, the same way on every node.

    A source's own test set is dealt out evenly; where there is none, every device holds out
    `spec.test_fraction` of its examples, or as many as make a sample (of texts, up to half).

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
        If the source, a path or a column is missing, there are too few examples, or every device
        has data of its own (see `load_device`).
    """
    require(spec.partition != LOCAL, "data.partition", spec.partition, "read device by device")
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
        label=spec.label_column,
    )
    own_test = corpus.test is None
    test = train
    if corpus.test is not None:
        test = _draw(corpus.test, spec.max_samples, seed, "test")
        enough = f"at most {len(test)}, for testing"
        require(len(test) >= n_devices, "fleet.devices", n_devices, enough)

    @cache
    def split(device: int) -> tuple[Indices, Indices]:
        share = shares[device]
        if own_test:
            return _with_test(share, train, spec, tokenizer=tokenizer, device=device, seed=seed)
        return share, np.arange(device, len(test), n_devices)

    return FederatedData(
        spec=spec,
        n_devices=n_devices,
        n_labels=corpus.n_labels,
        left_out=corpus.left_out,
        _train=train,
        _test=test,
        _tokenizer=tokenizer,
        _split=split,
    )


def load_test(
    spec: DataSpec, tokenizer: "PreTrainedTokenizerBase | None", path: str | Path
) -> Samples:
    """Read a test set that no device holds: all that is at `path`, as `spec` reads files.

    Of a source that has a test set of its own, that; what is there to train on is not looked at.

    Raises
    ------
    FedsplitError
        If it is not of a source that is read from files, no sample can be made of it, or its
        classes might be numbered otherwise than the devices'.
    """
    named = spec.loss_on != LABEL or spec.labels is not None
    require(named, "data.labels", None, "given, so that a test set of its own has the same classes")
    from_files = spec.source in FROM_FILES
    require(from_files, "data.source", spec.source, f"one of {', '.join(FROM_FILES)}")
    corpus = read_corpus(replace(spec, path=str(path)))
    examples = corpus.train if corpus.test is None else corpus.test
    return make_samples(examples, spec, tokenizer, whose="the server has to test on")


def load_device(
    spec: DataSpec,
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    device: int,
    n_devices: int,
    seed: int,
    path: str | Path | None = None,
) -> DeviceData:
    """Read what one device holds: its share of a data set, or all that is at its own `path`.

    Parameters
    ----------
    spec : DataSpec
        What to read. With the partition "local" its `path` does not count.
    tokenizer : PreTrainedTokenizerBase or None
        The model's tokenizer; None for images.
    device : int
        Which device, from 0.
    n_devices : int
        Devices that a shared data set is divided over.
    seed : int
        Root of every draw.
    path : str, Path or None
        The device's own file or folder; with the partition "local", and only then.

    Raises
    ------
    FedsplitError
        As in `load_data`; or if no sample can be made of the data, naming the device and its files.
    """
    require(0 <= device < n_devices, "device", device, f"in 0..{n_devices - 1}")
    if spec.partition != LOCAL:
        given = "null: only with data.partition=local has a device data of its own"
        require(path is None, "data-path", path and str(path), given)
        return load_data(spec, tokenizer, n_devices, seed).device(device)
    require(path not in (None, ""), "data-path", path, f"given for device {device}, its own data")
    corpus = read_corpus(replace(spec, path=str(path)))
    train = _draw(corpus.train, spec.max_samples, seed, "train")
    everything = np.arange(len(train))
    if corpus.test is None:
        if len(train) < spec.min_samples:
            raise FedsplitError(
                f"{path}: holds {len(train)} examples for device {device}, must be at least "
                f"data.min_samples={spec.min_samples}"
            )
        kept, held_out = _with_test(
            everything, train, spec, tokenizer=tokenizer, device=device, seed=seed
        )
        test = train
    else:
        test = _draw(corpus.test, spec.max_samples, seed, "test")
        kept, held_out = everything, np.arange(len(test))
    whose = f"device {device} has to"
    return DeviceData(
        make_samples([train[i] for i in kept], spec, tokenizer, whose=f"{whose} train on"),
        make_samples([test[i] for i in held_out], spec, tokenizer, whose=f"{whose} test on"),
        corpus.left_out,
    )


def _draw(
    examples: Sequence[Example], limit: int | None, seed: int, part: str
) -> Sequence[Example]:
    """Return at most `limit` random examples, in their order."""
    if limit is None or limit >= len(examples):
        return examples
    chosen = generator(seed, "data", "draw", part).choice(len(examples), limit, replace=False)
    return [examples[index] for index in np.sort(chosen)]


def _with_test(
    share: Indices,
    examples: Sequence[Example],
    spec: DataSpec,
    *,
    tokenizer: "PreTrainedTokenizerBase | None",
    device: int,
    seed: int,
) -> tuple[Indices, Indices]:
    """Return which of a device's `share` of `examples` it trains on, and which it tests on."""
    size = sizer(examples[0], tokenizer, spec)
    sizes: dict[int, int] = {}

    def enough(chosen: Indices) -> bool:
        fresh = [index for index in chosen.tolist() if index not in sizes]
        sizes.update((index, size(examples[index])) for index in fresh)
        return sum(sizes[index] for index in chosen.tolist()) >= spec.seq_len

    rng = generator(seed, "data", "test", device)
    # Short texts are shared out; of pairs that cannot be learnt there may be any number.
    most = len(share) // 2 if isinstance(examples[0], Text) else len(share) - 1
    held_out = _hold_out(share, spec.test_fraction, rng, enough, most)
    return np.setdiff1d(share, held_out), held_out


def _hold_out(
    share: Indices,
    fraction: float,
    rng: np.random.Generator,
    enough: Callable[[Indices], bool],
    most: int,
) -> Indices:
    """Return the random part of `share` to test on: at least one example, never all.

    Where `fraction` of it is not `enough`, it is the least that is, but no more than `most`.
    """
    count = min(max(1, round(fraction * len(share))), len(share) - 1)
    chosen = rng.choice(share, count, replace=False)
    if not enough(chosen):
        rest = rng.permutation(np.setdiff1d(share, chosen))
        while len(chosen) < most and not enough(chosen):
            chosen, rest = np.append(chosen, rest[0]), rest[1:]
    return np.sort(chosen)
