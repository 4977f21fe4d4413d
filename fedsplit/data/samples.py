"""Samples of fixed shape: packed texts, padded pairs, resized images."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fedsplit.data.examples import Example, Pair, Picture, Text
from fedsplit.data.spec import DataSpec
from fedsplit.errors import FedsplitError, require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """What a model is called with, and which samples of the data set these are.

    `inputs` of a language model are int64 ``[batch, seq_len]``: `input_ids`, `labels` (-100 is not
    learnt) and, only where there is padding, `attention_mask`; of an image classifier float32
    `pixel_values` ``[batch, 3, image_size, image_size]`` and int64 `labels` ``[batch]``.
    """

    inputs: dict[str, Tensor]
    samples: tuple[int, ...]


class Samples(Protocol):
    """The samples of one device, training or test."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def select(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the model inputs of the samples `indices`, stacked."""
        ...


@dataclass(frozen=True)
class TokenSamples:
    """Token samples, each of `tensors` int64 ``[n_samples, seq_len]``."""

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.tensors["input_ids"])

    def select(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the rows `indices`."""
        return {name: tensor[list(indices)] for name, tensor in self.tensors.items()}


@dataclass(frozen=True)
class PictureSamples:
    """Images as they were read; `select` resizes, since `image_size` may be much larger."""

    pictures: Sequence[Picture]
    image_size: int

    def __len__(self) -> int:
        return len(self.pictures)

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


def make_samples(
    examples: Sequence[Example], spec: DataSpec, tokenizer: "PreTrainedTokenizerBase | None"
) -> Samples:
    """Turn examples of one kind into samples.

    Raises
    ------
    FedsplitError
        If texts come without a tokenizer, or hold too little for one sample.
    """
    if isinstance(examples[0], Picture):
        return PictureSamples(cast("Sequence[Picture]", examples), spec.image_size)
    if tokenizer is None:
        raise FedsplitError(f"data.source={spec.source!r}: texts need a model with a tokenizer")
    if isinstance(examples[0], Text):
        return pack(cast("Sequence[Text]", examples), tokenizer, spec.seq_len)
    return pad(
        cast("Sequence[Pair]", examples), tokenizer, spec.seq_len, all_tokens=spec.loss_on == "all"
    )


def pack(texts: Sequence[Text], tokenizer: "PreTrainedTokenizerBase", seq_len: int) -> TokenSamples:
    """Join texts and cut them in full samples; what is left over at the end is dropped."""
    stream: list[int] = []
    for text in texts:
        tokens = tokenizer(text.text, add_special_tokens=False, verbose=False).input_ids
        stream += tokens
        if text.ends and tokens:
            stream += _end(tokenizer)
    n_samples = len(stream) // seq_len
    require(
        n_samples > 0,
        "data.seq_len",
        seq_len,
        f"at most {len(stream)}, the number of tokens that one of the devices has to train or "
        "test on; or use fewer devices or more data",
    )
    ids = torch.tensor(stream[: n_samples * seq_len]).view(n_samples, seq_len)
    return TokenSamples({"input_ids": ids, "labels": ids})


def pad(
    pairs: Sequence[Pair], tokenizer: "PreTrainedTokenizerBase", seq_len: int, *, all_tokens: bool
) -> TokenSamples:
    """Put each pair in one sample, cut or padded on the right to `seq_len`.

    A pair whose prompt alone fills the sample has nothing to learn and is left out.
    """
    begin = _begin(tokenizer)
    rows: list[tuple[list[int], int]] = []
    for pair in pairs:
        prompt = tokenizer(f"{pair.prompt}\n", add_special_tokens=False, verbose=False).input_ids
        target = tokenizer(pair.target, add_special_tokens=False, verbose=False).input_ids
        prompt = begin + prompt
        if len(prompt) < seq_len:
            rows.append(((prompt + target + _end(tokenizer))[:seq_len], len(prompt)))
    require(len(rows) > 0, "data.seq_len", seq_len, "longer than the prompts")
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.full((len(rows), seq_len), cast("int", filler))
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for i, (tokens, prompt_length) in enumerate(rows):
        first = 0 if all_tokens else prompt_length
        ids[i, : len(tokens)] = torch.tensor(tokens)
        mask[i, : len(tokens)] = 1
        labels[i, first : len(tokens)] = ids[i, first : len(tokens)]
    return TokenSamples({"input_ids": ids, "attention_mask": mask, "labels": labels})


def _begin(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the begin-of-text token for tokenizers that put one (Llama, Gemma)."""
    bos = tokenizer.bos_token_id
    return [cast("int", bos)] if bos is not None and bos in tokenizer("").input_ids else []


def _end(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the end-of-text token, if there is one."""
    return [] if tokenizer.eos_token_id is None else [cast("int", tokenizer.eos_token_id)]


def batches(
    samples: Samples,
    batch_size: int,
    rng: np.random.Generator | None = None,
    drop_last: bool = False,
) -> Iterator[Batch]:
    """Yield every sample once, in random order (in the given one without `rng`).

    With `drop_last` a last batch of fewer than `batch_size` samples is left out.

    Raises
    ------
    FedsplitError
        If `batch_size` is below 1.
    """
    require(batch_size >= 1, "batch_size", batch_size, "at least 1")
    order = np.arange(len(samples)) if rng is None else rng.permutation(len(samples))
    for start in range(0, len(order), batch_size):
        indices = tuple(order[start : start + batch_size].tolist())
        if len(indices) == batch_size or not drop_last:
            yield Batch(samples.select(indices), indices)


def training_batches(
    samples: Samples, batch_size: int, rng: np.random.Generator, steps: int
) -> Iterator[Batch]:
    """Yield `steps` batches of equal size, epoch after epoch, each epoch in a new random order.

    The samples that an epoch leaves over are dropped, so that every step costs the same; a batch
    never holds a sample twice. Fewer than `batch_size` samples make one batch of all.
    """
    size = min(batch_size, len(samples))

    def forever() -> Iterator[Batch]:
        while True:
            yield from batches(samples, size, rng, drop_last=True)

    return islice(forever(), steps)


@dataclass(frozen=True)
class RowSamples:
    """Samples of a data set of the user's own, one mapping of model inputs for each.

    Parameters
    ----------
    rows : sequence of mapping
        Tensors, numbers or lists of them, of equal shapes in all rows.
    """

    rows: Sequence[Mapping[str, Any]]

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
