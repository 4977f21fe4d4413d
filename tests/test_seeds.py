"""Random draws depend on the seed and their name, and on nothing else."""

from hypothesis import given
from hypothesis import strategies as st

from fedsplit.seeds import derive_seed, generator

names = st.lists(st.one_of(st.text(max_size=8), st.integers()), min_size=1, max_size=3)


@given(st.integers(), names)
def test_a_named_generator_can_be_made_again(seed: int, path: list[str | int]) -> None:
    assert generator(seed, *path).random() == generator(seed, *path).random()


@given(st.integers(), st.integers(), names, names)
def test_other_names_or_seeds_give_other_draws(
    first: int, second: int, path: list[str | int], other: list[str | int]
) -> None:
    if (first, path) != (second, other):
        assert derive_seed(first, *path) != derive_seed(second, *other)


def test_a_number_and_its_text_are_different_names() -> None:
    assert derive_seed(0, 1) != derive_seed(0, "1")
