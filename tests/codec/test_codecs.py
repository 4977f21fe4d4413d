"""Every codec: what comes back, what is refused, and what damaged bytes do."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.codec import CODECS, Loopback, make_codec
from fedsplit.errors import FedsplitError

TOPK = {"name": "topk", "keep": 0.3}
EVERY_CODEC = {
    "identity": {"name": "identity"},
    "fp16": {"name": "fp16"},
    "bf16": {"name": "bf16"},
    "fp8": {"name": "fp8"},
    "int8": {"name": "int8"},
    "int8, zstd": {"name": "int8", "lossless": "zstd"},
    "topk": TOPK,
    "topk, 2 bits": {**TOPK, "bits": 2, "rounding": "nearest"},
    "topk, author": {**TOPK, "rounding": "author", "clip_percentile": 95},
    "topk, token": {**TOPK, "per": "token", "scale": "token"},
    "topk, column": {**TOPK, "statistics": "column", "bits": 6},
    "topk, all": {"name": "topk", "keep": 1, "bits": 8, "scale": "token"},
    "low_rank": {"name": "low_rank", "rank": 3, "factors": {"name": "int8"}},
    "transform": {
        "name": "transform",
        "inner": {"name": "topk", "keep": 0.4, "bits": 6, "statistics": "column"},
    },
    "error_feedback": {"name": "error_feedback", "inner": TOPK},
    "temporal": {"name": "temporal", "key": {"name": "bf16"}, "residual": TOPK},
    "temporal, low_rank": {
        "name": "temporal",
        "key": {"name": "int8"},
        "residual": {"name": "low_rank", "rank": 2, "factors": TOPK},
        "threshold": 0.1,
    },
}
LOSSY = [name for name in EVERY_CODEC if name not in ("identity", "fp16", "bf16")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

every_codec = pytest.mark.parametrize("settings_", EVERY_CODEC.values(), ids=EVERY_CODEC)
shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Tensors as they may come: any shape, all zero, constant, tiny, huge, with outliers."""
    shape, dtype = draw(shapes), draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
    kind = draw(st.sampled_from(("normal", "zero", "constant", "scaled", "outliers", "sparse")))
    if kind == "zero":
        tensor = torch.zeros_like(tensor)
    elif kind == "constant":
        tensor = torch.full_like(tensor, draw(st.floats(-100, 100)))
    elif kind == "scaled":
        tensor = tensor * 10.0 ** draw(st.integers(-30, 30))
    elif kind == "outliers":
        tensor = tensor**9
    elif kind == "sparse":
        tensor = tensor * (tensor > 1)
    return tensor.to(dtype).nan_to_num()


@every_codec
@given(tensor=tensors())
@settings(max_examples=60, deadline=None)
def test_what_comes_back_has_the_shape_the_type_and_the_size_of_what_was_sent(settings_, tensor):
    sender, receiver = make_codec(settings_, 0), make_codec(settings_, 0)
    samples = range(tensor.shape[0]) if tensor.dim() > 0 else None
    for _ in range(2):
        payload = bytes(sender.encode(tensor, samples))
        decoded = receiver.decode(payload, tensor.shape, tensor.dtype, samples)
        assert decoded.shape == tensor.shape
        assert decoded.dtype == tensor.dtype
        assert decoded.isfinite().all()
        if tensor.numel() == 0:
            assert payload == b""
        elif not tensor.any():
            assert not decoded.any()


@pytest.mark.parametrize("settings_", EVERY_CODEC.values(), ids=EVERY_CODEC)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_integers_and_booleans_travel_unchanged(settings_, dtype):
    tensor = (torch.arange(24).reshape(2, 3, 4) % 5).to(dtype)
    payload = make_codec(settings_, 0).encode(tensor)
    decoded = make_codec(settings_, 1).decode(payload, tensor.shape, dtype)
    assert torch.equal(decoded, tensor)


@pytest.mark.parametrize(
    ("name", "bound"),
    [("fp16", 2**-11), ("bf16", 2**-8), ("fp8", 2**-4), ("int8", 0.5 / 127 + 1e-6)],
)
def test_narrow_types_keep_their_precision(name, bound):
    tensor = torch.randn(5, 7, 33) * torch.logspace(-3, 3, 7)[:, None]
    loop = Loopback({"name": name}, 0)
    error = (loop.send(tensor) - tensor).abs()
    # Floats err relative to the element, int8 relative to the token's largest.
    whole = tensor.abs().amax(-1, keepdim=True) if name in ("int8", "fp8") else tensor.abs()
    assert (error <= bound * whole + 2**-25).all()


@pytest.mark.parametrize("name", ["identity", "fp16", "bf16"])
def test_floats_preserve_nan_and_infinity_and_never_overflow(name):
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 3.0e38, -3.4028235e38])
    received = Loopback({"name": name}, 0).send(special)
    assert received[0].isnan()
    assert torch.equal(received[1:3], special[1:3])
    assert received[3:].isfinite().all()
    assert torch.equal(received[3:].sign(), special[3:].sign())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("settings_", [EVERY_CODEC[name] for name in LOSSY if "temp" not in name])
def test_lossy_codecs_refuse_nan_and_infinity(settings_, bad):
    tensor = torch.ones(3, 4)
    tensor[1, 2] = bad
    with pytest.raises(FedsplitError, match="NaN or infinity"):
        make_codec(settings_, 0).encode(tensor)


def test_identity_copies_nothing():
    tensor = torch.arange(6.0).reshape(2, 3)
    codec = make_codec({"name": "identity"}, 0)
    payload = codec.encode(tensor)
    decoded = codec.decode(payload, (2, 3), torch.float32)
    assert len(payload) == 24
    assert decoded.data_ptr() == tensor.data_ptr()
    assert torch.equal(codec.decode(bytes(payload), (2, 3), torch.float32), tensor)


