"""What a command says and returns when it cannot go on."""

from collections.abc import Callable

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from fedsplit.errors import FedsplitError
from fedsplit.report.tables import plain_text

_USAGE, _INTERRUPTED = 2, 130


def exit_code(command: Callable[[], int]) -> int:
    """Return what `command` returns.

    What is wrong with the user's input is one line on standard error, and exit code 2. What is
    wrong with the program keeps its traceback.
    """
    try:
        return command()
    except (FedsplitError, HydraException, OmegaConfBaseException) as error:
        return _refuse(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        return _refuse(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        return _INTERRUPTED


def _refuse(reason: str) -> int:
    line = plain_text(" ".join(reason.split()))
    Console(stderr=True).print(
        f"[red]error[/red]: {line}", highlight=False, soft_wrap=True, emoji=False
    )
    return _USAGE
