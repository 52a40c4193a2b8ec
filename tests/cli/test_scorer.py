"""Texts scored and continued as lm-evaluation-harness asks for it, against the model's own probabilities."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_config.commands.eval import build_scorer
from shared_config.contract.parameters import parameter_table
from shared_config.data import ByteTokenizer
from shared_config.evaluation.scorer import Scorer
from shared_config.parity.validation import validation_weights
from tests.jobs import tiny_job

POSITIONS = 12
RNG = np.random.default_rng(0)
TABLE = np.log(RNG.dirichlet(np.ones(258), size=258))
"""Of a model of pairs: row, the token before; column, the next."""


def pairs(tokens: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    counts = labels >= 0
    chosen = np.where(counts, TABLE[tokens, np.maximum(labels, 0)], 0).sum(axis=1)
    return chosen, ((TABLE[tokens].argmax(axis=-1) == labels) | ~counts).all(axis=1)


def greedy(prompt: Any, most: int) -> Any:
    token = prompt[-1]
    for _ in range(most):
        token = int(TABLE[token, :256].argmax())
        yield token


SCORER = Scorer(pairs, greedy, ByteTokenizer(), POSITIONS, rows=3)
TEXT = st.text("abc é", max_size=40)


@given(st.lists(st.tuples(TEXT, TEXT.filter(bool)), min_size=1, max_size=7))
def test_continuations_have_their_log_probability(asked: list[tuple[str, str]]) -> None:
    for (context, text), (found, is_greedy) in zip(asked, SCORER.continuations(asked), strict=True):
        ids, size = [256, *f"{context}{text}".encode()], len(text.encode())
        seen = ids[-(POSITIONS + 1) :]
        size = min(size, len(seen) - 1)
        steps = list(zip(seen[-size - 1 : -1], seen[-size:], strict=True))
        assert found == pytest.approx(sum(TABLE[a, b] for a, b in steps))
        assert is_greedy == all(TABLE[a].argmax() == b for a, b in steps)


@given(st.lists(st.text("abc é", max_size=60), min_size=1, max_size=5))
def test_every_token_of_a_text_is_scored_once(texts: list[str]) -> None:
    for text, found in zip(texts, SCORER.texts(texts), strict=True):
        ids = [256, *text.encode()]
        assert found == pytest.approx(sum(TABLE[a, b] for a, b in pairwise(ids)))


def test_what_is_written_ends_before_a_stop() -> None:
    whole = SCORER.until("a", [], 6)
    assert whole
    assert SCORER.until("a", ["", whole[1]], 6) == whole[: whole.index(whole[1])]


@pytest.mark.skipif(settings.get_current_profile_name() != "nightly", reason="nightly: compiles many programs")
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_model_scores_as_its_probabilities_say(backend: str) -> None:
    job = tiny_job({"vocab_size": 260, "n_layers": 1})
    weights = validation_weights(parameter_table(job.model), 0)
    scorer = build_scorer(backend, job, weights, "cpu")
    other = build_scorer("jax" if backend == "torch" else "torch", job, weights, "cpu")
    asked = [("the ", "cat"), ("", "b"), ("a much longer context than the others have ", "dogs")]
    for (found, is_greedy), (expected, _) in zip(scorer.continuations(asked), other.continuations(asked), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
        assert not is_greedy
    written = scorer.until("the ", [], 3)
    assert scorer.continuations([("the ", written)])[0][1] or "\N{REPLACEMENT CHARACTER}" in written


def test_the_harness_takes_the_model() -> None:
    """Where lm-evaluation-harness is installed."""
    pytest.importorskip("lm_eval.api.model")
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    from shared_config.evaluation.harness import HarnessModel

    model = HarnessModel(SCORER)

    def asked(kind: str, *arguments: Any) -> list[Any]:
        return [instance(request_type=kind, doc={}, arguments=arguments, idx=0)]

    assert model.loglikelihood(asked("loglikelihood", "a", "b")) == SCORER.continuations([("a", "b")])
    assert model.loglikelihood_rolling(asked("loglikelihood_rolling", "abc")) == SCORER.texts(["abc"])
    settings = {"until": ["\n"], "max_gen_toks": 4}
    assert model.generate_until(asked("generate_until", "a", settings)) == [SCORER.until("a", ["\n"], 4)]
