"""A second loss on the device: distance correlation, as it is defined, and exact across a cut."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsplit.errors import FedsplitError
from fedsplit.models import Boundary, load
from fedsplit.plan import Route
from fedsplit.privacy import PrivacySpec
from fedsplit.privacy.second_loss import distance_correlation, less_telling, read_by_neighbours
from tests.privacy.test_noise import OPEN, U, turn
from tests.tiny_split import OPTIMIZER, batches, gpt2, initial

WEIGHT = 3.0
NOPEEK = PrivacySpec(correlation_weight=WEIGHT)


def by_definition(first: np.ndarray, second: np.ndarray) -> float:
    """Return the squared distance correlation of points, item by item."""
    n = len(first)

    def centred(points: np.ndarray) -> np.ndarray:
        apart = np.array([[np.linalg.norm(a - b) for b in points] for a in points])
        found = np.empty((n, n))
        for i in range(n):
            for j in range(n):
                found[i, j] = apart[i, j] - apart[i].mean() - apart[:, j].mean() + apart.mean()
        return found

    a, b = centred(first), centred(second)
    covariance = sum(a[i, j] * b[i, j] for i in range(n) for j in range(n)) / n**2
    spreads = [sum(x[i, j] ** 2 for i in range(n) for j in range(n)) / n**2 for x in (a, b)]
    return float(covariance / np.sqrt(spreads[0] * spreads[1]))


def apart(points: np.ndarray) -> Tensor:
    """Return the distances between points."""
    return torch.cdist(torch.tensor(points), torch.tensor(points))


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 9), st.integers(0, 1000))
def test_it_is_what_its_definition_says(n: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    first, second = draw.normal(size=(n, 2)), draw.normal(size=(n, 5))
    found = float(distance_correlation(apart(first), apart(second)))
    assert found == pytest.approx(by_definition(first, second), rel=1e-9)
    assert float(distance_correlation(apart(first), apart(3 * first + 1))) == pytest.approx(1)
    assert float(distance_correlation(apart(first), torch.zeros(n, n).double())) == 0


def by_hand(route: Route) -> dict[str, Tensor]:
    """Return the adapters of a loop over the unsplit model with both losses."""
    model = load(gpt2())
    first, *rest = route.segments
    parameters = {
        name: torch.nn.Parameter(value.clone()) for name, value in initial(gpt2()).items()
    }
    model.install(parameters)
    model.train()
    stepper = OPTIMIZER.build(parameters.values())
    for batch in batches(2):
        stepper.zero_grad()
        boundary = model.run(first, batch.inputs)
        assert isinstance(boundary, Boundary)
        seen = batch.inputs["attention_mask"].bool()
        vectors, ids = boundary.tensors[0][seen], batch.inputs["input_ids"][seen]
        tokens = torch.nn.functional.one_hot(ids).float() / 2**0.5
        second = distance_correlation(torch.cdist(tokens, tokens), torch.cdist(vectors, vectors))
        output = boundary
        for segment in rest:
            output = model.run(segment, batch.inputs, output)
        (output.loss + WEIGHT * second).backward()
        stepper.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


@pytest.mark.parametrize("route", [OPEN, U], ids=["open", "U"])
def test_a_split_turn_trains_on_both_losses_as_the_unsplit_model_does(route: Route) -> None:
    expected, (_, found) = by_hand(route), turn(NOPEEK, route)
    _, alone = turn(None, route)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-4)
    assert any(not torch.allclose(found[name], alone[name], atol=1e-3) for name in alone)


def test_what_is_sent_and_evaluated_is_what_it_was() -> None:
    for train in (True, False):
        (sent, _), (bare, _) = turn(NOPEEK, train=train), turn(None, train=train)
        assert sent[0][48:] == bare[0][48:]  # past the token
        assert len(sent[1]) == len(bare[1])
    ids = {"input_ids": torch.arange(6).reshape(2, 3)}
    tensor = torch.rand(2, 3, 4, requires_grad=True)
    (found,) = less_telling(Boundary.pack(tensor), ids, correlation=WEIGHT, reader=0)
    assert torch.equal(found, tensor)


def test_padding_is_not_looked_at() -> None:
    draw = torch.Generator().manual_seed(0)
    ids, vectors = torch.tensor([[1, 2, 1, 3]]), torch.rand(1, 4, 5, generator=draw)
    mask = torch.tensor([[1, 1, 1, 0]])
    gradients = []
    for own, inputs in (
        (vectors, {"input_ids": ids, "attention_mask": mask}),
        (vectors[:, :3], {"input_ids": ids[:, :3]}),
    ):
        tensor = own.clone().requires_grad_()
        (found,) = less_telling(Boundary.pack(tensor), inputs, correlation=WEIGHT, reader=0)
        found.sum().backward()
        gradients.append(tensor.grad)
    long, short = gradients
    assert long is not None
    assert short is not None
    torch.testing.assert_close(long[:, :3], short)
    assert torch.equal(long[:, 3], torch.ones(1, 5))


def test_a_boundary_without_a_vector_for_each_token_is_refused() -> None:
    tensor = torch.rand(2, 5, 4, requires_grad=True)
    with pytest.raises(FedsplitError, match=r"correlation_weight=3.0: a boundary of shape \(2, 5"):
        less_telling(
            Boundary.pack(tensor), {"input_ids": torch.zeros(2, 3)}, correlation=WEIGHT, reader=0
        )


def test_a_reader_by_neighbours_is_what_its_definition_says() -> None:
    draw = torch.Generator().manual_seed(0)
    vectors, tokens = torch.randn(7, 3, generator=draw), torch.tensor([1, 2, 1, 3, 3, 3, 4])
    apart = (vectors[:, None] - vectors[None]).square().sum(-1)
    scale = 0.05 * float(apart.sum()) / (7 * 6)
    total = 0.0
    for i in range(7):
        chances = {j: float(torch.exp(-apart[i, j] / scale)) for j in range(7) if j != i}
        right = sum(chance for j, chance in chances.items() if tokens[j] == tokens[i])
        total += right / sum(chances.values())
    assert float(read_by_neighbours(vectors, tokens)) == pytest.approx(total / 7, rel=1e-5)
    places = tokens[:, None].float() + 0.001 * vectors
    alike = read_by_neighbours(places, tokens)
    assert float(alike) == pytest.approx(5 / 7, rel=1e-3)  # all but those that stand once


def test_a_reader_is_kept_from_reading() -> None:
    """A step against the gradient that comes out makes the boundary say less."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 4, (2, 8), generator=draw)
    tensor = torch.randn(2, 8, 4, generator=draw).requires_grad_()
    (found,) = less_telling(Boundary.pack(tensor), {"input_ids": ids}, correlation=0, reader=10.0)
    found.backward(torch.zeros_like(found))
    assert tensor.grad is not None
    before = read_by_neighbours(tensor.detach().flatten(0, 1), ids.flatten())
    after = read_by_neighbours((tensor.detach() - 0.1 * tensor.grad).flatten(0, 1), ids.flatten())
    assert float(after) < float(before)
    pixels = {"pixel_values": torch.rand(2, 3, 4, 4)}
    with pytest.raises(FedsplitError, match=r"reader_weight=10.0: must be 0, images"):
        less_telling(Boundary.pack(tensor), pixels, correlation=0, reader=10.0)
