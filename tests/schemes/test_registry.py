"""Schemes are found by name among all installed distributions."""

from importlib.metadata import EntryPoint

import pytest
from fedsplit.strategies.splitfed import SplitFed
from fedsplit.strategies.vanilla import Vanilla

from fedsplit.errors import FedsplitError
from fedsplit.schemes import find_scheme, scheme_names
from fedsplit.schemes.registry import GROUP


def entry(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, GROUP)


def test_the_projects_own_schemes_are_installed() -> None:
    assert {"splitfed", "vanilla", "fedlora"} <= set(scheme_names())
    assert find_scheme("splitfed") is SplitFed


def test_an_unknown_name_lists_what_exists() -> None:
    with pytest.raises(FedsplitError, match="strategy='splitfde': must be one of .*splitfed"):
        find_scheme("splitfde")


def test_a_name_registered_twice_is_refused() -> None:
    twice = [
        entry("x", "fedsplit.strategies.splitfed:SplitFed"),
        entry("x", "fedsplit.strategies.vanilla:Vanilla"),
    ]
    with pytest.raises(FedsplitError, match="more than once"):
        find_scheme("x", twice)


def test_one_distribution_seen_twice_is_no_clash() -> None:
    twice = [entry("x", "fedsplit.strategies.vanilla:Vanilla")] * 2
    assert find_scheme("x", twice) is Vanilla


def test_something_else_than_a_scheme_is_refused() -> None:
    with pytest.raises(FedsplitError, match="subclass of Scheme"):
        find_scheme("x", [entry("x", "json:dumps")])
