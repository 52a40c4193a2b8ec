"""What a recording costs, in forward and backward passes of the same model.

    python -m tests.benchmarks.bench_recording --width 512 --layers 6 --batch 2 --length 256

times, for a Llama of transformers in PyTorch and its port in JAX: a forward and backward pass; a recording that keeps
the loss alone; one of statistics of every activation and gradient; and one of all values. No deltas, nothing compiled
within the time; on a CPU seconds of the processor, as others may use it, but with ``--wall`` those of the wall, which
tell how several threads fare. Medians of alternating runs, also as shares of the pass. Recording the loss alone copies
the modules, but not the weights, in PyTorch, and computes no gradients in JAX.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kempnerforge_jax.parity as of_jax
import kempnerforge_torch.parity as of_torch
from kempnerforge_jax.model.state import from_numpy
from kempnerforge_torch.model.state import to_numpy
from shared_config.parity import transfer
from shared_config.parity.foreign.options import make_options
from shared_config.parity.foreign.recorder import Store
from tests.examples.llama_in_jax import Sizes, llama, names, nested

PASS = "forward and backward"
Ways = dict[str, Callable[[], object]]
LOSS, STATISTICS, VALUES = KINDS = ("loss alone", "statistics of all", "values of all")
HEADS, KV_HEADS = 16, 4


def main() -> None:
    """Print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 512), ("layers", 6), ("batch", 2), ("length", 256), ("runs", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu", help="of PyTorch; JAX takes its own")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--wall", action="store_true", help="seconds of the wall also on a CPU")
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=KINDS)
    parser.add_argument("--backend", choices=["torch", "jax"], nargs="+", default=["torch", "jax"])
    options = parser.parse_args()
    model = a_llama(options.width, options.layers).to(options.device, getattr(torch, options.dtype))
    tokens = torch.randint(0, 2048, (options.batch, options.length), device=options.device)
    for backend in options.backend:
        ways = (in_torch if backend == "torch" else in_jax)(model, tokens)
        ways = {name: way for name, way in ways.items() if name == PASS or name in options.kinds}
        of_processor = options.device == "cpu" and not options.wall
        times = medians(ways, options.runs, time.process_time if of_processor else time.perf_counter)
        for name, seconds in times.items():
            print(f"{backend:6} {name:22} {seconds:7.3f} s  {seconds / times[PASS]:5.2f} of a pass", flush=True)


def a_llama(width: int, layers: int) -> LlamaForCausalLM:
    """With weights as they are drawn."""
    config = LlamaConfig(
        vocab_size=2048, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=width // HEADS, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def medians(ways: Ways, runs: int, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of each, of alternating runs after a first."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(runs + 1):
        for name, way in ways.items():
            start = clock()
            way()
            if run:
                times[name].append(clock() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def in_torch(model: LlamaForCausalLM, tokens: torch.Tensor) -> Ways:
    """The plain pass, and the recordings."""

    def loss_of(output: Any) -> torch.Tensor:
        return output["logits"].float().square().mean()

    def step() -> None:
        model.zero_grad()
        loss_of(model(input_ids=tokens)).backward()
        if tokens.is_cuda:
            torch.cuda.synchronize()

    return {PASS: step, **recordings(of_torch, model, {"input_ids": tokens}, None, loss_of)}


def in_jax(model: LlamaForCausalLM, tokens: torch.Tensor) -> Ways:
    """The same of the port, with the model's weights."""
    config = model.config
    sizes = Sizes(HEADS, KV_HEADS, config.hidden_size // HEADS)
    flat = transfer({name: to_numpy(value.cpu()) for name, value in model.state_dict().items()}, names(sizes))
    weights = jax.tree.map(from_numpy, nested(flat, config.num_hidden_layers))
    ids = jnp.asarray(to_numpy(tokens.cpu()), jnp.int32)
    function = functools.partial(llama, sizes=sizes)

    def loss_of(output: jax.Array) -> jax.Array:
        return jnp.square(output.astype(jnp.float32)).mean()

    plain = jax.jit(jax.value_and_grad(lambda weights: loss_of(function(weights, ids))))
    step = lambda: jax.block_until_ready(plain(weights))  # noqa: E731
    return {PASS: step, **recordings(of_jax, function, (ids,), weights, loss_of)}


def recordings(backend: object, function: object, inputs: object, weights: object, loss_of: object) -> Ways:
    """Runs of the recorder, by what is kept."""
    ways: Ways = {}
    for kind in KINDS:
        options = make_options(
            dtype=None, backward=True, only=("none",) if kind == LOSS else (), above=0 if kind == STATISTICS else None,
            deltas=False, seed=0, refeed=None, names=None,
        )  # fmt: skip
        engine = backend._Engine(function, inputs, weights, loss_of, None, (), options)  # type: ignore[attr-defined]
        ways[kind] = functools.partial(engine.run, "", engine.weights, engine.inputs, {}, None, Store(options.above))
    return ways


if __name__ == "__main__":
    main()
