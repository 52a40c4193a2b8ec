"""``kempnerforge eval``: loss, perplexity and bits per byte of a model on given text."""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from shared_config.commands.backends import backend_module, require_backend, require_package
from shared_config.commands.common import (
    console,
    fitting_weights,
    folder_of,
    writable_file,
)
from shared_config.contract.decoding import DTYPES
from shared_config.contract.warm_start import without_warm_start
from shared_config.data.tokenizer import build_tokenizer
from shared_config.errors import UserError
from shared_config.evaluation.numbers import evaluate, evaluation_batches
from shared_config.evaluation.scorer import Scorer
from shared_config.interchange.files import written_aside
from shared_config.interchange.parts import HostArray, StateParts, whole
from shared_config.interchange.tokens import beside, has_tokenizer
from shared_config.loader import load_config, parse_overrides
from shared_config.schema.job import JobConfig


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
    if options.tasks is not None:
        found = evaluate_tasks(options, config, fitting_weights(path, config, overrides))
        for task, metrics in found.items():
            console().print(f"{task}: {', '.join(f'{name} {value}' for name, value in metrics.items())}", markup=False)
        if numbers is not None:
            write_json(numbers, {"weights": str(path), "tasks": found})
        return 0
    split = options.split or ("heldout" if options.data is None else "all")
    batches = evaluation_batches(config, split, options.batches)
    weights = fitting_weights(path, config, overrides)
    if options.dtype is not None:
        config = config.replace(train=config.train.replace(mixed_precision="fp32"))
    with backend_module(options.backend, "training.mixed_precision").arithmetic(options.dtype or DTYPES[0]) as dtype:
        trainer = backend_module(options.backend, "training.train").Trainer(
            without_warm_start(config), options.device, dtype=dtype, draws=False, trains=False
        )
        trainer.load_state(StateParts(0, {name: whole(name, tensor) for name, tensor in weights.items()}, {}))
        began = time.perf_counter()
        result = evaluate(config, trainer, batches)
        seconds = time.perf_counter() - began
    console().print(result.line(), markup=False)
    if numbers is not None:
        where = {"weights": str(path), "data": config.data.path, "split": split, "backend": options.backend}
        write_json(numbers, {**asdict(result), **where, "seconds": seconds})
    return 0


def evaluate_tasks(
    options: argparse.Namespace, config: JobConfig, weights: Mapping[str, HostArray]
) -> dict[str, dict[str, object]]:
    """Task of lm-evaluation-harness -> metric -> value.

    Raises:
        UserError: the package is missing, or the model sees pictures.
    """
    require_package("lm_eval", "lm-eval", "eval --tasks")
    from shared_config.evaluation.harness import run_tasks

    dtype = options.dtype or DTYPES[0]
    with backend_module(options.backend, "training.mixed_precision").arithmetic(dtype):
        scorer = build_scorer(options.backend, config, weights, options.device, dtype)
        return run_tasks(scorer, options.tasks.split(","), options.limit)


def write_json(path: Path, numbers: Mapping[str, object]) -> None:
    """Write the numbers, atomically."""
    with written_aside(path) as aside:
        aside.write_text(json.dumps(numbers, indent=1, default=str), encoding="utf-8")


def build_scorer(
    backend: str, config: JobConfig, weights: Mapping[str, HostArray], device: str | None, dtype: str = DTYPES[0]
) -> Scorer:
    """A model that scores and continues texts.

    Raises:
        UserError: it sees pictures.
    """
    if config.vlm is not None:
        raise UserError("eval --tasks: scores text models, not those with a [vlm] section")
    model = backend_module(backend, "model.build").load_model(config, weights, device, dtype=dtype)
    scores = backend_module(backend, "training.scoring").scores
    stream = backend_module(backend, "model.generate").stream
    tokenizer = build_tokenizer(config.data.tokenizer, config.data.eos_id)

    def generate(prompt: Sequence[int], most: int) -> Iterator[int]:
        stops = [token for token in tokenizer.stops if token < config.model.vocab_size]
        for token_B in stream(model, [list(prompt)], most, temperature=0.0, eos_token_id=stops):
            yield int(token_B[0])

    rows = config.eval.batch_size or config.train.batch_size
    return Scorer(functools.partial(scores, model), generate, tokenizer, config.model.max_seq_len, rows)
