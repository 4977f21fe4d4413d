"""What a source of data gives: examples before they become tensors."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

_BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")


@dataclass(frozen=True)
class _Placed:
    """Where an example was read: its file, and its row there, counted from 1 without a header."""

    file: str = field(default="", compare=False, kw_only=True)
    row: int = field(default=0, compare=False, kw_only=True)


@dataclass(frozen=True)
class Text(_Placed):
    """A piece of text; neighbouring pieces are packed into samples of full length.

    `group` is what a partition goes by; `ends` tells that what follows is unrelated, so that an
    end-of-text token comes between.
    """

    text: str
    group: int
    ends: bool = True


@dataclass(frozen=True)
class Pair(_Placed):
    """A prompt and the target to be learnt; one sample, padded to full length."""

    prompt: str
    target: str
    group: int


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is "system", "user", "assistant" or the like."""

    role: str
    content: str


@dataclass(frozen=True)
class Chat(_Placed):
    """A conversation of which the assistant's messages are learnt; one sample, padded."""

    messages: tuple[Message, ...]
    group: int


@dataclass(frozen=True)
class Picture(_Placed):
    """An image, uint8 of shape ``[3, height, width]``; `group` is its class, counted from 0."""

    pixels: NDArray[np.uint8]
    group: int


@dataclass(frozen=True)
class Labelled(_Placed):
    """A text, or a pair of texts, to be classified; `group` is its class, counted from 0."""

    text: str
    second: str | None
    group: int


Example = Text | Pair | Chat | Labelled | Picture


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
        Number of classes, of images and labelled texts.
    left_out : tuple of str
        Files of a folder that were not read, each with the reason.
    """

    train: Sequence[Example]
    test: Sequence[Example] | None = None
    n_labels: int | None = None
    left_out: tuple[str, ...] = ()


def paragraphs(text: str, group: int, file: str = "") -> list[Text]:
    """Return the paragraphs of a document, each with the blank line that follows it.

    A line of white space alone is blank.
    """
    parts = [part.strip("\n") for part in _BLANK_LINES.split(text)]
    parts = [part for part in parts if part.strip()]
    last = len(parts) - 1
    return [
        Text(f"{part}\n\n", group, ends=i == last, file=file, row=i + 1)
        for i, part in enumerate(parts)
    ]
