"""Try out a route: does the split model compute what the unsplit one does?"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from fedsplit.errors import FedsplitError, require
from fedsplit.models.anatomy import anatomy
from fedsplit.models.boundary import Boundary, Output, spread
from fedsplit.models.crossing import IGNORED_LABEL
from fedsplit.models.known import recall, remember
from fedsplit.models.loading import assemble
from fedsplit.models.lora_fields import changes_base
from fedsplit.models.names import CAUSAL
from fedsplit.models.spec import ModelSpec, usable_config
from fedsplit.models.split import SplitModel
from fedsplit.models.tiny import example_inputs, narrow, packed_and_not
from fedsplit.models.twins import Chain, Twin
from fedsplit.models.weights import stir
from fedsplit.plan import DEVICE, Route

Gradients = dict[str, Tensor | None]
"""Gradients of what is trained, by name."""

_TWIN_WIDTH = 8  # of a bottleneck
_Maybe = TypeVar("_Maybe", Tensor, Tensor | None)

_VERDICTS: dict[str, str | None] = {}
_TOGETHER: dict[str, list[frozenset[int]]] = {}
_PADDING: dict[str, bool] = {}
_TWINS: dict[str, tuple[Twin, Gradients]] = {}


def check_route(spec: ModelSpec, route: Route) -> None:
    """Refuse a route on which the split model would not train as the unsplit one.

    Tried on a narrow twin of the model, block for block: every gradient must be equal, to the
    last bit. The verdict is kept on disk (`fedsplit.models.known`).

    Raises
    ------
    FedsplitError
        If the route does not fit the model, or gradients differ; names the cuts that are possible.
    """
    config = spec.load_config()
    n_blocks = anatomy(config, spec.task).n_blocks
    require(route.n_blocks == n_blocks, "route", str(route), f"one of {n_blocks} blocks")
    last = route.segments[-1]
    if len(route.segments) > 1 and last.start == last.stop:
        raise FedsplitError(
            f"route={route}: the last segment must hold at least one block: the last cut must be "
            f"at most {n_blocks - 1}"
        )
    if len(route.segments) == 1:
        return
    first = _first_cut(spec)
    allowed = f"one that leaves the device after {first} or more blocks: the bottleneck is there"
    require(route.segments[0].stop >= first, "route", str(route), allowed)
    problem = _verdict(spec, config, route)
    if problem is not None:
        possible = possible_cuts(spec)
        raise FedsplitError(
            f"route={route}: {config.model_type!r} cannot be cut there ({problem}); possible "
            f"two-tier cuts: {', '.join(map(str, possible)) or 'none'}" + _hint(spec, config)
        )


def _hint(spec: ModelSpec, config: PretrainedConfig) -> str:
    """Return what may help where a model cannot be cut."""
    if getattr(config, "output_router_logits", False):
        # The loss of the routers is one of all blocks' logits at once, which no tier has.
        return "; config.output_router_logits=false leaves out the loss that spans all blocks"
    return "" if spec.share_token_ids else "; some models need share_token_ids=true"


def possible_cuts(spec: ModelSpec) -> tuple[int, ...]:
    """Return the cuts of two-tier routes that `check_route` allows, in order.

    Tried many at a time: where a route with all of them trains as the unsplit model, so does one
    with any of them. The answer is kept on disk (`fedsplit.models.known`).
    """
    config = spec.load_config()
    key = _model_key(spec, config)
    known = _known_cuts(key)
    if known is None:
        n_blocks = anatomy(config, spec.task).n_blocks
        known = _tried_together(spec, config, n_blocks, range(n_blocks))
        remember("cuts", key, [sorted(cuts) for cuts in known])
    first = _first_cut(spec)
    return tuple(sorted(cut for cuts in known for cut in cuts if cut >= first))


def _known_cuts(key: str) -> list[frozenset[int]] | None:
    """Return the possible cuts as sets that were tried together, if they were before."""
    known = recall("cuts", key)
    if isinstance(known, list) and all(
        isinstance(cuts, list) and all(type(cut) is int for cut in cuts) for cuts in known
    ):
        return [frozenset(cuts) for cuts in known]
    return None


def _first_cut(spec: ModelSpec) -> int:
    return 0 if spec.bottleneck is None else spec.bottleneck.after


def _tried_together(
    spec: ModelSpec, config: PretrainedConfig, n_blocks: int, cuts: Sequence[int]
) -> list[frozenset[int]]:
    """Return the possible ones of `cuts`, in sets that may be used together."""
    if _verdict(spec, config, Chain.at(n_blocks, cuts)) is None:
        return [frozenset(cuts)]
    if len(cuts) == 1:
        return []
    half = len(cuts) // 2
    return [
        found
        for part in (cuts[:half], cuts[half:])
        for found in _tried_together(spec, config, n_blocks, part)
    ]


def ignores_padding(spec: ModelSpec, cut: int, left: bool) -> bool:
    """Return whether nothing depends on what crosses `cut` of padding, `left` or right of a text.

    Tried on a narrow twin: with zeros in its place, forth and back, every gradient must be equal,
    to the last bit: some models look at it. The answer is kept on disk. Models with experts need no
    trial: tokens that share one round together, which not every mini-batch shows.
    """
    config = spec.load_config()
    if any("expert" in name for name in config.get_text_config().to_dict()):
        return False
    cut = min(cut, 1)  # what is computed of padding behind it differs in all later blocks as well
    key = json.dumps([_model_key(spec, config), cut, left])
    if key not in _PADDING:
        known = recall("padding", key)
        if not isinstance(known, bool):
            twin = usable_config(narrow(config), spec.task)
            known = ignores_padding_of(_trained(spec, config), twin, cut, left)
            remember("padding", key, known)
        _PADDING[key] = known
    return _PADDING[key]


def ignores_padding_of(spec: ModelSpec, config: PretrainedConfig, cut: int, left: bool) -> bool:
    """Return what `ignores_padding` does, of a model of `config` itself."""
    inputs = example_inputs(config, spec.task)
    if left:
        inputs = {
            name: value.flip(1) if value.dim() == 2 else value for name, value in inputs.items()
        }
        if spec.task == CAUSAL:  # what the padding before it predicts is not learnt
            inputs["labels"][1, int((inputs["attention_mask"][1] == 0).sum())] = IGNORED_LABEL
    n_blocks = anatomy(config, spec.task).n_blocks
    route = Route.two_tier(n_blocks, cut)
    try:
        found = [
            gradients(spec, config, route, inputs, kept=kept)
            for kept in (None, inputs["attention_mask"].bool())
        ]
    except (FedsplitError, RuntimeError, TypeError, ValueError, KeyError, IndexError) as error:
        del error  # whatever it is, the route's own trial says it
        return False
    return compare(*found) is None


def keeps_apart(spec: ModelSpec) -> bool:
    """Return whether texts that share a row train as if each had a row of its own.

    Tried on a narrow twin, unsplit: gradients must be equal but for rounding.
    """
    config = usable_config(narrow(spec.load_config()), spec.task)
    whole = _trained(spec, config)
    together, alone = packed_and_not(example_inputs(config, spec.task)["input_ids"])
    route = Route.device_only(anatomy(config, spec.task).n_blocks)
    try:
        found, expected = (gradients(whole, config, route, one) for one in (together, alone))
    except (FedsplitError, RuntimeError, TypeError, ValueError, KeyError, IndexError):
        return False  # it takes no position ids, or not these
    return not distance(found, expected) > 1e-4


def distance(found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> float:
    """Return the largest difference of gradients, beside the largest of those expected."""
    zero, far, scale = torch.zeros(()), 0.0, 0.0
    for name, one in expected.items():
        wanted, other = zero if one is None else one, found[name]
        scale = max(scale, float(wanted.abs().max()))
        far = max(far, float(((zero if other is None else other) - wanted).abs().max()))
    return far / scale


def step_through(
    tiers: Mapping[str, SplitModel],
    route: Route,
    inputs: Mapping[str, Tensor],
    kept: Tensor | None = None,
) -> Output:
    """Run forward and backward along `route` with all tiers in this process.

    Gradients collect in the parameters installed on each tier.

    Parameters
    ----------
    tiers : mapping of str to SplitModel
        The model that each tier of the route holds.
    route : Route
        Where each block runs.
    inputs : mapping of str to Tensor
        The batch, with labels.
    kept : Tensor or None
        The tokens of which something crosses a cut, boolean; zeros take the place of others. All
        by default.
    """
    sent: list[Boundary] = []
    received: list[Boundary] = []
    batch = dict(inputs)
    result: Boundary | Output | None = None
    for segment in route.segments:
        if isinstance(result, Boundary):
            crossing = None if kept is None else tiers[segment.tier].crossing(segment.start)
            marks = () if crossing is None else crossing.kept(kept)
            sent.append(replace(result, kept=marks))
            received.append(replace(result, tensors=_arrived(result.tensors, marks)).leaf())
        model = tiers[segment.tier]
        result = model.run(segment, batch, received[-1] if received else None)
        if len(sent) == 0:
            batch = model.travelling(inputs, route)
        if segment.stop == route.segments[-1].start:
            batch = batch | {"labels": inputs["labels"]}
    assert isinstance(result, Output)
    result.loss.backward()  # type: ignore[no-untyped-call]
    for outgoing, incoming in zip(reversed(sent), reversed(received), strict=True):
        outgoing.backward(_arrived(incoming.gradients(), outgoing.kept))
    return result


def _arrived(tensors: Sequence[_Maybe], marks: Sequence[Tensor | None]) -> tuple[_Maybe, ...]:
    """Return `tensors` with zeros where nothing of them is kept."""
    if not marks:
        return tuple(tensors)
    return tuple(
        one if one is None or where is None else spread(one[where], where)
        for one, where in zip(tensors, marks, strict=True)
    )


def gradients(
    spec: ModelSpec,
    config: PretrainedConfig,
    route: Route,
    inputs: Mapping[str, Tensor],
    *,
    checkpointing: bool = False,
    kept: Tensor | None = None,
) -> Gradients:
    """Return the gradient of everything trained after one step along `route`, by name.

    All weights are stirred first, so that no gradient is zero by construction (LoRA starts with
    B = 0). With `checkpointing` blocks are computed again in the backward pass. For `kept` see
    `step_through`.
    """
    names = dict.fromkeys(segment.tier for segment in route.segments)
    tiers = {
        tier: assemble(spec, config, route.on(tier), torch.device("cpu")).train() for tier in names
    }
    for model in tiers.values():
        stir(model.model, spec.seed)
        model.checkpointing = checkpointing
    return _gradients(tiers, route, inputs, kept)


def _gradients(
    tiers: Mapping[str, SplitModel],
    route: Route,
    inputs: Mapping[str, Tensor],
    kept: Tensor | None = None,
) -> Gradients:
    installed: dict[str, nn.Parameter] = {}
    for segment in route.segments:
        parameters = tiers[segment.tier].trainable(segment)
        tiers[segment.tier].install(parameters)
        installed |= parameters
    step_through(tiers, route, inputs, kept)
    return {name: value.grad for name, value in installed.items()}


def _trained(spec: ModelSpec, config: PretrainedConfig) -> ModelSpec:
    """Return what a trial trains: `spec` without all that no verdict depends on."""
    narrow_at = spec.bottleneck
    return replace(
        spec,
        source=None,
        model_type=config.model_type,
        config={},
        dtype="float32",
        dropout=0.0,
        lora=_without_draws(spec.lora),
        adapter=None,
        quantize=None,
        seed=0,
        bottleneck=None if narrow_at is None else replace(narrow_at, width=_TWIN_WIDTH),
    )


def _without_draws(lora: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of LoRA that a twin, narrower than the rank maybe, can begin with."""
    init = lora.get("init_lora_weights", True)
    return {**lora, "init_lora_weights": "pissa"} if changes_base(init) else dict(lora)


