"""A model of which a tier holds, and runs, some segments only."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

from fedsplit.errors import FedsplitError
from fedsplit.models.anatomy import EMBED, Anatomy
from fedsplit.models.boundary import Boundary, Output
from fedsplit.models.crossing import (
    IGNORED_LABEL,
    NARROW,
    Arrival,
    Crossing,
    input_forms,
    probes,
    travelling,
)
from fedsplit.models.names import CAUSAL, SEQUENCES
from fedsplit.models.packing import holds_several
from fedsplit.models.phantoms import is_phantom
from fedsplit.models.private import BatchNorm, SharedStates
from fedsplit.models.ranks import factor_of, rank_axis, require_fit, require_pairs
from fedsplit.models.residuals import Residuals
from fedsplit.models.slots import find_slots
from fedsplit.models.spec import ModelSpec
from fedsplit.models.tiny import padded, placeholder
from fedsplit.models.weights import held_bytes
from fedsplit.plan import DEVICE, Route, Segment


def positions_of(segment: Segment, n_blocks: int) -> frozenset[int]:
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
    """Leaves the model's forward at the end of a segment, with the values that cross the cut."""

    def __init__(self, output: Any, keywords: Mapping[str, Any]) -> None:
        super().__init__("end of segment")
        self.values = {"output": output, "shared": _shared(keywords)}


