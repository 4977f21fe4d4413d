"""A bottleneck between two blocks: split as unsplit, narrow on the wire, and counted."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fedsplit.errors import FedsplitError
from fedsplit.models import Bottleneck, ModelSpec, Output, SplitModel, check_route, load
from fedsplit.models import possible_cuts as cuts_of
from fedsplit.models.bottleneck import principal
from fedsplit.models.profile import profile_model
from fedsplit.models.routes import compare, gradients
from fedsplit.models.tiny import example_inputs
from fedsplit.plan import Route
from tests.models.test_split import BLOCKS, WHOLE, spec_of

AFTER, WIDTH, HIDDEN = 2, 5, 32
NARROW = Bottleneck(after=AFTER, width=WIDTH)
FAMILIES = ["gpt2", "llama"]


def narrow_spec(model_type: str, **settings: Any) -> ModelSpec:
    return spec_of(model_type, bottleneck=replace(NARROW, **settings))


def ends(model: SplitModel, end: str) -> Tensor:
    (found,) = (value for name, value in model.trained().items() if name.endswith(end))
    return found


def by_hooks(spec: ModelSpec, inputs: dict[str, Tensor], weights: dict[str, Tensor]) -> Output:
    """Run the model without a bottleneck, projected by hooks around the block behind it."""
    plain = load(replace(spec, bottleneck=None))
    behind: Any = next(
        module
        for name, module in plain.model.named_modules()
        if name.endswith((f".layers.{AFTER}", f".h.{AFTER}"))
    )
    down, up = ([weights[f"{end}.{part}"] for part in ("weight", "bias")] for end in ("down", "up"))

    def project(_: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (linear(linear(args[0], *down), *up), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": linear(linear(kwargs["hidden_states"], *down), *up)}

    behind.register_forward_pre_hook(project, with_kwargs=True)
    output = plain.run(WHOLE, inputs)
    assert isinstance(output, Output)
    return output


@pytest.mark.parametrize("model_type", FAMILIES)
def test_it_is_the_model_with_two_projections_between_two_blocks(model_type: str) -> None:
    spec = narrow_spec(model_type)
    model = load(spec)
    inputs = example_inputs(model.config, "causal-lm")
    weights = {
        f"{end}.{part}": ends(model, f"bottleneck_{end}.{part}")
        for end in ("down", "up")
        for part in ("weight", "bias")
    }
    theirs = {name: value.detach().clone().requires_grad_() for name, value in weights.items()}
    expected = by_hooks(spec, inputs, theirs)
    expected.loss.backward()  # type: ignore[no-untyped-call]
    found = model.run(WHOLE, inputs)
    assert isinstance(found, Output)
    found.loss.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-6)
    for name, value in weights.items():
        assert value.grad is not None
        torch.testing.assert_close(value.grad, theirs[name].grad, rtol=1e-5, atol=1e-6)
        assert bool(value.grad.any())


@pytest.mark.parametrize("model_type", FAMILIES)
def test_split_training_has_the_gradients_of_the_unsplit_model(model_type: str) -> None:
    spec = narrow_spec(model_type)
    config = spec.load_config()
    inputs = example_inputs(config, "causal-lm")
    whole = gradients(spec, config, Route.device_only(BLOCKS), inputs)
    assert sum("bottleneck" in name for name in whole) == 4
    routes = Route.two_tier(BLOCKS, 2), Route.two_tier(BLOCKS, 3), Route.u_shaped(BLOCKS, 2, 3)
    for route in (*routes, Route.three_tier(BLOCKS, 2, 3)):
        assert compare(whole, gradients(spec, config, route, inputs)) is None, route
        check_route(spec, route)


def test_a_tier_holds_its_own_side_and_narrow_tensors_cross() -> None:
    spec, route = narrow_spec("llama"), Route.two_tier(BLOCKS, AFTER)
    device, server = (load(spec, [segment]) for segment in route.segments)
    sides = [
        {name.split("bottleneck_")[1] for name in model.trained() if "bottleneck" in name}
        for model in (device, server)
    ]
    assert sides == [{"down.weight", "down.bias"}, {"up.weight", "up.bias"}]
    for model in (device, server):
        (form,) = model.crossing(AFTER).forms
        assert form.shape(3, 7) == (3, 7, WIDTH)
        (form,) = model.crossing(AFTER + 1).forms
        assert form.shape(3, 7) == (3, 7, HIDDEN)


def test_bytes_memory_and_flops_are_counted() -> None:
    plain, narrow = profile_model(spec_of("llama"), 8), profile_model(narrow_spec("llama"), 8)
    sent = [block.boundary_bytes for block in narrow.blocks]
    assert sent == [8 * 4 * (WIDTH if cut == AFTER else HIDDEN) for cut in range(1, BLOCKS + 1)]
    for index, out in ((AFTER - 1, WIDTH), (AFTER, HIDDEN)):
        more, less = narrow.blocks[index], plain.blocks[index]
        assert more.forward_flops - less.forward_flops == 2 * 8 * HIDDEN * WIDTH
        assert more.adapter_bytes - less.adapter_bytes == 4 * (HIDDEN * WIDTH + out)
        assert more.activation_bytes > less.activation_bytes


def test_routes_that_leave_the_device_before_it_are_refused() -> None:
    spec = narrow_spec("llama")
    assert cuts_of(spec) == (2, 3)
    with pytest.raises(FedsplitError, match="leaves the device after 2 or more blocks"):
        check_route(spec, Route.two_tier(BLOCKS, 1))
    check_route(spec, Route.device_only(BLOCKS))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_as_wide_as_the_model_it_begins_as_nothing(model_type: str) -> None:
    spec = narrow_spec(model_type, width=HIDDEN)
    inputs = example_inputs(spec.load_config(), "causal-lm")
    outputs = [load(one).run(WHOLE, inputs) for one in (spec, replace(spec, bottleneck=None))]
    logits = [output.logits for output in outputs if isinstance(output, Output)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-6)


def test_it_begins_with_the_directions_that_vary_most() -> None:
    draw = torch.Generator().manual_seed(0)
    scales = torch.tensor([3.0, 0.1, 2.0, 0.1])
    seen = 5 + scales * torch.randn(500, 4, generator=draw)
    found = {name.partition("_")[2]: value for name, value in principal(seen, 2).items()}
    kept = linear(seen, found["down.weight"], found["down.bias"])
    back = linear(kept, found["up.weight"], found["up.bias"])
    error = (back - seen).square().sum()
    _, values, _ = torch.linalg.svd(seen - seen.mean(0))
    torch.testing.assert_close(error, values[2:].square().sum(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"after": 0}, "privacy.bottleneck.after=0: must be at least 1"),
        ({"width": 0}, "privacy.bottleneck.width=0: must be at least 1"),
        ({"after": 4}, "privacy.bottleneck.after=4: must be at most 3"),
        ({"width": 33}, "privacy.bottleneck.width=33: must be at most 32"),
    ],
)
def test_what_is_no_place_or_width_is_refused(settings: dict[str, int], said: str) -> None:
    with pytest.raises(FedsplitError, match=said):
        load(narrow_spec("llama", **settings))
