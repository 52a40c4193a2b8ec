"""Speed of decoding against the `generate` of transformers with a static cache, on the same weights.

    python -m tests.benchmarks.bench_decode [--threads 2] [--new 32] [--rounds 3] [--no-compile] [--no-jax]
    python -m tests.benchmarks.bench_decode --device cuda [--preset llama_1b] [--dtype bfloat16] [--new 128]

One prompt, greedy. What is compared runs in turn, round after round, in one process. Prints one JSON line for each:
median seconds of a whole call, on the clock and of all cores together, tokens per second, how many times as fast as
transformers, and whether the tokens are the same, as in float32 they must be; the load of the machine stands beside
them, as it decides what such numbers are worth. Threads sleep where they wait for each other (OMP_WAIT_POLICY), as on
a busy machine those that spin take the time of those that work; with --threads 1 none waits. On a GPU, where
transformers compiles its step by itself and replays it as a CUDA graph, so does ours.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from shared_config.contract.initialise import initial_values
from shared_config.contract.parameters import parameter_table
from shared_config.interchange.huggingface import to_huggingface
from shared_config.interchange.huggingface_config import config_to_huggingface
from shared_config.loader import load_config
from shared_config.schema.model import ModelConfig

Decoder = Callable[[], np.ndarray]
REFERENCE = "transformers, static cache"


class Case(NamedTuple):
    """What all decode: ``new`` tokens after one prompt, of a model with these weights, by name."""

    config: ModelConfig
    weights: Mapping[str, Any]
    prompt: list[int]
    new: int
    device: str
    dtype: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--preset", default="llama_125m")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled step of torch out")
    parser.add_argument("--no-jax", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", options.device)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    config = load_config(options.preset).model
    weights = dict(initial_values(parameter_table(config), 0))
    prompt = [place * 37 % config.vocab_size for place in range(options.prompt)]
    case = Case(config, weights, prompt, options.new, options.device, options.dtype)
    decoders: dict[str, Decoder] = {REFERENCE: transformers_decoder(case)}
    decoders |= torch_decoders(case, not options.no_compile, options.threads)
    if not options.no_jax:
        decoders["jax"] = jax_decoder(case)
    first = {name: decode() for name, decode in decoders.items()}
    same = {name: bool(np.array_equal(tokens, first[REFERENCE])) for name, tokens in first.items()}
    seconds = timed_in_turn(decoders, options.rounds)
    reference_s, reference_cpu_s = (statistics.median(column) for column in zip(*seconds[REFERENCE], strict=True))
    for name, times in seconds.items():
        median, cpu_median = (statistics.median(column) for column in zip(*times, strict=True))
        report = {
            "decoder": name,
            "median_s": round(median, 3),
            "all_s": [round(clock, 3) for clock, _ in times],
            "cpu_s": round(cpu_median, 3),
            "tokens_per_s": round(options.new / median, 2),
            "times_transformers": round(reference_s / median, 3),
            "times_transformers_cpu": round(reference_cpu_s / cpu_median, 3),
            "same_tokens": same[name],
            "preset": options.preset,
            "dtype": options.dtype,
            "device": device_name(options.device),
            "threads": options.threads,
            "load": [round(load, 1) for load in os.getloadavg()],
            "cores": os.cpu_count(),
        }
        print(json.dumps(report), flush=True)


def device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else platform.machine()


def timed_in_turn(decoders: Mapping[str, Decoder], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of every call, on the clock and of the cores."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in decoders}
    for _ in range(rounds):
        for name, decode in decoders.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            decode()
            seconds[name].append((time.perf_counter() - start, time.process_time() - start_cpu))
    return seconds


def transformers_decoder(case: Case) -> Decoder:
    """`LlamaForCausalLM.generate`, as its documentation calls it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    fields: dict[str, Any] = config_to_huggingface(case.config)
    dtype = getattr(torch, case.dtype)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=dtype).eval()
    named = to_huggingface(case.weights, case.config)
    state = {name: torch.from_numpy(np.array(value)).to(dtype) for name, value in named.items()}
    model.load_state_dict(state, strict=not case.config.tie_embeddings)
    model = model.to(case.device)
    ids = torch.tensor([case.prompt], device=case.device)

    def decode() -> np.ndarray:
        tokens = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=case.new,
            min_new_tokens=case.new,
            do_sample=False,
            cache_implementation="static",
            pad_token_id=0,
        )
        return tokens.cpu().numpy()

    return decode


def torch_decoders(case: Case, with_compiled: bool, threads: int) -> dict[str, Decoder]:
    """Ours, eager and compiled."""
    import torch

    from kempnerforge_torch.model.build import load_model
    from kempnerforge_torch.model.generate import generate

    torch.set_num_threads(threads)
    model = load_model(case.config, case.weights, case.device).to(getattr(torch, case.dtype))

    def decode(compile: bool) -> np.ndarray:
        return generate(model, [case.prompt], case.new, temperature=0.0, compile=compile).cpu().numpy()

    decoders: dict[str, Decoder] = {"torch": lambda: decode(compile=False)}
    return decoders | ({"torch, compiled": lambda: decode(compile=True)} if with_compiled else {})


def jax_decoder(case: Case) -> Decoder:
    """Ours, the whole loop as one program; float32 products in float32, as those of torch."""
    import jax

    from kempnerforge_jax.model.build import load_model
    from kempnerforge_jax.model.generate import generate
    from kempnerforge_jax.model.state import merge, split

    jax.config.update("jax_default_matmul_precision", "highest" if case.dtype == "float32" else None)
    graphdef, params, buffers = split(load_model(case.config, case.weights, case.device))
    model = merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(case.dtype), params), buffers)
    return lambda: np.asarray(generate(model, [case.prompt], case.new, temperature=0.0))


if __name__ == "__main__":
    main()
