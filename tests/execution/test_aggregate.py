"""How adapter sets become one, beside the dense matrices that they stand for."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedsplit.errors import SettingsError
from fedsplit.execution.aggregate import (
    AGGREGATIONS,
    FFA,
    FLEXLORA,
    MEAN,
    PADDED,
    RAFLORA,
    Part,
    aggregate,
    aggregation_error,
)
from fedsplit.growth import FEDEX, LEAVE_RESIDUALS, STACKING, growth
from fedsplit.models.ranks import at_rank, put_back, residual_rank, residuals, trained

A, B = "base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"
V, U = A.replace("lora", "residual"), B.replace("lora", "residual")
HEAD = "base_model.model.score.weight"
IN, OUT, RANK = 9, 7, 4
WEIGHTS = (1.0, 2.0, 5.0)


def one_set(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {A: draw(RANK, IN), B: draw(OUT, RANK), HEAD: draw(3, OUT)}


def parts_of(ranks: tuple[int | None, ...], same_a: bool = False) -> list[Part]:
    """Parts that began with one set, of which each trained its first components."""
    before = one_set(99)
    parts = []
    for seed, (rank, weight) in enumerate(zip(ranks, WEIGHTS, strict=True)):
        trained = one_set(seed) | ({A: before[A]} if same_a else {})
        whole = put_back(at_rank(trained, rank), before)
        parts.append(Part(adapters=whole, weight=weight, rank=rank))
    return parts


def dense(adapters: dict[str, Tensor]) -> Tensor:
    """The matrix that a set stands for."""
    whole = adapters[B] @ adapters[A]
    return whole + (adapters[U] @ adapters[V] if V in adapters else 0)


def dense_mean(parts: list[Part]) -> Tensor:
    """The oracle: the mean of the matrices that the devices trained."""
    total = sum(part.weight for part in parts)
    return sum(part.weight / total * dense(at_rank(part.adapters, part.rank)) for part in parts)


EQUAL, MIXED = (None, None, None), (1, 2, 4)


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("ranks", [EQUAL, MIXED], ids=["equal", "mixed"])
def test_the_error_is_that_of_the_dense_matrices(how: str, ranks: tuple[int | None, ...]) -> None:
    parts = parts_of(ranks, same_a=how == FFA)
    found = aggregate(how, parts)
    mean = dense_mean(parts)
    expected = float((mean - dense(found)).norm() / mean.norm())
    assert aggregation_error(parts, found) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("how", [FFA, FEDEX, STACKING])
@pytest.mark.parametrize("ranks", [EQUAL, MIXED], ids=["equal", "mixed"])
def test_some_are_the_dense_mean(how: str, ranks: tuple[int | None, ...]) -> None:
    parts = parts_of(ranks, same_a=how == FFA)
    found = aggregate(how, parts)
    torch.testing.assert_close(dense(found), dense_mean(parts), rtol=0, atol=1e-12)
    assert aggregation_error(parts, found) < 1e-12


@pytest.mark.parametrize("how", LEAVE_RESIDUALS)
def test_residuals_add_up_at_no_higher_rank_than_the_matrix_has(how: str) -> None:
    parts = parts_of(EQUAL)
    for expected in (None, OUT, OUT):
        found = aggregate(how, parts)
        torch.testing.assert_close(dense(found), dense_mean(parts), rtol=0, atol=1e-11)
        assert expected is None or residual_rank(found) == expected
        beside = residuals(found)
        parts = [replace(p, adapters={**p.adapters, **beside}) for p in parts_of(EQUAL)]


def test_residuals_that_parts_began_with_apart_are_averaged() -> None:
    apart = [aggregate(FEDEX, parts_of(EQUAL)[:n]) for n in (2, 3)]
    parts = [Part(adapters=one, weight=w) for one, w in zip(apart, (1, 3), strict=True)]
    mean = dense(apart[0]) / 4 + dense(apart[1]) * 3 / 4
    torch.testing.assert_close(dense(aggregate(FEDEX, parts)), mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("how", LEAVE_RESIDUALS)
@pytest.mark.parametrize("ranks", [(3, 3), (1, 2), (4, 1), (1,), (4,), (1, 1, 1)])
def test_residuals_grow_by_what_was_trained(how: str, ranks: tuple[int, ...]) -> None:
    parts = parts_of((*ranks, None, None)[:3])[: len(ranks)]
    assert residual_rank(aggregate(how, parts)) == min(growth(how, ranks, RANK), OUT)


def test_the_residual_of_fedex_is_of_a_rank_less_and_of_one_part_there_is_none() -> None:
    assert growth(FEDEX, [RANK, RANK], RANK) == RANK
    assert growth(FEDEX, [2, 3, 4], RANK) == 7
    assert growth(STACKING, [2, 3, 4], RANK) == 9
    assert growth(FEDEX, [RANK], RANK) == 0


def test_stacking_begins_afresh() -> None:
    found = aggregate(STACKING, parts_of(MIXED))
    assert not found[B].any()
    last = parts_of(MIXED)[-1].adapters[A][3]
    torch.testing.assert_close(found[A][3], last)  # only one part has it


def test_flexlora_is_the_nearest_of_its_rank() -> None:
    parts = parts_of(MIXED)
    left, sizes, right = torch.linalg.svd(dense_mean(parts))
    nearest = left[:, :RANK] * sizes[:RANK] @ right[:RANK]
    torch.testing.assert_close(dense(aggregate(FLEXLORA, parts)), nearest, rtol=0, atol=1e-12)


def test_raflora_averages_a_component_over_those_who_have_it() -> None:
    parts = parts_of(MIXED)
    total = torch.zeros(OUT, IN, dtype=torch.float64)
    for component in range(RANK):
        having = [part for part in parts if (part.rank or RANK) > component]
        weight = sum(part.weight for part in having)
        for part in having:
            b, a = part.adapters[B][:, component], part.adapters[A][component]
            total += part.weight / weight * torch.outer(b, a)
    left, sizes, right = torch.linalg.svd(total)
    nearest = left[:, :RANK] * sizes[:RANK] @ right[:RANK]
    torch.testing.assert_close(dense(aggregate(RAFLORA, parts)), nearest, rtol=0, atol=1e-12)


@pytest.mark.parametrize("how", [PADDED, MEAN])
def test_components_that_nobody_trained_stay(how: str) -> None:
    before = one_set(99)
    found = aggregate(how, parts_of((1, 2, 2)))
    torch.testing.assert_close(found[A][2:], before[A][2:])
    torch.testing.assert_close(found[B][:, 2:], before[B][:, 2:])


def test_components_that_some_did_not_train_are_zero_there_or_as_they_were() -> None:
    parts, before = parts_of(MIXED), one_set(99)
    last = parts[-1].adapters[A][3]
    torch.testing.assert_close(aggregate(PADDED, parts)[A][3], 5 / 8 * last)
    torch.testing.assert_close(aggregate(MEAN, parts)[A][3], 5 / 8 * last + 3 / 8 * before[A][3])


@pytest.mark.parametrize("how", [FLEXLORA, RAFLORA])
def test_what_comes_of_singular_values_begins_like_lora(how: str) -> None:
    """Rows of A are orthogonal, as long as drawn ones; the largest components come first."""
    found = aggregate(how, parts_of(MIXED))
    torch.testing.assert_close(
        found[A] @ found[A].T, torch.eye(RANK, dtype=torch.float64) / 3, rtol=0, atol=1e-12
    )
    sizes = found[B].norm(dim=0)
    assert (sizes[:-1] >= sizes[1:]).all()


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_what_has_no_rank_is_averaged(how: str) -> None:
    parts = parts_of(MIXED, same_a=how == FFA)
    mean = sum(part.weight * part.adapters[HEAD] for part in parts) / 8
    found = aggregate(how, parts)
    torch.testing.assert_close(found[HEAD], mean)
    assert list(trained(found)) == list(parts[0].adapters)


def test_ranks_above_a_modules_dimensions_are_padded() -> None:
    small = [
        Part(adapters={A: p.adapters[A][:, :2], B: p.adapters[B]}, weight=1)
        for p in parts_of(EQUAL)
    ]
    found = aggregate(FLEXLORA, small)
    assert found[A].shape == (RANK, 2)
    assert aggregation_error(small, found) == pytest.approx(0, abs=1e-12)


def test_convolutions_are_matrices_too() -> None:
    parts = [
        Part(adapters={A: torch.randn(2, 3, 3, 3), B: torch.randn(5, 2, 1, 1)}, weight=1)
        for _ in range(2)
    ]
    found = aggregate(RAFLORA, parts)
    assert (found[A].shape, found[B].shape) == ((2, 3, 3, 3), (5, 2, 1, 1))


def test_ffa_refuses_an_a_that_was_trained() -> None:
    with pytest.raises(SettingsError, match=r"aggregator.adapters='ffa'"):
        aggregate(FFA, parts_of(EQUAL))
