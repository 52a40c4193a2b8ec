"""How probable given tokens are: sums of log-probabilities, and whether every one is the most probable."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from shared_config.contract.labels import IGNORED
from shared_config.contract.parameters import parameter_table
from shared_config.parity.validation import validation_weights
from tests.jobs import tiny_job
from tests.parity.backends import Torch, on_both

RNG = np.random.default_rng(7)


@on_both
def test_rows_are_scored_by_the_labels_that_count(backend: Torch) -> None:
    """Of rows of the most probable tokens, whole, in part, with one that is not, and without any that counts."""
    config = tiny_job({"vocab_size": 40, "n_layers": 1}).model
    tokens = RNG.integers(0, 40, (5, 6))
    model = backend.model(config, validation_weights(parameter_table(config), 0), dtype="float32")
    logits = np.float64(backend.run(lambda ids: model.run(ids).logits, tokens))
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    best, second = np.argsort(-logits, axis=-1)[..., :2].transpose(2, 0, 1)
    labels = best.copy()
    labels[1:3, :4] = IGNORED
    labels[2, 5], labels[3, 0], labels[4] = second[2, 5], second[3, 0], IGNORED
    counts = labels != IGNORED
    chosen = np.take_along_axis(log_probabilities, np.maximum(labels, 0)[..., None], axis=-1)[..., 0]

    total, is_greedy = backend.module("training.scoring").scores(model, tokens, labels)

    np.testing.assert_allclose(total, np.where(counts, chosen, 0).sum(axis=1), rtol=1e-6)
    assert is_greedy.tolist() == [True, True, False, False, True]
    assert total[4] == 0


@on_both
def test_what_bfloat16_models_find_is_summed_in_float32(backend: Torch) -> None:
    config = tiny_job({"vocab_size": 40, "n_layers": 1}).model
    tokens, labels = (RNG.integers(0, 40, (5, 6)) for _ in range(2))
    model = backend.model(config, validation_weights(parameter_table(config), 0), dtype="bfloat16")
    total, _ = backend.module("training.scoring").scores(model, tokens, labels)
    assert (total.astype(ml_dtypes.bfloat16) != total).any()
