"""Expected compression: of boundaries as they are, element type and shape included."""

import pytest
import torch
from fedsplit.apps.config import codec_plan, load_config

from fedsplit.assets import default_codec_table
from fedsplit.codec import gaussian_ratio, make_codec
from fedsplit.models import ModelSpec, load
from fedsplit.models.profile import example_batch, profile_model
from fedsplit.plan import Segment
from fedsplit.planning import CodecTable

SIZES = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 64, "vocab_size": 64}
CODECS = (
    "identity",
    "fp16",
    "bf16",
    "fp8",
    "int8",
    "topk",
    "sft",
    "low_rank",
    "transform",
    "temporal",
    "error_feedback",
)


def spec(dtype="float32"):
    return ModelSpec(model_type="gpt2", config=SIZES, r=4, dtype=dtype)


def uplink(name):
    return codec_plan(load_config([f"codec={name}"])).uplink


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("codec", CODECS)
def test_it_is_that_of_a_boundary_of_the_model(codec, dtype):
    """Gaussian values of the boundary's own shape and type, encoded: nothing is left to guess."""
    model = load(spec(dtype))
    model.train()
    inputs = example_batch(model.config, "causal-lm", 32, 8)
    (boundary,) = model.run(Segment("device", 0, 1), inputs).tensors
    assert boundary.dtype == getattr(torch, dtype)
    draw = torch.Generator().manual_seed(3)
    values = torch.randn(boundary.shape, generator=draw).to(boundary.dtype)
    sent = len(make_codec(uplink(codec), 3).encode(values, range(8)))
    ratio = gaussian_ratio(profile_model(spec(dtype), 32), batch=8, seed=3)
    assert ratio(uplink(codec)) == pytest.approx(sent / boundary.nbytes, rel=0.01)


@pytest.mark.parametrize("settings", CodecTable.read_csv(default_codec_table()).settings, ids=str)
def test_the_shipped_table_says_what_a_two_byte_boundary_sends(settings):
    """Bytes of an element stay, so that the ratio doubles; as the codec itself shows."""
    table = CodecTable.read_csv(default_codec_table())
    assert table.itemsize == 4
    row = table.settings.index(settings)
    wide, narrow = (gaussian_ratio(profile_model(spec(t), 32), 8) for t in ("float32", "bfloat16"))
    change = narrow(settings) / wide(settings)
    found = table.at(2).ratio[row] / table.ratio[row]
    assert found == pytest.approx(change, rel=0.02)
    assert table.at(2).itemsize == 2
    assert table.at(4).ratio == pytest.approx(table.ratio)
