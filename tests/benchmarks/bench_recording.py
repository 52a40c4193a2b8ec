"""What a recording costs, in forward and backward passes of the same model.

    python -m tests.benchmarks.bench_recording --width 1024 --layers 2 --tokens 512

times a Llama of transformers: a forward and backward pass, a recording of statistics of every activation and gradient
(without deltas), and one of all values. Medians of alternating runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kempnerforge_torch.parity import record


def main() -> None:
    """Print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 1024), ("layers", 2), ("tokens", 512), ("runs", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    width = options.width
    config = LlamaConfig(
        vocab_size=2048, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=options.layers,
        num_attention_heads=16, num_key_value_heads=4, head_dim=width // 16, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 2048, (1, options.tokens))

    def step() -> None:
        model.zero_grad()
        model(input_ids=tokens).logits.float().square().mean().backward()

    ways: dict[str, Callable[[], object]] = {
        "forward and backward": step,
        "statistics of all": lambda: record(model, {"input_ids": tokens}, above=0, deltas=False),
        "values of all": lambda: record(model, {"input_ids": tokens}, deltas=False),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(options.runs + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if run:
                times[name].append(time.perf_counter() - start)
    plain = statistics.median(times["forward and backward"])
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        print(f"{name:22} {middle:7.3f} s  {middle / plain:5.2f} times", flush=True)


if __name__ == "__main__":
    main()
