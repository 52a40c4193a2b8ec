"""How fast one GPU trains and decodes: the tables of README. Prints a JSON line for each run, then a table.

    python -m tests.benchmarks.bench_speed --what works      training, documents, micro-batches, experts, decoding
    python -m tests.benchmarks.bench_speed --what growth     sequences of 2k to 32k, batches of 1 to 16, 125M to 8B

Every run is a process of its own, in which the work is measured in rounds: medians of each, of several calls. The
machine's limits come first, and again at the end. "hf" is the model of transformers of the same shapes under autocast,
with torch's fused AdamW; its decoding is `generate` with a static cache. Initial values are those of a small pool.

Share of a training step is the FLOPs that the model needs (recomputation and masked keys not counted) over time, of
the product; of decoding the bytes of weights and cache that a token must read over time, of the copy.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from shared_config.commands.bench import MEMORY_OF_JAX
from tests.benchmarks.bench_scaling import SINGLE, limits
from tests.benchmarks.pool import repeated

Line = dict[str, Any]
PROMPT, NEW, DOCUMENT = 128, 128, 512
BOTH = ("torch", "jax")
WITH_PEER = (*BOTH, "hf")
FULL = "--train.activation_checkpointing=full"


@dataclasses.dataclass(frozen=True)
class Run:
    """A work of a config.

    Attributes:
        rows: of decoding; 0 for training steps.
        documents: whether rows are documents of `DOCUMENT` tokens.
    """

    name: str
    config: str
    overrides: Sequence[str] = ()
    backends: Sequence[str] = BOTH
    rows: int = 0
    documents: bool = False


def dense(batch_size: int, seq_len: int, *others: str) -> tuple[str, ...]:
    """Overrides: 16 layers of 2048, micro-batches of this shape."""
    longest = f"--model.max_seq_len={max(seq_len, 8192)}"
    return (*SINGLE, longest, f"--train.batch_size={batch_size}", f"--train.seq_len={seq_len}", *others)


def runs_of(what: str) -> Iterator[Run]:
    """The runs of a table."""
    if what == "works":
        yield Run("D, 4 x 2048", "llama_1b", dense(4, 2048), WITH_PEER)
        yield Run("D, 1 x 8192", "llama_1b", dense(1, 8192))
        yield Run("D, 1 x 8192, 16 documents", "llama_1b", dense(1, 8192, "--data.pack_documents=true"), documents=True)
        yield Run("D, 4 micro-batches of 4 x 2048", "llama_1b", dense(4, 2048, "--train.grad_accum_steps=4"))
        yield Run("moe_small, 4 x 2048", "moe_small", ("--train.scan_layers=false",))
        yield Run("D, decoding, 1 row", "llama_1b", dense(1, 2048), WITH_PEER, rows=1)
        yield Run("D, decoding, 16 rows", "llama_1b", dense(1, 2048), rows=16)
        yield Run("llama3_8b, decoding, 1 row", "llama3_8b", rows=1)
        return
    for batch_size, seq_len in [(1, 1024 * count) for count in (2, 4, 8, 16, 32)]:
        yield Run(f"D, {batch_size} x {seq_len}", "llama_1b", dense(batch_size, seq_len))
    for batch_size in (2, 4, 8, 16):
        yield Run(f"D, {batch_size} x 2048", "llama_1b", dense(batch_size, 2048))
    shape = ("--train.batch_size=4", "--train.seq_len=2048")
    yield Run("llama_125m, 4 x 2048", "llama_125m", shape)
    yield Run("llama_1b, 4 x 2048", "llama_1b", (*shape, "--train.activation_checkpointing=none"))
    yield Run("llama3_8b, 4 x 2048, computed again", "llama3_8b", (*shape, FULL))


# One run


def work(backend: str, run: Run, rounds: int, device: str) -> Line:
    """Medians of the rounds, and what they are measured by."""
    from shared_config.bench.measure import timed
    from shared_config.loader import load_config

    machine, config = machine_of(backend, device), load_config(run.config, run.overrides)
    call, measure = (decoding if run.rows else training)(machine, config, run)
    timings = [timed(call, machine.wait) for _ in range(rounds)]
    medians = [timing.median for timing in timings]
    found = {"first": timings[0].first, "rounds": medians, "peak": machine.peak(call)}
    return {**found, **measure(statistics.median(medians))}


def machine_of(backend: str, device: str) -> Any:
    """What measures; `hf` is one of PyTorch."""
    package = "kempnerforge_jax" if backend == "jax" else "kempnerforge_torch"
    importlib.import_module(f"{package}.model.init").__dict__["initial_value"] = repeated
    bench = importlib.import_module(f"{package}.bench")
    return (bench.Foreign if backend == "hf" else bench.Machine)(device)


def training(machine: Any, config: Any, run: Run) -> tuple[Callable[[], object], Callable[[float], Line]]:
    """A step, and what its seconds are worth."""
    from shared_config.bench.works import batches_of, step_flops, tokens_of

    batches = batches_of(config)
    if run.documents:
        numbers = np.arange(config.train.seq_len, dtype=np.int32) // DOCUMENT
        batches = [{**batch, "doc_ids": np.broadcast_to(numbers, batch["tokens"].shape)} for batch in batches]
    tokens, flops = tokens_of(batches), step_flops(config, batches)
    return machine.step(config, batches), lambda seconds: {
        "ms": 1e3 * seconds,
        "tokens/s": tokens / seconds,
        "flops/s": (flops or math.nan) / seconds,
    }


def decoding(machine: Any, config: Any, run: Run) -> tuple[Callable[[], object], Callable[[float], Line]]:
    """`NEW` tokens after each prompt, which is read in the same time, and what the seconds are worth."""
    from shared_config.bench.works import decode_bytes
    from shared_config.contract.counts import BFLOAT16, kv_cache_bytes

    ids = np.arange(run.rows * PROMPT).reshape(run.rows, PROMPT) * 37 % config.model.vocab_size
    others = (run.rows - 1) * kv_cache_bytes(config.model, 1, PROMPT + NEW // 2, BFLOAT16)
    read = decode_bytes(config, PROMPT, NEW) + others
    return machine.decoder(config, ids.tolist(), NEW), lambda seconds: {
        "ms": 1e3 * seconds / NEW,
        "tokens/s": run.rows * NEW / seconds,
        "bytes/s": read * NEW / seconds,
    }


# All of them


def measure(backend: str, run: Run, rounds: int, device: str) -> Line:
    """What a process of its own finds."""
    asked = json.dumps([backend, dataclasses.asdict(run), rounds, device])
    own = ["-m", "tests.benchmarks.bench_speed", "--worker", asked]
    environment = {**MEMORY_OF_JAX, **os.environ}
    ended = subprocess.run([sys.executable, *own], env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in ended.stdout.splitlines() if line.startswith('{"first"')]
    about = {"backend": backend, "run": run.name}
    return {**about, **(json.loads(lines[0]) if lines else {"failed": (ended.stderr or ended.stdout)[-1500:]})}


def table(lines: Sequence[Line], limit: Line) -> str:
    """A row for each run."""
    rows = [f"{'':42} {'ms':>8} {'rounds':>13} {'tok/s':>8} {'share':>6} {'GiB':>6} {'first s':>7}"]
    for line in lines:
        title = f"{line['backend']:5} {line['run']}"
        if "failed" in line:
            rows.append(f"{title:42} failed")
            continue
        limited = {"flops/s": "product FLOP/s", "bytes/s": "copy B/s"}
        share = sum(line.get(rate, 0) / limit.get(most, math.inf) for rate, most in limited.items())
        spread = "-".join(f"{1e3 * end(line['rounds']):.1f}" for end in (min, max))
        numbers = f"{line['ms']:8.2f} {spread:>13} {line['tokens/s']:8.0f} {share:6.3f}"
        rows.append(f"{title:42} {numbers} {(line['peak'] or 0) / 2**30:6.1f} {line['first']:7.1f}")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--what", choices=["works", "growth"], default="works")
    parser.add_argument("--backend", choices=WITH_PEER, nargs="+", default=WITH_PEER)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[""], help="parts of the names of runs")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        backend, run, rounds, device = json.loads(arguments.worker)
        print(json.dumps(work(backend, Run(**run), rounds, device)), flush=True)
        return
    limit, lines = limits(), []
    print(json.dumps(limit), flush=True)
    for backend in arguments.backend:
        for run in runs_of(arguments.what):
            if backend in run.backends and any(part in run.name for part in arguments.only):
                lines.append(measure(backend, run, arguments.rounds, arguments.device))
                print(json.dumps(lines[-1]), flush=True)
    print(table(lines, limit))
    print(json.dumps(limits()))


if __name__ == "__main__":
    main()
