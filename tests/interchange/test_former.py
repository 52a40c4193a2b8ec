"""What former versions wrote is read under the names, and with the meaning, that it has now."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from shared_config.contract.specs import ParameterTable
from shared_config.contract.vision import job_table
from shared_config.interchange import checkpoint
from shared_config.interchange.activations import read_activations, write_activations
from shared_config.interchange.former import (
    Former,
    current_fields,
    current_toml,
    former,
    has_mixtures,
    is_former,
)
from shared_config.interchange.source import read_config, read_model
from shared_config.interchange.tensors import TRACE, TensorFile, write_tensors
from shared_config.interchange.toml import config_from_dict, config_to_dict, config_to_toml
from shared_config.interchange.weights import load_weights, save_weights
from shared_config.parity.traces import Trace, TraceMeta, read_trace, summarize, write_trace
from shared_config.schema import AdapterConfig, JobConfig, ModelConfig, TrainConfig, VisionEncoderConfig, VLMConfig
from tests.oracle.weights import draw

MODEL = ModelConfig(
    dim=24, n_layers=2, n_heads=6, n_kv_heads=3, vocab_size=11, ffn_hidden_dim=8, max_seq_len=32, num_experts=0
)
ROUTED = MODEL.replace(num_experts=2)
MEANT = {"cross_attention_every_n_layers": 1, "cross_attention_n_kv_heads": 3}


def job(arch: str, adapter: str, fields: dict[str, Any], model: ModelConfig = MODEL) -> JobConfig:
    pooling = {"pool_heads": 2} if adapter == "attentional_pool" else {}
    return JobConfig(
        model=model,
        train=TrainConfig(seq_len=16),
        vision_encoder=VisionEncoderConfig(feature_dim=6, num_tokens=4),
        adapter=AdapterConfig(type=adapter).replace(**pooling),
        vlm=VLMConfig.for_arch(arch, max_text_len=8, **fields),
    )


NOW = {
    "cross_attention": job("cross_attention", "linear", MEANT),
    "moma": job("moma", "attentional_pool", {"moma_experts_per_modality": {"image": 1, "text": 2}}),
    "mot": job("mot", "avgpool", {}, ROUTED),
    "joint_decoder": job("joint_decoder", "mlp_2layer", {}),
}
"""Jobs as they are now; before, the first did without a number of key/value heads, which were those of the text."""
RENAMED = {
    "cross_attention": {".attn.": ".attention.", ".attn_norm": ".attention_norm"},
    "moma": {".mlp.experts.image": ".mlp.image", ".mlp.experts.text": ".mlp.text"},
}
WITHOUT_BIAS = ("adapter.proj.bias", *(f"adapter.{name}_proj.bias" for name in "qkvo"))


def then(arch: str, name: str) -> str:
    """What a tensor or module was called."""
    for new, old in RENAMED.get(arch, {}).items():
        name = name.replace(new, old) if arch == "moma" or "cross_attention_layers" in name else name
    return name


def former_fields(arch: str) -> dict[str, Any]:
    fields: dict[str, Any] = config_to_dict(NOW[arch])
    fields["vlm"].pop("cross_attention_n_kv_heads", None)
    return fields


def written(arch: str) -> tuple[ParameterTable, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The table of now, weights by the names of then, and what is to be read: the same, with biases of 0."""
    table = job_table(NOW[arch])
    state = {name: value.astype(np.float32) for name, value in draw({n: s.shape for n, s in table.items()}, 3).items()}
    old = {then(arch, name): value for name, value in state.items() if name not in WITHOUT_BIAS}
    return table, old, {name: value * (name not in WITHOUT_BIAS) for name, value in state.items()}


def assert_same(found: Any, expected: Any) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("arch", NOW)
def test_weights(arch: str, tmp_path: Path) -> None:
    table, old, expected = written(arch)
    file, single, sharded = tmp_path / "old.safetensors", tmp_path / "single", tmp_path / "sharded"
    save_weights(sharded, old, max_shard_bytes=4000, metadata={"names": "1"})
    assert len(list(sharded.iterdir())) > 2
    single.mkdir()
    (single / "config.toml").write_text(config_to_toml(NOW[arch]).replace("cross_attention_n_kv_heads = 3\n", ""))
    for path in (file, single / "model.safetensors"):
        write_tensors(path, old, {"format": "pt"})
    for path in (file, single, sharded):
        assert_same(load_weights(path), expected)
        assert list(load_weights(path, table)) == list(table)
    assert config_from_dict(read_config(single)) == NOW[arch]
    source = read_model(single, NOW[arch])
    assert source.found == NOW[arch]
    assert_same(source.weights, expected)
    again = tmp_path / "again.safetensors"
    save_weights(again, source.weights)
    assert_same(load_weights(again), expected)


