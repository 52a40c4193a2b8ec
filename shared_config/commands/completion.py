"""``kempnerforge completion``: what a shell needs to complete commands, their options, fields and presets."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from shared_config.commands import NAMES, line_of
from shared_config.commands.line import Parser
from shared_config.errors import UserError
from shared_config.loader import config_fields, preset_names

BASH = """_kempnerforge() {{
    local words
    COMPREPLY=()
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
    [ "$COMP_CWORD" -eq 1 ] && words="{commands} --help --version"
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _kempnerforge kempnerforge
"""


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Do it. Returns the exit status."""
    if overrides:
        raise UserError(f"{overrides[0]}: completion takes no config")
    words = {name: list(words_of(name)) for name in NAMES}
    if options.shell == "fish":
        print("\n".join(fish(words)))
        return 0
    cases = "\n".join(f'        {name}) words="{" ".join(found)}" ;;' for name, found in words.items())
    start = "#compdef kempnerforge\nautoload -U +X bashcompinit && bashcompinit\n" if options.shell == "zsh" else ""
    print(start + BASH.format(cases=cases, commands=" ".join(NAMES)), end="")
    return 0


def words_of(name: str) -> Iterator[str]:
    """Options of a command, and where it takes a config presets and fields."""
    parser = Parser(prog=name)
    line_of(name).add_arguments(parser)
    yield from parser.options
    if "config" in parser.destinations:
        yield from preset_names()
        yield from (f"--{field}" for field in config_fields())


def fish(words: dict[str, list[str]]) -> Iterator[str]:
    """Lines of a completion file of fish."""
    for name, found in words.items():
        yield f"complete -c kempnerforge -n __fish_use_subcommand -a {name}"
        options = [word.removeprefix("--") for word in found if word.startswith("--")]
        others = [word for word in found if not word.startswith("-")]
        yield from (f'complete -c kempnerforge -n "__fish_seen_subcommand_from {name}" -l {word}' for word in options)
        yield from (f'complete -c kempnerforge -n "__fish_seen_subcommand_from {name}" -a {word}' for word in others)
