"""A model of which a tier holds, and runs, some segments only."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from fedsplit.errors import FedsplitError
from fedsplit.models.adapters import adapted_module, add_adapters, peft_key
from fedsplit.models.anatomy import EMBED, Anatomy, anatomy
from fedsplit.models.boundary import Boundary, Output
from fedsplit.models.spec import ModelSpec
from fedsplit.models.weights import build, held_bytes
from fedsplit.plan import DEVICE, Route, Segment

IGNORED_LABEL = -100
_NARROW = {"attention_mask": torch.bool, "labels": torch.int32, "input_ids": torch.int32}


def load(
    spec: ModelSpec, segments: Sequence[Segment] | None = None, device: str | torch.device = "cpu"
) -> "SplitModel":
    """Build a model with its adapters, holding only what `segments` need.

    Parameters
    ----------
    spec : ModelSpec
        Which model, and what of it is trained.
    segments : sequence of Segment or None
        What this tier runs; None for everything.
    device : str or torch.device
        Where the weights go.

    Raises
    ------
    FedsplitError
        If the model is unknown, cannot be cut, or its checkpoint cannot be read by segments.
    """
    config = spec.load_config()
    parts = anatomy(config, spec.task)
    if segments is None:
        segments = [Segment(DEVICE, 0, parts.n_blocks)]
    owned = frozenset().union(*(_positions(segment, parts.n_blocks) for segment in segments))
    if spec.share_token_ids:
        owned |= {EMBED}

    def owns_weight(name: str) -> bool:
        return not owned.isdisjoint(parts.positions[name])

    def owns_module(name: str) -> bool:
        return not owned.isdisjoint(parts.of_module(name))

    model = build(spec, config, owns_weight, torch.device(device))
    if spec.train == "lora":
        add_adapters(model, spec, owns_module)
    else:
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(owns_weight(name))
    return SplitModel(spec, config, model, parts, owned)


def _positions(segment: Segment, n_blocks: int) -> frozenset[int]:
    """Return the positions that `segment` runs: its blocks, the embeddings and the head."""
    if not 0 <= segment.start <= segment.stop <= n_blocks:
        raise FedsplitError(f"segment={segment}: must lie within the model's {n_blocks} blocks")
    found = set(range(segment.start, segment.stop))
    if _is_first(segment):
        found.add(EMBED)
    if segment.stop == n_blocks:
        found.add(n_blocks)
    return frozenset(found)


def _is_first(segment: Segment) -> bool:
    return segment.tier == DEVICE and segment.start == 0


class _Reached(Exception):
    """Leaves the model's forward at the end of a segment, with what its last block returned."""

    def __init__(self, output: Any) -> None:
        super().__init__("end of segment")
        self.output = output


@dataclass(frozen=True)
class _Slot:
    """Where a trained tensor hangs in the model."""

    module: nn.Module
    name: str
    position: int

    def get(self) -> Tensor:
        table = self.module._parameters if self.name in self.module._parameters else None
        value = (table if table is not None else self.module._buffers)[self.name]
        assert value is not None
        return value

    def put(self, value: Tensor) -> None:
        if self.name in self.module._parameters:
            self.module._parameters[self.name] = value  # type: ignore[assignment]
        else:
            self.module._buffers[self.name] = value


