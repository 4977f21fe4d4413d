"""What arrives at a cut is known before it does, from the receiver's own model."""

import pytest
import torch

from fedsplit.errors import FedsplitError
from fedsplit.models import Boundary, ModelSpec
from fedsplit.models.crossing import Axis
from fedsplit.models.loading import assemble
from fedsplit.models.tiny import example_inputs
from fedsplit.plan import Route
from tests.conformance.test_architectures import (
    ARCHITECTURES,
    TARGETS,
    image_config,
    tiny_config,
    usable_config,
)

CPU = torch.device("cpu")
SHARED = ModelSpec(
    model_type="gemma3n_text", target_modules=("q_proj", "v_proj"), share_token_ids=True
)
TEXTS = [ModelSpec(model_type=kind, target_modules=TARGETS.get(kind)) for kind in ARCHITECTURES]
IMAGES = [
    ModelSpec(model_type="vit", task="image-classification", target_modules=("q_proj",)),
    ModelSpec(model_type="resnet", task="image-classification", target_modules=("convolution",)),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spec", [*TEXTS, SHARED, *IMAGES], ids=lambda spec: spec.model_type)
def test_it_is_what_the_sender_sends(spec: ModelSpec, dtype: str) -> None:
    spec = ModelSpec(**{**vars(spec), "dtype": dtype})
    if spec.task == "causal-lm":
        config = usable_config(tiny_config(str(spec.model_type), 4), spec.task)
        inputs, tokens = example_inputs(config, spec.task), 8
    else:
        config, tokens = image_config(str(spec.model_type)), 1
        inputs = example_inputs(config, spec.task)
        inputs["pixel_values"] = inputs["pixel_values"].to(getattr(torch, spec.dtype))
    whole = assemble(spec, config, None, CPU).train()
    for cut in range(whole.n_blocks):
        route = Route.two_tier(whole.n_blocks, cut)
        receiver = assemble(spec, config, [route.segments[1]], CPU)
        sent = whole.run(route.segments[0], inputs)
        assert isinstance(sent, Boundary)
        arrival = receiver.arrival(route, 1)
        assert arrival.boundary.layout == sent.layout
        forms = [(form.dtype, form.shape(2, tokens)) for form in arrival.boundary.forms]
        assert forms == [(tensor.dtype, tuple(tensor.shape)) for tensor in sent.tensors]
        for name, value in whole.travelling(inputs, route).items():
            form = arrival.inputs[name]
            assert (form.dtype, form.shape(2, tokens)) == (value.dtype, tuple(value.shape))
            assert form.holds(value)


def test_looking_leaves_the_model_as_it_was() -> None:
    config = usable_config(tiny_config("mixtral", 4), "causal-lm")
    model = assemble(ModelSpec(model_type="mixtral"), config, None, CPU).train()
    route = Route.two_tier(4, 2)
    inputs = example_inputs(config, "causal-lm")
    experts, state = model.model.get_experts_implementation(), torch.get_rng_state()
    before = model.run(route.segments[0], inputs)
    model.arrival(route, 1)
    after = model.run(route.segments[0], inputs)
    assert isinstance(before, Boundary)
    assert isinstance(after, Boundary)
    assert torch.equal(before.tensors[0], after.tensors[0])
    assert model.training
    assert model.model.get_experts_implementation() == experts
    assert torch.equal(torch.get_rng_state(), state)


def test_labels_are_expected_where_they_leave_the_device_and_ids_where_they_are_shared() -> None:
    config = usable_config(tiny_config("llama", 4), "causal-lm")
    model = assemble(ModelSpec(model_type="llama"), config, None, CPU)
    open_route, home = Route.two_tier(4, 2), Route.u_shaped(4, 1, 3)
    assert set(model.arrival(open_route, 1).inputs) == {"attention_mask", "position_ids", "labels"}
    assert set(model.arrival(home, 1).inputs) == {"attention_mask", "position_ids"}
    shared = assemble(
        ModelSpec(model_type="llama", share_token_ids=True, target_modules=("q_proj",)),
        config,
        None,
        CPU,
    )
    assert "input_ids" in shared.arrival(home, 1).inputs


@pytest.mark.parametrize(
    ("sizes", "axis"),
    [
        ((7, 7, 7), Axis(7, 0, False)),
        ((2, 3, 2), Axis(1, 0, True)),
        ((4, 4, 8), Axis(0, 1, False)),
        ((8, 12, 16), Axis(0, 1, True)),
        ((36, 36, 40), Axis(32, 1, False)),
        ((1, 1, 1), Axis(1, 0, False)),
    ],
)
def test_an_axis_is_told_by_how_it_grows(sizes: tuple[int, ...], axis: Axis) -> None:
    assert Axis.through(sizes) == axis


@pytest.mark.parametrize("sizes", [(2, 3, 3), (2, 5, 2), (4, 4, 7), (1, 2, 4)])
def test_an_axis_that_grows_otherwise_is_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(FedsplitError, match="grow"):
        Axis.through(sizes)
