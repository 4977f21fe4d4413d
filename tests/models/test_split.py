"""Segments run with the model's own forward: positions, token order and modes as unsplit."""

from typing import Any

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fedsplit.errors import FedsplitError
from fedsplit.models import Boundary, ModelSpec, Output, SplitModel, load
from fedsplit.models.lora import lora_config
from fedsplit.models.routes import step_through
from fedsplit.models.tiny import example_inputs, tiny_config
from fedsplit.plan import Route, Segment

BLOCKS = 4
WHOLE = Route.device_only(BLOCKS).segments[0]


def spec_of(model_type: str, **settings: Any) -> ModelSpec:
    fields = tiny_config(model_type, BLOCKS).to_diff_dict()
    del fields["model_type"]
    return ModelSpec(model_type=model_type, config=fields | settings.pop("config", {}), **settings)


def tiers_of(spec: ModelSpec, route: Route) -> dict[str, SplitModel]:
    return {segment.tier: load(spec, route.on(segment.tier)) for segment in route.segments}


def last_boundary(spec: ModelSpec, route: Route, inputs: dict[str, Tensor]) -> list[Boundary]:
    """Return what crosses each cut of `route`, in evaluation mode."""
    found: list[Boundary] = []
    batch = inputs
    for segment in route.segments[:-1]:
        model = load(spec, [segment])
        received = found[-1] if found else None
        result = model.run(segment, batch, received)
        batch = model.travelling(inputs, route)
        assert isinstance(result, Boundary)
        found.append(result)
    return found


def logits_of(spec: ModelSpec, route: Route, inputs: dict[str, Tensor]) -> Tensor:
    received = last_boundary(spec, route, inputs)[-1]
    last = route.segments[-1]
    result = load(spec, [last]).run(last, inputs, received)
    assert isinstance(result, Output)
    assert result.logits is not None
    return result.logits


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "llama"])
def test_positions_and_token_order_are_those_of_the_unsplit_model(model_type: str) -> None:
    """Models entered again through `inputs_embeds` add their positions twice."""
    spec = spec_of(model_type)
    route = Route.three_tier(BLOCKS, 1, 3)
    inputs = example_inputs(load(spec).config, "causal-lm")
    whole = load(spec).run(WHOLE, inputs)
    assert isinstance(whole, Output)
    assert torch.equal(logits_of(spec, route, inputs), whole.logits)
    shuffled = inputs | {"input_ids": inputs["input_ids"].flip(0)}
    assert not torch.equal(logits_of(spec, route, shuffled), whole.logits)


def test_explicit_positions_travel() -> None:
    spec = spec_of("llama")
    inputs = example_inputs(load(spec).config, "causal-lm")
    inputs["position_ids"] = 3 + inputs["attention_mask"].cumsum(-1)
    whole = load(spec).run(WHOLE, inputs)
    assert torch.equal(logits_of(spec, Route.two_tier(BLOCKS, 2), inputs), whole.logits)  # type: ignore[union-attr]


def test_a_boundary_has_the_tokens_where_the_block_put_them() -> None:
    spec = spec_of("gpt2")
    inputs = example_inputs(load(spec).config, "causal-lm")
    model = load(spec)
    seen: list[Tensor] = []
    hook = model.model.transformer.h[1].register_forward_hook(lambda *a: seen.append(a[2]))
    model.run(WHOLE, inputs)
    hook.remove()
    (crossing,) = last_boundary(spec, Route.two_tier(BLOCKS, 2), inputs)
    (block_output,) = (value[0] if isinstance(value, tuple) else value for value in seen)
    assert torch.equal(crossing.tensors[0], block_output)


def test_every_tier_is_in_the_mode_it_was_set_to() -> None:
    """A peer trained a device against a server in evaluation mode."""
    spec = spec_of("gpt2", config={"resid_pdrop": 0.5, "embd_pdrop": 0.5}, dropout=0.5)
    route = Route.two_tier(BLOCKS, 2)
    server = route.segments[1]
    inputs = example_inputs(load(spec).config, "causal-lm")
    (received,) = last_boundary(spec, route, inputs)
    model = load(spec, [server])
    modes = {}
    for training in (False, True):
        model.train(training)
        assert model.training is training
        assert {module.training for module in model.model.modules()} == {training}
        pair = [model.run(server, inputs, received) for _ in range(2)]
        modes[training] = torch.equal(pair[0].logits, pair[1].logits)  # type: ignore[union-attr, arg-type]
    assert modes == {False: True, True: False}


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_names_are_those_that_peft_saves(model_type: str) -> None:
    spec = spec_of(model_type)
    config = spec.load_config()
    plain = AutoModelForCausalLM.from_config(config)
    plain = get_peft_model(plain, lora_config(spec, plain))
    expected = get_peft_model_state_dict(plain)
    assert set(load(spec).adapter_names(WHOLE)) == set(expected)
    route = Route.u_shaped(BLOCKS, 1, 3)
    tiers = tiers_of(spec, route)
    names = [tiers[segment.tier].adapter_names(segment) for segment in route.segments]
    assert sum(map(len, names)) == len(expected)
    assert set().union(*map(set, names)) == set(expected)


