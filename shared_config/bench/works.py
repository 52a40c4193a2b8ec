"""What `kempnerforge bench` measures: the pieces of work, the jobs and batches that they are, and what each needs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from shared_config.contract import flops
from shared_config.contract.counts import (
    BFLOAT16,
    FLOAT32,
    count_active_parameters,
    experts_flops_per_token,
    flops_per_token,
    kv_cache_bytes,
    visible_pairs,
)
from shared_config.data import open_data
from shared_config.errors import UserError
from shared_config.interchange.vision import tower_of
from shared_config.schema.base import shown
from shared_config.schema.job import JobConfig
from shared_config.training.trainer import Batch

LIMITS = "limits"
WORKS = {
    "train": "training steps",
    "packed": "training steps, several documents in each row",
    "window": "training steps, a sliding window over the sequence",
    "moe": "a layer of experts by itself, forward and backward",
    "decode": "new tokens after one prompt",
    "memory": "bytes at the peak of a training step, by part",
}
STEPS = ("train", "packed", "window")
PROMPT, NEW = 32, 32
"""Tokens of the prompt, and those that follow."""
DOCUMENTS = 4
"""Of a packed row, on average."""
WINDOW = 4
"""Of how many windows a sequence has the length, where the config has no window."""


def chosen_works(text: str | None, config: JobConfig) -> tuple[str, ...]:
    """The works of a comma-separated list; all that the config has for None.

    Raises:
        UserError: an unknown one, or one that the config does not have.
    """
    if text is None:
        return tuple(work for work in WORKS if refusal(work, config) is None)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in WORKS:
            raise UserError(f"--what = {shown(text)}: {shown(name)} must be one of {', '.join(WORKS)}")
        if reason := refusal(name, config):
            raise UserError(f"--what = {shown(text)}: {name} needs {reason}")
    return tuple(dict.fromkeys(names))


def refusal(work: str, config: JobConfig) -> str | None:
    """What a work needs that a config lacks; None if nothing."""
    if work == "moe" and not routed_layers(config):
        return "a model with experts that a router chooses (model.num_experts above 0)"
    if work in ("packed", "window", "decode") and config.vlm is not None:
        return "a text model (a config without [vlm])"
    return None


def routed_layers(config: JobConfig) -> list[int]:
    """Layers with one router over experts."""
    if config.vlm is not None:
        return []
    return [layer for layer in range(config.model.n_layers) if config.model.is_moe_layer(layer)]


def job_of(work: str, config: JobConfig) -> JobConfig:
    """The job whose steps a work takes."""
    if work == "packed":
        return config.replace(data=config.data.replace(pack_documents=True))
    if work == "window":
        window = config.model.sliding_window or max(1, config.train.seq_len // WINDOW)
        return config.replace(model=config.model.with_window(window))
    return config


def batches_of(job: JobConfig) -> list[Batch]:
    """The micro-batches of a step: random tokens, of a job with images what its data are."""
    if job.vlm is not None:
        data = open_data(job)
        return [data.batch(index) for index in range(job.train.grad_accum_steps)]
    return [drawn_batch(job, index) for index in range(job.train.grad_accum_steps)]


def drawn_batch(job: JobConfig, seed: int) -> Batch:
    """Random tokens and the next ones as labels; where documents are packed, some that end anywhere."""
    rng, (rows, length) = np.random.default_rng(seed), (job.train.batch_size, job.train.seq_len)
    tokens = rng.integers(0, job.model.vocab_size, (rows, length + 1), dtype=np.int32)
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}
    if job.data.pack_documents:
        batch["doc_ids"] = np.cumsum(rng.random((rows, length)) < DOCUMENTS / length, axis=1, dtype=np.int32)
    return batch


def tokens_of(batches: Sequence[Batch]) -> int:
    """Text tokens of a step."""
    return sum(batch["labels"].size for batch in batches)


def step_flops(job: JobConfig, batches: Sequence[Batch]) -> float | None:
    """Of a training step: forward and backward, nothing twice, masked keys not counted; None where it is not known."""
    if job.vlm is not None:
        prompts = [prompt for batch in batches for prompt in batch.get("prompt_lengths", np.zeros(1, int)).tolist()]
        return flops.step_flops(job, tokens_of(batches), tower_of(job), prompts=prompts)
    model, length = job.model, job.train.seq_len
    pairs = sum(
        layers * visible_pairs(batch.get("doc_ids"), batch["tokens"].shape, window)
        for batch in batches
        for window, layers in model.window_counts.items()
    )
    attention = 4 * model.n_heads * model.head_size * pairs
    return 3.0 * (flops_per_token(model, length).matmul * tokens_of(batches) + attention)


def experts_flops(job: JobConfig) -> float:
    """Of a layer of experts, forward and backward, for the tokens of a micro-batch."""
    return 3.0 * experts_flops_per_token(job.model) * job.train.batch_size * job.train.seq_len


def decode_lengths(config: JobConfig) -> tuple[int, int]:
    """Tokens of the prompt and new ones, which the model's longest sequence holds.

    Raises:
        UserError: it holds less than a prompt and two new tokens.
    """
    longest = config.model.max_seq_len
    if longest < 3:
        raise UserError(f"model.max_seq_len = {longest}: must be at least 3 to measure decoding")
    prompt = min(PROMPT, longest // 2)
    return prompt, min(NEW, longest - prompt)


def decode_bytes(config: JobConfig, prompt: int, new: int) -> float:
    """Read for one new token: the weights that it uses, of a table of embeddings that is no head one row, and the keys
    and values that are cached, of sequences of the mean length.
    """
    model, number = config.model, BFLOAT16 if config.train.casts else FLOAT32
    weights = count_active_parameters(model) - (0 if model.tie_embeddings else (model.vocab_size - 1) * model.dim)
    length = prompt + math.ceil(new / 2)
    return float(number * weights + kv_cache_bytes(model, 1, length, number))
