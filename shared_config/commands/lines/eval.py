"""What may stand on the line of ``kempnerforge eval``."""

from __future__ import annotations

import argparse

from shared_config.commands.lines.arguments import add_backend, add_config, add_dtype, positive

HELP = "loss, perplexity and bits per byte of a model on held-out or on given text"
EXAMPLES = (
    "kempnerforge eval runs/latest --backend torch",
    "kempnerforge eval runs/latest --backend jax --data book.txt --json book.json",
    "kempnerforge eval FOLDER --backend torch --tasks arc_easy,hellaswag --limit 100",
    "kempnerforge eval llama3_8b --weights FOLDER --backend torch --data texts/ --eval.batch_size 4",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's own options."""
    add_config(parser)
    add_backend(parser)
    parser.add_argument(
        "--weights",
        metavar="PATH",
        help="native weights, a training run or checkpoint, or a Hugging Face folder (default: those of CONFIG, a "
        "folder). Of a run that keeps an average of its weights --eval.average true takes that",
    )
    parser.add_argument(
        "--data", metavar="PATH", help="text, JSON Lines or token ids, all of which is read (default: data.path)"
    )
    parser.add_argument(
        "--split", choices=("heldout", "all"), help="what of the data is read (default: all of --data, else heldout)"
    )
    parser.add_argument(
        "--tasks", metavar="A,B", help="tasks of lm-evaluation-harness instead of data; needs the extra lm-eval"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="with --tasks, no more than N documents of each")
    parser.add_argument("--batches", type=positive, metavar="N", help="read no more than N batches (default: all)")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers as JSON")
    add_dtype(parser, None, "float32, and products as train.mixed_precision says")
    parser.add_argument("--device", help="cpu, cuda, tpu ... (default: the backend's own)")
