"""`kempnerforge trace` and `compare`, and the recordings of both backends behind them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import kempnerforge_jax.trace
import kempnerforge_torch.trace
from kempnerforge_jax.model import mlp as jax_mlp
from shared_config.cli import main
from shared_config.contract.parameters import parameter_table
from shared_config.errors import UserError
from shared_config.loader import load_config
from shared_config.parity.compare import compare_traces
from shared_config.parity.numerics import relative_error
from shared_config.parity.request import Request, make_request
from shared_config.parity.shrink import shrink
from shared_config.parity.traces import Trace, read_trace, write_trace
from shared_config.parity.validation import validation_moments, validation_weights
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
    for first, second in ((a.summarized(0), b), (a.summarized(0), b.summarized(0))):
        summarized = compare_traces(first, second)
        assert summarized.equal, [row.name for row in summarized.failures]
    wrong = changed(b, "forward/layers.1.attention.v_proj").summarized(0)
    found = compare_traces(a.summarized(0), wrong)
    assert [row.name for row in found.failures] == ["forward/layers.1.attention.v_proj"]
    assert found.failures[0].estimated
    size = np.asarray(b.tensors["forward/layers.1.attention.v_proj"]).size
    assert found.failures[0].error == pytest.approx(0.5 / size**0.5), "0.5 in one of its places"


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
            assert relative_error(trace.array(f"decode/{name}"), trace.array("forward/output_head")) < 1e-13


def test_initial_weights_have_the_same_bits(exact: dict[str, Trace]) -> None:
    assert exact["torch"].meta.initial_hash == exact["jax"].meta.initial_hash != ""


def test_a_trace_of_less_precision_carries_deltas_of_its_own(exact: dict[str, Trace]) -> None:
    rounded = kempnerforge_torch.trace.record(CONFIG, dtype="float32", device="cpu")
    assert rounded.meta.deltas["float32"] == exact["torch"].meta.deltas["float32"]
    assert rounded.meta.deltas["float32"]["loss"] > 0


def test_update_is_that_of_the_specification(exact: dict[str, Trace]) -> None:
    table = parameter_table(CONFIG.model)
    moments = {name: value.astype(np.float64) for name, value in validation_moments(table, seed=0).items()}
    m, v = ({name: moments[f"{moment}.{name}"] for name in table} for moment in ("m", "v"))
    state = AdamWState(m, v, dict.fromkeys(table, 7))
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
            assert relative_error(trace.array(f"updated/{name}"), value) < 1e-13
            assert relative_error(trace.array(f"updated/{name}"), weights[name]) > 1e-4


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


def test_what_compare_says_is_on_the_terminal_in_the_numbers_and_on_the_page(
    exact: dict[str, Trace], files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Forward and backward, with place, values and multiples of rounding; NaN; tensors that one side lacks."""
    tensors = {name: np.array(tensor) for name, tensor in exact["jax"].tensors.items() if name != "forward/norm"}
    tensors["forward/extra"] = np.ones(3)
    tensors["forward/layers.0.mlp"][0, 3, 5] = np.nan
    tensors["gradient/layers.1.mlp.up_proj.weight"][7, 2] += 0.25
    write_trace(files["jax"], dataclasses.replace(exact["jax"], tensors=tensors))
    numbers, page = tmp_path / "numbers.json", tmp_path / "page.html"
    options = ["--json", str(numbers), "--report", str(page)]
    assert main(["compare", str(files["torch"]), str(files["jax"]), *options]) == 1
    printed, html = capsys.readouterr().out, page.read_text(encoding="utf-8")
    right = {name: float(np.asarray(exact["torch"].tensors[name])[place]) for name, place in (
        ("forward/layers.0.mlp", (0, 3, 5)), ("gradient/layers.1.mlp.up_proj.weight", (7, 2)))}  # fmt: skip
    for said in (
        f"first to diverge, forward: forward/layers.0.mlp: differs; at (0, 3, 5) torch "
        f"{right['forward/layers.0.mlp']!r}, jax nan; 1 places are unequal or not finite on one side",
        f"first to diverge, backward: gradient/layers.1.mlp.up_proj.weight: differs; at (7, 2) torch "
        f"{right['gradient/layers.1.mlp.up_proj.weight']!r}, jax ",
        "times the limit",
        "times what rounding does",
    ):
        assert said in " ".join(printed.split())
    content = json.loads(numbers.read_text(encoding="utf-8"))
    assert not content["equal"]
    assert content["failures"] == 4
    assert content["first_forward"] == "forward/layers.0.mlp"
    assert content["first_backward"] == "gradient/layers.1.mlp.up_proj.weight"
    rows = {row["name"]: row for row in content["rows"]}
    assert rows["forward/norm"]["status"] == "missing in b"
    assert rows["forward/extra"]["status"] == "missing in a"
    assert rows["gradient/layers.1.mlp.up_proj.weight"]["multiple"] > 1e6
    for text in (printed, html):
        assert all(status in text for status in ("missing in a", "missing in b"))
    assert html.count('<img class="heat"') == 2, "where the first two differ"
    assert html.count("<svg") == 3, "errors by layer: forward, gradients, updates"
    assert 'src="http' not in html
    assert "href=" not in html


