"""What may stand on the line of ``kempnerforge prepare``."""

from __future__ import annotations

import argparse

from shared_config.commands.lines.arguments import not_negative, positive

HELP = "turn text into token files for --data.path; started again after a kill, it goes on"
EXAMPLES = ("kempnerforge prepare texts/ --tokenizer FOLDER --output tokens/",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own options."""
    parser.add_argument(
        "sources",
        metavar="SOURCE",
        nargs="+",
        help="files, or folders of them: .txt (a document each), .jsonl, .parquet and .arrow (a document a row); .txt "
        "and .jsonl also as .gz and .zst; folders that datasets saved as well",
    )
    parser.add_argument("--tokenizer", required=True, metavar="FOLDER", help="a Hugging Face folder, or 'bytes'")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="field or column of a row (default: text)")
    parser.add_argument(
        "--separator", default="", metavar="TEXT", help="what parts the documents of a .txt file (default: it is one)"
    )
    parser.add_argument("--eos-id", type=not_negative, metavar="ID", help="ends documents (default: the tokenizer's)")
    parser.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        help="processes (default: one a core)",
    )
    parser.add_argument(
        "--shard-mib",
        type=positive,
        default=64,
        metavar="N",
        help="MiB of input for a file of tokens (default: 64)",
    )
    parser.add_argument("--follow-symlinks", action="store_true", help="also those that lead out of a folder")