def test_views_are_sent_as_they_look():
    tensor = torch.randn(6, 4).T[1:, ::2]
    assert torch.equal(Loopback({"name": "identity"}, 0).send(tensor), tensor)


@every_codec
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_bytes_end_in_a_clean_error_or_a_tensor_of_the_right_shape(settings_, data):
    tensor = torch.randn(4, 3, 10, generator=torch.Generator().manual_seed(1))
    payload = bytearray(make_codec(settings_, 0).encode(tensor, range(4)))
    damage = data.draw(st.sampled_from(("flip", "cut", "extend", "noise")))
    if damage == "flip":
        payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    elif damage == "cut":
        del payload[data.draw(st.integers(0, len(payload) - 1)) :]
    elif damage == "extend":
        payload += data.draw(st.binary(min_size=1, max_size=9))
    else:
        payload = bytearray(data.draw(st.binary(max_size=200)))
    try:
        decoded = make_codec(settings_, 0).decode(payload, tensor.shape, tensor.dtype, range(4))
    except FedsplitError:
        return
    assert decoded.shape == tensor.shape


@pytest.mark.parametrize("name", ["topk", "low_rank", "int8, zstd", "int8", "identity", "temporal"])
def test_missing_bytes_are_noticed(name):
    tensor = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    payload = bytes(make_codec(EVERY_CODEC[name], 0).encode(tensor))
    for end in range(0, len(payload), max(1, len(payload) // 40)):
        with pytest.raises(FedsplitError):
            make_codec(EVERY_CODEC[name], 0).decode(payload[:end], tensor.shape, tensor.dtype)


def test_a_compression_bomb_is_refused_before_it_unfolds():
    import zstandard

    bomb = zstandard.compress(bytes(50_000_000), 1)
    with pytest.raises(FedsplitError, match="corrupt"):
        make_codec(EVERY_CODEC["int8, zstd"], 0).decode(bomb, (4, 4), torch.float32)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "zip"}, "identity, fp16"),
        ({}, "codec.name=None"),
        ({"name": "topk", "kept": 0.1}, "known: keep, per, bits"),
        ({"name": "bf16", "bits": 2}, "known: none"),
        ({"name": "topk", "seed": 3}, "unknown setting"),
        ({"name": "topk", "keep": 0.0}, "codec.keep=0.0"),
        ({"name": "topk", "keep": float("nan")}, "codec.keep"),
        ({"name": "topk", "keep": "0.1"}, "codec.keep"),
        ({"name": "topk", "bits": 1}, "from 2 to 8"),
        ({"name": "topk", "bits": 4.5}, "integer"),
        ({"name": "topk", "rounding": "up"}, "unbiased, author, nearest"),
        ({"name": "topk", "per": "channel"}, "tensor, token"),
        ({"name": "int8", "lossless": "xz"}, "none, zstd"),
        ({"name": "low_rank"}, "needs this setting"),
        ({"name": "low_rank", "factors": "int8"}, "settings of a codec"),
        ({"name": "error_feedback", "inner": EVERY_CODEC["temporal"]}, "codec without memory"),
        ({**EVERY_CODEC["temporal"], "key_every": 0}, "codec.key_every"),
        ({**EVERY_CODEC["temporal"], "memory_mb": -1}, "codec.memory_mb"),
    ],
)
def test_wrong_settings_are_refused_by_name(wrong, message):
    with pytest.raises(FedsplitError, match=message):
        make_codec(wrong, 0)


def test_every_codec_is_covered_here():
    assert {settings_["name"] for settings_ in EVERY_CODEC.values()} == set(CODECS)


def test_settings_survive_json():
    for settings_ in EVERY_CODEC.values():
        make_codec(json.loads(json.dumps(settings_)), 0)


CONFIGS = sorted((Path(__file__).parents[2] / "conf" / "codec").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_works_and_opens_with_its_command(path):
    from omegaconf import OmegaConf

    assert path.read_text().startswith(f"# fedsplit run codec={path.stem}\n")
    config = OmegaConf.to_container(OmegaConf.load(path))
    assert set(config) == {"uplink", "downlink"}
    for direction in config.values():
        tensor = torch.randn(2, 5, 16)
        received = Loopback(direction, 0).send(tensor, (0, 1))
        assert received.shape == tensor.shape


EXTREMES = {
    "the largest": torch.tensor([3.4028235e38, -3.4028235e38]),
    "very large": torch.tensor([3e38, -2.9e38]),
    "large": torch.tensor([1e30, -3e29]),
    "small": torch.tensor([1e-30, -3e-31]),
    "subnormal": torch.tensor([1e-41, -3e-42]),
}


@pytest.mark.parametrize("size", EXTREMES)
@every_codec
def test_values_at_the_ends_of_float32_come_back_or_are_refused(settings_, size):
    """Twice, as codecs with memory send differences; never infinite, never by a foreign error."""
    high, low = EXTREMES[size].tolist()
    draw = torch.Generator().manual_seed(0)
    link = Loopback(settings_, 0)
    for _ in range(2):
        tensor = low + (high - low) * torch.rand((6, 8), generator=draw, dtype=torch.float64)
        tensor[0, 0], tensor[1, 1] = high, low
        try:
            found = link.send(tensor.float(), range(6)).double()
        except FedsplitError:
            assert abs(high) > 1e38
            return
        assert found.isfinite().all()
        assert found.norm() <= 2 * tensor.norm()
