"""Attacks read tokens that were planted, and none that are not there."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedsplit.privacy import (
    Learner,
    Observed,
    guessing,
    labels_from_gradient,
    nearest_embedding,
    rouge_l,
    success,
    tokens_from_embeddings,
)
from fedsplit.privacy.inverter import Training

WORDS, WIDTH, TOKENS = 60, 24, 20
QUICK = Training(hidden=96, steps=300, every=50, patience=9, lr=5e-3)


def embedding() -> Tensor:
    """Return embeddings of a small vocabulary, centred."""
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(WORDS, WIDTH, generator=draw)
    return weight - weight.mean(0)


def seen(texts: int, seed: int, noise: float = 0.0, shifted: bool = False) -> Observed:
    """Return what crosses a cut: a fixed rotation of embeddings, perhaps of the token before."""
    draw = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(99)
    rotation, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=fixed))
    tokens = torch.randint(0, WORDS, (texts, TOKENS), generator=draw)
    source = tokens.roll(1, 1) if shifted else tokens
    vectors = 3 * embedding()[source] @ rotation + 1
    vectors = vectors + noise * torch.randn(vectors.shape, generator=draw)
    return Observed(vectors.reshape(-1, WIDTH), tokens.reshape(-1), (TOKENS,) * texts)


def share(reader, observed: Observed) -> float:  # type: ignore[no-untyped-def]
    return success(reader(observed), observed.tokens, observed.lengths).tokens


def test_the_nearest_embedding_is_read_where_nothing_was_computed() -> None:
    observed = seen(2, 0)
    plain = Observed(embedding()[observed.tokens], observed.tokens, observed.lengths)
    assert share(nearest_embedding(embedding()), plain) == 1.0
    assert share(nearest_embedding(embedding()), observed) < 0.5


def test_a_linear_map_reads_what_was_turned() -> None:
    reader = Learner(seen(10, 1), embedding()).ridge()
    assert share(reader, seen(4, 2)) == 1.0


def test_the_inverter_reads_what_no_linear_map_can() -> None:
    """Each vector holds the token before: only who looks at the neighbours can tell."""
    own, private = seen(40, 1, shifted=True), seen(4, 2, shifted=True)
    linear = share(Learner(own, embedding()).ridge(), private)
    assert linear < 0.15
    assert share(Learner(own, embedding()).inverter(0, QUICK), private) > 0.8


@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_the_inverter_is_not_weaker_than_the_linear_map(noise: float) -> None:
    own, private = seen(20, 1, noise), seen(20, 2, noise)
    linear = share(Learner(own, embedding()).ridge(), private)
    assert share(Learner(own, embedding()).inverter(0, QUICK), private) >= linear - 0.02


def test_nothing_is_read_of_noise_alone() -> None:
    own, private = seen(10, 1), seen(10, 2)
    own = Observed(torch.randn(own.vectors.shape), own.tokens, own.lengths)
    private = Observed(torch.randn(private.vectors.shape), private.tokens, private.lengths)
    for reader in (
        Learner(own, embedding()).ridge(),
        Learner(own, embedding()).inverter(0, QUICK),
    ):
        assert share(reader, private) < 5 / WORDS


def test_attacks_are_the_same_each_time_and_leave_the_generator_alone() -> None:
    own, private = seen(5, 1), seen(2, 2)
    before = torch.random.get_rng_state()
    first = Learner(own, embedding()).inverter(3, QUICK)(private)
    assert torch.equal(Learner(own, embedding()).inverter(3, QUICK)(private), first)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("mixing", [False, True], ids=["head", "blocks and head"])
def test_labels_are_read_from_the_gradient_of_what_went_home(mixing: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    head = torch.randn(WIDTH, WORDS, generator=draw)
    labels = torch.randint(0, WORDS, (3, TOKENS), generator=draw)

    def scores(boundary: Tensor) -> Tensor:
        mixed = boundary.cumsum(1) / 4 if mixing else 0
        return torch.nn.functional.layer_norm(boundary + mixed, (WIDTH,)) @ head

    boundary = torch.randn(3, TOKENS, WIDTH, generator=draw, requires_grad=True)
    loss = cross_entropy(scores(boundary).flatten(0, 1), labels.flatten())
    (gradient,) = torch.autograd.grad(loss, boundary)
    found = labels_from_gradient(scores, boundary.detach(), gradient)
    assert (found == labels).float().mean() > (0.5 if mixing else 0.99)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_trained_embeddings_tell_which_tokens_a_device_has(decay: float) -> None:
    weight = torch.nn.Parameter(torch.randn(WORDS, WIDTH))
    before = weight.detach().clone()
    optimizer = torch.optim.AdamW([weight], lr=1e-3, weight_decay=decay)
    for tokens in ([3, 5, 5], [8, 3, 41]):
        optimizer.zero_grad()
        torch.nn.functional.embedding(torch.tensor(tokens), weight).square().sum().backward()
        optimizer.step()
    assert tokens_from_embeddings(before, weight.detach()).tolist() == [3, 5, 8, 41]


def test_rouge_l_is_that_of_its_definition() -> None:
    assert rouge_l([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(2 * 3 / 8)
    assert rouge_l([1, 2, 3], [1, 2, 3]) == 1.0
    assert rouge_l([1], [2, 3]) == 0.0
    assert rouge_l([], [1]) == 0.0
    assert rouge_l([7, 1, 2], [1, 2]) == pytest.approx(2 * 2 / 5)


def test_guessing_is_the_servers_most_frequent_token() -> None:
    assert guessing(torch.tensor([4, 4, 1]), torch.tensor([4, 1, 1, 4])) == 0.5
