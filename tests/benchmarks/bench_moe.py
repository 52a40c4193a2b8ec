"""Speed of mixtures of experts against what stacks in use do. Prints one JSON line for each measurement.

    python -m tests.benchmarks.bench_moe --device cpu     our layer against a loop over experts, both backends
    python -m tests.benchmarks.bench_moe --device cuda    a training step against padding to the largest group (torch),
                                                          the step time of JAX, grouped products alone, and whether the
                                                          host waits for the GPU anywhere

What is compared is measured in turn, round after round, in one process; medians and their ratio are printed. The CPU
numbers are seconds that the process had on one core, whatever else the machine did.

Shapes: T tokens, D model dim, F expert width, E experts, k choices of each token, R = k * T rows.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

CPU = {"dim": 512, "hidden_dim": 1024, "experts": 16, "top_k": 2, "tokens": 4096}
GPU = {"dim": 1024, "hidden_dim": 2816, "experts": 16, "top_k": 2, "layers": 8, "batch": 4, "length": 2048}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--backend", choices=["torch", "jax", "both"], default="both")
    parser.add_argument("--part", choices=["all", "step", "products", "sync"], default="all", help="of the GPU's")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    backends = ["torch", "jax"] if arguments.backend == "both" else [arguments.backend]
    if arguments.device == "cpu":
        use_one_core()
        for backend in backends:
            {"torch": torch_layer, "jax": jax_layer}[backend](arguments.rounds)
        return
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    parts = ["sync", "products", "step"] if arguments.part == "all" else [arguments.part]
    for part in parts:
        for backend in backends:
            measure = {
                ("sync", "torch"): torch_sync,
                ("products", "torch"): torch_products,
                ("products", "jax"): jax_products,
                ("step", "torch"): torch_step,
                ("step", "jax"): jax_step,
            }.get((part, backend))
            if measure is not None:
                measure(arguments.rounds)


# Measuring

Times = dict[str, list[float]]


def use_one_core() -> None:
    """Threads of a second core, which may be busy with something else, would blur the comparison."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})


