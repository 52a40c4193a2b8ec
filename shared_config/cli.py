"""The `kempnerforge` command: ``kempnerforge COMMAND CONFIG [--option value] [--section.field value ...]``.

Options without a dot belong to the command, those with a dot override the config. Any error is a short message on
stderr and exit status 2; with ``--debug`` anywhere on the line, the traceback stands before it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from shared_config.training.signals import INTERRUPTED, INTERRUPTS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; without arguments that of the process, which then exits.

    Returns:
        exit status: 0 success, 1 a comparison found a difference, 2 something to fix, or that could not run,
        129 hung up, 130 interrupted, 143 terminated.
    """
    if arguments is not None:
        return _status(arguments)
    INTERRUPTS.take()
    from shared_config.training import streams  # once interrupts are taken care of, like all that it needs

    sys.stdout, sys.stderr = streams.outliving(sys.stdout), streams.outliving(sys.stderr)
    status = INTERRUPTED
    try:
        status = _status(sys.argv[1:])
    except KeyboardInterrupt:
        pass
    except SystemExit as end:  # that of --help and --version
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    finally:
        INTERRUPTS.at_once = status
    streams.flush()
    if _is_launched():
        os._exit(status)  # threads of collectives can abort an interpreter that ends
    return status


def _status(arguments: Sequence[str]) -> int:
    from shared_config.commands.line import status_of

    return status_of(arguments)


def _is_launched() -> bool:
    from shared_config.training.launch import is_launched

    return is_launched()


if __name__ == "__main__":
    sys.exit(main())
