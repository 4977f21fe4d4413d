"""Profiles: FLOPs and bytes of blocks against what a real model does."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from fedsplit.errors import FedsplitError
from fedsplit.measured import MeasuredProfile
from fedsplit.models import Boundary, ModelSpec, load
from fedsplit.models.blocks import find_blocks
from fedsplit.models.profile import example_batch, profile_model, profile_module
from fedsplit.models.profile_measured import measure_machine
from fedsplit.models.ranks import residuals
from fedsplit.plan import Route, Segment
from fedsplit.profiles import ModelProfile, total

TINY = {"vocab_size": 64, "n_embd": 32, "n_layer": 4, "n_head": 4}
SPEC = ModelSpec(model_type="gpt2", config=TINY)


def whole(profile: ModelProfile, cost: str) -> float:
    return float(getattr(total([profile.embed, *profile.blocks, profile.head]), cost))


def real_gpt2(attention: str, frozen_up_to: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    model = GPT2LMHeadModel._from_config(
        GPT2Config(**TINY, use_cache=False), attn_implementation=attention
    )
    for block in model.transformer.h[:frozen_up_to]:
        block.requires_grad_(False)
    if frozen_up_to:
        model.transformer.wte.requires_grad_(False)
        model.transformer.wpe.requires_grad_(False)
    ids = torch.randint(0, 64, (2, 16))
    return model.train(), {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("frozen", [0, 2])
def test_flops_are_those_that_torch_counts_on_a_real_step(frozen: int) -> None:
    model, inputs = real_gpt2("eager", frozen)
    profile = profile_module(model, inputs, find_blocks(model))
    with FlopCounterMode(display=False) as forward:
        loss = model(**inputs).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert 2 * whole(profile, "forward_flops") == forward.get_total_flops()
    assert 2 * whole(profile, "backward_flops") == backward.get_total_flops()
    for block in profile.blocks[:frozen]:
        assert block.backward_flops == block.activation_bytes == block.adapter_bytes == 0


def test_fused_attention_counts_as_its_matrix_products_do() -> None:
    eager, inputs = real_gpt2("eager")
    fused, _ = real_gpt2("sdpa")
    counted = [profile_module(m, inputs, find_blocks(m)) for m in (eager, fused)]
    assert whole(counted[0], "forward_flops") == whole(counted[1], "forward_flops")


def test_llama_7b_costs_two_flops_per_parameter_and_token() -> None:
    tokens = 128
    profile = profile_model(ModelSpec(model_type="llama", dtype="bfloat16"), tokens)
    adapters = whole(profile, "adapter_bytes") / 4
    parameters = (whole(profile, "parameter_bytes") - 4 * adapters) / 2
    assert parameters == 6_738_415_616
    assert whole(profile, "forward_flops") == pytest.approx(2 * parameters * tokens, rel=0.02)
    # A frozen matrix needs the gradient of its input alone: as much work as its forward pass.
    middle = profile.blocks[16]
    assert middle.backward_flops == pytest.approx(middle.forward_flops, rel=0.02)
    assert profile.blocks[0].backward_flops < 0.8 * middle.backward_flops


def test_what_is_saved_is_what_autograd_saves_on_a_real_step() -> None:
    model, inputs = real_gpt2("sdpa", frozen_up_to=1)
    profile = profile_module(model, inputs, find_blocks(model))
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss
    sizes = [t.untyped_storage().nbytes() for at, t in saved.items() if at not in weights]
    assert loss.requires_grad
    assert 2 * whole(profile, "activation_bytes") == sum(sizes)


def test_bytes_are_those_of_a_loaded_model() -> None:
    profile = profile_model(SPEC, seq_len=16, batch=2)
    held = load(SPEC)
    segment = Segment("device", 0, 2)
    inputs = example_batch(held.config, SPEC.task, 16, 2)
    boundary = held.run(segment, inputs)
    assert isinstance(boundary, Boundary)
    sent = sum(tensor.numel() * tensor.element_size() for tensor in boundary.tensors)
    assert 2 * profile.blocks[1].boundary_bytes == sent
    adapters = sum(t.numel() * t.element_size() for t in held.adapters(segment).values())
    assert sum(block.adapter_bytes for block in profile.blocks[:2]) == adapters
    device = load(SPEC, [segment])
    first = total([profile.embed, *profile.blocks[:2]])
    assert first.parameter_bytes == pytest.approx(device.held_bytes, rel=1e-3)
    assert first.optimizer_bytes == 2 * adapters


TIED = ModelSpec(model_type="gpt2", config=TINY | {"tie_word_embeddings": True}, train="full")


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize(
    "route", [Route.device_only(4), Route.u_shaped(4, 1, 3), Route.u_shaped(4, 0, 4)], ids=str
)
def test_tied_embeddings_count_once_where_they_share_a_tier(route: Route, train: str) -> None:
    """Against what a device holds that loads these segments."""
    spec = replace(TIED, train=train)
    profile = profile_model(spec, seq_len=16)
    (tied,) = profile.shared
    assert tied.units == (0, 5)
    assert tied.parameter_bytes == 4 * 64 * 32
    assert tied.adapter_bytes == (tied.parameter_bytes if train == "full" else 0)
    held = load(spec, route.on("device"))
    own = [0, 5, *(i + 1 for part in route.on("device") for i in range(part.start, part.stop))]
    found = profile.total(own)
    assert found.parameter_bytes == pytest.approx(held.held_bytes, rel=2e-3)
    adapters = {name: t for part in route.on("device") for name, t in held.adapters(part).items()}
    assert found.adapter_bytes == sum(t.nbytes for t in adapters.values())


def test_tied_embeddings_count_on_either_side_of_a_cut() -> None:
    profile = profile_model(replace(TIED, train="lora"), seq_len=16)
    first, last = profile.segments(Route.two_tier(4, 2))
    assert first.parameter_bytes + last.parameter_bytes == sum(
        unit.parameter_bytes for unit in profile.units
    )


def test_only_masks_are_shared_by_the_samples_of_a_batch() -> None:
    one, four = (profile_model(SPEC, seq_len=16, batch=size) for size in (1, 4))
    assert whole(one, "forward_flops") == whole(four, "forward_flops")
    shared = whole(one, "activation_bytes") - whole(four, "activation_bytes")
    assert 0 <= shared < 0.1 * whole(one, "activation_bytes")


def measured_peak(cut: int) -> tuple[float, float]:
    """Return measured and modelled peak bytes of a device that trains `cut` blocks of GPT-2."""
    script = Path(__file__).with_name("device_peak.py")
    # The allocator has to give memory back at once, or the peak shows its habits.
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
    }
    answer = subprocess.run(
        [sys.executable, str(script), str(cut)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    measured, modelled = map(float, answer.stdout.split()[-2:])
    return measured, modelled


@pytest.mark.parametrize(
    "cut", [2, *(pytest.param(cut, marks=pytest.mark.slow) for cut in (1, 4, 12))]
)
def test_modelled_peak_is_the_measured_one_at_gpt2_small_shape(cut: int) -> None:
    measured, modelled = measured_peak(cut)
    assert modelled == pytest.approx(measured, rel=0.15)


def test_shapes_without_sense_are_refused() -> None:
    with pytest.raises(FedsplitError, match="batch=0"):
        profile_model(SPEC, seq_len=16, batch=0)
    with pytest.raises(FedsplitError, match="seq_len=1"):
        profile_model(SPEC, seq_len=1)
    with pytest.raises(FedsplitError, match="repeats=0"):
        measure_machine(SPEC, seq_len=16, repeats=0)


def test_blocks_computed_again_keep_their_input_alone_and_take_longer() -> None:
    profile = profile_model(ModelSpec(model_type="gpt2", config={"n_layer": 2}), 16)
    again = profile.checkpointed()
    for unit, (before, block) in enumerate(zip(profile.units, profile.blocks, strict=False)):
        found = again.blocks[unit]
        assert found.backward_flops == block.backward_flops + block.forward_flops
        assert found.activation_bytes == before.boundary_bytes < block.activation_bytes
        # At its turn a block needs all that it needed before.
        both = found.activation_bytes + found.workspace_bytes
        assert both >= block.activation_bytes + block.workspace_bytes
    assert (again.embed, again.head) == (profile.embed, profile.head)
    times = {"forward_s": (1.0, 2.0, 3.0, 4.0), "backward_s": (10.0, 20.0, 30.0, 40.0)}
    measured = MeasuredProfile(model="gpt2", seq_len=16, batch=1, **times)
    backward = [unit.backward_flops for unit in measured.seconds(again).units]
    assert backward == [10.0, 22.0, 33.0, 40.0]


@pytest.mark.parametrize("components", [4, 24, 40, 1000])
def test_a_residual_is_as_large_as_a_model_holds_it_at_most(components: int) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_key_value_heads": 2, "head_dim": 8}
    config = sizes | {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    half = {"rank_pattern": {"down_proj": 2}}
    spec = ModelSpec(model_type="llama", config=config, r=4, target_modules="all-linear", lora=half)
    profile, tokens = profile_model(spec, seq_len=8), 8
    forms = residuals(load(spec).forms(Segment("server", 1, 2), residuals=True))
    n_bytes = flops = 0.0
    for name, most in forms.items():
        own = components / 2 if "down_proj" in name else components
        share = min(own / most.shape["residual_B" in name], 1)
        n_bytes += share * most.nbytes
        flops += 2 * tokens * share * most.numel()
    before, after = profile.blocks[1], profile.beside(components).blocks[1]
    assert after.residual_bytes == pytest.approx(n_bytes)
    assert after.parameter_bytes - before.parameter_bytes == pytest.approx(n_bytes)
    for way in ("forward_flops", "backward_flops"):
        assert getattr(after, way) - getattr(before, way) == pytest.approx(flops)
    assert after.adapter_bytes == before.adapter_bytes