def timed(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    wait: Callable[[], Any] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Seconds of each round of each function, called in turn so that whatever else the machine does hits all of them.

    Args:
        wait: called before every reading of the clock, where results come later.
    """
    wait = wait or (lambda: None)
    for function in runs.values():
        function()
    times: Times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, function in runs.items():
            wait()
            start = clock()
            function()
            wait()
            times[name].append(clock() - start)
    return times


def report(measurement: str, times: Times, baseline: str | None = None, **more: Any) -> None:
    """One JSON line: median milliseconds, and the median over rounds of how many times as long the baseline takes."""
    line: dict[str, Any] = {"measurement": measurement, **more}
    line["milliseconds"] = {name: round(1e3 * statistics.median(values), 3) for name, values in times.items()}
    if baseline is not None:
        line["times_faster_than_baseline"] = {
            name: round(statistics.median(b / a for a, b in zip(values, times[baseline], strict=True)), 3)
            for name, values in times.items()
            if name != baseline
        }
    if hasattr(os, "getloadavg"):
        line["load"] = [round(value, 2) for value in os.getloadavg()]
    print(json.dumps(line), flush=True)


def torch_versions() -> dict[str, str]:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.processor()} (one core)"
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()}


def jax_versions() -> dict[str, str]:
    import jax

    return {"device": str(jax.devices()[0]), "jax": jax.__version__, "python": platform.python_version()}


# CPU, torch


def torch_layer(rounds: int) -> None:
    """Forward and backward of one layer, float32."""
    import torch

    from kempnerforge_torch.model.moe import build_moe

    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(1, CPU["tokens"], CPU["dim"], requires_grad=True)
    for packed in (True, False):
        layer = build_moe(CPU["dim"], CPU["hidden_dim"], CPU["experts"], CPU["top_k"], packed_experts=packed)

        def run(forward: Callable[..., Any], layer: Any = layer) -> None:
            layer.zero_grad()
            x.grad = None
            forward(x).square().sum().backward()

        looped = torch_loop(layer)
        torch.testing.assert_close(looped(x), layer(x), rtol=1e-4, atol=1e-5)
        runs = {"ours": lambda layer=layer: run(layer), "loop": lambda looped=looped: run(looped)}
        report("layer", timed(runs, rounds, clock=time.process_time), "loop", packed=packed, **CPU, **torch_versions())


def torch_loop(layer: Any) -> Callable[[Any], Any]:
    """The same function as a loop over experts: take the tokens of each, and add what comes out to their rows."""
    import torch
    import torch.nn.functional as F

    def forward(x: Any) -> Any:
        x_TD = x.flatten(0, 1)
        weights_Tk, indices_Tk = layer.router(x_TD)
        y_TD = torch.zeros_like(x_TD)
        gate, up, down = packed_matrices(layer)
        for expert in range(layer.num_experts):
            token, slot = torch.where(indices_Tk == expert)
            if layer.packed_experts:
                own = x_TD[token]
                out = (F.silu(own @ gate[expert]) * (own @ up[expert])) @ down[expert]
            else:
                out = layer.experts[expert](x_TD[token])
            y_TD = y_TD.index_add(0, token, out * weights_Tk[token, slot, None])
        return y_TD.reshape(x.shape)

    return forward


def packed_matrices(layer: Any) -> list[Any]:
    """Gate, up and down matrices, each a tuple of one per expert; so taken, their gradients are stacked once."""
    if not layer.packed_experts:
        return [None] * 3
    return [weight.unbind() for weight in (layer.gate_w, layer.up_w, layer.down_w)]


# CPU, JAX


def jax_layer(rounds: int) -> None:
    """Forward and backward of one layer, float32.

    Two loops over experts: one outside jit, each expert on exactly its tokens, the routes known beforehand and every
    shape compiled beforehand; and one inside jit, where shapes are static, each expert on all tokens.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from kempnerforge_jax.model.moe import build_moe
    from kempnerforge_jax.model.state import merge, split

    x = jax.random.normal(jax.random.key(0), (1, CPU["tokens"], CPU["dim"]))
    for packed in (True, False):
        layer = build_moe(
            CPU["dim"], CPU["hidden_dim"], CPU["experts"], CPU["top_k"], packed_experts=packed, rngs=nnx.Rngs(0)
        )
        graphdef, params, buffers = split(layer)
        indices_Tk = np.asarray(layer.router(x.reshape(-1, CPU["dim"]))[1])

        def loss(forward: Callable[..., Any], params: Any, x: Any, given: Any = (graphdef, buffers)) -> Any:
            return jnp.square(forward(merge(given[0], params, given[1]), x)).sum()

        def gradient(forward: Callable[..., Any], loss: Any = loss) -> Any:
            return jax.value_and_grad(functools.partial(loss, forward), argnums=(0, 1))

        ours = jax.jit(gradient(lambda layer, x: layer(x)))
        inside = jax.jit(gradient(jax_loop_on_all))
        outside = gradient(lambda layer, x, indices_Tk=indices_Tk: jax_loop(layer, x, indices_Tk))
        runs = {
            name: lambda function=function, params=params: jax.block_until_ready(function(params, x))
            for name, function in {"ours": ours, "loop": outside, "loop_in_jit": inside}.items()
        }
        value, other = (runs[name]()[0] for name in ("ours", "loop"))
        np.testing.assert_allclose(value, other, rtol=1e-4)
        report("layer", timed(runs, rounds, clock=time.process_time), "loop", packed=packed, **CPU, **jax_versions())


def jax_loop(layer: Any, x: Any, indices_Tk: Any) -> Any:
    """A loop over experts on arrays that are there, so that each expert gets its tokens alone."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    x_TD = x.reshape(-1, x.shape[-1])
    weights_Tk, _ = layer.router(x_TD)
    weights = layer.expert_weights()
    y_TD = jnp.zeros_like(x_TD)
    for expert in range(layer.num_experts):
        token, slot = np.nonzero(indices_Tk == expert)
        own = x_TD[token]
        hidden = jax.nn.silu(own @ weights["gate"][expert]) * (own @ weights["up"][expert])
        y_TD = y_TD.at[token].add(hidden @ weights["down"][expert] * weights_Tk[token, slot, None])
    return y_TD.reshape(x.shape)


def jax_loop_on_all(layer: Any, x: Any) -> Any:
    """A loop over experts with static shapes: each computes all tokens, with weight 0 for those not its own."""
    import jax
    import jax.numpy as jnp

    x_TD = x.reshape(-1, x.shape[-1])
    weights_Tk, indices_Tk = layer.router(x_TD)
    weights = layer.expert_weights()
    y_TD = jnp.zeros_like(x_TD)
    for expert in range(layer.num_experts):
        hidden = jax.nn.silu(x_TD @ weights["gate"][expert]) * (x_TD @ weights["up"][expert])
        share_T1 = jnp.where(indices_Tk == expert, weights_Tk, 0).sum(axis=1, keepdims=True)
        y_TD += hidden @ weights["down"][expert] * share_T1
    return y_TD.reshape(x.shape)


# GPU


def job(*, compile_model: bool = True) -> Any:
    """The training job of the GPU's measurements."""
    from shared_config.schema.job import JobConfig
    from shared_config.schema.model import ModelConfig
    from shared_config.schema.training import TrainConfig

    model = ModelConfig(
        dim=GPU["dim"], n_layers=GPU["layers"], n_heads=16, vocab_size=32000, ffn_hidden_dim=GPU["hidden_dim"],
        max_seq_len=GPU["length"], num_experts=GPU["experts"], moe_top_k=GPU["top_k"], moe_packed_experts=True,
        moe_router_z_loss_weight=1e-3,
    )  # fmt: skip
    train = TrainConfig(
        batch_size=GPU["batch"], seq_len=GPU["length"], mixed_precision="bf16", compile_model=compile_model
    )
    return JobConfig(model=model, train=train)


def batch_of_tokens() -> dict[str, Any]:
    import numpy as np

    tokens = np.random.default_rng(0).integers(0, 32000, (GPU["batch"], GPU["length"] + 1), dtype=np.int32)
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}