@pytest.mark.parametrize("arch", NOW)
def test_checkpoints(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, old, expected = written(arch)
    moments = {f"{moment}.{name}": value for name, value in old.items() for moment in ("m", "v")}
    counts = {f"t.{name}": np.asarray(4, np.int32) for name in old}
    state = checkpoint.TrainingState(5, old, moments | counts)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", 1)
        path = checkpoint.save(tmp_path, state, config=former_fields(arch))
    found = checkpoint.load(path)
    assert_same(found.state.weights, expected)
    assert config_from_dict(found.config) == config_from_dict(checkpoint.read_config(tmp_path)) == NOW[arch]
    counts = {f"t.{name}": np.asarray(0 if name in WITHOUT_BIAS else 4, np.int32) for name in expected}
    assert_same(found.state.optimizer, {f"{moment}.{n}": v for n, v in expected.items() for moment in "mv"} | counts)
    assert_same(read_model(path).weights, expected)


def test_moments_of_what_was_frozen_are_not_made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, old, _ = written("moma")
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    path = checkpoint.save(tmp_path, checkpoint.TrainingState(5, old, {"m.adapter.q_proj.weight": np.ones((6, 6))}))
    monkeypatch.undo()
    biases = {f"{part}.adapter.q_proj.bias" for part in "mt"}
    assert set(checkpoint.load(path).state.optimizer) == {"m.adapter.q_proj.weight", *biases}


@pytest.mark.parametrize("arch", NOW)
@pytest.mark.parametrize("number", ["1", "2"])
def test_traces(arch: str, number: str, tmp_path: Path) -> None:
    now = {f"gradient/{name}": value for name, value in written(arch)[2].items()}
    modules = {"cross_attention": "cross_attention_layers.0.attn", "moma": "layers.0.mlp.experts.text.router"}
    module = f"transformer.{modules.get(arch, 'layers.0.mlp.text.router')}"
    now |= {f"forward/{module}": np.ones((2, 3), np.float32), f"routing/{module}.indices": np.zeros(2, np.int32)}
    meta = TraceMeta("torch", "cpu", "bfloat16", 0, config_to_toml(NOW[arch]))
    tensors = {then(arch, name): value for name, value in now.items()}
    meta = dataclasses.replace(
        meta,
        config=meta.config.replace("cross_attention_n_kv_heads = 3\n", ""),
        deltas={"bfloat16": {then(arch, f"forward/{module}"): 0.5}},
        parts={"bfloat16": {then(arch, f"forward/{module}"): np.ones(3)}},
        selection={"layers": None, "only": [then(arch, f"{module}.*")]},
        refed={"backend": "jax", "modules": [then(arch, module)], "own": []},
    )
    file, old = tmp_path / "now.safetensors", tmp_path / "then.safetensors"
    write_trace(file, Trace({**tensors, f"forward/{then(arch, module)}": summarize(np.ones(9))}, meta))
    save_file(load_file(file), old, metadata={**TensorFile(file).metadata, TRACE: number})
    found = read_trace(old)
    assert list(found.tensors) == list(now)
    assert found.tensors[f"forward/{module}"] is not None
    assert config_from_dict(found.meta.config_fields) == NOW[arch]
    assert found.meta.deltas == {"bfloat16": {f"forward/{module}": 0.5}}
    assert list(found.meta.parts["bfloat16"]) == [f"forward/{module}"]
    assert found.meta.refed == {"backend": "jax", "modules": [module], "own": []}
    assert found.meta.wants(f"forward/{module}.gate")
    assert dict(read_trace(file).meta.deltas) == meta.deltas


ACTIVATIONS = {
    "cross_attention": ("cross_attention_layers.0.attn", "cross_attention_layers.0.attn_norm", "layers.0.attention"),
    "moma": ("layers.0.mlp.experts.image", "layers.0.mlp.experts.text.router", "layers.0.mlp", "layers.0.attention"),
    "mot": ("layers.0.mlp.image", "layers.0.mlp.text.router", "layers.0.attn.q_proj.text", "layers.0.mlp/text"),
}


@pytest.mark.parametrize("arch", ACTIVATIONS)
def test_activations(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = {name: np.full(2, place, np.float32) for place, name in enumerate(ACTIVATIONS[arch])}
    file = tmp_path / "activations.npz"
    alone = then(arch, ACTIVATIONS[arch][1])
    with monkeypatch.context() as patch:
        patch.setattr("shared_config.interchange.activations.VERSION", "")
        write_activations(file, {then(arch, name): value for name, value in now.items()})
        write_activations(tmp_path / "alone.npz", {alone: np.ones(1)})
    assert_same(read_activations(file), now)
    assert list(read_activations(tmp_path / "alone.npz", arch)) == [ACTIVATIONS[arch][1]]
    write_activations(file, now)
    assert_same(read_activations(file), now)


def test_what_is_written_now_is_read_as_it_is(tmp_path: Path) -> None:
    """Even what looks like a former version's: architectures and adapters may be registered under any names."""
    names = ("adapter.proj.weight", "layers.0.mlp.text.gate", "layers.0.attention_norm.weight")
    state = {name: np.ones((2, 3), np.float32) for name in names}
    save_weights(tmp_path / "now.safetensors", state)
    write_activations(tmp_path / "now.npz", state)
    path = checkpoint.save(tmp_path, checkpoint.TrainingState(1, state, {}))
    for found in (
        load_weights(tmp_path / "now.safetensors"),
        read_activations(tmp_path / "now.npz"),
        checkpoint.load(path).state.weights,
    ):
        assert_same(found, state)


@pytest.mark.parametrize(
    ("model", "before", "now"),
    [
        ({}, {}, {"cross_attention_n_kv_heads": 3}),
        ({"n_kv_heads": 6}, {}, {}),
        ({}, {"cross_attention_n_kv_heads": 2}, {"cross_attention_n_kv_heads": 2}),
        ({}, {"cross_attention_n_heads": 4}, {"cross_attention_n_heads": 4, "cross_attention_head_dim": 4}),
        ({"dim": 16, "n_heads": 2, "n_kv_heads": 1}, {"cross_attention_n_heads": 4}, None),
        ({"head_dim": 6}, {"cross_attention_n_heads": 4}, {"cross_attention_n_heads": 4}),
        ({"head_dim": 6}, {"cross_attention_n_heads": 6}, {"cross_attention_n_heads": 6}),
        ({"head_dim": 6, "n_kv_heads": 6}, {"cross_attention_n_heads": 0}, {"cross_attention_n_heads": 0}),
        ({}, {"cross_attention_n_heads": 6}, {"cross_attention_n_heads": 6}),
    ],
)
def test_heads_of_cross_attention_mean_what_they_meant(model: dict[str, Any], before: Any, now: Any) -> None:
    """As many keys as the text has, and as wide heads, unless their own number says another."""
    fields = {"dim": 24, "n_layers": 2, "n_heads": 6, "n_kv_heads": 3, **model}
    if now is None:
        now = {**before, "cross_attention_head_dim": 8}
    text = {"model": fields, "vlm": {"arch": "cross_attention", **before}}
    vlm = {"arch": "cross_attention", "cross_attention_head_dim": 0, **now}
    assert current_fields(text) == {"model": fields, "vlm": vlm}


def test_configs_that_meant_the_same_stay_as_they_are() -> None:
    text = {"dim": 24, "n_layers": 2, "n_heads": 6, "n_kv_heads": 3}
    for fields in (
        {},
        {"model": text},
        {"model": text, "vlm": {"arch": "mot"}},
        {"model": {"dim": -1}, "vlm": {"arch": "cross_attention"}},
        {"model": {"unknown": 1}, "vlm": {"arch": "cross_attention"}},
        {"vlm": 3, "model": text},
    ):
        assert current_fields(fields) == fields
    given = {"model": text, "vlm": {"arch": "cross_attention"}, "train": {"seq_len": 8}}
    now = current_fields(given)
    assert now == {**given, "vlm": {"arch": "cross_attention", "cross_attention_head_dim": 0} | MEANT_HEADS}
    assert given["vlm"] == {"arch": "cross_attention"}
    unchanged = "# mine\nmodel.dim   = 24\n"
    assert current_toml(unchanged) == unchanged
    changed = current_toml('[model]\ndim = 24\nn_heads = 6\nn_kv_heads = 3\n[vlm]\narch = "cross_attention"\n')
    assert "cross_attention_n_kv_heads = 3" in changed
    assert "dim = 24" in changed


MEANT_HEADS = {"cross_attention_n_kv_heads": 3}


def test_names_tell_what_a_model_was() -> None:
    mixture, shared = "layers.0.mlp.image.gate", "layers.0.attention.q"
    assert has_mixtures([mixture, shared, "norm.weight"])
    for names in ([mixture], [shared], [mixture, "layers.0.attn.q"], [mixture, f"vision_encoder.{shared}"],
                  ["layers.0.mlp.images", shared], ["layers.0.mlp.experts.image.gate", shared]):  # fmt: skip
        assert not has_mixtures(names)
    assert has_mixtures(["transformer.layers.0.mlp.text", "transformer.layers.0.attention_norm.weight"])
    assert is_former(["x", "cross_attention_layers.0.attention.q", "cross_attention_layers.0.attention_norm"])
    assert not is_former(
        ["cross_attention_layers.0.attn.q", "layers.0.attention.q", "cross_attention_layers.0.attention_x"]
    )
    assert former([mixture, shared]).mixtures
    assert not former([mixture, shared], {"vlm": {"arch": "mot"}}).mixtures
    assert former([], {"vlm": {"arch": "moma"}}).mixtures
    assert former([mixture, shared], {"model": {}}).mixtures


def test_adapters_without_biases_are_those_of_our_types() -> None:
    pooling = [f"{name}_proj.weight" for name in ("v", "q", "out", "k", "o")]
    within = [f"adapter.{name}" for name in (*pooling, "out_proj.bias")]
    biases = {f"adapter.{name}_proj.weight": f"adapter.{name}_proj.bias" for name in "koqv"}
    assert list(former([*within, "norm.weight"]).biases.items()) == list(biases.items())
    alone = [name.removeprefix("adapter.") for name in within]
    assert dict(former(alone).biases) == {f"{name}_proj.weight": f"{name}_proj.bias" for name in "koqv"}
    assert dict(former(["adapter.proj.weight", "x"]).biases) == {"adapter.proj.weight": "adapter.proj.bias"}
    assert dict(former(["proj.weight"]).biases) == {"proj.weight": "proj.bias"}
    for names in (["adapter.proj.weight", "adapter.proj.bias"], ["proj.weight", "x"], within[:-1], []):
        assert dict(former(names).biases) == {}
    for kind in ("linear", "avgpool", "attentional_pool"):
        assert former(["proj.weight"], {"adapter": {"type": kind}}).biases
    for config in ({"adapter": {"type": "mlp_2layer"}}, {"adapter": {}}, {"adapter": 3}, {"model": {}}):
        assert not former(["proj.weight"], config).biases
    for config in (None, {}):
        assert former(["proj.weight"], config).biases


def test_biases_are_of_their_weight_s_rows_and_dtype() -> None:
    weight = np.ones((2, 3), np.float16)
    then = Former(False, {"a": "b", "c": "d"})
    state = then.state({"a": weight, "x": weight})
    assert list(state) == ["a", "b", "x"]
    assert (state["b"].dtype, state["b"].tolist()) == (np.float16, [0, 0])
    moments = then.moments({"m.a": weight, "v.a": weight.astype(np.float32), "m.x": weight})
    assert list(moments) == ["m.a", "v.a", "m.x", "m.b", "v.b", "t.b"]
    assert (moments["m.b"].dtype, moments["m.b"].tolist()) == (np.float16, [0, 0])
    assert (moments["v.b"].dtype, moments["v.b"].tolist()) == (np.float32, [0, 0])
    assert (moments["t.b"].dtype, moments["t.b"].tolist()) == (np.int32, 0)


def test_lists_of_names_are_renamed_and_nothing_else() -> None:
    old, now = "cross_attention_layers.1.attention.q", "cross_attention_layers.1.attn.q"
    then = Former(True)
    assert then.listed({"a": [old, 3, None], "b": old, "c": 3}) == {"a": [now, 3, None], "b": old, "c": 3}
    assert then.name("forward/layers.3.mlp.text") == "forward/layers.3.mlp.experts.text"
    assert Former(False).name("layers.3.mlp.text") == "layers.3.mlp.text"
    assert then.name("cross_attention_layers.12.attention") == "cross_attention_layers.12.attn"
    assert then.name("cross_attention_layers.1.attention_norm.weight") == "cross_attention_layers.1.attn_norm.weight"
    for name in ("cross_attention_layers.1.attention_map", "layers.1.attention", "layers.3.mlp.textual"):
        assert then.name(name) == name
    assert then.named({old: 1, "x": 2}) == {now: 1, "x": 2}
