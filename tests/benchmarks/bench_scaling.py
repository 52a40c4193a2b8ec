"""Training steps on 1, 2, 4, ... GPUs of one host, in parallel layouts. Prints a JSON line for each run, then a table.

    python -m tests.benchmarks.bench_scaling --what agree --devices 1 2     20 losses in float32, every layout that fits
    python -m tests.benchmarks.bench_scaling --what depth --devices 1 2 4   an eighth of the layers of llama3_8b, FSDP
    python -m tests.benchmarks.bench_scaling --what dense --devices 4 8     llama3_8b itself, which needs four
    python -m tests.benchmarks.bench_scaling --what experts --devices 4 8   moe_small, ep 1, 4 and 8
    python -m tests.benchmarks.bench_scaling --what images --devices 1 4    a vision-language model
    python -m tests.benchmarks.bench_scaling --what single                  16 layers of 2048, short and long sequences

Every run is a process of its own (PyTorch: one for each GPU, under torchrun). The micro-batches of a step are numbered,
and the ranks take them as `shared_config.parity.layouts` deals them, so that runs with equally many in all see the same
ones: "agree" gives one device as many as all ranks have. Other runs have one for each rank. Initial values repeat those
of a small pool, which the size of llama3_8b asks for; the optimiser, the loss and the schedule are the trainers' own.

Share is the FLOPs that the model needs (recomputation not counted) over time, of the limit: products of two bfloat16
matrices of 8192 x 8192 on one GPU in the same call.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tests.benchmarks.pool import repeated

Line = dict[str, Any]
WARM_UP = 3
LARGE = ("--train.batch_size=4", "--train.seq_len=4096")
FULL = (*LARGE, "--train.activation_checkpointing=full", "--train.scan_layers=true")
"""KempnerForge's own measurement: 4 x 4096 tokens a GPU, every block computed again."""
SINGLE = (
    "--model.dim=2048", "--model.n_layers=16", "--model.n_heads=16", "--model.n_kv_heads=8",
    "--model.ffn_hidden_dim=5632", "--model.vocab_size=32000", "--model.max_seq_len=8192",
    "--train.activation_checkpointing=none", "--train.mixed_precision=bf16", "--train.scan_layers=false",
)  # fmt: skip
SMALL = (
    "--train.mixed_precision=fp32", "--train.matmul_precision=highest", "--scheduler.name=constant",
    "--scheduler.warmup_steps=0", "--train.compile_model=false",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """A config on some devices.

    Attributes:
        micro_batches: of a step, those of all ranks.
    """

    name: str
    config: str
    devices: int
    layout: Mapping[str, int]
    overrides: Sequence[str] = ()
    micro_batches: int = 1
    backends: Sequence[str] = ("torch", "jax")

    @property
    def arguments(self) -> list[str]:
        """Of the config, as on a command line."""
        ranks = self.devices // math.prod(self.layout.get(axis, 1) for axis in ("cp", "tp", "pp"))
        sizes = [f"--distributed.{axis}={size}" for axis, size in self.layout.items()]
        return [*self.overrides, *sizes, f"--train.grad_accum_steps={self.micro_batches // ranks}"]

    def described(self) -> str:
        """Name, devices and layout."""
        return " ".join([self.name, f"x{self.devices}", *(f"{axis}={size}" for axis, size in self.layout.items())])


def runs_of(what: str, devices: Sequence[int]) -> Iterator[Run]:
    """The runs of a question, the smallest number of devices first."""
    for count in devices:
        if what == "agree":
            yield from _agreeing(count, max(devices))
        elif what == "depth":
            eighth = (*FULL, "--model.n_layers=4")
            yield Run("llama3_8b, part", "llama3_8b", count, {"dp_shard": count}, eighth, count)
        elif what == "dense":
            yield Run("llama3_8b", "llama3_8b", count, {"dp_shard": count}, FULL, count)
            tp = {"dp_shard": count // 2, "tp": 2}
            yield Run("llama3_8b", "llama3_8b", count, tp, FULL, count // 2, ("torch",))
        elif what == "experts":
            for ep in sorted({1, *(size for size in (4, count) if count % size == 0)}):
                yield Run("moe_small", "moe_small", count, {"dp_shard": count, "ep": ep}, (), count)
        elif what == "single":
            for batch_size, seq_len in ((4, 2048), (1, 8192)):
                shape = (f"--train.batch_size={batch_size}", f"--train.seq_len={seq_len}")
                name = f"16 layers, {batch_size} x {seq_len}"
                yield Run(name, "llama_1b", count, {"dp_shard": count}, (*SINGLE, *shape), count)
        elif what == "images":
            few = ("--model.n_layers=4", "--train.batch_size=2", "--train.seq_len=1024")
            yield Run("vlm, 4 layers", "vlm_8b_joint_decoder", count, {"dp_shard": count}, few, count)


def _agreeing(count: int, micro_batches: int) -> Iterator[Run]:
    """Every layout of one axis, and pairs of axes on four devices and more, of a dense model and a mixture."""
    wanted: list[tuple[str, dict[str, int]]] = [("debug", {"dp_shard": count}), ("debug_moe", {"dp_shard": count})]
    if count > 1:
        wanted += [("debug", {"dp_shard": 1, "dp_replicate": count}), ("debug", {"dp_shard": 1, "cp": count})]
        wanted += [("debug", {"dp_shard": 1, axis: count}) for axis in ("tp", "pp")]
        wanted += [("debug_moe", {"dp_shard": count, "ep": count})]
    if count > 3:
        wanted += [("debug", {"dp_shard": count // 2, other: 2}) for other in ("dp_replicate", "tp", "cp")]
        wanted += [("debug_moe", {"dp_shard": count // 2, "ep": 2, "tp": 2})]
    for config, layout in wanted:
        backends = ("torch",) if {"tp", "pp"} & set(layout) else ("torch", "jax")
        yield Run(config, config, count, layout, SMALL, micro_batches, backends)


# One run


def measure(backend: str, run: Run, steps: int) -> Line:
    """Take the steps in a process of its own, and read its line."""
    own = ["-m", "tests.benchmarks.bench_scaling", "--worker", json.dumps([backend, dataclasses.asdict(run), steps])]
    spread = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={run.devices}"]
    alone = backend == "jax" or run.devices == 1
    environment = {**os.environ, "NCCL_NVLS_ENABLE": "0"}  # NVLink multicast, which not every host allows
    ended = subprocess.run(
        [sys.executable, *([] if alone else spread), *own], env=environment, capture_output=True, text=True, check=False
    )
    lines = [line for line in ended.stdout.splitlines() if line.startswith('{"seconds"')]
    about = {"backend": backend, "name": run.name, "run": run.described()}
    about |= {"devices": run.devices, "micro_batches": run.micro_batches}
    if not lines:
        return {**about, "failed": (ended.stderr or ended.stdout)[-1500:]}
    return {**about, **json.loads(lines[0])}


def take_steps(config: Any, count: int, step: Callable[[Sequence[Line]], Mapping[str, Any]], steps: int) -> Line:
    """Seconds of each step after some for warming up, and the losses of all."""
    seconds, losses = [], []
    for number in range(WARM_UP + steps):
        batches = [drawn(config, number * count + index) for index in range(count)]
        start = time.perf_counter()
        losses.append(float(step(batches)["loss"]))
        seconds.append(time.perf_counter() - start)
    middle = statistics.median(seconds[WARM_UP:])
    spread = (max(seconds[WARM_UP:]) - min(seconds[WARM_UP:])) / middle
    return {"seconds": middle, "spread": round(spread, 3), "first": round(seconds[0], 1), "losses": losses}


def drawn(config: Any, number: int) -> dict[str, np.ndarray]:
    """The micro-batch of a number."""
    from shared_config.parity.images import pixels as drawn_pixels

    rng, shape = np.random.default_rng(number), (config.train.batch_size, config.train.seq_len)
    tokens = "tokens" if config.vlm is None else "input_ids"
    batch = {name: rng.integers(0, config.model.vocab_size, shape, dtype=np.int32) for name in (tokens, "labels")}
    pixels = drawn_pixels(config, shape[0], number)
    return batch if pixels is None else {**batch, "pixel_values": pixels.astype(np.float32)}


def work(backend: str, run: Run, steps: int) -> None:
    """What one process does; the first prints."""
    from shared_config.contract.flops import step_flops
    from shared_config.interchange.vision import tower_of
    from shared_config.loader import load_config

    config = load_config(run.config, run.arguments)
    found = {"torch": work_torch, "jax": work_jax}[backend](config, run, steps)
    if found is not None:
        tokens = run.micro_batches * config.train.batch_size * config.train.seq_len
        flops = step_flops(config, tokens, tower_of(config))
        print(json.dumps({**found, "tokens/s": tokens / found["seconds"], "flops": flops}), flush=True)


def work_torch(config: Any, run: Run, steps: int) -> Line | None:
    import torch
    import torch.distributed as dist

    import kempnerforge_torch.model.init as init
    from kempnerforge_torch.distributed.processes import joined
    from kempnerforge_torch.training.train import Trainer

    init.initial_value = repeated
    with joined(None) as device:
        trainer = Trainer(config, device)
        own = trainer.ranks
        found = take_steps(
            config, run.micro_batches, lambda batches: trainer.step(batches[own.rank :: own.count]), steps
        )
        memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        return {**found, "GiB": memory / 2**30} if not dist.is_initialized() or dist.get_rank() == 0 else None


def work_jax(config: Any, run: Run, steps: int) -> Line:
    import jax

    import kempnerforge_jax.model.init as init
    from kempnerforge_jax.layouts import _joined
    from kempnerforge_jax.training.train import Trainer

    init.initial_value = repeated
    devices = jax.devices()[: run.devices]
    trainer = Trainer(config, devices)
    ranks = 1 if trainer.mesh is None else trainer.mesh.layout.data_ranks
    found = take_steps(config, run.micro_batches, lambda batches: trainer.step(_joined(batches, ranks)), steps)
    memory = max((device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in devices)
    return {**found, "GiB": memory / 2**30}


# All of them


def limits() -> Line:
    """What one GPU can do: products, and copies."""
    import torch

    from kempnerforge_torch.bench import Machine
    from shared_config.bench.measure import Request, limits_of
    from shared_config.bench.works import LIMITS
    from shared_config.schema.job import JobConfig

    if not torch.cuda.is_available():
        return {}
    machine = Machine("cuda")
    found = limits_of(machine, Request(JobConfig(), LIMITS))
    return {"product FLOP/s": found.product, "copy B/s": found.copy, "card": machine.kind}


def table(lines: Sequence[Line], limit: Line) -> str:
    """A row for each run: speed, that of a device against the first run of the backend, share, memory, and the losses
    against those of the first run that saw the same micro-batches.
    """
    rows = [f"{'':44} {'tok/s':>9} {'scaling':>7} {'share':>6} {'GiB':>6} {'loss off by':>11}"]
    measured = [line for line in lines if "failed" not in line]
    for line in lines:
        title = f"{line['backend']:5} {line['run']}"
        if line not in measured:
            rows.append(f"{title:44} failed")
            continue
        alike = [other for other in measured if other["name"] == line["name"]]
        alone = next(other for other in alike if other["backend"] == line["backend"])
        first = next(other for other in alike if other["micro_batches"] == line["micro_batches"])
        scaling = line["tokens/s"] / line["devices"] / (alone["tokens/s"] / alone["devices"])
        share = (line["flops"] or math.nan) / line["seconds"] / line["devices"] / limit.get("product FLOP/s", math.inf)
        off = max(abs(a - b) / abs(b) for a, b in zip(line["losses"], first["losses"], strict=True))
        numbers = f"{line['tokens/s']:9.0f} {scaling:7.3f} {share:6.3f} {line['GiB']:6.1f} {off:11.1e}"
        rows.append(f"{title:44} {numbers}")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--what", choices=["agree", "depth", "dense", "experts", "images", "single"], nargs="+", default=["depth"]
    )
    parser.add_argument("--devices", type=int, nargs="+", default=[1])
    parser.add_argument("--backend", choices=["torch", "jax"], nargs="+", default=["torch", "jax"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="other fields of the configs")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        backend, run, steps = json.loads(arguments.worker)
        work(backend, Run(**run), steps)
        return
    limit, lines = limits(), []
    print(json.dumps(limit), flush=True)
    for what in arguments.what:
        for run in runs_of(what, sorted(arguments.devices)):
            own = dataclasses.replace(run, overrides=[*run.overrides, *(f"--{field}" for field in arguments.set)])
            for backend in [name for name in arguments.backend if name in run.backends]:
                lines.append(measure(backend, own, arguments.steps))
                print(json.dumps(lines[-1]), flush=True)
    print(table(lines, limit))


if __name__ == "__main__":
    main()
