"""The one exception that fedsplit raises for bad input."""

from collections.abc import Iterable


class FedsplitError(ValueError):
    """Bad input, named: which field, what it was, what is allowed."""


def require(condition: bool, field: str, value: object, allowed: str) -> None:
    """Raise a `FedsplitError` naming `field`, its `value` and what is `allowed`.

    Raises
    ------
    FedsplitError
        If `condition` is false.
    """
    if not condition:
        raise FedsplitError(f"{field}={value!r}: must be {allowed}")


def require_choice(field: str, value: object, choices: Iterable[object]) -> None:
    """Raise a `FedsplitError` listing `choices` unless `value` is one of them.

    Raises
    ------
    FedsplitError
        If `value` is not among `choices`.
    """
    known = list(choices)
    if value not in known:
        listed = ", ".join(str(choice) for choice in known)
        raise FedsplitError(f"{field}={value!r}: must be one of {listed}")
