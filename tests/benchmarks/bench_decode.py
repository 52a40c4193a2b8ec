"""Speed of decoding on the CPU against the `generate` of transformers with a static cache, on the same weights.

    python -m tests.benchmarks.bench_decode [--threads 2] [--new 32] [--rounds 3] [--no-compile] [--no-jax]

One prompt, greedy; the tokens of all must be equal. What is compared runs in turn, round after round, in one process.
Prints one JSON line for each: median seconds of a whole call, on the clock and of all cores together, tokens a second,
and how many times as fast as transformers; the load of the machine stands beside them, as it decides what such numbers
are worth. Threads sleep where they wait for each other (OMP_WAIT_POLICY), as on a busy machine those that spin take the
time of those that work; with --threads 1 none waits.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from shared_config.contract.initialise import initial_values
from shared_config.contract.parameters import parameter_table
from shared_config.interchange.huggingface import config_to_huggingface, to_huggingface
from shared_config.loader import load_config
from shared_config.schema.model import ModelConfig

Decoder = Callable[[], np.ndarray]
REFERENCE = "transformers, static cache"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--preset", default="llama_125m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled step of torch out")
    parser.add_argument("--no-jax", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    config = load_config(options.preset).model
    weights = dict(initial_values(parameter_table(config), 0))
    prompt = [place * 37 % config.vocab_size for place in range(options.prompt)]
    decoders: dict[str, Decoder] = {REFERENCE: transformers_decoder(config, weights, prompt, options.new)}
    decoders |= torch_decoders(config, weights, prompt, options.new, not options.no_compile, options.threads)
    if not options.no_jax:
        decoders["jax"] = jax_decoder(config, weights, prompt, options.new)
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
            "threads": options.threads,
            "load": [round(load, 1) for load in os.getloadavg()],
            "cores": os.cpu_count(),
            "machine": platform.machine(),
        }
        print(json.dumps(report), flush=True)


def timed_in_turn(decoders: Mapping[str, Decoder], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of every call, on the clock and of the cores."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in decoders}
    for _ in range(rounds):
        for name, decode in decoders.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            decode()
            seconds[name].append((time.perf_counter() - start, time.process_time() - start_cpu))
    return seconds


def transformers_decoder(config: ModelConfig, weights: Mapping[str, Any], prompt: list[int], new: int) -> Decoder:
    """`LlamaForCausalLM.generate`, as its documentation calls it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    fields = config_to_huggingface(config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=torch.float32).eval()
    state = {name: torch.from_numpy(np.array(value)) for name, value in to_huggingface(weights, config).items()}
    model.load_state_dict(state, strict=not config.tie_embeddings)
    ids = torch.tensor([prompt])

    def decode() -> np.ndarray:
        tokens = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            cache_implementation="static",
            pad_token_id=0,
        )
        return tokens.numpy()

    return decode


def torch_decoders(
    config: ModelConfig, weights: Mapping[str, Any], prompt: list[int], new: int, with_compiled: bool, threads: int
) -> dict[str, Decoder]:
    """Ours, eager and compiled."""
    import torch

    from kempnerforge_torch.model.generate import generate, load_model

    torch.set_num_threads(threads)
    model = load_model(config, weights, "cpu")
    decoders = {"torch": lambda: generate(model, [prompt], new, temperature=0.0).numpy()}
    if with_compiled:
        decoders["torch, compiled"] = lambda: generate(model, [prompt], new, temperature=0.0, compile=True).numpy()
    return decoders


def jax_decoder(config: ModelConfig, weights: Mapping[str, Any], prompt: list[int], new: int) -> Decoder:
    """Ours, the whole loop as one program."""
    from kempnerforge_jax.model.generate import generate, load_model

    model = load_model(config, weights, "cpu")
    return lambda: np.asarray(generate(model, [prompt], new, temperature=0.0))


if __name__ == "__main__":
    main()
