"""Codecs that remember samples, and the low-rank codec that they use."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.codec import Loopback, make_codec, straight_through
from fedsplit.codec.low_rank import truncated_svd
from fedsplit.codec.memory import SampleMemory, fit, visits
from fedsplit.errors import FedsplitError

TOPK = {"name": "topk", "keep": 0.2}
TEMPORAL = {"name": "temporal", "key": {"name": "bf16"}, "residual": TOPK, "threshold": 0.01}


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(received: torch.Tensor, sent: torch.Tensor) -> float:
    return float((received - sent).norm() / sent.norm())


def test_a_known_sample_that_did_not_change_costs_almost_nothing():
    loop, rows = Loopback(TEMPORAL, 0), gaussian(8, 32, 64)
    loop.send(rows, range(8))
    first = loop.n_bytes
    received = loop.send(rows, range(8))
    assert loop.n_bytes - first < 20
    assert error(received, rows) < 0.01


def test_losses_of_residuals_do_not_add_up():
    loop, rows = Loopback({**TEMPORAL, "threshold": 0.0, "key_every": 100}, 0), gaussian(8, 32, 64)
    errors = []
    for epoch in range(12):
        rows = rows + 0.05 * gaussian(8, 32, 64, seed=epoch + 1)
        errors.append(error(loop.send(rows, range(8)), rows))
    assert max(errors) < 0.1
    assert loop.n_bytes < 0.1 * loop.n_raw_bytes


def test_a_sample_is_sent_whole_again_after_some_visits():
    loop, rows = Loopback({**TEMPORAL, "key_every": 3}, 0), gaussian(4, 16, 16)
    sizes = []
    for _ in range(7):
        before = loop.n_bytes
        loop.send(rows, range(4))
        sizes.append(loop.n_bytes - before > rows.numel())
    assert sizes == [True, False, False, True, False, False, True]


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_both_ends_stay_together_whatever_the_batches(data):
    settings_ = {**TEMPORAL, "memory_mb": data.draw(st.sampled_from((0.0, 0.001, 0.003, 1.0)))}
    loop = Loopback(settings_, 0)
    rows = gaussian(10, 12, 8)
    for _ in range(data.draw(st.integers(1, 12))):
        samples = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
        length = data.draw(st.sampled_from((12, 12, 7)))
        sent = rows[samples, :length]
        assert error(loop.send(sent, samples), sent) < 0.6
    assert loop._sender._memory.n_bytes == loop._receiver._memory.n_bytes
    assert loop._sender._memory.n_bytes <= settings_["memory_mb"] * 1e6


def test_without_samples_everything_is_sent_whole():
    loop, rows = Loopback(TEMPORAL, 0), gaussian(4, 16)
    for _ in range(2):
        assert error(loop.send(rows), rows) < 2**-8


def test_a_sender_that_starts_afresh_is_understood():
    rows = gaussian(4, 16)
    receiver = make_codec(TEMPORAL, 0)
    for sender in (make_codec(TEMPORAL, 0), make_codec(TEMPORAL, 0)):
        for _ in range(2):
            payload = sender.encode(rows, range(4))
            received = receiver.decode(payload, rows.shape, rows.dtype, range(4))
            assert error(received, rows) < 0.01


def test_a_receiver_that_lost_its_memory_says_so():
    rows = gaussian(4, 16)
    sender = make_codec(TEMPORAL, 0)
    sender.encode(rows, range(4))
    payload = sender.encode(rows, range(4))
    with pytest.raises(FedsplitError, match="both need new codecs"):
        make_codec(TEMPORAL, 0).decode(payload, rows.shape, rows.dtype, range(4))


def test_samples_must_match_the_rows():
    with pytest.raises(FedsplitError, match="samples"):
        make_codec(TEMPORAL, 0).encode(gaussian(4, 16), (1, 2))


def test_memory_forgets_the_longest_unused():
    memory = SampleMemory(limit_bytes=3 * 8 * 2)
    for sample in (1, 2, 3, 1, 4):
        memory.put(sample, torch.full((8,), float(sample)), 0)
    assert [sample for sample in range(6) if memory.get(sample)] == [1, 3, 4]
    memory.put(5, torch.zeros(100), 0)
    assert len(memory) == 0
    assert memory.n_bytes == 0


def test_rows_of_another_length_share_their_common_part():
    row = gaussian(5, 3).to(torch.bfloat16)
    assert torch.equal(fit(row, (3, 3)), row[:3].float())
    assert torch.equal(fit(row, (7, 3))[5:], torch.zeros(2, 3))


def test_a_sample_has_the_same_positions_as_a_row_or_as_a_row_for_each_token():
    whole = gaussian(3, 4, 5)
    by_token = whole.reshape(12, 5)
    for tensor, owners in ((whole, (7, 2, 9)), (by_token, (7,) * 4 + (2,) * 4 + (9,) * 4)):
        seen = visits(tensor, owners)
        assert [sample for sample, _ in seen] == [7, 2, 9]
        assert all(torch.equal(part, row) for (_, part), row in zip(seen, whole, strict=True))
        assert all(part.untyped_storage().data_ptr() == tensor.data_ptr() for _, part in seen)
    assert [tuple(part.shape) for _, part in visits(gaussian(4), (1, 1, 2, 1))] == [
        (2, 1),
        (1, 1),
        (1, 1),
    ]


LENGTHS = (5, 2, 9, 4)
REMEMBERING = {
    "temporal": {"name": "temporal", "key": {"name": "bf16"}, "residual": {"name": "int8"}},
    "error_feedback": {"name": "error_feedback", "inner": {"name": "int8"}},
}


@pytest.mark.parametrize("name", REMEMBERING)
def test_what_a_sample_decodes_to_does_not_depend_on_who_shares_its_batch(name):
    """Of codecs that work token by token: alone, with others, and beside padding that stays."""
    texts = [gaussian(3, length, 8, seed=length) for length in LENGTHS]  # three visits each
    loops = [Loopback(REMEMBERING[name], 0) for _ in range(3)]
    found = [[], [], []]
    for visit, order in enumerate(((0, 1, 2, 3), (2, 0, 3, 1), (3, 2, 1, 0))):
        pairs = order[:2], order[2:]
        for loop, groups, results in zip(
            loops, ([order], pairs, [(i,) for i in order]), found, strict=True
        ):
            parts = {}
            for group in groups:
                rows = torch.cat([texts[i][visit] for i in group])
                owners = [i for i in group for _ in range(LENGTHS[i])]
                came = loop.send(rows, owners).split([LENGTHS[i] for i in group])
                parts |= dict(zip(group, came, strict=True))
            results.append(torch.cat([parts[i] for i in range(4)]))
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))


def test_a_sample_is_known_whether_others_of_its_batch_have_padding_or_not():
    loop, rows = Loopback(TEMPORAL, 0), gaussian(2, 6, 64)
    loop.send(rows, (4, 7))
    before = loop.n_bytes
    loop.send(rows.reshape(12, 64), (4,) * 6 + (7,) * 6)
    assert loop.n_bytes - before < 20


@given(m=st.integers(1, 40), n=st.integers(1, 40), rank=st.integers(1, 12), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_truncated_svd_is_nearly_the_best_of_its_rank(m, n, rank, seed):
    matrix = gaussian(m, n, seed=seed)
    rank = min(rank, m, n)
    left, right = truncated_svd(matrix, rank, seed)
    assert left.shape == (rank, m)
    assert right.shape == (rank, n)
    best = torch.linalg.svdvals(matrix)[rank:].norm()
    assert (left.T @ right - matrix).norm() <= 1.1 * best + 1e-4 * matrix.norm()


def test_low_rank_changes_are_sent_by_their_factors():
    change = gaussian(4, 64, 6) @ gaussian(6, 96, seed=1)
    loop = Loopback({"name": "low_rank", "rank": 6, "factors": {"name": "int8"}}, 0)
    assert error(loop.send(change), change) < 0.02
    assert loop.n_bytes < 6 * (4 * 64 + 96) * 1.1


def test_axes_make_correlated_columns_cheap_and_are_sent_once():
    mixing = torch.linalg.qr(gaussian(64, 64)).Q * torch.logspace(1, -2, 64)[:, None]
    sent = [gaussian(8, 32, 64, seed=seed) @ mixing for seed in range(1, 6)]
    inner = {"name": "topk", "keep": 0.3, "bits": 7, "rounding": "nearest"}
    plain = Loopback(inner, 0)
    axes = Loopback({"name": "transform", "inner": {**inner, "statistics": "column"}}, 0)
    for tensor in sent:
        assert error(axes.send(tensor), tensor) < 0.25 * error(plain.send(tensor), tensor)
    first_and_others = axes.n_bytes
    axes.send(sent[0])
    assert first_and_others > 5 * (axes.n_bytes - first_and_others) + 2 * 64 * 64 - 1000


def test_a_receiver_without_the_axes_says_so():
    sender = make_codec({"name": "transform", "inner": {"name": "int8"}}, 0)
    rows = gaussian(20, 16)
    sender.encode(rows)
    with pytest.raises(FedsplitError, match="both need new codecs"):
        make_codec({"name": "transform", "inner": {"name": "int8"}}, 0).decode(
            sender.encode(rows), rows.shape, rows.dtype
        )


def test_error_feedback_delivers_what_compression_left_out():
    """The mean of what arrives approaches a constant gradient; without feedback it never does."""
    gradient = gaussian(4, 32, 16)
    inner = {"name": "topk", "keep": 0.05, "bits": 8}
    means = {}
    for settings_ in (inner, {"name": "error_feedback", "inner": inner}):
        loop = Loopback(settings_, 0)
        received = [loop.send(gradient, range(4)) for _ in range(80)]
        means[settings_["name"]] = error(torch.stack(received).mean(0), gradient)
    assert means["error_feedback"] < 0.35
    assert means["topk"] > 0.7


def test_gradients_pass_straight_through():
    forward = Loopback({"name": "topk", "keep": 0.2, "rounding": "nearest"}, 0)
    backward = Loopback({"name": "bf16"}, 0)
    hidden = gaussian(4, 8, 16).requires_grad_()
    crossed = straight_through(hidden, forward, backward, range(4))
    weight = gaussian(4, 8, 16, seed=1)
    (crossed * weight).sum().backward()
    assert torch.equal(hidden.grad, weight.to(torch.bfloat16).float())
    assert int((crossed == 0).sum()) > 0.7 * crossed.numel()
    assert backward.n_bytes == hidden.numel() * 2
