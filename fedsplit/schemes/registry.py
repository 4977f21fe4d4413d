"""Schemes by name: what is installed under the entry-point group `fedsplit.strategies`."""

from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points

from fedsplit.errors import FedsplitError
from fedsplit.schemes.scheme import Scheme

GROUP = "fedsplit.strategies"


def scheme_names(found: Iterable[EntryPoint] | None = None) -> tuple[str, ...]:
    """Return the names of all installed schemes, sorted."""
    return tuple(sorted(_by_name(found)))


def find_scheme(
    name: str, found: Iterable[EntryPoint] | None = None, *, field: str = "strategy"
) -> type[Scheme]:
    """Return the scheme class registered as `name`.

    Parameters
    ----------
    name : str
        Entry-point name, such as ``splitfed``.
    found : iterable of EntryPoint, optional
        Where to look; by default every installed distribution.
    field : str
        The setting that names it, for the error.

    Raises
    ------
    FedsplitError
        If no or several distributions register `name`, or what they register is no
        `Scheme`; lists the names that exist.
    """
    entries = _by_name(found)
    if name not in entries:
        raise FedsplitError(f"{field}={name!r}: must be one of {', '.join(sorted(entries))}")
    candidates = entries[name]
    if len(candidates) > 1:
        places = ", ".join(entry.value for entry in candidates)
        raise FedsplitError(f"{field}={name!r}: registered more than once ({places})")
    scheme = candidates[0].load()
    if not (isinstance(scheme, type) and issubclass(scheme, Scheme)):
        raise FedsplitError(f"{field}={name!r}: {candidates[0].value} must be a subclass of Scheme")
    return scheme


def _by_name(found: Iterable[EntryPoint] | None) -> dict[str, list[EntryPoint]]:
    entries: dict[str, dict[str, EntryPoint]] = {}
    for entry in entry_points(group=GROUP) if found is None else found:
        # One distribution can be found twice, through the path and through an editable install.
        entries.setdefault(entry.name, {})[entry.value] = entry
    return {name: list(values.values()) for name, values in entries.items()}