def _shared(keywords: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the keys and values that earlier blocks leave for later ones (Gemma 3n and 4)."""
    return {
        name: dict(value) for name, value in keywords.items() if isinstance(value, SharedStates)
    }


class SplitModel:
    """A model of which only some segments hold weights; made by `load`.

    The model's own forward runs on every tier. Blocks before the segment return the received
    boundary instead of computing, and the forward is left after the segment's last block, so that
    masks, positions and rotary tables are those of the model's own code.

    One thread at a time may call `run`. `counts_tokens` says whether those who evaluate it count
    the tokens predicted right, which takes a look at all logits.
    """

    counts_tokens = False

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
        self.device = model.device  # finding it is a walk through the parameters
        self.n_blocks = parts.n_blocks
        self._checkpointing = False
        self._parts = parts
        self._owned = owned
        self._norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
        self._slots = find_slots(model, parts, owned, self._norms, spec.train)
        self._residuals = Residuals(model, self._slots)
        trained = {
            id(slot.get())
            for name, slot in self._slots.items()
            if not (spec.freeze_a and rank_axis(name) == 0)
        }
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        if spec.train == "lora":
            # The backbone is frozen, and many branches share it: so are its running statistics.
            for norm in self._norms:
                norm.momentum = 0.0
        self._segment: Segment | None = None
        self._received: Any = None
        self._installed: Mapping[str, nn.Parameter] | None = None
        self._crossings: dict[tuple[int, int | None], Crossing] = {}
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
        for norm in self._norms:
            if norm.running_mean is not None and is_phantom(norm.running_mean):
                norm.eval()
        return self

    def eval(self) -> "SplitModel":
        """Set evaluation mode."""
        return self.train(False)

    @property
    def checkpointing(self) -> bool:
        """Whether blocks are computed again in the backward pass; its dropout is then the same.

        Whoever calls backward has to have the parameters of the forward pass in place.
        """
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, wanted: bool) -> None:
        if wanted and self._norms and self.spec.train == "full":
            # They would count every mini-batch twice in their running statistics.
            raise FedsplitError("train.checkpointing: must be false, this model has batch norms")
        self._checkpointing = wanted

    @property
    def held_bytes(self) -> int:
        """Bytes of memory that the weights take on this tier."""
        return held_bytes(self.model)

    def holds(self, segments: Iterable[Segment]) -> bool:
        """Return whether the weights of all `segments` are held on this tier."""
        return all(positions_of(segment, self.n_blocks) <= self._owned for segment in segments)

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

    def trained(self) -> dict[str, Tensor]:
        """Return all that is trained on this tier, by name, the tensors themselves."""
        return {name: slot.get() for name, slot in self._slots.items()}

    def forms(self, segment: Segment, *, residuals: bool = False) -> dict[str, Tensor]:
        """Return tensors like those of `segment`, without memory; `residuals` at their largest."""
        names = self.adapter_names(segment)
        beside = self._residuals.forms(names) if residuals else {}
        return {name: self._slots[name].like for name in names} | beside

    def trainable(
        self, segment: Segment, adapters: Mapping[str, Tensor] | None = None
    ) -> dict[str, nn.Parameter]:
        """Return parameters for `segment`, a branch's own, with the values of `adapters`.

        They may be of a lower rank; by default they are those installed. Residuals come along, to
        be trained by nobody. Raises `FedsplitError` if one is missing or has another shape.
        """
        names = self.adapter_names(segment)
        found = {} if adapters is None else self._residuals.fixed(names, adapters)
        for name in names:
            if adapters is not None and name not in adapters:
                raise FedsplitError(f"adapters: {name!r} is missing")
            found[name] = self._slots[name].fresh(
                name, None if adapters is None else adapters[name]
            )
        require_pairs(found)
        return found

    def install(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put `parameters` in place, the objects themselves, without a copy.

        Many branches share one frozen backbone this way: each installs its own before it runs.
        Residuals that are not among them are put away.

        Raises
        ------
        FedsplitError
            If a name is unknown or a shape differs.
        """
        if parameters is self._installed:
            return
        for name in parameters:
            if (factor_of(name) or name) not in self._slots:
                raise FedsplitError(f"adapter={name!r}: is not trained on this tier")
        own = {name: self._slots[name] for name in parameters if name in self._slots}
        for name, slot in own.items():
            require_fit(name, parameters[name], slot.like)
        for name, slot in own.items():
            slot.put(parameters[name])
        self._residuals.install(parameters)
        self._installed = parameters

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Install copies of `values`, each to be trained or not as what was there before.

        Raises
        ------
        FedsplitError
            As `install`.
        """
        copies = {}
        for name, value in values.items():
            trains = name in self._slots and self._slots[name].get().requires_grad
            copies[name] = nn.Parameter(value.detach().to(self.device, copy=True), trains)
        self.install(copies)

    def travelling(self, inputs: Mapping[str, Tensor], route: Route) -> dict[str, Tensor]:
        """Return what later tiers of `route` need of a batch, in small types.

        The attention mask; the labels unless the route returns home; the token ids only if the
        spec shares them.
        """
        found = travelling(inputs, with_ids=self.spec.share_token_ids)
        if route.returns_home:
            found.pop("labels", None)
        return found

    def arrival(self, route: Route, position: int, pixels: int | None = None) -> Arrival:
        """Return what the segment at `position` of `route` gets in every mini-batch.

        Of images, `pixels` is the height and width; by default what the configuration says.

        Found by sending three tiny batches through the blocks before it, without gradients; those
        that are not held here compute with zeros. Like `run`, for one thread at a time.

        Raises
        ------
        FedsplitError
            If the boundary does not grow with samples and tokens as boundaries do.
        """
        forms = input_forms(self.spec, self.config, with_labels=not route.returns_home)
        return Arrival(forms, self.crossing(route.segments[position].start, pixels))

    def crossing(self, cut: int, pixels: int | None = None) -> Crossing:
        """Return what crosses the cut after `cut` blocks; see `arrival`."""
        key = cut, pixels
        if key not in self._crossings:
            batches = probes(self.spec, self.config, pixels)
            self._crossings[key] = Crossing.through([self._probe(cut, one) for one in batches])
        return self._crossings[key]

    @torch.no_grad()
    def _probe(self, cut: int, inputs: Mapping[str, Tensor]) -> Boundary:
        """Return the boundary at `cut` of a batch: of the right form, with any values."""
        here = {name: value.to(self.device) for name, value in inputs.items()}
        training, experts = self.training, self.model.get_experts_implementation()
        self.eval()
        self.model.set_experts_implementation("eager")  # others do not take phantom weights
        try:
            with self._running(Segment(DEVICE, 0, cut), None):
                self.model(**here)
        except _Reached as reached:
            return Boundary.pack(reached.values)
        finally:
            self.model.set_experts_implementation(experts)
            self.train(training)
        raise FedsplitError(f"cut={cut}: must lie before the model's last block")

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
            labels, on the segment that holds the head); best on the host, where looking at them
            waits for nothing.
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
                return Boundary.pack(reached.values)
        return Output(result.loss, self.n_targets(inputs), result.logits)

    def n_targets(self, inputs: Mapping[str, Tensor]) -> int:
        """Return how many labels of a batch the mean of its loss is over."""
        labels = inputs["labels"]
        targets = labels[..., 1:] if self.spec.task == CAUSAL else labels
        return int((targets != IGNORED_LABEL).sum())

    def _require_owned(self, segment: Segment) -> frozenset[int]:
        positions = positions_of(segment, self.n_blocks)
        if not positions <= self._owned:
            raise FedsplitError(f"segment={segment}: its weights are not held on this tier")
        return positions

    def _arguments(
        self, segment: Segment, inputs: Mapping[str, Tensor], boundary: Boundary | None
    ) -> dict[str, Tensor]:
        """Return the model's arguments: the real ones, or stand-ins of the same shape."""
        found = {name: value.to(self.device) for name, value in inputs.items()}
        found = {name: value.long() if name in NARROW else value for name, value in found.items()}
        if self.spec.task == SEQUENCES and {"input_ids", "attention_mask"} <= found.keys():
            found["input_ids"] = padded(found["input_ids"], found["attention_mask"], self.config)
        if segment.stop < self.n_blocks:
            found.pop("labels", None)
        elif "labels" not in found:
            raise FedsplitError(f"segment={segment}: labels are needed where the head is")
        if boundary is not None and not self.spec.share_token_ids:
            mask = found.get("attention_mask")
            found |= placeholder(self.config, self.spec.task, mask, boundary.tensors[0])
        if holds_several(inputs):
            del found["attention_mask"]
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
            segment, received = self._segment, self._received
            if segment is None:
                return forward(*args, **kwargs)
            if index < segment.start:
                for name, values in received["shared"].items():
                    kwargs[name].update(values)
                return received["output"]
            if index >= segment.stop:
                raise _Reached(args[0] if args else kwargs["hidden_states"], kwargs)
            if index == 0 and received is not None:
                # A cut before the first block: the boundary is that block's input.
                if args:
                    args = (received["output"], *args[1:])
                else:
                    kwargs["hidden_states"] = received["output"]
            if self._checkpointing and torch.is_grad_enabled():
                output = checkpoint(forward, *args, use_reentrant=False, **kwargs)
            else:
                output = forward(*args, **kwargs)
            if index == segment.stop - 1 and segment.stop < self.n_blocks:
                raise _Reached(self._parts.prune(output), kwargs)
            return output

        return staged
