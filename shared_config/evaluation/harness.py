"""A model for lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), the extra ``lm-eval``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]

from shared_config.evaluation.scorer import Scorer

MOST_NEW_TOKENS = 256


class Request(Protocol):
    """What the harness asks."""

    @property
    def args(self) -> tuple[str, ...]:
        """Texts; of what is to be continued the second is a mapping of settings."""
        ...


class HarnessModel(LM):
    """What the harness asks of a model, by a `Scorer`."""

    def __init__(self, scorer: Scorer):
        super().__init__()
        self.scorer = scorer

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """See `Scorer.continuations`; the arguments of a request are context and continuation."""
        return self.scorer.continuations([(request.args[0], request.args[1]) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Request]) -> list[float]:
        """See `Scorer.texts`; the argument of a request is the text."""
        return self.scorer.texts([request.args[0] for request in requests])

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """See `Scorer.until`; the arguments of a request are the prompt and a mapping with "until"."""
        found = []
        for request in requests:
            arguments: Any = request.args
            prompt, settings = arguments
            stops = settings.get("until", [])
            most = settings.get("max_gen_toks", MOST_NEW_TOKENS)
            found.append(self.scorer.until(prompt, [stops] if isinstance(stops, str) else stops, most))
        return found


def run_tasks(scorer: Scorer, tasks: Sequence[str], limit: int | None) -> dict[str, dict[str, object]]:
    """Task -> metric -> value, as the harness gives them.

    Args:
        limit: documents of a task; None: all.
    """
    found: Any = simple_evaluate(model=HarnessModel(scorer), tasks=list(tasks), limit=limit)
    return found["results"]
