"""What of a node's disk a server may have read: nothing outside the folder that the node allows."""

from dataclasses import replace
from pathlib import Path

from fedsplit.data.spec import FROM_FILES, DataSpec
from fedsplit.errors import FedsplitError, require


def confine(spec: DataSpec, root: str | Path | None) -> DataSpec:
    """Return `spec` with its files below `root`, for a node that obeys a server's `spec`.

    A relative path is taken from `root`. Links are followed before they are judged.

    Parameters
    ----------
    spec : DataSpec
        What a server asks a node to read.
    root : str, Path or None
        The node's ``data-root``: the only folder that a server may name files of; None allows all.

    Raises
    ------
    FedsplitError
        If `root` is no folder, or the files are not below it.
    """
    if root is None:
        return spec
    allowed = Path(root).expanduser()
    require(allowed.is_dir(), "data-root", str(root), "an existing folder")
    allowed = allowed.resolve()
    if spec.source in FROM_FILES and spec.path is not None:
        test = spec.test_path
        return replace(
            spec,
            path=_below(allowed, "data.path", spec.path),
            test_path=None if test is None else _below(allowed, "data.test_path", test),
        )
    if spec.source == "hub" and spec.name is not None and _is_local(spec.name):
        return replace(spec, name=_below(allowed, "data.name", spec.name))
    return spec


def _is_local(name: str) -> bool:
    """Return whether the `datasets` library would read `name` from this machine's disk."""
    return Path(name).expanduser().exists() or name.startswith(("/", "~", ".")) or ":" in name


def _below(allowed: Path, field: str, path: str) -> str:
    meant = (allowed / Path(path).expanduser()).resolve()
    if not meant.is_relative_to(allowed):
        raise FedsplitError(f"{field}={path!r}: must be below this node's data-root")
    return str(meant)