def _model_key(spec: ModelSpec, config: PretrainedConfig) -> str:
    fields = config.to_dict()
    # Where the configuration was read is not what it says.
    fields.pop("_name_or_path", None)
    return json.dumps([str(_trained(spec, config)), fields], sort_keys=True, default=str)


def _verdict(spec: ModelSpec, config: PretrainedConfig, route: Route) -> str | None:
    """Return what goes wrong on `route`, or None."""
    model = _model_key(spec, config)
    cuts = frozenset(route.cuts)
    if model not in _TOGETHER:
        _TOGETHER[model] = _known_cuts(model) or []
    passed = _TOGETHER[model]
    if not route.returns_home and any(cuts <= together for together in passed):
        return None
    key = json.dumps([model, str(route)])
    if key not in _VERDICTS:
        known = recall("route", key)
        if isinstance(known, list) and len(known) == 1 and isinstance(known[0], str | None):
            _VERDICTS[key] = known[0]
        else:
            twin = usable_config(narrow(config), spec.task)
            _VERDICTS[key] = find_difference(_trained(spec, config), twin, route)
            remember("route", key, [_VERDICTS[key]])
    if _VERDICTS[key] is None and not route.returns_home:
        passed.append(cuts)
    return _VERDICTS[key]


def find_difference(spec: ModelSpec, config: PretrainedConfig, route: Route) -> str | None:
    """Return in words how training along `route` differs from unsplit training, or None.

    Parameters
    ----------
    spec : ModelSpec
        What is trained; its source is not read, weights are random.
    config : PretrainedConfig
        The model, narrow and without dropout.
    route : Route
        The route to try.
    """
    inputs = example_inputs(config, spec.task)
    key = json.dumps([str(spec), config.to_json_string(use_diff=False)])
    if key not in _TWINS:
        twin = Twin(spec, config)
        unsplit = Route.device_only(route.n_blocks)
        whole = _gradients({DEVICE: twin.tier(unsplit.segments)}, unsplit, inputs)
        _TWINS.clear()  # whoever asks of one model many times asks of it in a row
        _TWINS[key] = twin, whole
    twin, whole = _TWINS[key]
    try:
        names = dict.fromkeys(segment.tier for segment in route.segments)
        split = _gradients({tier: twin.tier(route.on(tier)) for tier in names}, route, inputs)
    except FedsplitError as error:
        return str(error)
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return compare(whole, split)


def compare(whole: Mapping[str, Tensor | None], split: Mapping[str, Tensor | None]) -> str | None:
    """Return how two sets of gradients differ, or None if they are equal to the last bit."""
    if set(whole) != set(split):
        odd = sorted(set(whole) ^ set(split))
        return f"{len(odd)} adapters are on one side only, such as {odd[0]}"
    worst, where = 0.0, ""
    for name, expected in whole.items():
        got = split[name]
        if expected is None and got is None:
            continue
        zero = torch.zeros(())
        distance = float(
            ((zero if got is None else got) - (zero if expected is None else expected)).abs().max()
        )
        if not distance <= worst:
            worst, where = distance, name
    return f"the gradient of {where} differs by {worst:.2g}" if where else None