# Products of rounded numbers


def as_tf32(x: torch.Tensor) -> torch.Tensor:
    """The nearest numbers of 10 bits of mantissa, ties to even."""
    bits = x.view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


class RoundedProducts(TorchFunctionMode):
    """Rounds what goes into products of float32 matrices, as matrix units do."""

    def __init__(self, rounded: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.rounded = rounded

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (functional.linear, functional.scaled_dot_product_attention, torch.Tensor.__matmul__):
            args = [self.rounded(x) if x is not None and x.dtype == torch.float32 else x for x in args]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("rounded", "found"),
    [
        (as_tf32, "is of the size that TF32 leaves (2^-11, where float32 leaves 2^-24): train.matmul_precision"),
        (lambda x: x.bfloat16().float(), "is of the size that bfloat16 leaves (2^-8, where float32 leaves 2^-24)"),
        (lambda x: x, ""),
        (lambda x: x * 1.1, ""),
    ],
)
def test_coarser_products_are_named(
    exact: dict[str, Trace],
    files: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rounded: Callable[[torch.Tensor], torch.Tensor],
    found: str,
) -> None:
    asked: dict[str, Any] = {"dtype": "float32", "deltas": False, "device": "cpu", "only": ["forward/*"]}
    plain = kempnerforge_torch.trace.record(CONFIG, **asked)
    with RoundedProducts(rounded):
        other = kempnerforge_torch.trace.record(CONFIG, **asked)
    paths = [tmp_path / "plain.safetensors", tmp_path / "other.safetensors"]
    for path, trace in zip(paths, (plain, other), strict=True):
        write_trace(path, trace)
    status = main(["compare", *map(str, paths), "--truth", str(files["torch"])])
    printed = capsys.readouterr().out
    assert status == (0 if rounded(torch.tensor(0.3)) == torch.tensor(0.3) else 1)
    assert ("of the size that" in printed) == bool(found)
    assert found in " ".join(printed.split())
    if found:
        assert "note: forward/layers.0.attention.q_proj: the relative error, " in printed


# Parts of a run


@pytest.mark.parametrize("backend", RECORD)
def test_only_what_is_asked_for_is_recorded(exact: dict[str, Trace], backend: str) -> None:
    asked = {"layers": [1], "only": ["forward/*.attention", "gradient/*.mlp_norm.weight", "updated/*.q_proj.weight"]}
    trace = RECORD[backend](CONFIG, deltas=False, device="cpu", **asked)
    assert list(trace.tensors) == [
        "forward/layers.1.attention",
        "loss",
        "gradient/layers.1.mlp_norm.weight",
        "updated/layers.1.attention.q_proj.weight",
    ]
    comparison = compare_traces(exact["torch"], trace, labels=("whole", "part"))
    assert comparison.equal
    assert len(comparison.rows) == 5, "those, and the initial weights"
    left_out = len(exact["torch"].tensors) - 4
    assert comparison.notes == (
        f"part: holds layers 1; only {', '.join(asked['only'])}: {left_out} tensors of the other are not compared",
    )


def request(**asked: Any) -> Request:
    return make_request(CONFIG, dtype="float64", seed=0, **asked)


