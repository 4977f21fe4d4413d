"""Partitions: every example on one device, the same for everybody, and as unlike as asked for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsplit.data.partition import PARTITIONS, dirichlet, divide, iid, natural, shard
from fedsplit.errors import FedsplitError
from fedsplit.seeds import generator

group_arrays = st.lists(st.integers(0, 6), min_size=30, max_size=120).map(np.array)


@settings(max_examples=60, deadline=None)
@given(
    groups=group_arrays,
    n_devices=st.integers(1, 10),
    partition=st.sampled_from(PARTITIONS),
    alpha=st.floats(0.01, 100),
    min_samples=st.integers(1, 3),
    seed=st.integers(0, 2**40),
)
def test_every_example_is_on_exactly_one_device(
    groups, n_devices, partition, alpha, min_samples, seed
):
    shares = divide(
        groups,
        n_devices,
        partition,
        generator(seed),
        alpha=alpha,
        min_samples=min_samples,
    )
    assert len(shares) == n_devices
    assert min(map(len, shares)) >= min_samples
    assert sorted(np.concatenate(shares)) == list(range(len(groups)))
    assert all((np.diff(share) > 0).all() for share in shares)


@settings(max_examples=20, deadline=None)
@given(groups=group_arrays, partition=st.sampled_from(PARTITIONS), seed=st.integers(0, 2**40))
def test_every_node_comes_to_the_same_division(groups, partition, seed):
    first, second = (divide(groups, 4, partition, generator(seed, "data")) for _ in range(2))
    for mine, theirs in zip(first, second, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_natural_keeps_groups_whole_while_there_are_enough():
    groups = np.repeat([0, 1, 2, 3, 4], 7)
    owned = [set(groups[share]) for share in natural(groups, 3)]
    assert owned == [{0, 3}, {1, 4}, {2}]


def test_natural_shares_a_group_between_the_devices_beyond_the_groups():
    groups = np.repeat([0, 1, 2], 10)
    shares = natural(groups, 5)
    assert [set(groups[share]) for share in shares] == [{0}, {1}, {2}, {0}, {1}]
    assert [len(share) for share in shares] == [5, 5, 10, 5, 5]


def test_iid_shares_are_of_equal_size():
    assert sorted(map(len, iid(23, 4, generator(0)))) == [5, 6, 6, 6]


def _distance_from_even(groups, shares):
    """Mean total variation between a device's classes and those of all data."""
    overall = np.bincount(groups, minlength=10) / len(groups)
    mixes = [np.bincount(groups[share], minlength=10) / max(1, len(share)) for share in shares]
    return np.mean([np.abs(mix - overall).sum() / 2 for mix in mixes])


def test_dirichlet_is_the_less_even_the_smaller_alpha():
    groups = np.repeat(np.arange(10), 200)
    distances = [
        _distance_from_even(groups, dirichlet(groups, 8, alpha, generator(0)))
        for alpha in (0.05, 0.5, 5.0, 500.0)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.6
    assert distances[-1] < 0.05


def test_a_device_gets_no_more_classes_than_it_has_shards():
    groups = np.repeat(np.arange(10), 40)
    shares = shard(groups, 10, 2, generator(3))
    assert all(len(set(groups[share])) <= 2 for share in shares)
    assert all(len(share) == 40 for share in shares)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"partition": "nearest"}, "data.partition='nearest': must be one of natural, iid"),
        ({"n_devices": 0}, "fleet.devices=0"),
        ({"n_devices": 21}, "fleet.devices=21: must be at most 20"),
        ({"min_samples": 5}, "fleet.devices=5: must be at most 4: there are 20 examples"),
    ],
)
def test_what_cannot_be_divided_is_refused(arguments, message):
    settings_ = {"n_devices": 5, "partition": "iid", "min_samples": 1} | arguments
    with pytest.raises(FedsplitError, match=message):
        divide(np.zeros(20, np.int64), rng=generator(0), **settings_)
