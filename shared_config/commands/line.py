"""One command line: parsed, run, and its errors reported."""

from __future__ import annotations

import argparse
import contextlib
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

from shared_config.errors import UserError
from shared_config.training import streams
from shared_config.training.launch import rank_of
from shared_config.training.signals import INTERRUPTED, INTERRUPTS, ending_at_once

if TYPE_CHECKING:
    from shared_config.commands import Command

USER_ERROR = 2
HARMLESS = ("show",)
"""Commands that several processes may run at once."""
PARALLEL = ("train",)
"""Commands that handle several processes themselves."""
DEBUG = "--debug"
LINE = 2000
"""Characters of a line of a message; the middle of a longer one is left out."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `UserError`."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print.

        Raises:
            UserError: always.
        """
        raise UserError(f"{message}; see {self.prog} --help")


def status_of(given: Sequence[str]) -> int:
    """Run a command line, and say what went wrong. Returns the exit status."""
    try:
        INTERRUPTS.caught()
        status = run([argument for argument in given if argument != DEBUG])
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        streams.discard(sys.stdout)
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit:
        raise
    except BaseException as error:  # libraries in Rust raise what is not an Exception
        if INTERRUPTS.came:
            return INTERRUPTED
        if DEBUG in given:
            traceback.print_exc()
        return _complain(message_of(error))


def run(arguments: Sequence[str]) -> int:
    """Run a command line; what goes wrong is raised.

    Raises:
        UserError: what the user can fix.
    """
    check_texts(arguments)
    own, overrides = split_overrides(arguments)
    with ending_at_once():
        from shared_config.commands import COMMANDS
        from shared_config.commands.processes import require_one_process
    options = build_parser(COMMANDS).parse_args(own)
    if options.command not in (*HARMLESS, *PARALLEL):
        require_one_process()
    return COMMANDS[options.command].run(options, overrides)


def check_texts(arguments: Sequence[str]) -> None:
    """Refuse arguments that no file, path or terminal can hold.

    Raises:
        UserError: naming the argument.
    """
    for argument in arguments:
        if "\0" in argument or not _is_utf8(argument):
            raise UserError(f"argument {argument!r}: must be UTF-8 text without the NUL character")


def message_of(error: BaseException) -> str:
    """The message for an error: all of a `UserError`, one line of an unexpected one."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    said = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return f"could not go on: {said} ({DEBUG} shows where)"


def build_parser(available: Mapping[str, Command]) -> Parser:
    """One subparser per command."""
    parser = Parser(
        prog="kempnerforge",
        description="One config, the same model in PyTorch and in JAX.",
        epilog="CONFIG is the name of a preset or a .toml file. Any field of it can be set: --model.dim 512. "
        "--debug shows the traceback of an error.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, command in available.items():
        subparser = commands.add_parser(name, help=command.HELP, description=command.HELP, allow_abbrev=False)
        command.add_arguments(subparser)
    return parser


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments of a command, separated from the ``--section.field value`` among them."""
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
    rank = rank_of()
    for line in message.splitlines() if rank == 0 else (f"rank {rank}: {line}" for line in message.splitlines()):
        kept = line if len(line) <= LINE else f"{line[: LINE // 2]} ... {line[-LINE // 2 :]}"
        with contextlib.suppress(OSError):
            print(f"kempnerforge: {kept}", file=sys.stderr)
    return USER_ERROR


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
