"""What may stand on the line of ``kempnerforge completion``."""

from __future__ import annotations

import argparse

HELP = "print the completion of a shell: commands, options, fields of a config, presets"
EXAMPLES = (
    "source <(kempnerforge completion bash)",
    "kempnerforge completion zsh > ~/.zfunc/_kempnerforge",
    "kempnerforge completion fish > ~/.config/fish/completions/kempnerforge.fish",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own options."""
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="whose completion is printed")
