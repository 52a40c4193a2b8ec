"""The loss of logits that are given by their factors, in chunks of tokens, by the oracle's of the whole product."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
from jax.core import Tracer

from shared_config.contract import labels as contract
from tests.oracle.loss import cross_entropy, cross_entropy_backward
from tests.parity.backends import BACKENDS, Torch
from tests.tolerance import assert_same_function

SCALE = 0.37
"""What the loss is multiplied with before it is differentiated."""


@contextlib.contextmanager
def chunks_of(rows: int, vocabulary: int, number: int = 8) -> Iterator[None]:
    """Within it, logits exist of about so many tokens at a time."""
    never = patch.object(contract, "takes_less_whole", lambda *_: False)
    with patch.object(contract, "LOGITS_BYTES", rows * vocabulary * number), never:
        yield


def drawn(batch: int, length: int, dim: int, vocabulary: int, ignored: float, seed: int) -> tuple[np.ndarray, ...]:
    """float64 x (B, S, D) and weight (V, D), int32 labels (B, S)."""
    rng = np.random.default_rng(seed)
    x_BSD, weight_VD = rng.standard_normal((batch, length, dim)), rng.standard_normal((vocabulary, dim))
    labels_BS = rng.integers(0, vocabulary, (batch, length), dtype=np.int32)
    return x_BSD, weight_VD, np.where(rng.random(labels_BS.shape) < ignored, np.int32(-100), labels_BS)


def check_loss(
    backend: Torch,
    rows: int,
    x_BSD: np.ndarray,
    weight_VD: np.ndarray,
    labels_BS: np.ndarray,
    divisor: float = 1.0,
    smoothing: float = 0.0,
    z: float = 0.0,
) -> None:
    """Sum, count and gradients of both factors, and of each where the other needs none."""
    logits_BSV, labels = x_BSD @ weight_VD.T / divisor, np.maximum(labels_BS, -100)
    count = int((labels != -100).sum())
    dlogits_BSV = cross_entropy_backward(SCALE * count, logits_BSV, labels, smoothing, z) / divisor
    truth = {
        "loss": np.array(SCALE * count * cross_entropy(logits_BSV, labels, smoothing, z)),
        "dx": dlogits_BSV @ weight_VD,
        "dw": np.einsum("bsv,bsd->vd", dlogits_BSV, x_BSD),
    }
    loss, factors = backend.module("training.loss"), backend.module("model.embedding").FactoredLogits

    def scaled(x: Any, weight: Any) -> Any:
        total, found_count = loss.cross_entropy(factors(x, weight, divisor), backend.array(labels_BS), **terms)
        counts.append(found_count)
        return SCALE * total

    terms = {"smoothing": smoothing, "z_weight": z}
    counts: list[Any] = []
    with chunks_of(rows, len(weight_VD)):
        found = {"loss": backend.run(scaled, x_BSD, weight_VD)}
        found["dx"], found["dw"] = backend.gradients(scaled, x_BSD, weight_VD)
        (of_x,) = backend.gradients(lambda x: scaled(x, backend.array(weight_VD)), x_BSD)
        (of_weight,) = backend.gradients(lambda weight: scaled(backend.array(x_BSD), weight), weight_VD)
    for name, value in {**found, "dx alone": of_x, "dw alone": of_weight}.items():
        assert_same_function(value, truth[name.split()[0]], f"{name}, {rows} rows of {labels_BS.shape}")
    assert all(isinstance(each, Tracer) or int(each) == count for each in counts)


def check_head(name: str) -> None:
    """Six chunks, the last of which is not full, and has a label that counts."""
    backend = next(backend for backend in BACKENDS if backend.name == name)
    x_BSD, weight_VD, labels_BS = drawn(batch=3, length=7, dim=5, vocabulary=11, ignored=0.3, seed=1)
    labels_BS[-1, -1] = 10
    check_loss(backend, 4, x_BSD, weight_VD, labels_BS, divisor=3.0)
    check_loss(backend, 4, x_BSD, weight_VD, labels_BS, smoothing=0.2, z=0.1)


HEAD_CHECKS: dict[str, tuple[Callable[[str], None], ...]] = {"training.head": (check_head,)}
