"""`kempnerforge trace` and `compare`, and the recordings of both backends behind them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import kempnerforge_jax.trace
import kempnerforge_torch.trace
from kempnerforge_jax.model import mlp as jax_mlp
from shared_config.cli import main
from shared_config.compare import compare_traces
from shared_config.contract.parameters import parameter_table
from shared_config.contract.validation import validation_moments, validation_weights
from shared_config.interchange.traces import Trace, read_trace, write_trace
from shared_config.loader import load_config
from shared_config.numerics import relative_error
from tests.oracle.optimizer import AdamWState, adamw_step, clip

TINY = (
    "--model.dim=16",
    "--model.n_layers=2",
    "--model.n_heads=2",
    "--model.n_kv_heads=1",
    "--model.ffn_hidden_dim=24",
    "--model.vocab_size=19",
    "--model.sliding_window=5",
)
CONFIG = load_config("debug", TINY)
RECORD = {"torch": kempnerforge_torch.trace.record, "jax": kempnerforge_jax.trace.record}


@pytest.fixture(scope="module")
def exact() -> dict[str, Trace]:
    """The float64 trace of each backend."""
    return {backend: record(CONFIG, dtype="float64", device="cpu") for backend, record in RECORD.items()}


@pytest.fixture
def files(exact: dict[str, Trace], tmp_path: Path) -> dict[str, Path]:
    paths = {backend: tmp_path / f"{backend}.safetensors" for backend in exact}
    for backend, trace in exact.items():
        write_trace(paths[backend], trace)
    return paths


def test_backends_record_the_same_names_in_the_same_order(exact: dict[str, Trace]) -> None:
    names = list(exact["torch"].tensors)
    assert names == list(exact["jax"].tensors)
    assert names.index("forward/layers.0") < names.index("forward/layers.1.attention_norm") < names.index("loss")
    assert "gradient/layers.1.attention.q_proj.weight" in names
    assert "updated/token_embedding.embedding.weight" in names
    assert {"decode/single", "decode/prefill", "decode/drawn"} < set(names)


def test_backends_are_the_same_function_in_float64(exact: dict[str, Trace]) -> None:
    comparison = compare_traces(exact["torch"], exact["jax"])
    assert comparison.equal, [row.name for row in comparison.failures]
    assert max(row.relative for row in comparison.rows) < 1e-13


def test_routes_of_experts_are_recorded_alike() -> None:
    config = load_config("debug_moe", [*TINY, "--model.num_experts=4", "--model.sliding_window=none"])
    a, b = (record(config, dtype="float64", deltas=False, device="cpu") for record in RECORD.values())
    comparison = compare_traces(a, b)
    assert comparison.equal, [row.name for row in comparison.failures]
    routing = {row.name for row in comparison.groups["routing"]}
    assert "routing/layers.1.mlp.router.indices" in routing
    assert "routing/layers.1.expert_counts" in routing
    assert not any(name.startswith("routing/layers.0.") for name in routing)
    counts = np.asarray(a.tensors["routing/layers.1.expert_counts"])
    indices = np.asarray(a.tensors["routing/layers.1.mlp.router.indices"])
    assert np.array_equal(counts, np.bincount(indices.ravel(), minlength=4))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_backends_are_within_rounding_in_other_dtypes(exact: dict[str, Trace], dtype: str) -> None:
    torch_trace, jax_trace = (record(CONFIG, dtype=dtype, deltas=False, device="cpu") for record in RECORD.values())
    assert (
        str(torch_trace.tensors["forward/layers.0"].dtype) == str(jax_trace.tensors["forward/layers.0"].dtype) == dtype
    )
    comparison = compare_traces(torch_trace, jax_trace, exact["torch"])
    assert comparison.equal, [row.name for row in comparison.failures]


def test_cached_decoding_is_the_full_forward(exact: dict[str, Trace]) -> None:
    for trace in exact.values():
        for name in ("single", "prefill", "drawn"):
            assert relative_error(trace.tensors[f"decode/{name}"], trace.tensors["forward/output_head"]) < 1e-13


def test_initial_weights_have_the_same_bits(exact: dict[str, Trace]) -> None:
    assert exact["torch"].meta.initial_hash == exact["jax"].meta.initial_hash != ""


def test_a_trace_of_less_precision_carries_deltas_of_its_own(exact: dict[str, Trace]) -> None:
    rounded = kempnerforge_torch.trace.record(CONFIG, dtype="float32", device="cpu")
    assert rounded.meta.deltas["float32"] == exact["torch"].meta.deltas["float32"]
    assert rounded.meta.deltas["float32"]["loss"] > 0


def test_update_is_that_of_the_specification(exact: dict[str, Trace]) -> None:
    table = parameter_table(CONFIG.model)
    moments = {name: value.astype(np.float64) for name, value in validation_moments(table, seed=0).items()}
    state = AdamWState(
        {name: moments[f"m.{name}"] for name in table}, {name: moments[f"v.{name}"] for name in table}, 7
    )
    weights = {name: value.astype(np.float64) for name, value in validation_weights(table, seed=0).items()}
    for trace in exact.values():
        gradients = {name: np.asarray(trace.tensors[f"gradient/{name}"]) for name in table}
        expected, _ = adamw_step(
            weights,
            clip(gradients, CONFIG.train.grad_clip_norm),
            state,
            lr=CONFIG.optimizer.lr,
            betas=CONFIG.optimizer.betas,
            eps=CONFIG.optimizer.eps,
            weight_decay=CONFIG.optimizer.weight_decay,
            decayed=[name for name, spec in table.items() if spec.decay],
        )
        for name, value in expected.items():
            assert relative_error(trace.tensors[f"updated/{name}"], value) < 1e-13
            assert relative_error(trace.tensors[f"updated/{name}"], weights[name]) > 1e-4


def test_a_bug_in_one_layer_is_named_first(
    exact: dict[str, Trace], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(jax_mlp.ACTIVATIONS, "silu", jax_mlp.ACTIVATIONS["gelu"])
    wrong = kempnerforge_jax.trace.record(CONFIG, dtype="float64", deltas=False, device="cpu")
    paths = [tmp_path / "right.safetensors", tmp_path / "wrong.safetensors"]
    for path, trace in zip(paths, (exact["torch"], wrong), strict=True):
        write_trace(path, trace)
    assert main(["compare", *map(str, paths)]) == 1
    printed = capsys.readouterr().out
    assert "first to diverge, forward: forward/layers.0.mlp.down_proj: differs" in printed
    assert "DIFFERENT" in printed


def test_compare_equal_traces(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = tmp_path / "numbers.json"
    page = tmp_path / "page.html"
    options = ["--json", str(numbers), "--report", str(page)]
    assert main(["compare", str(files["torch"]), str(files["jax"]), *options]) == 0
    assert page.read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert "DIFFERENT" not in capsys.readouterr().out
    content = json.loads(numbers.read_text(encoding="utf-8"))
    assert content["equal"]
    assert content["tensors"] == len(content["rows"]) > 50


def test_compare_says_where_a_single_value_differs(
    exact: dict[str, Trace], files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = dict(exact["jax"].tensors)
    changed = np.array(tensors["forward/layers.1.attention.v_proj"])
    changed[1, 7, 3] += 1e-6
    tensors["forward/layers.1.attention.v_proj"] = changed
    write_trace(files["jax"], dataclasses.replace(exact["jax"], tensors=tensors))
    assert main(["compare", str(files["torch"]), str(files["jax"])]) == 1
    printed = capsys.readouterr().out
    assert "first to diverge, forward: forward/layers.1.attention.v_proj" in printed
    assert "(1, 7, 3)" in printed


def test_trace_command_with_given_tokens_and_summaries(tmp_path: Path) -> None:
    file = tmp_path / "trace.safetensors"
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.arange(14, dtype=np.int64).reshape(2, 7))
    options = ["--backend", "torch", "--output", str(file), "--tokens", str(tokens), "--no-deltas", "--summary", "1000"]
    assert main(["trace", "debug", *TINY, *options, "--weights", "init", "--device", "cpu"]) == 0
    trace = read_trace(file)
    assert trace.meta.weights == "init"
    assert trace.meta.deltas == {}
    assert trace.tensors["forward/layers.0"].shape == (2, 7, 16)
    assert not isinstance(trace.tensors["forward/layers.0"], np.ndarray)