class SplitModel:
    """A model of which only some segments hold weights; made by `load`.

    The model's own forward runs on every tier. Blocks before the segment return the received
    boundary instead of computing, and the forward is left after the segment's last block, so that
    masks, positions and rotary tables are those of the model's own code.

    One thread at a time may call `run`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        config: PretrainedConfig,
        model: PreTrainedModel,
        parts: Anatomy,
        owned: frozenset[int],
    ) -> None:
        self.spec = spec
        self.config = config
        self.model = model
        self.n_blocks = parts.n_blocks
        self._parts = parts
        self._owned = owned
        self._slots = dict(self._find_slots())
        self._segment: Segment | None = None
        self._received: Any = None
        for index, name in enumerate(parts.blocks):
            block = model.get_submodule(name)
            block.forward = self._staged(index, block.forward)
        self.train(False)

    @property
    def training(self) -> bool:
        """Whether the model runs in training mode."""
        return self.model.training

    def train(self, mode: bool = True) -> "SplitModel":
        """Set training (dropout on) or evaluation mode; a loaded model is in evaluation mode."""
        self.model.train(mode)
        return self

    def eval(self) -> "SplitModel":
        """Set evaluation mode."""
        return self.train(False)

    @property
    def held_bytes(self) -> int:
        """Bytes of memory that the weights take on this tier."""
        return held_bytes(self.model)

    def adapter_names(self, segment: Segment) -> tuple[str, ...]:
        """Return the names of what is trained in `segment`.

        Names are those of the unsplit PEFT model's saved adapter, or of the model's state dict
        with ``train: full``.
        """
        positions = self._require_owned(segment)
        return tuple(name for name, slot in self._slots.items() if slot.position in positions)

    def adapters(self, segment: Segment) -> dict[str, Tensor]:
        """Return detached copies of the values installed for `segment`, by name."""
        return {
            name: self._slots[name].get().detach().clone() for name in self.adapter_names(segment)
        }

    def trainable(self, segment: Segment) -> dict[str, nn.Parameter]:
        """Return fresh parameters with the values installed for `segment`: a branch's own."""
        return {
            name: nn.Parameter(value, requires_grad=self._slots[name].get().requires_grad)
            for name, value in self.adapters(segment).items()
        }

    def install(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put `parameters` in place, the objects themselves, without a copy.

        Many branches share one frozen backbone this way: each installs its own before it runs.

        Raises
        ------
        FedsplitError
            If a name is unknown or a shape differs.
        """
        for name, parameter in parameters.items():
            slot = self._slots.get(name)
            if slot is None:
                raise FedsplitError(f"adapter={name!r}: is not trained on this tier")
            if slot.get().shape != parameter.shape:
                raise FedsplitError(
                    f"adapter={name!r}: shape {tuple(parameter.shape)} must be "
                    f"{tuple(slot.get().shape)}"
                )
        for name, parameter in parameters.items():
            self._slots[name].put(parameter)

    def travelling(self, inputs: Mapping[str, Tensor], route: Route) -> dict[str, Tensor]:
        """Return what later tiers of `route` need of a batch, in small types.

        The attention mask; the labels unless the route returns home; the token ids only if the
        spec shares them.
        """
        wanted = {"attention_mask", "position_ids"}
        if not route.returns_home:
            wanted.add("labels")
        if self.spec.share_token_ids:
            wanted.add("input_ids")
        found = dict(inputs)
        if "input_ids" in found and "attention_mask" not in found:
            found["attention_mask"] = torch.ones_like(found["input_ids"])
        return {
            name: value.to(_NARROW.get(name, value.dtype))
            for name, value in found.items()
            if name in wanted
        }

    def run(
        self, segment: Segment, inputs: Mapping[str, Tensor], boundary: Boundary | None = None
    ) -> Boundary | Output:
        """Run `segment` on a batch.

        Parameters
        ----------
        segment : Segment
            Blocks to run, all held on this tier.
        inputs : mapping of str to Tensor
            The batch on the first segment; on later ones what `travelling` returned (and the
            labels, on the segment that holds the head).
        boundary : Boundary or None
            What the segment before sent; None on the first one.

        Returns
        -------
        Boundary or Output
            The output of the segment's last block, or the loss and logits after the head. Call
            backward on it; gradients collect in the received boundary's tensors that require them.
        """
        self._require_owned(segment)
        if _is_first(segment) != (boundary is None):
            need = "no boundary" if _is_first(segment) else "the boundary of the segment before"
            raise FedsplitError(f"segment={segment}: takes {need}")
        if segment.start == segment.stop < self.n_blocks and boundary is not None:
            return boundary
        arguments = self._arguments(segment, inputs, boundary)
        with self._running(segment, boundary):
            try:
                result = self.model(**arguments)
            except _Reached as reached:
                return Boundary.pack(reached.output, self._parts.kept)
        labels = arguments["labels"]
        targets = labels[..., 1:] if self.spec.task == "causal-lm" else labels
        return Output(result.loss, int((targets != IGNORED_LABEL).sum()), result.logits)

    def _require_owned(self, segment: Segment) -> frozenset[int]:
        positions = _positions(segment, self.n_blocks)
        if not positions <= self._owned:
            raise FedsplitError(f"segment={segment}: its weights are not held on this tier")
        return positions

    def _arguments(
        self, segment: Segment, inputs: Mapping[str, Tensor], boundary: Boundary | None
    ) -> dict[str, Tensor]:
        """Return the model's arguments: the real ones, or stand-ins of the same shape."""
        found = {
            name: value.long() if name in _NARROW else value for name, value in inputs.items()
        }
        if segment.stop < self.n_blocks:
            found.pop("labels", None)
        elif "labels" not in found:
            raise FedsplitError(f"segment={segment}: labels are needed where the head is")
        if boundary is None or self.spec.share_token_ids:
            return found
        if self.spec.task == "causal-lm":
            if "attention_mask" not in found:
                raise FedsplitError(f"segment={segment}: the attention mask is needed")
            found["input_ids"] = torch.zeros_like(found["attention_mask"])
        else:
            batch = boundary.tensors[0].shape[0]
            size = _image_size(self.config)
            found["pixel_values"] = torch.zeros(()).expand(batch, self.config.num_channels, *size)
        return found

    @contextmanager
    def _running(self, segment: Segment, boundary: Boundary | None) -> Iterator[None]:
        self._segment = segment
        self._received = None if boundary is None else boundary.unpack()
        try:
            yield
        finally:
            self._segment = self._received = None

    def _staged(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return block `index`'s forward, obeying the segment that runs."""

        def staged(*args: Any, **kwargs: Any) -> Any:
            segment = self._segment
            if segment is None:
                return forward(*args, **kwargs)
            if index < segment.start:
                return self._received
            if index >= segment.stop:
                raise _Reached(args[0] if args else kwargs["hidden_states"])
            if index == 0 and self._received is not None:
                # A cut before the first block: the boundary is that block's input.
                if args:
                    args = (self._received, *args[1:])
                else:
                    kwargs["hidden_states"] = self._received
            output = forward(*args, **kwargs)
            if index == segment.stop - 1 and segment.stop < self.n_blocks:
                raise _Reached(output)
            return output

        return staged

    def _find_slots(self) -> Iterator[tuple[str, _Slot]]:
        """Yield every trained tensor that this tier holds."""
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            owner, _, short = name.rpartition(".")
            module = self.model.get_submodule(owner)
            if self.spec.train == "lora":
                where = self._parts.of_module(adapted_module(name))
                yield peft_key(name), _Slot(module, short, min(where & self._owned))
            else:
                where = self._parts.positions[name]
                yield name, _Slot(module, short, min(where & self._owned))


def _image_size(config: PretrainedConfig) -> tuple[int, int]:
    size = getattr(config, "image_size", 32)
    return (size, size) if isinstance(size, int) else tuple(size)
