"""``kempnerforge eval``: loss, perplexity and bits per byte of a model on given text."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from shared_config.commands.backends import backend_module, require_backend
from shared_config.commands.common import (
    add_backend,
    add_config,
    console,
    fitting_weights,
    folder_of,
    positive,
    writable_file,
)
from shared_config.contract.warm_start import without_warm_start
from shared_config.errors import UserError
from shared_config.evaluation.numbers import evaluate, evaluation_batches
from shared_config.interchange.checkpoint import TrainingState
from shared_config.interchange.files import written_aside
from shared_config.interchange.tokens import beside, has_tokenizer
from shared_config.loader import load_config, parse_overrides

HELP = "loss, perplexity and bits per byte of a model on held-out or on given text"
EXAMPLES = (
    "kempnerforge eval runs/latest --backend torch",
    "kempnerforge eval runs/latest --backend jax --data book.txt --json book.json",
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
    parser.add_argument("--batches", type=positive, metavar="N", help="read no more than N batches (default: all)")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers as JSON")
    parser.add_argument("--device", help="cpu, cuda, tpu ... (default: the backend's own)")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Do it, under the overrides of the config. Returns the exit status."""
    numbers = None if options.json is None else writable_file(options.json)
    path = folder_of(options.config) if options.weights is None else Path(options.weights)
    if path is None:
        raise UserError(f"{options.config}: has no weights to evaluate; name some with --weights")
    data = [] if options.data is None else [f"--data.path={options.data}"]
    known, own = beside(path), {name for name, _ in parse_overrides(overrides)}
    if known is not None and has_tokenizer(known) and "data.tokenizer" not in own:
        data.append(f"--data.tokenizer={known}")
    config = load_config(options.config, [*overrides, *data])
    config.validate(world_size=1)
    require_backend(options.backend)
    split = options.split or ("heldout" if options.data is None else "all")
    batches = evaluation_batches(config, split, options.batches)
    weights = fitting_weights(path, config, overrides)
    trainer = backend_module(options.backend, "training.train").Trainer(without_warm_start(config), options.device)
    trainer.load_state(TrainingState(0, dict(weights), {}))
    began = time.perf_counter()
    result = evaluate(config, trainer, batches)
    seconds = time.perf_counter() - began
    console().print(result.line(), markup=False)
    if numbers is not None:
        where = {"weights": str(path), "data": config.data.path, "split": split, "backend": options.backend}
        with written_aside(numbers) as aside:
            aside.write_text(json.dumps({**asdict(result), **where, "seconds": seconds}, indent=1), encoding="utf-8")
    return 0
