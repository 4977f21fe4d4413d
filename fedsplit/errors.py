"""What fedsplit raises, by whose fault it is.

Whoever catches one knows what may go on: only a `NodeLost` costs its own turn and no more.
"""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class FedsplitError(ValueError):
    """What was given cannot be used; its kinds say whose it is."""


class SettingsError(FedsplitError):
    """A wrong value of the user's: which field, what it was, what is allowed."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"{field}={value!r}: must be {allowed}")
        self.field, self.value, self.allowed = field, value, allowed


class PlanError(FedsplitError):
    """A plan of a scheme that cannot be carried out, found before anything of it is sent."""


class NodeLost(FedsplitError):
    """A node refused, failed, answered what cannot be, or is gone: its turn is lost, no other."""


class InfeasibleError(FedsplitError):
    """No plan meets a constraint.

    Parameters
    ----------
    constraint : str
        Which constraint, in words ("memory of device 3", "bandwidth of uplink").
    needed, available : float
        What the best plan would need and what there is, in `unit`.
    unit : str
        Unit of both.
    """

    def __init__(self, constraint: str, needed: float, available: float, unit: str) -> None:
        self.constraint = constraint
        self.needed = float(needed)
        self.available = float(available)
        self.unit = unit
        super().__init__(
            f"{constraint}: needs {self.needed:g} {unit}, has {self.available:g} {unit}, "
            f"off by {self.shortfall:g} {unit}"
        )

    @property
    def shortfall(self) -> float:
        """By how much the constraint is missed, in `unit`."""
        return abs(self.needed - self.available)


@contextmanager
def within(group: str) -> Iterator[None]:
    """Have a wrong setting that is raised inside be named as one of `group`, as its user wrote it.

    Raises
    ------
    SettingsError
        In place of one whose field has no group yet.
    """
    try:
        yield
    except SettingsError as error:
        if "." in error.field:
            raise
        raise SettingsError(f"{group}.{error.field}", error.value, error.allowed) from error


def require(condition: bool, field: str, value: object, allowed: str) -> None:
    """Raise a `SettingsError` naming `field`, its `value` and what is `allowed`.

    Raises
    ------
    SettingsError
        If `condition` is false.
    """
    if not condition:
        raise SettingsError(field, value, allowed)


def require_choice(field: str, value: object, choices: Iterable[object]) -> None:
    """Raise a `SettingsError` listing `choices` unless `value` is one of them.

    Raises
    ------
    SettingsError
        If `value` is not among `choices`.
    """
    known = list(choices)
    if value not in known:
        raise SettingsError(field, value, f"one of {', '.join(map(str, known))}")


def require_known(field: str, value: object, known: Iterable[str]) -> None:
    """Raise a `SettingsError` with the nearest known name unless the last part of `field` is known.

    Parameters
    ----------
    field : str
        Dotted name of a setting, whose last part is looked up in `known`.
    value : object
        What it was given.
    known : iterable of str
        Names that may stand in its place.

    Raises
    ------
    SettingsError
        If it is none of them; lists the nearest first.
    """
    names = list(known)
    parent, dot, name = field.rpartition(".")
    if name in names:
        return
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        allowed = f"a known setting; the nearest is {parent}{dot}{near[0]}"
    else:
        place = f" of {parent}" if parent else ""
        allowed = f"a known setting{place}: {', '.join(names) or 'there are none'}"
    raise SettingsError(field, value, allowed)
