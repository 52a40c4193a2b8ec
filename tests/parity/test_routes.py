"""Traces whose experts take the tokens that another trace's experts took."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kempnerforge_jax.trace import record as record_jax
from kempnerforge_torch.trace import record as record_torch
from shared_config.errors import UserError
from shared_config.loader import load_config
from shared_config.parity import checks
from shared_config.parity.compare import compare_traces
from shared_config.parity.plan import Plan
from shared_config.parity.traces import Trace

SMALL = (
    "--model.dim=16", "--model.n_layers=1", "--model.n_heads=2", "--model.n_kv_heads=1", "--model.ffn_hidden_dim=24",
    "--model.max_seq_len=64", "--vlm.max_text_len=24", "--train.seq_len=16", "--vision_encoder.image_size=8",
    "--vision_encoder.patch_size=4", "--vision_encoder.feature_dim=12", "--vision_encoder.n_heads=3",
    "--vision_encoder.n_layers=1",
)  # fmt: skip
CONFIG = load_config("debug_vlm_moma", SMALL)
ROUTER = "routing/transformer.layers.0.mlp.experts.text.router.indices"
RECORD: dict[str, Any] = {"torch": record_torch, "jax": record_jax}


def traced(backend: str, **options: Any) -> Trace:
    return RECORD[backend](CONFIG, device="cpu", **{"deltas": False, **options})


@pytest.fixture(scope="module")
def truth() -> Trace:
    return traced("torch", deltas=True)


def test_own_routes_change_nothing(truth: Trace) -> None:
    again = traced("torch", routes=truth)
    for name, tensor in truth.tensors.items():
        np.testing.assert_array_equal(again.tensors[name], tensor, err_msg=name)


def test_other_routes_are_taken_and_both_backends_are_the_same_function_under_them(truth: Trace) -> None:
    worst_first = np.asarray(truth.tensors[ROUTER])[::-1].copy()
    worst_first[0] = (worst_first[0] + 1) % worst_first.max()
    moved = Trace({**truth.tensors, ROUTER: worst_first}, truth.meta)
    found = {backend: traced(backend, routes=moved) for backend in RECORD}
    np.testing.assert_array_equal(found["jax"].tensors[ROUTER], worst_first)
    comparison = compare_traces(found["torch"], found["jax"], None)
    assert all(row.ok for rows in comparison.groups.values() for row in rows)
    logits, others = (np.asarray(trace.tensors["forward/transformer.output_head"]) for trace in (truth, found["torch"]))
    assert np.abs(logits - others).max() > 1e-3
    narrow = {backend: traced(backend, dtype="bfloat16", routes=truth) for backend in RECORD}
    comparison = compare_traces(narrow["torch"], narrow["jax"], truth)
    assert all(row.ok for rows in comparison.groups.values() for row in rows)


def test_routes_of_another_run_are_refused(truth: Trace) -> None:
    for record in RECORD.values():
        with pytest.raises(UserError, match=r"routes: .* not of the same run:\n  seed: 1 and 0"):
            record(CONFIG, seed=1, routes=truth)
        without_text = {name: tensor for name, tensor in truth.tensors.items() if name != ROUTER}
        for kept, router in (({}, "0.image"), (without_text, "0.text")):
            with pytest.raises(UserError, match=rf"lacks what router {router} chose, routing/\.\.\.\.indices"):
                record(CONFIG, routes=Trace(kept, truth.meta))
        with pytest.raises(UserError, match="only experts that choose tokens"):
            record(load_config("debug_vlm_mot", SMALL), routes=truth)


def test_validate_takes_the_routes_of_float64_in_bfloat16_where_experts_choose_tokens(tmp_path: Path) -> None:
    for config, takes_routes in ((CONFIG, True), (load_config("debug_vlm_mot", SMALL), False)):
        jobs = checks._trace_jobs(Plan(config, tmp_path, dtypes=("bfloat16", "float64")), "jax")
        assert [job[job.index("--dtype") + 1] for job in jobs] == ["float64", "bfloat16"]
        assert ["--routes" in job for job in jobs] == [False, takes_routes]
        assert not takes_routes or jobs[1][-2:] == ["--routes", str(tmp_path / "jax-float64.safetensors")]
