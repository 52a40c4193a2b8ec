"""The `kempnerforge` command: ``kempnerforge COMMAND CONFIG [--option value] [--section.field value ...]``.

Options without a dot belong to the command, those with a dot override the config. What the user can mend (`UserError`,
a file that can't be read or written) is one message on stderr and exit status 2; a traceback is always a defect of this
package.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from shared_config.commands import COMMANDS
from shared_config.errors import UserError

USER_ERROR, INTERRUPTED = 2, 130


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `UserError`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Returns:
        exit status: 0 success, 1 a comparison found a difference, 2 an error of the user's, 130 interrupted.
    """
    own, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
    try:
        options = build_parser().parse_args(own)
        return COMMANDS[options.command].run(options, overrides)
    except UserError as error:
        return _complain(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        return _complain(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        return INTERRUPTED


def build_parser() -> Parser:
    """One subparser a command."""
    parser = Parser(
        prog="kempnerforge",
        description="One config, the same model in PyTorch and in JAX.",
        epilog="CONFIG is the name of a preset or a .toml file. Any field of it can be set: --model.dim 512.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.HELP, description=command.HELP, allow_abbrev=False)
        command.add_arguments(subparser)
    return parser


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments of a command, and the ``--section.field value`` among them, apart."""
    own: list[str] = []
    overrides: list[str] = []
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        name, equals, _ = argument.partition("=")
        if not (name.startswith("--") and "." in name):
            own.append(argument)
            continue
        overrides.append(argument)
        if not equals and remaining and not remaining[0].startswith("--"):
            overrides.append(remaining.pop(0))
    return own, overrides


def _complain(message: str) -> int:
    print("kempnerforge: " + message.replace("\n", "\nkempnerforge: "), file=sys.stderr)
    return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
