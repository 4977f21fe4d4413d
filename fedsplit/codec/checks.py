"""Checks of codec settings, which come from YAML or JSON and may hold anything."""

from fedsplit.errors import require


def number(field: str, value: object, low: float, high: float) -> float:
    """Return `value` as a float in [low, high].

    Raises
    ------
    FedsplitError
        If it is no such number (NaN and booleans included).
    """
    good = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    require(good, f"codec.{field}", value, f"a number from {low:g} to {high:g}")
    return float(value)  # type: ignore[arg-type]


def flag(field: str, value: object) -> bool:
    """Return `value`.

    Raises
    ------
    FedsplitError
        If it is neither true nor false.
    """
    require(isinstance(value, bool), f"codec.{field}", value, "true or false")
    return bool(value)


def integer(field: str, value: object, low: int, high: int) -> int:
    """Return `value` as an integer in [low, high].

    Raises
    ------
    FedsplitError
        If it is no such integer.
    """
    good = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    require(good, f"codec.{field}", value, f"an integer from {low} to {high}")
    return int(value)  # type: ignore[call-overload,no-any-return]
