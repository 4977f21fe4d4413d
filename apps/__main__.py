"""The entry point of the ``fedsplit`` command, also ``python -m fedsplit.apps``."""

import sys

from .launch.surroundings import collect_seldom, look_for_users_modules_last


def main() -> int:
    """Run the command line; return the exit code.

    Before anything else is imported, modules of the user's that happen to be called like those
    that we need move behind them.
    """
    look_for_users_modules_last()
    collect_seldom()
    from .cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