def test_initial_adapters_do_not_depend_on_the_cut() -> None:
    spec = spec_of("llama")
    whole = load(spec).adapters(WHOLE)
    for cut in (1, 3):
        for segment in Route.two_tier(BLOCKS, cut).segments:
            for name, value in load(spec, [segment]).adapters(segment).items():
                assert torch.equal(value, whole[name])
    spread = torch.stack([value.std() for name, value in whole.items() if "lora_A" in name])
    assert torch.all(spread > 0)
    assert all(not value.any() for name, value in whole.items() if "lora_B" in name)


def test_branches_share_one_backbone() -> None:
    """Each branch's own parameters are put in place; gradients and values stay apart."""
    spec = spec_of("llama")
    model = load(spec).train()
    inputs = example_inputs(model.config, "causal-lm")
    branches = [model.trainable(WHOLE) for _ in range(2)]
    model.install(branches[0])
    for name, parameter in branches[0].items():
        assert any(parameter is other for other in model.model.parameters()), name
    step_through({"device": model}, Route.device_only(BLOCKS), inputs)
    assert any(value.grad is not None for value in branches[0].values())
    assert all(value.grad is None for value in branches[1].values())
    with torch.no_grad():
        next(iter(branches[0].values())).add_(1.0)
    model.install(branches[1])
    fresh = load(spec).adapters(WHOLE)
    assert all(torch.equal(value, fresh[name]) for name, value in model.adapters(WHOLE).items())


def test_one_server_runs_spans_that_differ_between_branches() -> None:
    spec = spec_of("gpt2")
    server = load(spec, [Segment("server", 1, BLOCKS)])
    inputs = example_inputs(server.config, "causal-lm")
    whole = load(spec).run(WHOLE, inputs)
    for cut in (3, 1, 2):
        route = Route.two_tier(BLOCKS, cut)
        (received,) = last_boundary(spec, route, inputs)
        result = server.run(route.segments[1], inputs, received)
        assert torch.equal(result.loss, whole.loss)  # type: ignore[union-attr]


def test_labels_stay_at_home_on_a_u_shape_and_ids_always() -> None:
    model = load(spec_of("llama"))
    inputs = example_inputs(model.config, "causal-lm")
    assert set(model.travelling(inputs, Route.two_tier(BLOCKS, 2))) == {"attention_mask", "labels"}
    assert set(model.travelling(inputs, Route.u_shaped(BLOCKS, 1, 3))) == {"attention_mask"}
    del inputs["attention_mask"]
    assert bool(model.travelling(inputs, Route.two_tier(BLOCKS, 2))["attention_mask"].all())


def test_the_loss_is_a_mean_over_the_targets_that_are_counted() -> None:
    model = load(spec_of("llama"))
    inputs = example_inputs(model.config, "causal-lm")
    output = model.run(WHOLE, inputs)
    assert isinstance(output, Output)
    assert output.logits is not None
    targets = inputs["labels"][:, 1:]
    losses = nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum"
    )
    assert output.n_targets == int((targets >= 0).sum())
    assert float(output.loss) == pytest.approx(float(losses) / output.n_targets, rel=1e-5)


def test_a_frozen_backbone_of_convolutions_keeps_its_statistics() -> None:
    spec = ModelSpec(
        model_type="resnet",
        config={"depths": [1, 1], "hidden_sizes": [8, 16], "embedding_size": 8, "num_labels": 3},
        task="image-classification",
        target_modules=("convolution",),
    )
    model = load(spec).train()
    before = {name: value.clone() for name, value in model.model.named_buffers()}
    model.run(Route.device_only(2).segments[0], example_inputs(model.config, spec.task))
    for name, value in model.model.named_buffers():
        if "running" in name:
            assert torch.equal(value, before[name]), name


def test_mistakes_are_named() -> None:
    spec = spec_of("llama")
    device, server = Route.two_tier(BLOCKS, 2).segments
    model = load(spec, [device])
    inputs = example_inputs(model.config, "causal-lm")
    boundary = model.run(device, inputs)
    assert isinstance(boundary, Boundary)
    with pytest.raises(FedsplitError, match="not held on this tier"):
        model.run(server, inputs, boundary)
    with pytest.raises(FedsplitError, match="takes no boundary"):
        model.run(device, inputs, boundary)
    with pytest.raises(FedsplitError, match="boundary of the segment before"):
        load(spec, [server]).run(server, inputs)
    with pytest.raises(FedsplitError, match="labels"):
        load(spec, [server]).run(server, {"attention_mask": inputs["attention_mask"]}, boundary)
    with pytest.raises(FedsplitError, match="attention mask"):
        load(spec, [server]).run(server, {"labels": inputs["labels"]}, boundary)
    with pytest.raises(FedsplitError, match="4 blocks"):
        load(spec, [Segment("device", 0, 9)])
    with pytest.raises(FedsplitError, match="nonsense"):
        model.install({"nonsense": nn.Parameter(torch.zeros(1))})
    name = model.adapter_names(device)[0]
    with pytest.raises(FedsplitError, match="shape"):
        model.install({name: nn.Parameter(torch.zeros(1))})
    with pytest.raises(FedsplitError, match="target_modules"):
        load(spec_of("llama", target_modules=("no_such_layer",)))
