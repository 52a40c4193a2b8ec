"""Training steps on 1, 2, 4, ... GPUs of one host, in parallel layouts. Prints a JSON line for each run, then tables.

    python -m tests.benchmarks.bench_scaling --what agree --devices 1 2     20 losses in float32, every layout that fits
    python -m tests.benchmarks.bench_scaling --what curves --devices 1 2    the same of layers as wide as llama3_8b's
    python -m tests.benchmarks.bench_scaling --what depth --devices 1 2 4   a part of the layers of llama3_8b
    python -m tests.benchmarks.bench_scaling --what dense --devices 4 8     llama3_8b itself, which needs four
    python -m tests.benchmarks.bench_scaling --what experts --devices 4 8   moe_small, ep 1, 4 and 8
    python -m tests.benchmarks.bench_scaling --what images --devices 1 4    a vision-language model
    python -m tests.benchmarks.bench_scaling --what single                  16 layers of 2048, short and long sequences
    python -m tests.benchmarks.bench_scaling --what depth experts images curves --devices 1 2 4 8 --together 8 \\
        --recomputation full selective --set model.n_layers=16              a host of eight, runs beside each other

Every run is a process of its own (PyTorch: one for each GPU, under torchrun). The micro-batches of a step are numbered,
and the ranks take them as `shared_config.parity.layouts` deals them, so that runs with equally many in all see the same
ones: "agree" and "curves" give one device as many as all ranks have. Other runs have one for each rank, and of a
pipeline's ranks eight. Initial values repeat those of a small pool, which the size of llama3_8b asks for; the
optimiser, the loss and the schedule are the trainers' own.

Share is the FLOPs that the model needs (recomputation not counted) over time, of the limit: products of two bfloat16
matrices of 8192 x 8192 on one GPU in the same call. Losses are compared with those of the first run that saw the same
micro-batches; their bound is that of the proof, 10 times what a rounding of the initial values does to them, which a
run of its own measures, and at least 1e-5 of them.
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
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from shared_config.parity.tolerance import tolerance_of
from shared_config.parity.traces import LOSSES
from tests.benchmarks.pool import perturbed, repeated

Line = dict[str, Any]
WARM_UP = 3
LARGE = ("--train.batch_size=4", "--train.seq_len=4096", "--train.scan_layers=true")
"""KempnerForge's own measurement: 4 x 4096 tokens a GPU."""
SINGLE = (
    "--model.dim=2048", "--model.n_layers=16", "--model.n_heads=16", "--model.n_kv_heads=8",
    "--model.ffn_hidden_dim=5632", "--model.vocab_size=32000", "--model.max_seq_len=8192",
    "--train.activation_checkpointing=none", "--train.mixed_precision=bf16", "--train.scan_layers=false",
)  # fmt: skip
SMALL = (
    "--train.mixed_precision=fp32", "--train.matmul_precision=highest", "--scheduler.name=constant",
    "--scheduler.warmup_steps=0", "--train.compile_model=false",
)  # fmt: skip


TOWER = (
    "--vision_encoder.type=vit", "--vision_encoder.path=", "--vision_encoder.image_size=378",
    "--vision_encoder.patch_size=14", "--vision_encoder.n_heads=16", "--vision_encoder.n_layers=27",
)  # fmt: skip
"""As large as SigLIP's so400m, which is only in a folder."""
Agreeing = Mapping[str, tuple[str, tuple[str, ...]]]
"""A config and overrides for each kind of model."""
SHORT = ("--model.n_layers=2", "--train.batch_size=1", "--train.seq_len=1024", "--optimizer.lr=3e-5")
AGREEING: Mapping[str, Agreeing] = {
    "agree": {"dense": ("debug", ()), "experts": ("debug_moe", ())},
    "curves": {
        "dense": ("llama3_8b", SHORT),
        "experts": ("moe_small", (*SHORT, "--model.moe_router=softmax_topk")),
        "images": ("vlm_8b_joint_decoder", (*SHORT, *TOWER)),
    },
}
"""Wide experts have no balancing bias: it moves in steps of one size, so that one token that goes to another expert
moves others.
"""


@dataclasses.dataclass(frozen=True)
class Run:
    """A config on some devices.

    Attributes:
        micro_batches: of a step, those of all ranks.
        perturbed: whether initial values are off by a rounding of float32.
    """

    name: str
    config: str
    devices: int
    layout: Mapping[str, int]
    overrides: Sequence[str] = ()
    micro_batches: int = 1
    backends: Sequence[str] = ("torch", "jax")
    perturbed: bool = False

    @property
    def arguments(self) -> list[str]:
        """Of the config, as on a command line."""
        sizes = [f"--distributed.{axis}={size}" for axis, size in self.layout.items()]
        steps = self.micro_batches // data_ranks(self.devices, self.layout)
        return [*self.overrides, *sizes, f"--train.grad_accum_steps={steps}"]

    def described(self) -> str:
        """Name, devices and layout."""
        layout = [f"{axis}={size}" for axis, size in self.layout.items()]
        return " ".join([self.name, f"x{self.devices}", *layout, *(["perturbed"] if self.perturbed else [])])


