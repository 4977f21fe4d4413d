"""A tier holds its own weights only, right to the last bit, wherever they come from."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedsplit.errors import FedsplitError
from fedsplit.models import ModelSpec, SplitModel, load
from fedsplit.models.lora import lora_config
from fedsplit.models.phantoms import is_phantom
from fedsplit.models.tiny import example_inputs, tiny_config
from fedsplit.plan import Route, Segment

BLOCKS = 4
SERVER = Segment("server", 2, BLOCKS)


def save(folder: Path, model_type: str, shard: str = "20KB") -> ModelSpec:
    """Save a tiny random checkpoint in shards and return the spec that reads it."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, BLOCKS))
    model.save_pretrained(folder, max_shard_size=shard)
    targets = ("in_proj", "x_proj") if model_type == "mamba" else None
    return ModelSpec(source=str(folder), target_modules=targets)


def fields(model_type: str, n_blocks: int = BLOCKS) -> dict[str, Any]:
    """Return the configuration fields of a tiny model."""
    found = tiny_config(model_type, n_blocks).to_diff_dict()
    return {name: value for name, value in found.items() if name != "model_type"}


def held(model: SplitModel) -> dict[str, Tensor]:
    """Return the weights that take memory, by name; single numbers aside."""
    return {
        name: value
        for name, value in model.model.state_dict().items()
        if value.numel() > 1 and not is_phantom(value)
    }


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "mixtral", "mamba"])
def test_each_tier_reads_its_own_weights_from_a_sharded_checkpoint(
    tmp_path: Path, model_type: str
) -> None:
    spec = save(tmp_path, model_type)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    route = Route.three_tier(BLOCKS, 1, 3)
    together: set[str] = set()
    for segment in route.segments:
        model = load(spec, [segment])
        frozen = {
            k.replace(".base_layer", ""): v for k, v in held(model).items() if "lora" not in k
        }
        together |= set(frozen)
        for name, value in frozen.items():
            assert torch.equal(value, plain[name]), name
        blocks = {int(part) for name in frozen for part in name.split(".") if part.isdigit()}
        assert blocks == set(range(segment.start, segment.stop))
    assert together == {name for name, value in plain.items() if value.numel() > 1}


def test_buffers_that_no_checkpoint_stores_are_computed(tmp_path: Path) -> None:
    spec = save(tmp_path, "llama")
    plain = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_buffers())
    ours = dict(load(spec, [SERVER]).model.named_buffers())
    assert set(plain) == set(ours)
    for name, value in plain.items():
        assert torch.equal(value, ours[name]), name


def test_tied_head_arrives_on_the_last_tier(tmp_path: Path) -> None:
    spec = save(tmp_path, "gpt2")
    model = load(spec, [SERVER]).model
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not is_phantom(model.lm_head.weight)
    assert is_phantom(model.transformer.wpe.weight)


def test_weights_take_the_memory_of_their_segment_only(tmp_path: Path) -> None:
    spec = save(tmp_path, "llama")
    whole = load(spec).held_bytes
    parts = [load(spec, [segment]).held_bytes for segment in Route.two_tier(BLOCKS, 1).segments]
    assert sum(parts) == pytest.approx(whole, rel=0.01)
    assert parts[0] < 0.4 * whole


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_random_weights_depend_on_seed_and_name_alone(model_type: str) -> None:
    spec = ModelSpec(model_type=model_type, config=fields(model_type), seed=5)
    whole = load(spec).model.state_dict()
    part = held(load(spec, [SERVER]))
    assert len(part) > 8
    for name, value in part.items():
        assert torch.equal(value, whole[name]), name
    other = held(
        load(ModelSpec(model_type=model_type, config=fields(model_type), seed=6), [SERVER])
    )
    assert any(not torch.equal(value, other[name]) for name, value in part.items())


def test_random_weights_have_the_spread_of_the_model_s_own_initialisation() -> None:
    config = tiny_config("llama", BLOCKS)
    ours = load(ModelSpec(model_type="llama", config=fields("llama"))).model.state_dict()
    plain = AutoModelForCausalLM.from_config(config).state_dict()
    compared = [name for name in plain if name in ours and plain[name].numel() > 500]
    assert len(compared) > 8
    for name in compared:
        assert float(ours[name].std()) == pytest.approx(float(plain[name].std()), rel=0.15)


def test_loading_leaves_the_callers_random_numbers_alone() -> None:
    spec = ModelSpec(model_type="llama", config=fields("llama", 2))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    load(spec)
    assert torch.equal(torch.rand(3), expected)


def test_a_joined_adapter_loads_in_plain_peft(tmp_path: Path) -> None:
    """Peers exported one stage's adapter only; ours is the unsplit model's, key by key."""
    spec = save(tmp_path / "base", "gpt2")
    route = Route.three_tier(BLOCKS, 1, 3)
    joined: dict[str, Tensor] = {}
    for segment in route.segments:
        joined |= load(spec, [segment]).adapters(segment)
    draw = torch.Generator().manual_seed(0)
    joined = {name: torch.randn(value.shape, generator=draw) for name, value in joined.items()}
    folder = tmp_path / "adapter"
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora_config(spec, base).save_pretrained(str(folder))
    save_file(joined, folder / "adapter_model.safetensors")
    plain = PeftModel.from_pretrained(base, str(folder))
    saved = {
        name.replace(".default", ""): v for name, v in plain.state_dict().items() if "lora" in name
    }
    assert set(saved) == set(joined)
    model = load(spec)
    model.install({name: torch.nn.Parameter(value) for name, value in joined.items()})
    inputs = example_inputs(model.config, "causal-lm")
    ours = model.run(Route.device_only(BLOCKS).segments[0], inputs)
    with torch.no_grad():
        theirs = plain.eval()(**inputs)
    assert torch.equal(ours.logits, theirs.logits)  # type: ignore[union-attr]


def test_pickled_checkpoints_are_refused(tmp_path: Path) -> None:
    config = tiny_config("gpt2", 2)
    config.save_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FedsplitError, match="safetensors"):
        load(ModelSpec(source=str(tmp_path)))


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    with pytest.raises(FedsplitError, match="do not fit"):
        load(ModelSpec(source=str(tmp_path), config={"intermediate_size": 48}))


LOADING = """
import sys, torch
from benchmarks.memory import peak_mb
from fedsplit.models import ModelSpec, load
from fedsplit.models.anatomy import anatomy
from fedsplit.plan import Segment
spec = ModelSpec(source=sys.argv[1])
anatomy(spec.load_config(), spec.task)
before = peak_mb()
model = load(spec, [Segment("device", 0, 1)])
print(peak_mb() - before, model.held_bytes / 1e6)
"""


def test_the_device_never_holds_the_server_s_weights(tmp_path: Path) -> None:
    """Peers build the whole model on the device before they drop layers."""
    sizes = {"n_embd": 512, "n_head": 4, "n_layer": 12, "vocab_size": 1000, "n_positions": 64}
    config = ModelSpec(model_type="gpt2", config=fields("gpt2") | sizes).load_config()
    model = AutoModelForCausalLM.from_config(config)
    whole_mb = sum(value.numel() * 4 for value in model.parameters()) / 1e6
    model.save_pretrained(tmp_path, max_shard_size="30MB")
    command = [sys.executable, "-c", LOADING, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    grown_mb, held_mb = map(float, done.stdout.split()[-2:])
    assert held_mb < 0.15 * whole_mb
    assert grown_mb < held_mb + 0.4 * (whole_mb - held_mb)
