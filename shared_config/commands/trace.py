"""``kempnerforge trace``: every activation, gradient and update of one step, in a file to be compared anywhere."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np

from shared_config.commands.backends import backend_module, require_backend, require_package
from shared_config.commands.common import (
    fitting_weights,
    folder_of,
    in_transformers,
    load_job,
    writable_file,
)
from shared_config.contract.warm_start import without_warm_start
from shared_config.errors import UserError
from shared_config.interchange.outputs import refuse_overwriting
from shared_config.interchange.reading import check_regular
from shared_config.parity.layouts import LAYOUT, LayoutBackend, record_layout
from shared_config.parity.plan import TRANSFORMERS
from shared_config.parity.request import WEIGHTS, check_tokens
from shared_config.parity.scenarios import record_scenario
from shared_config.parity.selection import parse_layers
from shared_config.parity.traces import Trace, read_trace, write_trace
from shared_config.parity.work import Backend
from shared_config.schema.job import JobConfig

NPY = ".npy"


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Do it, under the overrides of the config. Returns the exit status."""
    config = load_job(options, overrides, several_devices=options.scenario == LAYOUT)
    output = writable_file(options.output)
    which = options.weights or (None if options.shrink else folder_of(options.config)) or WEIGHTS[0]
    given = None if which in WEIGHTS else which
    ids = options.tokens if (options.tokens or "").endswith(NPY) else None
    refuse_overwriting(output, given, options.config, ids, options.refeed, options.routes)
    weights = load_given_weights(str(which), config, overrides)
    tokens = None if options.tokens is None else read_tokens(options.tokens)
    if tokens is not None:
        check_tokens(tokens, config)
    layers = None if options.layers is None else parse_layers(options.layers, config.model.n_layers)
    refeed, routes = (None if file is None else read_trace(file) for file in (options.refeed, options.routes))
    if options.backend == TRANSFORMERS:
        write_trace(output, of_transformers(options, config, given, weights))
        return 0
    require_backend(options.backend)
    if options.scenario is not None:
        write_trace(output, scenario(options, config, weights))
        return 0
    trace = backend_module(options.backend, "trace").record(
        config if isinstance(weights, str) else without_warm_start(config),
        dtype=options.dtype,
        seed=options.seed,
        weights=weights,
        tokens=tokens,
        deltas=options.deltas,
        device=options.device,
        layers=layers,
        only=[pattern.strip() for patterns in options.only or () for pattern in patterns.split(",")],
        refeed=refeed,
        routes=routes,
    )
    if options.summary is not None:
        trace = trace.summarized(options.summary)
    write_trace(output, trace)
    return 0


def of_transformers(
    options: argparse.Namespace,
    config: JobConfig,
    folder: str | Path | None,
    weights: str | Mapping[str, np.ndarray],
) -> Trace:
    """What the model of transformers computes that a Hugging Face folder holds.

    Raises:
        UserError: no such folder; an option that is for the backends; transformers is not installed.
    """
    for name in ("tokens", "layers", "only", "refeed", "routes", "summary", "scenario"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name}: is for the backends; leave it out with --backend {TRANSFORMERS}")
    if folder is None or isinstance(weights, str) or not in_transformers(Path(folder)):
        raise UserError(f"--backend {TRANSFORMERS}: needs the weights of a Hugging Face folder, not {folder}")
    if options.dtype == "fp8":
        raise UserError(f"--dtype fp8: is for the backends; must be another with --backend {TRANSFORMERS}")
    require_package(TRANSFORMERS, TRANSFORMERS, f"--backend {TRANSFORMERS}")
    record = backend_module("torch", "huggingface").record
    return record(config, Path(folder), weights, dtype=options.dtype, seed=options.seed, device=options.device)


def scenario(options: argparse.Namespace, config: JobConfig, weights: str | Mapping[str, np.ndarray]) -> Trace:
    """The result of a scenario.

    Raises:
        UserError: an option that scenarios don't have, or one that this needs and lacks.
    """
    for name in ("tokens", "layers", "only", "refeed", "routes", "summary"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name}: a scenario has its own inputs and keeps all; leave it out")
    if options.scenario.startswith("resume-") and options.runs is None:
        raise UserError(f"--scenario {options.scenario}: needs --runs DIR, the folder of its checkpoints")
    if options.scenario == LAYOUT:
        if options.dtype != "float64" or options.device not in (None, "cpu"):
            raise UserError(f"--scenario {LAYOUT}: runs in float64 on the CPU; leave --dtype and --device out")
        backend = cast(LayoutBackend, backend_module(options.backend, "layouts"))
        return record_layout(backend, config, seed=options.seed, weights=weights)
    return record_scenario(
        cast(Backend, backend_module(options.backend, "scenarios")),
        config,
        options.scenario,
        dtype=options.dtype,
        seed=options.seed,
        weights=weights,
        deltas=options.deltas,
        device=options.device,
        runs=None if options.runs is None else Path(options.runs),
    )


def load_given_weights(which: str, config: JobConfig, overrides: Sequence[str] = ()) -> str | Mapping[str, np.ndarray]:
    """A kind of weights by name, or the weights at a path that fit the config.

    Raises:
        UserError: no such kind or file, settings beside the weights that differ, or tensors that do not fit.
    """
    if which in WEIGHTS:
        return which
    if not Path(which).exists():
        raise UserError(f"--weights = {which!r}: must be one of {', '.join(WEIGHTS)}, or an existing file or folder")
    return {name: np.asarray(tensor) for name, tensor in fitting_weights(which, config, overrides).items()}


def read_tokens(text: str) -> np.ndarray:
    """Token ids of a .npy file, or of a list, which is one row.

    Raises:
        UserError: neither.
    """
    if text.endswith(NPY):
        try:
            check_regular(text)
            return np.load(text, allow_pickle=False)
        except (UserError, OSError, ValueError, EOFError) as error:
            raise UserError(f"--tokens = {text!r}: can't be read as a .npy file: {error}") from None
    try:
        return np.array([[int(number) for number in text.split(",")]])
    except (ValueError, OverflowError):
        raise UserError(f"--tokens = {text!r}: must be a .npy file or integers as in 1,2,3") from None