def data_ranks(devices: int, layout: Mapping[str, int]) -> int:
    """Ranks that have micro-batches of their own."""
    return devices // math.prod(layout.get(axis, 1) for axis in ("cp", "tp", "pp"))


def runs_of(what: str, devices: Sequence[int], recomputation: Sequence[str] = ("full",)) -> Iterator[Run]:
    """The runs of a question, the smallest number of devices first."""
    for count in sorted(devices):
        if what in AGREEING:
            yield from _agreeing(AGREEING[what], count, max(devices), count == min(devices))
        elif what in ("depth", "dense"):
            for kept in recomputation:
                yield from _large(what, count, kept)
        elif what == "experts":
            for ep in sorted({1, *(size for size in (4, count) if count % size == 0)}):
                yield Run("moe_small", "moe_small", count, {"dp_shard": count, "ep": ep}, (), count)
        elif what == "single":
            for batch_size, seq_len in ((4, 2048), (1, 8192)):
                shape = (f"--train.batch_size={batch_size}", f"--train.seq_len={seq_len}")
                name = f"16 layers, {batch_size} x {seq_len}"
                yield Run(name, "llama_1b", count, {"dp_shard": count}, (*SINGLE, *shape), count)
        elif what == "images":
            few = (*TOWER, "--model.n_layers=4", "--train.batch_size=2", "--train.seq_len=1024")
            yield Run("vlm, 4 layers", "vlm_8b_joint_decoder", count, {"dp_shard": count}, few, count)


def _large(what: str, count: int, kept: str) -> Iterator[Run]:
    """FSDP of both backends, and with two ranks of tensor parallelism and of a pipeline in PyTorch."""
    name, overrides = f"llama3_8b, {kept}", (*LARGE, f"--train.activation_checkpointing={kept}")
    if what == "depth":
        name, overrides = f"llama3_8b part, {kept}", (*overrides, "--model.n_layers=4")
    yield Run(name, "llama3_8b", count, {"dp_shard": count}, overrides, count)
    if count > 1:
        half = count // 2
        yield Run(name, "llama3_8b", count, {"dp_shard": half, "tp": 2}, overrides, half, ("torch",))
        yield Run(name, "llama3_8b", count, {"dp_shard": half, "pp": 2}, overrides, 8 * half, ("torch",))