def torch_step(rounds: int) -> None:
    """A whole training step, of our layer compiled block by block, of our layer eagerly, and of the baseline."""
    import gc

    import torch

    from kempnerforge_torch.training.train import Trainer

    batch, times, more = batch_of_tokens(), {}, {}
    for name in ("ours", "ours_eager", "padded"):
        trainer = Trainer(job(compile_model=name == "ours"), "cuda")
        if name == "padded":
            pad_to_the_largest_group(trainer.model)
            more["largest_group_over_mean"] = largest_group(trainer.model, batch)
        more[f"losses_{name}"] = [round(float(trainer.step([batch])["loss"]), 4) for _ in range(3)]
        torch.cuda.reset_peak_memory_stats()
        times |= timed({name: lambda trainer=trainer: trainer.step([batch])}, rounds, torch.cuda.synchronize)
        more[f"peak_gib_{name}"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        del trainer
        gc.collect()
        torch.cuda.empty_cache()
    report("step", times, "padded", **more, **GPU, **torch_versions())


def largest_group(model: Any, batch: Mapping[str, Any]) -> float:
    """The most tokens that an expert gets over the mean, over all layers, at the initial weights."""
    import torch

    with torch.no_grad():
        stats = model.run(torch.from_numpy(batch["tokens"]).cuda()).stats
    return max(round(float(one.expert_counts.max() / one.expert_counts.float().mean()), 2) for one in stats.values())


def pad_to_the_largest_group(model: Any) -> None:
    """Replace the forward of each layer of experts by one that pads every group to the largest and keeps the books in
    loops over experts, with the host waiting for each one's number of tokens.
    """
    for block in model.layers.values():
        block.mlp.forward = padded_forward(block.mlp)


def padded_forward(layer: Any) -> Callable[..., Any]:
    import torch
    import torch.nn.functional as F

    from kempnerforge_torch.model.stats import MoEOutput, MoEStats

    def forward(x: Any, valid: Any = None, *, return_stats: bool = False) -> Any:
        x_TD = x.flatten(0, 1)
        weights_Tk, indices_Tk, routed = layer.router(x_TD, batch_size=x.shape[0], return_stats=True)
        groups = [torch.where(indices_Tk == expert) for expert in range(layer.num_experts)]
        largest = max(len(token) for token, _ in groups)
        padded = x_TD.new_zeros(layer.num_experts, largest, x_TD.shape[1])
        for expert, (token, _) in enumerate(groups):
            padded[expert, : len(token)] = x_TD[token]
        hidden = F.silu(torch.bmm(padded, layer.gate_w)) * torch.bmm(padded, layer.up_w)
        out = torch.bmm(hidden, layer.down_w)
        y_TD = torch.zeros_like(x_TD)
        for expert, (token, slot) in enumerate(groups):
            share = weights_Tk[token, slot, None].to(x.dtype)
            y_TD.index_add_(0, token, out[expert, : len(token)] * share)
        y = y_TD.reshape(x.shape)
        stats = MoEStats(*routed, dropped=torch.zeros((), dtype=torch.int32, device=x.device))
        return MoEOutput(y, stats) if return_stats else y

    return forward


def torch_sync(rounds: int) -> None:
    """Forward and backward with an error where the host waits for the GPU, eagerly and compiled."""
    import torch

    from kempnerforge_torch.model.transformer import Transformer

    config = job().model
    tokens = torch.from_numpy(batch_of_tokens()["tokens"]).cuda()
    for compiled in (False, True):
        model = Transformer(config.replace(n_layers=2)).to("cuda", torch.bfloat16)
        if compiled:
            for block in model.layers.values():
                block.compile(fullgraph=True)

        def run(model: Any = model) -> None:
            logits, stats, _ = model.run(tokens)
            loss = logits.float().logsumexp(dim=-1).mean()
            for layer in stats.values():
                loss = loss + layer.aux_loss + layer.z_loss
            loss.backward()

        run()
        with without_sync():
            run()
        finite = all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
        print(json.dumps({"measurement": "sync", "compiled": compiled, "host_syncs": 0, "finite": finite}), flush=True)


@contextlib.contextmanager
def without_sync() -> Iterator[None]:
    import torch

    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def product_sizes() -> tuple[int, int, int, int, Any]:
    """R, D, F, E, and uneven group ends."""
    import numpy as np

    rows = GPU["batch"] * GPU["length"] * GPU["top_k"]
    share = np.random.default_rng(0).dirichlet(np.full(GPU["experts"], 4.0))
    ends = np.floor(np.cumsum(share) * rows + 0.5).astype(np.int32)
    return rows, GPU["dim"], GPU["hidden_dim"], GPU["experts"], ends


def torch_products(rounds: int) -> None:
    """One grouped product and one sum of outer products, bfloat16, beside a dense product of the same size."""
    import torch

    from kempnerforge_torch.model.grouped import grouped_matmul, grouped_outer, tiled_matmul, tiled_outer

    R, D, F, E, ends = product_sizes()
    x, w, y = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((R, D), (E, D, F), (R, F)))
    ends_E = torch.from_numpy(ends).cuda()
    runs = {
        "dense": lambda: x @ w[0],
        "grouped": lambda: grouped_matmul(x, w, ends_E, True),
        "tiled": lambda: tiled_matmul(x, w, ends_E),
        "dense_outer": lambda: x.t() @ y,
        "grouped_outer": lambda: grouped_outer(x, y, ends_E),
        "tiled_outer": lambda: tiled_outer(x, y, ends_E),
    }
    many = {name: lambda function=function: [function() for _ in range(10)] for name, function in runs.items()}
    times = a_tenth(timed(many, rounds, torch.cuda.synchronize))
    report("products", times, "dense", teraflops=teraflops(times, R, D, F), **torch_versions())


