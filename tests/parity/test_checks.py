"""The checks of arrays refuse the same with the same words in both backends, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from shared_config.schema.model import ModelConfig
from tests.parity.backends import Torch, on_both

IDS, REAL = np.array([[0, 1, 2], [2, 1, 0]], np.int32), np.ones((2, 3), bool)
AXES = ("batch", "length")
ALLOWED: tuple[tuple[str, Any, Any], ...] = (
    ("check_shape", IDS, (2, 3)),
    ("check_axes", IDS, AXES),
    ("check_mask", REAL, (2, 3)),
    ("check_ids", IDS, 3),
    ("check_ids", IDS.astype(np.uint8), None),
    ("check_ids", IDS - 99, None),
)
REFUSED: tuple[tuple[str, Any, Any, str], ...] = (
    ("check_shape", IDS, (3, 2), "x.shape = (2, 3): must be (3, 2)"),
    ("check_shape", IDS, (2, 3, 1), "x.shape = (2, 3): must be (2, 3, 1)"),
    ("check_axes", IDS[0], AXES, "x.shape = (3,): must be (batch, length)"),
    ("check_axes", IDS[None], AXES, "x.shape = (1, 2, 3): must be (batch, length)"),
    ("check_mask", IDS, (2, 3), "x.dtype = int32: must be bool, True = real"),
    ("check_mask", REAL, (2, 4), "x.shape = (2, 3): must be (2, 4)"),
    ("check_ids", REAL, None, "x.dtype = bool: must be an integer type"),
    ("check_ids", IDS.astype(np.float32), None, "x.dtype = float32: must be an integer type"),
    ("check_ids", IDS.astype(np.complex64), None, "x.dtype = complex64: must be an integer type"),
    ("check_ids", IDS, 2, "x = 2: ids must be in [0, 2); 2 of 6 are not"),
    ("check_ids", IDS - 1, 3, "x = -1: ids must be in [0, 3); 2 of 6 are not"),
)


@on_both
@pytest.mark.parametrize(("check", "array", "allowed"), ALLOWED)
def test_what_fits_passes(backend: Torch, check: str, array: np.ndarray, allowed: Any) -> None:
    getattr(backend.module("model.checks"), check)("x", backend.array(array), allowed)


@on_both
@pytest.mark.parametrize(("check", "array", "allowed", "said"), REFUSED)
def test_what_does_not_fit_is_refused(backend: Torch, check: str, array: np.ndarray, allowed: Any, said: str) -> None:
    with pytest.raises(ValueError, match="must be") as caught:
        getattr(backend.module("model.checks"), check)("x", backend.array(array), allowed)
    assert str(caught.value).replace("torch.", "") == said


@on_both
def test_one_more_id_may_be_allowed(backend: Torch) -> None:
    check_ids = backend.module("model.checks").check_ids
    check_ids("x", backend.array(IDS), 2, 2)
    with pytest.raises(ValueError, match=r"x = 1: ids must be in \[0, 1\) or 2; 2 of 6 are not"):
        check_ids("x", backend.array(IDS), 1, 2)


@on_both
def test_documents_and_padding_fit_the_tokens(backend: Torch) -> None:
    check = backend.module("model.checks").check_positions
    ids, real = backend.array(IDS), backend.array(REAL)
    check((2, 3), None, None)
    check((2, 3), ids, real)
    for shape, documents, padding, name in (
        ((2, 3), real, None, "doc_ids.dtype"),
        ((2, 4), ids, None, "doc_ids.shape"),
        ((2, 3), None, ids, "key_padding_mask.dtype"),
        ((2, 4), None, real, "key_padding_mask.shape"),
    ):
        with pytest.raises(ValueError, match=name):
            check(shape, documents, padding)


@on_both
@pytest.mark.parametrize("shape", [(3,), (1, 2, 3)])
def test_tokens_have_two_axes(backend: Torch, shape: tuple[int, ...]) -> None:
    config = ModelConfig(dim=4, n_layers=1, n_heads=1, vocab_size=5, ffn_hidden_dim=4, max_seq_len=4)
    model = backend.build(backend.module("model.transformer").Transformer, config, dtype="float32")
    with pytest.raises(ValueError, match=r"tokens\.shape = .*: must be \(batch, length\)"):
        model(backend.array(np.zeros(shape, np.int32)))


@on_both
def test_a_stage_without_embedding_takes_the_stream_and_no_tokens(backend: Torch) -> None:
    config = ModelConfig(dim=4, n_layers=1, n_heads=1, vocab_size=5, ffn_hidden_dim=4, max_seq_len=4)
    model = backend.build(backend.module("model.transformer").Transformer, config, dtype="float32")
    model.token_embedding = None
    with pytest.raises(ValueError, match=r"tokens\.dtype = .*int32: a stage without embedding takes the stream"):
        model(backend.array(np.zeros((1, 2, 4), np.int32)))
    with pytest.raises(ValueError, match=r"tokens\.shape = \(1, 2\): must be \(batch, length, dim\)"):
        model(backend.array(np.zeros((1, 2), np.float32)))


@on_both
def test_a_model_takes_no_more_positions_than_it_has(backend: Torch) -> None:
    config = ModelConfig(dim=4, n_layers=1, n_heads=1, vocab_size=5, ffn_hidden_dim=4, max_seq_len=4)
    model = backend.build(backend.module("model.transformer").Transformer, config, dtype="float32")
    assert model(backend.array(np.zeros((1, 4), np.int32))).shape == (1, 4, 5)
    with pytest.raises(ValueError, match=r"sequence length = 5: must be at most max_seq_len = 4"):
        model(backend.array(np.zeros((1, 5), np.int32)))
