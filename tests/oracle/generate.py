"""Sampling, and generation as its definition: a full forward of each row's own tokens for every new token.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shared_config.schema.model import ModelConfig
from tests.oracle.linear import Weights
from tests.oracle.router import softmax
from tests.oracle.transformer import transformer


def sample(
    logits_V: np.ndarray, uniform: float = 0.0, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> int:
    """The token that a uniform number in [0, 1) picks.

    Temperature 0 is greedy. Otherwise logits / temperature; tokens sorted by falling logit, equal ones by index; the
    first ``top_k`` kept (0: all); of their probabilities, renormalised, the shortest run from the top whose sum reaches
    ``top_p`` (the token that crosses is kept); renormalised again, the first token whose cumulative probability exceeds
    ``uniform``.
    """
    _check(temperature, top_k, top_p)
    if temperature == 0:
        return int(np.argmax(logits_V))
    order, probabilities = kept_distribution(logits_V, temperature, top_k, top_p)
    passed = np.cumsum(probabilities) > uniform
    return int(order[np.argmax(passed) if passed.any() else -1])


def kept_distribution(
    logits_V: np.ndarray, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that can be drawn, most probable first, and their probabilities."""
    order = np.argsort(-logits_V, kind="stable")[: top_k or None]
    probabilities = softmax(logits_V[order] / temperature)
    before = np.concatenate([[0.0], np.cumsum(probabilities)[:-1]])
    kept = before < top_p
    return order[kept], probabilities[kept] / probabilities[kept].sum()


def generate(
    weights: Weights,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    uniforms: np.ndarray | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int = 0,
) -> np.ndarray:
    """The new tokens (B, max_new_tokens) of prompts of any lengths; after an EOS a row is padding.

    Args:
        uniforms: (B, max_new_tokens) numbers in [0, 1), one for each draw.
    """
    stops = set() if eos_token_id is None else {*np.atleast_1d(eos_token_id).tolist()}
    new = np.full((len(prompts), max_new_tokens), pad_token_id, dtype=np.int64)
    for row, prompt in enumerate(prompts):
        seen = list(prompt)
        for step in range(max_new_tokens):
            logits_V = transformer(weights, config, np.array([seen])).logits[0, -1]
            uniform = 0.0 if uniforms is None else uniforms[row, step]
            new[row, step] = token = sample(logits_V, uniform, temperature, top_k, top_p)
            seen.append(token)
            if token in stops:
                break
    return new


def _check(temperature: float, top_k: int, top_p: float) -> None:
    if temperature < 0:
        raise ValueError(f"temperature = {temperature}: must be at least 0")
    if top_k < 0:
        raise ValueError(f"top_k = {top_k}: must be at least 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p = {top_p}: must be in (0, 1]")
