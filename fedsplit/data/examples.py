"""What a source of data gives: examples before they become tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Text:
    """A piece of text; neighbouring pieces are packed into samples of full length.

    `group` is what a partition goes by; `ends` tells that what follows is unrelated, so that an
    end-of-text token comes between.
    """

    text: str
    group: int
    ends: bool = True


@dataclass(frozen=True)
class Pair:
    """A prompt and the target to be learnt; one sample, padded to full length."""

    prompt: str
    target: str
    group: int


@dataclass(frozen=True)
class Picture:
    """An image, uint8 of shape ``[3, height, width]``; `group` is its class, counted from 0."""

    pixels: NDArray[np.uint8]
    group: int


Example = Text | Pair | Picture


@dataclass(frozen=True)
class Corpus:
    """All examples of a source, of one kind.

    Parameters
    ----------
    train : sequence of Example
        What the devices' data is taken from.
    test : sequence of Example or None
        The source's own test set, if it has one.
    n_labels : int or None
        Number of image classes.
    """

    train: Sequence[Example]
    test: Sequence[Example] | None = None
    n_labels: int | None = None


def paragraphs(text: str, group: int) -> list[Text]:
    """Return the paragraphs of a document, each with the blank line that follows it."""
    parts = [part.strip("\n") for part in text.split("\n\n")]
    parts = [part for part in parts if part.strip()]
    last = len(parts) - 1
    return [Text(f"{part}\n\n", group, ends=i == last) for i, part in enumerate(parts)]
