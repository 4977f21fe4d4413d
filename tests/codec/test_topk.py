"""The SFT pipeline: what is kept, how it is rounded, how few bytes it takes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.codec import Loopback, make_codec
from fedsplit.codec.entropy import Gaps, Stack, normalise, weigh
from fedsplit.codec.formula import (
    author_bits,
    entropy_bits,
    huffman_bits,
    ideal_bits,
)
from fedsplit.codec.quantise import Grid
from fedsplit.codec.sparsify import kept_positions
from fedsplit.codec.topk import TopK
from fedsplit.errors import FedsplitError


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 300),
    keep=st.floats(0.001, 1.0),
    seed=st.integers(0, 999),
    ties=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_kept_is_what_reaches_the_kth_smallest_magnitude(rows, width, keep, seed, ties):
    tensor = gaussian(rows, width, seed=seed) ** 3
    if ties:
        tensor = (tensor * 2).round()
    flat = tensor.abs().reshape(-1)
    k = round((1 - keep) * flat.numel())
    threshold = flat.sort().values[k - 1] if k > 0 else 0.0
    expected = np.flatnonzero((flat >= threshold).numpy())
    assert np.array_equal(kept_positions(tensor, keep, per_token=False).numpy(), expected)


def test_per_token_keeps_the_same_number_of_every_token():
    tensor = gaussian(20, 50) * torch.logspace(-4, 4, 20)[:, None]
    positions = kept_positions(tensor, 0.2, per_token=True)
    assert torch.equal(torch.bincount(positions // 50), torch.full((20,), 11))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_unbiased_rounding_has_the_right_mean(bits):
    magnitude = torch.linspace(0.3, 2.1, 97)
    grid = Grid.fit(magnitude, bits, 100.0)
    n = 20_000
    noise = torch.rand(n, 97, generator=torch.Generator().manual_seed(bits))
    rounded = grid.magnitudes(grid.levels(magnitude.expand(n, 97).clone(), "unbiased", noise))
    # A value between two levels has a variance of at most step^2 / 4.
    tolerance = 5 * grid.step / 2 / n**0.5
    assert (rounded.mean(0) - magnitude).abs().max() < tolerance


def test_the_authors_rounding_is_certain_near_a_level_and_biased_between():
    grid = Grid(0.0, 7.0, 8)
    n = 40_000
    noise = torch.rand(n, generator=torch.Generator().manual_seed(0))
    for fraction in (0.0, 0.1, 0.25, 0.375, 0.5, 0.6, 0.75, 0.9):
        up = grid.levels(torch.full((n,), 3 + fraction), "author", noise).sub(3).float().mean()
        expected = min(max((fraction - 0.25) / 0.5, 0.0), 1.0)
        assert up == pytest.approx(expected, abs=0.02)


def test_the_authors_grid_clips_the_top_five_percent():
    magnitude = torch.arange(1.0, 101.0)
    grid = Grid.fit(magnitude, 4, 95.0)
    assert (grid.low, grid.high) == (1.0, 95.0)
    assert grid.magnitudes(grid.levels(magnitude, "author", torch.zeros(100))).max() == 95.0


@given(seed=st.integers(0, 10_000), bits=st.integers(2, 8), keep=st.floats(0.02, 1.0))
@settings(max_examples=60, deadline=None)
def test_decoding_returns_exactly_what_was_quantised(seed, bits, keep):
    tensor = gaussian(3, 11, 17, seed=seed)
    codec, twin = (TopK(keep=keep, bits=bits, seed=seed) for _ in range(2))
    kept = twin.quantise(tensor)
    expected = torch.zeros(tensor.numel())
    magnitude = kept.grid.magnitudes(torch.from_numpy(kept.symbols // 2))
    expected[kept.positions] = torch.where(
        torch.from_numpy(kept.symbols % 2 == 1), -magnitude, magnitude
    )
    received = codec.decode(codec.encode(tensor), tensor.shape, tensor.dtype)
    assert torch.equal(received.reshape(-1), expected)
    step = kept.grid.step
    error = (received.reshape(-1) - tensor.reshape(-1))[kept.positions].abs().max()
    assert error <= step * (1 + 1e-5) + 1e-6


def test_token_scales_rescue_small_tokens_beside_a_huge_one():
    tensor = gaussian(64, 96)
    tensor[5] *= 1e4
    small = torch.arange(64) != 5
    for scale, low, high in (("tensor", 0.99, float("inf")), ("token", 0.0, 0.1)):
        settings_ = {"name": "topk", "keep": 0.5, "bits": 5, "scale": scale}
        error = (Loopback(settings_, 0).send(tensor) - tensor)[small].norm() / tensor[small].norm()
        assert low <= error**2 <= high


@pytest.mark.parametrize("keep", [0.02, 0.1, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("heavy", [False, True])
def test_bytes_are_within_one_percent_of_the_entropy(keep, heavy):
    tensor = gaussian(4, 64, 768)
    tensor = tensor**3 if heavy else tensor
    kept = TopK(keep=keep).quantise(tensor)
    sent = 8 * len(make_codec({"name": "topk", "keep": keep}, 0).encode(tensor))
    ideal = ideal_bits(np.bincount(kept.symbols), tensor.numel())
    assert ideal < sent < 1.01 * ideal + 8 * 48


def test_statistics_by_column_pay_where_columns_differ_and_decode_alike():
    tensor = gaussian(4, 128, 256) * torch.logspace(0.5, -1.5, 256)
    received, sizes = [], []
    for statistics in ("tensor", "column"):
        settings_ = {"name": "topk", "keep": 0.2, "rounding": "nearest", "statistics": statistics}
        loop = Loopback(settings_, 0)
        received.append(loop.send(tensor))
        sizes.append(loop.n_bytes)
    assert torch.equal(*received)
    assert sizes[1] < 0.8 * sizes[0]


def test_the_authors_formula_bounds_the_bytes_that_are_sent():
    tensor = gaussian(8, 64, 256)
    settings_ = {"keep": 0.3, "rounding": "author", "clip_percentile": 95.0}
    kept = TopK(**settings_).quantise(tensor)
    counts = np.bincount(kept.symbols // 2)
    formula = author_bits(counts, tensor.numel())
    sent = 8 * len(make_codec({"name": "topk", **settings_}, 0).encode(tensor))
    # The bitmap takes 1 bit an element where its entropy is H(0.3); Huffman loses little.
    gain = tensor.numel() - entropy_bits([counts.sum(), tensor.numel() - counts.sum()])
    assert formula - gain - 0.05 * huffman_bits(counts) < sent < formula - gain + 8 * 48
    assert formula <= 4 * int(counts.sum()) + tensor.numel() + 64


def test_huffman_code_lengths_by_hand():
    assert huffman_bits([5, 1, 1, 1]) == 5 * 1 + 1 * 2 + 1 * 3 + 1 * 3
    assert huffman_bits([7, 0]) == 7


@given(
    probabilities=st.lists(st.floats(0, 1), min_size=2, max_size=40).filter(lambda p: sum(p) > 0.1),
    n=st.integers(1, 500),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_the_stack_returns_symbols_in_order(probabilities, n, seed):
    rng = np.random.default_rng(seed)
    p = np.array(probabilities) / sum(probabilities)
    first = rng.choice(len(p), n, p=p).astype(np.int32)
    second = rng.integers(0, len(p), n).astype(np.int32)
    stack = Stack()
    stack.push(second, normalise(weigh(second, len(p) + 1)))
    stack.push(first, normalise(weigh(first, len(p) + 1)))
    back = Stack.from_bytes(memoryview(stack.to_bytes()))
    assert np.array_equal(back.pop(n, normalise(weigh(first, len(p) + 1))), first)
    assert np.array_equal(back.pop(n, normalise(weigh(second, len(p) + 1))), second)
    back.close()


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_gaps_give_the_positions_back(data):
    n = data.draw(st.integers(1, 20_000))
    size = data.draw(st.integers(1, min(n, 200)))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    positions = np.sort(rng.choice(n, size, replace=False)).astype(np.int64)
    gaps = Gaps(size, n)
    assert gaps.probabilities.sum() == pytest.approx(1.0)
    symbols = gaps.symbols(positions)
    assert symbols.min() >= 0
    assert symbols.max() <= gaps.escape
    assert np.array_equal(gaps.positions(symbols), positions)


def test_announced_counts_beyond_the_tensor_are_refused():
    payload = bytearray(TopK().encode(gaussian(4, 16)))
    payload[8:16] = b"\xff" * 8
    with pytest.raises(FedsplitError, match="do not fit"):
        TopK().decode(payload, (4, 16), torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_tensor_on_the_gpu_is_coded_like_one_on_the_cpu():
    tensor = gaussian(4, 64, 256)
    settings_ = {"name": "topk", "rounding": "nearest", "scale": "token"}
    there = bytes(make_codec(settings_, 0).encode(tensor.cuda()))
    assert there == bytes(make_codec(settings_, 0).encode(tensor))
