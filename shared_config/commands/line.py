"""One command line: parsed, run, and its errors reported."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.metadata
import re
import sys
import textwrap
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from shared_config.commands import NAMES, helps, line_of, run_of, sections
from shared_config.errors import UserError
from shared_config.training import streams
from shared_config.training.launch import rank_of
from shared_config.training.signals import INTERRUPTED, INTERRUPTS, ending_at_once

if TYPE_CHECKING:
    from shared_config.commands import Line

PACKAGE = "kempnerforge-twin"
USER_ERROR = 2
HARMLESS = ("show",)
"""Commands that several processes may run at once."""
PARALLEL = ("train",)
"""Commands that handle several processes themselves."""
DEBUG = "--debug"
MAY_BE_EMPTY = frozenset(["prompt", "system", "separator", "stop", "only"])
"""Arguments that are texts, or patterns, and no names."""
LINE = 2000
"""Characters of a line of a message; the middle of a longer one is left out."""
SHOWING = 1.0
"""Seconds that a process leaves another one to show an error before it ends: launchers end all when one does."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `UserError`.

    Attributes:
        options, destinations: of its arguments.
    """

    def __init__(self, **settings: Any) -> None:
        self.options: list[str] = []
        self.destinations: list[str] = []
        super().__init__(**settings)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """Declare an argument, as argparse does."""
        action = super().add_argument(*names, **settings)
        self.options += action.option_strings
        self.destinations.append(action.dest)
        return action

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print.

        Raises:
            UserError: always.
        """
        raise UserError(f"{message}{_hint(message)}; see {self.prog} --help")


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
        if isinstance(error, UserError) and error.shown_elsewhere:
            time.sleep(SHOWING)
            return USER_ERROR
        return _complain(message_of(error))


def run(arguments: Sequence[str]) -> int:
    """Run a command line; what goes wrong is raised.

    Raises:
        UserError: what the user can fix.
    """
    check_texts(arguments)
    own, overrides = split_overrides(arguments)
    chosen = next((argument for argument in own if not argument.startswith("-")), "")
    with ending_at_once():
        available = {chosen: line_of(chosen)} if chosen in NAMES else {}
    options = build_parser(helps(), available).parse_args(own)
    check_given(options, own)
    if options.command not in (*HARMLESS, *PARALLEL):
        from shared_config.commands.processes import require_one_process

        require_one_process()
    with ending_at_once():
        do = run_of(options.command)
    return do(options, overrides)


def check_given(options: argparse.Namespace, own: Sequence[str]) -> None:
    """Refuse empty names: a path that is empty would be the folder in which the command runs.

    Raises:
        UserError: naming the argument.
    """
    for name, value in vars(options).items():
        if name not in MAY_BE_EMPTY and "" in (value if isinstance(value, list) else [value]):
            flag = f"--{name.replace('_', '-')}"
            said = flag if any(argument.partition("=")[0] == flag for argument in own) else name
            raise UserError(f"{said} = '': must not be empty")


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


def build_parser(names: Mapping[str, str], available: Mapping[str, Line]) -> Parser:
    """One subparser per command: command -> its help; those that are available have arguments."""
    parser = Parser(
        prog="kempnerforge",
        description="One config, the same model in PyTorch and in JAX.",
        epilog="CONFIG is the name of a preset or a .toml file. Any field of it can be set: --model.dim 512. "
        "--debug shows the traceback of an error. kempnerforge COMMAND --help gives examples.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="versions of this package and of the frameworks")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, text in names.items():
        subparser = commands.add_parser(
            name,
            help=text,
            description=text,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name in available:
            available[name].add_arguments(subparser)
            subparser.epilog = "\n".join(
                ["examples:", *(f"  {line}" for line in available[name].EXAMPLES), *_sections(subparser)]
            )
    return parser


class _Version(argparse.Action):
    """Print the versions, which are looked up only then, and leave."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(version_text())
        parser.exit()


def version_text() -> str:
    """Version of this package, and of the frameworks that are installed, none of which is imported."""
    known = [(name, _version(name)) for name in ("torch", "jax", "flax", "optax")]
    frameworks = ", ".join(f"{name} {version}" for name, version in known if version)
    return f"kempnerforge {_version(PACKAGE) or 'uninstalled'} ({frameworks or 'no backend installed'})"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _sections(parser: Parser) -> list[str]:
    """What of a config can be set, for commands that take one."""
    if "config" not in parser.destinations:
        return []
    names = textwrap.wrap(", ".join(sections()), 100)
    return [
        "sections of a config, whose fields are set by --SECTION.FIELD VALUE:",
        *(f"  {line}" for line in names),
        "  kempnerforge show CONFIG prints all fields with their values, kempnerforge show --schema what each means",
    ]


def _hint(message: str) -> str:
    """The fields of a config that an unknown option may mean, or the commands that another word may."""
    close: list[str] = []
    if found := re.search(r"unrecognized arguments: --(\w+)", message):
        from shared_config.loader import fields_like

        close = [f"--{name}" for name in fields_like(found[1])]
    elif found := re.search(r"argument COMMAND: invalid choice: '(\S+)'", message):
        close = difflib.get_close_matches(found[1], NAMES)
    return f"; did you mean {' or '.join(close)}?" if close else ""


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
