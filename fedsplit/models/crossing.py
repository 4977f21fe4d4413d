"""What must arrive at a cut: known to the receiver, so that nothing that is not it is taken."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from fedsplit.errors import FedsplitError
from fedsplit.models.boundary import Boundary
from fedsplit.models.names import CAUSAL, IMAGES
from fedsplit.models.spec import ModelSpec
from fedsplit.models.tiny import image_size
from fedsplit.models.weights import weights_dtype

IGNORED_LABEL = -100
NARROW = {
    "attention_mask": torch.bool,
    "labels": torch.int32,
    "input_ids": torch.int32,
    "position_ids": torch.int32,
}
"""Types in which inputs travel."""


def travelling(inputs: Mapping[str, Tensor], with_ids: bool = False) -> dict[str, Tensor]:
    """Return what later tiers of an open route need of a batch, in small types.

    The attention mask, the labels, and the token ids if they go `with_ids`.
    """
    wanted = {"attention_mask", "position_ids", "labels", *(["input_ids"] if with_ids else [])}
    found = dict(inputs)
    if "input_ids" in found and "attention_mask" not in found:
        found["attention_mask"] = torch.ones_like(found["input_ids"])
    return {
        name: value.to(NARROW.get(name, value.dtype))
        for name, value in found.items()
        if name in wanted
    }


# Three small batches, (samples, tokens), that tell how each axis of a boundary grows.
PROBES = ((2, 4), (3, 4), (2, 8))


@dataclass(frozen=True)
class Axis:
    """An axis of a boundary tensor: ``fixed + per_token * tokens``, for each sample or in all."""

    fixed: int
    per_token: int
    per_sample: bool

    def of(self, samples: int, tokens: int) -> int:
        """Return the size of the axis for a mini-batch of so many samples of so many tokens."""
        return (self.fixed + self.per_token * tokens) * (samples if self.per_sample else 1)

    @classmethod
    def through(cls, sizes: Sequence[int]) -> "Axis":
        """Return the axis that has these sizes in the `PROBES`.

        Raises
        ------
        FedsplitError
            If there is none.
        """
        (samples, few), _, (_, many) = PROBES
        per_sample = sizes[0] != sizes[1]
        share = samples if per_sample else 1
        per_token = (sizes[2] - sizes[0]) // (share * (many - few))
        axis = cls(sizes[0] // share - per_token * few, per_token, per_sample)
        if [axis.of(*shape) for shape in PROBES] != list(sizes):
            raise FedsplitError(f"boundary axis={sizes}: must grow with samples and tokens")
        return axis


@dataclass(frozen=True)
class TensorForm:
    """The type and axes of a boundary tensor."""

    dtype: torch.dtype
    axes: tuple[Axis, ...]

    def shape(self, samples: int, tokens: int) -> tuple[int, ...]:
        """Return the shape for a mini-batch of so many samples of so many tokens."""
        return tuple(axis.of(samples, tokens) for axis in self.axes)

    @property
    def by_token(self) -> bool:
        """Whether it is ``[samples, tokens, ...]``."""
        return self.axes[:2] == (Axis(1, 0, True), Axis(0, 1, False))


@dataclass(frozen=True)
class Crossing:
    """What crosses a cut in every mini-batch: a layout, and a form for each of its tensors."""

    layout: str
    forms: tuple[TensorForm, ...]

    def size_bytes(self, samples: int, tokens: int) -> int:
        """Return the bytes of the boundary of a mini-batch of this size."""
        return sum(
            math.prod(form.shape(samples, tokens)) * form.dtype.itemsize for form in self.forms
        )

    def kept(self, where: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return `Boundary.kept` if tokens hold something where `where` is true (None: all do)."""
        if where is None:
            return ()
        return tuple(where if form.by_token else None for form in self.forms)

    @classmethod
    def through(cls, boundaries: Sequence[Boundary]) -> "Crossing":
        """Return what the boundaries of the `PROBES` have in common.

        Raises
        ------
        FedsplitError
            If their tensors do not grow with samples and tokens as boundaries do.
        """
        layouts = {boundary.layout for boundary in boundaries}
        if len(layouts) != 1:
            raise FedsplitError(f"boundary layout={layouts!r:.200}: must be that of any batch")
        forms = []
        for tensors in zip(*(boundary.tensors for boundary in boundaries), strict=True):
            sizes = zip(*(tensor.shape for tensor in tensors), strict=True)
            forms.append(TensorForm(tensors[0].dtype, tuple(map(Axis.through, sizes))))
        return cls(layouts.pop(), tuple(forms))


@dataclass(frozen=True, kw_only=True)
class InputForm:
    """What an input that travels beside a boundary must be; see ``SplitModel.travelling``.

    Parameters
    ----------
    dtype : dtype
        Its type on the wire.
    per_token : bool
        Whether it is ``[samples, tokens]``, else ``[samples]``.
    stop : int
        Its values are at least 0 and below this.
    ignored : int or None
        One more value that it may have.
    optional : bool
        Whether it may be missing.
    """

    dtype: torch.dtype
    per_token: bool = True
    stop: int
    ignored: int | None = None
    optional: bool = False

    def shape(self, samples: int, tokens: int) -> tuple[int, ...]:
        """Return the shape for a mini-batch of so many samples of so many tokens."""
        return (samples, tokens) if self.per_token else (samples,)

    def holds(self, values: Tensor) -> bool:
        """Return whether all `values` are within range."""
        if values.dtype == torch.bool:
            return True
        good = (values >= 0) & (values < self.stop)
        if self.ignored is not None:
            good |= values == self.ignored
        return bool(good.all())


@dataclass(frozen=True)
class Arrival:
    """What a tier gets in every mini-batch: inputs by name, and the boundary."""

    inputs: dict[str, InputForm]
    boundary: Crossing


def input_forms(
    spec: ModelSpec, config: PretrainedConfig, *, with_labels: bool
) -> dict[str, InputForm]:
    """Return what later tiers may get beside a boundary, by name."""
    text, forms = spec.task != IMAGES, {}

    def add(name: str, stop: int | None, **others: Any) -> None:
        whole = torch.iinfo(torch.int32).max
        forms[name] = InputForm(dtype=NARROW[name], stop=int(stop or whole), **others)

    if text:
        add("attention_mask", 2)
        add("position_ids", getattr(config, "max_position_embeddings", None), optional=True)
    if text and spec.share_token_ids:
        add("input_ids", config.vocab_size)
    if with_labels:
        causal = spec.task == CAUSAL
        classes = config.vocab_size if causal else config.num_labels
        add("labels", classes, per_token=causal, ignored=IGNORED_LABEL)
    return forms


def probes(
    spec: ModelSpec, config: PretrainedConfig, pixels: int | None = None
) -> list[dict[str, Tensor]]:
    """Return the inputs of the `PROBES`; images are `pixels` high and wide, or as configured."""
    if spec.task != IMAGES:
        ids = [torch.zeros(shape, dtype=torch.long) for shape in PROBES]
        return [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]
    pixel = torch.zeros((), dtype=weights_dtype(spec, config))
    size = image_size(config) if pixels is None else (pixels, pixels)
    image = (config.num_channels, *size)
    return [{"pixel_values": pixel.expand(samples, *image)} for samples, _ in PROBES]
