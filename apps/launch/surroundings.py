"""What of the user's surroundings reaches the processes of a run, and what must not.

Imported before anything else of the project, while a user's modules still hide others: it takes
from the standard library only what has a name that nobody gives to a module.
"""

import atexit
import gc
import os
import sys
from collections.abc import Mapping
from pathlib import Path

# An environment variable that every process of a run has, and no other process.
MARK = "FEDSPLIT_RUN"
_USERS_PATH = "FEDSPLIT_PYTHONPATH"
# A Unix socket's path has at most 107 characters; Ray puts some 70 of its own behind this.
_LONGEST_TMP = 16
_USUAL = (700, 10, 10)
_LOOPBACK = "localhost,127.0.0.1,::1"


def look_for_users_modules_last() -> None:
    """Move the working folder and PYTHONPATH behind the installed packages.

    A user's ``apps.py`` or ``psutil.py`` that happens to lie there is then not taken for ours, or
    for one that we need; a user's own scheme is still found.
    """
    users = {_resolved(entry) for entry in ("", *_entries("PYTHONPATH"))} - {_root()}
    own = [entry for entry in sys.path if _resolved(entry) not in users]
    sys.path[:] = [*own, *(entry for entry in sys.path if _resolved(entry) in users)]


def append_users_modules() -> None:
    """Let a process of a run find what its starter's PYTHONPATH holds, behind everything else."""
    sys.path += [entry for entry in _entries(_USERS_PATH) if entry not in sys.path]


def collect_seldom() -> None:
    """Let this process spend no time on looking for garbage in what it imports.

    Importing torch and its like makes a million objects that stay: looking through them again
    and again takes a second of processor time, and another one when the process ends.
    """
    gc.set_threshold(100_000, 50, 1000)
    atexit.register(gc.freeze)


def collect_as_usual() -> None:
    """Look for garbage again, in what is made from now on: this process has imported all it needs.

    A command that watches a run for days must not keep what it has shown.
    """
    gc.freeze()
    gc.set_threshold(*_USUAL)


def environment(flower_home: Path) -> dict[str, str]:
    """Return the environment of a run's processes, with `flower_home` for what Flower keeps."""
    users = [*_entries("PYTHONPATH"), *_entries(_USERS_PATH)]
    kept = {key: value for key, value in os.environ.items() if key not in _DROPPED}
    root = _root()
    path = {} if root in _installed() else {"PYTHONPATH": str(root)}
    absolute = [str(_resolved(entry)) for entry in users if _resolved(entry) != root]
    return {
        **kept,
        **path,
        **_past_proxies(kept),
        _USERS_PATH: os.pathsep.join(absolute),
        "PYTHONSAFEPATH": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}",
        "FLWR_HOME": str(flower_home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # A device's few texts at a time are done before other threads have woken up.
        "TOKENIZERS_PARALLELISM": "false",
        # Steps are some 10 % faster when freed activations are kept instead of unmapped.
        "MALLOC_MMAP_THRESHOLD_": "1073741824",
        "MALLOC_TRIM_THRESHOLD_": "4294967296",
        "MALLOC_TOP_PAD_": "67108864",
    }


def ray_environment() -> dict[str, str]:
    """Return variables with which Ray listens on loopback alone, and obeys who has them alone."""
    import secrets

    return {
        # On any system, Ray then takes loopback for this machine's address. Told 127.0.0.1 as
        # `_node_ip_address`, it puts a network's in its place.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }


def make_home() -> Path:
    """Make a folder for what a run leaves nowhere else, private to its user, with a short path."""
    import tempfile

    place = tempfile.gettempdir()
    if len(place) > _LONGEST_TMP and os.access("/tmp", os.W_OK | os.X_OK):
        place = "/tmp"
    return Path(tempfile.mkdtemp(prefix="fedsplit-", dir=place))


# A cluster of somebody else's is not where a run belongs.
_DROPPED = ("PYTHONPATH", "RAY_ADDRESS", "PYTHONSTARTUP")


def _past_proxies(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that keep this machine's own addresses from going through a proxy."""
    return {
        name: ",".join(filter(None, (variables.get(name), _LOOPBACK)))
        for name in ("no_proxy", "NO_PROXY")
    }


def _entries(variable: str) -> list[str]:
    return [entry for entry in os.environ.get(variable, "").split(os.pathsep) if entry]


def _root() -> Path:
    """Return the folder from which this fedsplit is imported."""
    import fedsplit

    assert fedsplit.__file__ is not None
    return Path(fedsplit.__file__).resolve().parent.parent


def _installed() -> set[Path]:
    """Return the folders in which any Python of this installation finds packages by itself."""
    import site
    import sysconfig

    names = ("purelib", "platlib")
    folders = [*(sysconfig.get_path(name) for name in names), site.getusersitepackages()]
    return {Path(folder).resolve() for folder in folders}


def _resolved(entry: str) -> Path:
    return Path(entry).resolve()