def _agreeing(models: Agreeing, count: int, micro_batches: int, first: bool) -> Iterator[Run]:
    """Every layout of one axis, and pairs of axes on four devices and more; and first what a rounding does."""
    wanted: list[tuple[str, dict[str, int]]] = [(kind, {"dp_shard": count}) for kind in models]
    if count > 1:
        wanted += [("dense", {"dp_shard": 1, "dp_replicate": count}), ("dense", {"dp_shard": 1, "cp": count})]
        wanted += [("dense", {"dp_shard": count // 2, axis: 2}) for axis in ("tp", "pp")]
        wanted += [("experts", {"dp_shard": count, "ep": count})]
    if count > 3:
        wanted += [("dense", {"dp_shard": count // 2, other: 2}) for other in ("dp_replicate", "cp")]
        wanted += [("experts", {"dp_shard": count // 2, "ep": 2, "tp": 2})]
    for kind, layout in wanted:
        config, overrides = models[kind]
        run = Run(config, config, count, layout, (*SMALL, *overrides), micro_batches)
        if first:
            yield dataclasses.replace(run, backends=("torch",), perturbed=True)
        yield dataclasses.replace(run, backends=("torch",)) if {"tp", "pp"} & set(layout) else run


# One run


def measure(backend: str, run: Run, steps: int, gpus: Sequence[int] = ()) -> Line:
    """Take the steps in processes of their own, which see these GPUs or all, and read their line."""
    own = ["-m", "tests.benchmarks.bench_scaling", "--worker", json.dumps([backend, dataclasses.asdict(run), steps])]
    spread = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={run.devices}"]
    alone = backend == "jax" or run.devices == 1
    environment = {**os.environ, "NCCL_NVLS_ENABLE": "0"}  # NVLink multicast, which not every host allows
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    ended = subprocess.run(
        [sys.executable, *([] if alone else spread), *own], env=environment, capture_output=True, text=True, check=False
    )
    lines = [line for line in ended.stdout.splitlines() if line.startswith('{"seconds"')]
    about = {"backend": backend, "name": run.name, "run": run.described()}
    about |= {"devices": run.devices, "micro_batches": run.micro_batches, "perturbed": run.perturbed}
    if not lines:
        return {**about, "failed": (ended.stderr or ended.stdout)[-6000:]}
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

    init.initial_value = perturbed if run.perturbed else repeated
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

    init.initial_value = perturbed if run.perturbed else repeated
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


def spread(runs: Sequence[tuple[str, Run]], steps: int, gpus: int) -> Iterator[Line]:
    """Measure each run of a backend, as many beside each other as there are GPUs for; 0: one at a time. Lines are in
    the order of the runs, as soon as they are known and another run has begun.
    """
    if not gpus:
        yield from (measure(backend, run, steps) for backend, run in runs)
        return
    free, changed = list(range(gpus)), threading.Condition()

    def on(own: Sequence[int], backend: str, run: Run) -> Line:
        try:
            return measure(backend, run, steps, own)
        finally:
            with changed:
                free.extend(own)
                changed.notify()

    with ThreadPoolExecutor(gpus) as pool:
        begun = deque[Future[Line]]()
        for backend, run in runs:
            with changed:
                changed.wait_for(lambda needed=run.devices: len(free) >= needed)
                own = [free.pop() for _ in range(run.devices)]
            begun.append(pool.submit(on, own, backend, run))
            while begun and begun[0].done():
                yield begun.popleft().result()
        yield from (line.result() for line in begun)


def table(lines: Sequence[Line], limit: Line) -> str:
    """A row for each run: speed, that of a device against the first run of the backend, share, memory, how far losses
    are off those of the first run that saw the same micro-batches, and that as a share of their bound.
    """
    rows = [f"{'':52} {'tok/s':>9} {'scaling':>7} {'share':>6} {'GiB':>6} {'loss off by':>11} {'of bound':>8}"]
    measured = [line for line in lines if "failed" not in line]
    for line in lines:
        title = f"{line['backend']:5} {line['run']}"
        if line not in measured:
            rows.append(f"{title:52} failed")
            continue
        alike = [other for other in measured if other["name"] == line["name"]]
        alone = next(other for other in alike if other["backend"] == line["backend"])
        scaling = line["tokens/s"] / line["devices"] / (alone["tokens/s"] / alone["devices"])
        share = (line["flops"] or math.nan) / line["seconds"] / line["devices"] / limit.get("product FLOP/s", math.inf)
        off, of_bound = parted(line, [other for other in alike if other["micro_batches"] == line["micro_batches"]])
        numbers = f"{line['tokens/s']:9.0f} {scaling:7.3f} {share:6.3f} {line['GiB']:6.1f} {off:11.1e}"
        rows.append(f"{title:52} {numbers} {of_bound:8.3f}")
    return "\n".join(rows)


def parted(line: Line, alike: Sequence[Line]) -> tuple[float, float]:
    """How far losses are off those of the first run that is not perturbed, relatively, and as a share of their bound,
    which is NaN where no run was perturbed.
    """
    plain = [other for other in alike if not other["perturbed"]] or [line]
    losses, first = np.array(line["losses"]), np.array(plain[0]["losses"])
    off = np.abs(losses - first)
    wobble = next((np.abs(np.array(other["losses"]) - first) for other in alike if other["perturbed"]), None)
    tolerance = tolerance_of(LOSSES, "float32")
    bound = np.nan if wobble is None else np.maximum(tolerance.K * wobble, tolerance.relative * np.abs(first))
    return float(np.max(off / np.abs(first))), float(np.max(off / bound))


def curves(lines: Sequence[Line]) -> str:
    """The losses of every fifth step."""
    measured = [line for line in lines if "failed" not in line]
    longest = max((len(line["losses"]) for line in measured), default=0)
    rows = [f"{'losses of step':52} " + " ".join(f"{step:>9}" for step in range(1, longest + 1, 5))]
    for line in measured:
        title = f"{line['backend']:5} {line['run']}"
        rows.append(f"{title:52} " + " ".join(f"{loss:9.6f}" for loss in line["losses"][::5]))
    return "\n".join(rows)


WHAT = (*AGREEING, "depth", "dense", "experts", "images", "single")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--what", choices=WHAT, nargs="+", default=["depth"])
    parser.add_argument("--devices", type=int, nargs="+", default=[1])
    parser.add_argument("--backend", choices=["torch", "jax"], nargs="+", default=["torch", "jax"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--recomputation", nargs="+", default=["full"], help="of depth and dense")
    parser.add_argument(
        "--together", type=int, default=0, metavar="GPUS", help="measure runs beside each other on these"
    )
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="FIELD=VALUE", help="other fields of all configs but those of curves"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        backend, run, steps = json.loads(arguments.worker)
        work(backend, Run(**run), steps)
        return
    limit, lines = limits(), []
    print(json.dumps(limit), flush=True)
    fields = [f"--{field}" for field in arguments.set]
    runs = [
        (backend, dataclasses.replace(run, overrides=[*run.overrides, *(fields if what != "curves" else ())]))
        for what in arguments.what
        for run in runs_of(what, arguments.devices, arguments.recomputation)
        for backend in arguments.backend
        if backend in run.backends
    ]
    for line in spread(runs, arguments.steps, arguments.together):
        lines.append(line)
        print(json.dumps(line), flush=True)
    print(table(lines, limit), curves(lines), sep="\n\n")


if __name__ == "__main__":
    main()
