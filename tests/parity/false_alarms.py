"""How far from their limits correct pairs of traces stay: none may be called different.

    python -m tests.parity.false_alarms --pairs 300

draws small jobs of every architecture, records one step of each in torch and JAX, in float32 and bfloat16, compares
them as ``validate`` does, and prints, by dtype, group and kind of part, the largest share of a limit that was seen. A
pair is torch against JAX in one dtype on one drawn job. ``--first`` goes on after so many jobs.

300 pairs (CPU, torch 2.11, jax 0.11, 2026-11-28) gave no false alarm; in 8 of bfloat16 a token chose another expert.
Nor did they on 2026-11-30, 38 of them with torch 2.13 and jax 0.10. The largest shares of limits, of the first time:

    ==========  ========  =====  ===========  =======  =====
    dtype       group     whole  row, column  element  scale
    ==========  ========  =====  ===========  =======  =====
    float32     forward   0.42   0.64         0.47     0.40
    float32     gradient  0.40   0.63         0.46     0.49
    float32     updated   0.26   0.49         0.31
    float32     decode    0.30   0.27         0.34
    float32     loss      0.29
    float32     routing   0.38
    bfloat16    forward   0.55   0.84         0.62     0.84
    bfloat16    gradient  0.71   0.80         0.28     0.57
    bfloat16    updated   0.43   0.67         0.02
    bfloat16    decode    0.41   0.46         0.53
    bfloat16    loss      0.15
    bfloat16    routing   1.00
    ==========  ========  =====  ===========  =======  =====
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import argparse
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import torch

from kempnerforge_jax.trace import record as record_jax
from kempnerforge_torch.trace import record as record_torch
from shared_config.errors import ConfigError
from shared_config.loader import load_config
from shared_config.parity.checks import describe
from shared_config.parity.compare import Comparison, compare_traces
from shared_config.parity.traces import Trace
from shared_config.schema.job import JobConfig
from shared_config.schema.vlm import MoMaConfig

DTYPES = ("float32", "bfloat16")
RECORD: dict[str, Any] = {"torch": record_torch, "jax": record_jax}
PRESETS = (
    "debug",
    "debug_moe",
    "debug_vlm_joint_decoder",
    "debug_vlm_cross_attention",
    "debug_vlm_mot",
    "debug_vlm_moma",
)
MODEL: dict[str, tuple[Any, ...]] = {
    "n_layers": (1, 2, 3),
    "vocab_size": (13, 37, 260),
    "ffn_hidden_dim": (9, 24, 50, 130),
    "norm_type": ("rmsnorm", "layernorm"),
    "norm_eps": (1e-5, 1e-6, 1e-2),
    "activation": ("silu", "gelu", "relu"),
    "attention_bias": ("true", "false"),
    "tie_embeddings": ("true", "false"),
    "qk_norm": ("true", "false"),
    "rope_theta": (50.0, 10000.0, 500000.0),
    "max_seq_len": (64,),
}
EXPERTS: dict[str, tuple[Any, ...]] = {
    "num_experts": (2, 4, 8),
    "moe_top_k": (1, 2),
    "moe_shared_experts": (0, 1),
    "moe_capacity_factor": (0.0, 1.25),
    "moe_packed_experts": ("true", "false"),
    "moe_gradient_scale": ("true", "false"),
    "moe_norm_topk_prob": ("true", "false"),
    "moe_routed_scaling": (1.0, 2.5),
}
VISION = {
    "vlm.max_text_len": 24,
    "vision_encoder.image_size": 8,
    "vision_encoder.patch_size": 4,
    "vision_encoder.feature_dim": 12,
    "vision_encoder.n_heads": 3,
    "vision_encoder.n_layers": 1,
}


@dataclass
class Seen:
    """What correct pairs have shown.

    Attributes:
        shares: (dtype, group, kind of part or "whole") -> the largest share of a limit, and where it was.
        rerouted: how many pairs of a dtype had a choice of experts that was not the same in both.
    """

    pairs: int = 0
    shares: dict[tuple[str, str, str], tuple[float, str]] = field(default_factory=dict)
    rerouted: Counter[str] = field(default_factory=Counter)
    alarms: list[str] = field(default_factory=list)

    def add(self, dtype: str, comparison: Comparison, origin: str) -> None:
        """Take in one comparison."""
        self.pairs += 1
        self.rerouted[dtype] += any(row.name.endswith(".indices") and row.mismatched > 0 for row in comparison.rows)
        for row in comparison.rows:
            key = dtype, row.group, "whole" if row.part is None else row.part.kind
            self.shares[key] = max(self.shares.get(key, (0.0, "")), (row.share, f"{row.full_label} of {origin}"))
        self.alarms += [f"{dtype}: {describe(row, comparison)}; {origin}" for row in comparison.failures]

    def lines(self) -> Iterator[str]:
        """A table, and every false alarm."""
        for (dtype, group, kind), (share, where) in sorted(self.shares.items()):
            yield f"{dtype:9} {group:9} {kind:8} {share:6.3f}  {where}"
        yield f"pairs: {self.pairs}, with other routes: {dict(self.rerouted)}; false alarms: {len(self.alarms)}"
        yield from self.alarms


def drawn_job(seed: int) -> JobConfig:
    """A small job of the architecture whose turn it is: draws that no backend can run are drawn again."""
    rng = random.Random(seed)
    while True:
        try:
            return load_config(PRESETS[seed % len(PRESETS)], overrides(rng, PRESETS[seed % len(PRESETS)]))
        except ConfigError:
            continue


def overrides(rng: random.Random, preset: str) -> list[str]:
    """Settings of a drawn job."""
    kv_heads, group, head_dim = rng.choice((1, 2, 3)), rng.choice((1, 2, 3)), rng.choice((4, 6, 10, 16))
    heads = kv_heads * group
    chosen: dict[str, Any] = {f"model.{name}": rng.choice(values) for name, values in MODEL.items()}
    chosen |= {"model.n_heads": heads, "model.n_kv_heads": kv_heads, "model.head_dim": head_dim}
    chosen["model.dim"] = heads * head_dim if rng.random() < 0.5 else rng.choice((14, 20, 28, 48))
    if rng.random() < 0.4:
        chosen["model.sliding_window"] = rng.choice((1, 3, 6))
    if preset == "debug_moe":
        chosen |= {f"model.{name}": rng.choice(values) for name, values in EXPERTS.items()}
        chosen["model.moe_frequency"] = rng.randint(1, chosen["model.n_layers"])
        chosen["model.moe_router"] = rng.choice(("softmax_topk", "sigmoid_topk"))
        weight = 0.1 if chosen["model.moe_router"] == "sigmoid_topk" else 0.0
        chosen["model.moe_sequence_aux_loss_weight"] = weight
    if preset.startswith("debug_vlm"):
        chosen |= VISION
    if preset == "debug_vlm_cross_attention":
        chosen["vlm.cross_attention_every_n_layers"] = 1
    chosen |= {"train.seq_len": 16, "optimizer.lr": rng.choice((3e-4, 2e-3)), "optimizer.weight_decay": 0.1}
    return [f"--{name}={value}" for name, value in chosen.items()]


def compare_pairs(seed: int, seen: Seen) -> None:
    """One drawn job, in every dtype."""
    job = drawn_job(seed)
    truth = record_torch(job, seed=seed, device="cpu")
    origin = f"job {seed}, {PRESETS[seed % len(PRESETS)]}"
    for dtype in DTYPES:
        a, b = (recorded(record, job, dtype, seed) for record in RECORD.values())
        seen.add(dtype, compare_traces(a, b, truth), origin)
    jax.clear_caches()


def recorded(record: Any, job: JobConfig, dtype: str, seed: int) -> Trace:
    """One trace, as ``validate`` asks for it: in bfloat16, experts that choose tokens take those of float64."""
    given: dict[str, Any] = {"seed": seed, "device": "cpu", "deltas": False}
    if dtype == "bfloat16" and isinstance(job.vlm, MoMaConfig):
        given["routes"] = record(job, **given, only=["routing/*"])
    return record(job, dtype=dtype, **given)


def main() -> None:
    """Print the largest shares of limits, and every false alarm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seen = Seen()
    for seed in range(options.first, options.first + -(-options.pairs // len(DTYPES))):
        compare_pairs(seed, seen)
        print(f"job {seed}: {len(seen.alarms)} false alarms", *seen.alarms[-3:], sep="\n", flush=True)
        if seed % 10 == 9:
            print(*seen.lines(), sep="\n", flush=True)
    print(*seen.lines(), sep="\n", flush=True)


if __name__ == "__main__":
    main()