def test_what_is_not_asked_for_is_not_computed() -> None:
    """Neither outputs are held, nor is there a backward pass, an update or decoding without need."""
    modules, trained = ["layers.0", "layers.0.attention", "layers.1"], ["layers.0.a", "layers.1.a", "norm.weight"]
    whole = request()
    assert whole.modules(modules) == modules
    assert whole.differentiated(trained) == trained
    assert whole.updates(trained)
    assert whole.decodes
    forward = request(only=["forward/*.attention"])
    assert forward.modules(modules) == ["layers.0.attention"]
    assert forward.differentiated(trained) == []
    assert not forward.updates(trained)
    assert not forward.decodes
    layer = request(layers=[1], only=["gradient/*"])
    assert layer.differentiated(trained) == ["layers.1.a"]
    assert request(only=["updated/norm*"]).differentiated(trained) == trained, "the norm is that of all gradients"


def test_decoding_brings_the_logits_along_that_it_is_measured_by() -> None:
    trace = kempnerforge_torch.trace.record(CONFIG, dtype="float32", device="cpu", only=["decode/single"])
    assert list(trace.tensors) == ["forward/output_head", "loss", "decode/single"]
    deltas = trace.meta.deltas["float32"]
    assert deltas["decode/single"] == deltas["forward/output_head"] > 0


@pytest.mark.parametrize("asked", [{"layers": [0]}, {"only": ["gradient/*"]}])
def test_what_is_recorded_without_decoding_has_its_deltas(asked: dict[str, Any]) -> None:
    trace = kempnerforge_torch.trace.record(CONFIG, dtype="float32", device="cpu", **asked)
    assert any(name.startswith("gradient/") for name in trace.tensors)
    assert not any(name.startswith("decode/") for name in trace.tensors)
    assert set(trace.meta.deltas["float32"]) == set(trace.tensors)


# Recorded inputs


@pytest.mark.parametrize(
    ("backend", "preset"),
    [
        ("torch", "debug_moe"),
        ("torch", "debug_vlm_joint_decoder"),
        ("torch", "debug_vlm_cross_attention"),
        ("torch", "debug_vlm_moma"),
        ("jax", "debug_moe"),
        ("jax", "debug_vlm_mot"),
    ],
)
def test_layers_that_are_given_recorded_inputs_compute_the_same(preset: str, backend: str) -> None:
    config = shrink(load_config(preset))
    whole = kempnerforge_torch.trace.record(config, dtype="float32", device="cpu", deltas=backend == "jax")
    fed = RECORD[backend](config, dtype="float32", device="cpu", refeed=whole, deltas=backend == "torch")
    assert list(fed.tensors) == [name for name in whole.tensors if name.split("/")[0] in ("forward", "routing", "loss")]
    comparison = compare_traces(whole, fed)
    assert comparison.equal, [row.name for row in comparison.failures]
    assert any("were given what torch cpu float32 recorded" in note for note in comparison.notes)
    if backend == "jax":
        return
    deltas = fed.meta.deltas["float32"]
    path = "" if config.vlm is None else "transformer."
    assert deltas[f"forward/{path}output_head"] > 0
    assert deltas["loss"] == 0, "that of recorded logits"


def refed(other: Trace, **asked: Any) -> Trace:
    return kempnerforge_torch.trace.record(CONFIG, deltas=False, device="cpu", refeed=other, **asked)


def test_a_wrong_record_is_passed_on_to_the_next_layer_and_no_further(exact: dict[str, Trace]) -> None:
    """Layer 1 is given what stands in the file, whatever layer 0 puts out."""
    wrong = changed(exact["torch"], "forward/layers.0")
    comparison = compare_traces(exact["torch"], dataclasses.replace(refed(wrong), meta=exact["torch"].meta))
    names = [row.name.removeprefix("forward/") for row in comparison.rows if row.status == "differs"]
    assert names[0] == "layers.1.attention_norm"
    assert all(name.startswith("layers.1") for name in names)


def test_layers_without_record_pass_on_what_they_put_out(exact: dict[str, Trace]) -> None:
    part = kempnerforge_torch.trace.record(CONFIG, deltas=False, device="cpu", only=["layers.0", "*q_proj"])
    comparison = compare_traces(part, refed(part))
    assert comparison.equal
    assert any(note.endswith("layers.1: not recorded there, passed on what they put out themselves")
               for note in comparison.notes)  # fmt: skip