def jax_products(rounds: int) -> None:
    """The same in JAX, for each implementation of the seam."""
    import jax
    import jax.numpy as jnp

    from kempnerforge_jax.model import grouped

    R, D, F, E, ends = product_sizes()
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((R, D), (E, D, F), (R, F))
    x, w, y = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))
    tiled = {
        f"tiled_{rows}": (
            functools.partial(grouped.tiled_matmul, tile_rows=rows),
            functools.partial(grouped.tiled_outer, tile_rows=rows),
        )
        for rows in (128, 256, 512)
    }
    each = {"ragged": (grouped.ragged_matmul, grouped.ragged_outer), **tiled}
    runs: dict[str, Callable[[], Any]] = {"dense": functools.partial(jax.jit(jnp.matmul), x, w[0])}
    for name, (matmul, outer) in each.items():
        runs[name] = functools.partial(jax.jit(matmul), x, w, ends)
        runs[f"{name}_outer"] = functools.partial(jax.jit(outer), x, y, ends)
    many = {
        name: lambda function=function: jax.block_until_ready([function() for _ in range(10)])
        for name, function in runs.items()
    }
    times = a_tenth(timed(many, rounds))
    report("products", times, "dense", teraflops=teraflops(times, R, D, F), **jax_versions())


def a_tenth(times: Times) -> Times:
    return {name: [value / 10 for value in values] for name, values in times.items()}


def teraflops(times: Times, R: int, D: int, F: int) -> dict[str, float]:
    return {name: round(2e-12 * R * D * F / statistics.median(values), 1) for name, values in times.items()}


def jax_step(rounds: int) -> None:
    """A whole training step of the JAX backend."""
    import jax

    from kempnerforge_jax.training.train import Trainer

    batch, trainer = batch_of_tokens(), Trainer(job())
    losses = [float(trainer.step([batch])["loss"]) for _ in range(3)]
    times = timed({"ours": lambda: jax.block_until_ready(trainer.step([batch]))}, rounds)
    report("step", times, losses=losses, **GPU, **jax_versions())


if __name__ == "__main__":
    main()