def test_compare_knows_what_was_fed(exact: dict[str, Trace], tmp_path: Path) -> None:
    fed = refed(exact["jax"])
    assert compare_traces(exact["jax"], fed).equal
    assert compare_traces(fed, exact["jax"].summarized(0)).equal, "the hash is that of summaries too"
    assert compare_traces(fed, refed(exact["jax"])).equal
    with pytest.raises(UserError, match=r"trace b: its layers were given what another trace \(jax cpu float64\)"):
        compare_traces(changed(exact["torch"], "forward/layers.0"), fed)
    write_trace(tmp_path / "fed.safetensors", fed)
    assert read_trace(tmp_path / "fed.safetensors").meta.refed == fed.meta.refed


def changed(trace: Trace, name: str) -> Trace:
    """The trace with another value in one place of a tensor."""
    array = np.array(trace.tensors[name])
    array.reshape(-1)[3] += 0.5
    return dataclasses.replace(trace, tensors={**trace.tensors, name: array})


def test_traces_that_can_not_be_fed_are_refused(exact: dict[str, Trace]) -> None:
    other = exact["torch"]

    def with_tensors(**tensors: Any) -> Trace:
        return dataclasses.replace(other, tensors=tensors)

    for given, message in (
        (with_tensors(loss=np.ones(())), r"refeed: the other trace holds no output of a layer, as forward/layers\.0"),
        (other.summarized(0), "refeed: forward/token_embedding: the other trace holds a summary"),
        (refed(other), "refeed: the other trace was itself given recorded inputs"),
        (
            dataclasses.replace(other, meta=dataclasses.replace(other.meta, seed=3, tokens_hash="a" * 64)),
            r"refeed: this run and the other trace are not of the same run:\n  seed: 0 and 3\n  tokens: other values",
        ),
    ):
        with pytest.raises(UserError, match=message):
            refed(given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "0,9"], "layers = 0,9: must be in 0-1, as model.n_layers = 2"),
        (["--layers", "x"], "layers = 'x': must be numbers and ranges of layers, as in 0,3-5"),
        (["--only", "loss,layers.0.atention"], "only = 'layers.0.atention': matches no tensor; did you mean"),
        (["--refeed", "{torch}", "--seed", "1"], "not of the same run:\nkempnerforge:   seed: 1 and 0"),
        (["--refeed", "{torch}", "--model.n_layers=3"], "model.n_layers: 3 and 2"),
        (["--refeed", "{torn}"], "torn.safetensors: can't be read as a safetensors file"),
        (["--refeed", "{torn}.absent"], "absent: can't be read"),
    ],
)
def test_trace_refuses_what_can_not_be(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    places = {**files, "torn": torn(files["torch"])}
    output = tmp_path / "trace.safetensors"
    command = ["trace", "debug", *TINY, "--backend", "torch", "--device", "cpu", "--no-deltas", "--output", str(output)]
    assert main([*command, *(option.format(**places) for option in options)]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def torn(file: Path) -> Path:
    """A copy without its end."""
    path = file.with_name("torn.safetensors")
    path.write_bytes(file.read_bytes()[:-100])
    return path


def test_compare_refuses_what_can_not_be_compared(
    exact: dict[str, Trace], files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meta = dataclasses.replace(exact["jax"].meta, config=exact["jax"].meta.config.replace("dim = 16", "dim = 32"))
    other = tmp_path / "other.safetensors"
    write_trace(other, dataclasses.replace(exact["jax"], meta=meta))
    for wrong, message in (
        (other, "trace a and trace b are not of the same run:\nkempnerforge:   model.dim: 16 and 32"),
        (torn(files["jax"]), "torn.safetensors: can't be read as a safetensors file"),
    ):
        assert main(["compare", str(files["torch"]), str(wrong)]) == 2
        assert message in capsys.readouterr().err


def test_the_command_takes_parts_and_recorded_inputs(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "part.safetensors"
    command = ["trace", "debug", *TINY, "--backend", "torch", "--device", "cpu", "--no-deltas", "--output", str(output)]
    options = ["--layers", "0-1", "--only", "*.o_proj,layers.?", "--only", "*.mlp", "--refeed", str(files["jax"])]
    assert main([*command, *options]) == 0
    assert list(read_trace(output).tensors) == [
        *(f"forward/layers.{i}{name}" for i in (0, 1) for name in (".attention.o_proj", ".mlp", "")),
        "loss",
    ]
    assert main(["compare", str(files["jax"]), str(output)]) == 0
    assert "torch: its layers were given what jax cpu float64 recorded" in capsys.readouterr().out
