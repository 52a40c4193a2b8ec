"""Weights of kempnerforge.model load by name, unchanged: its names and shapes, with drawn values, in both backends."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from shared_config.contract.parameters import aliases, parameter_table
from shared_config.errors import UserError
from shared_config.interchange.weights import load_weights, save_weights
from shared_config.schema import AdapterConfig, ModelConfig, MoTConfig, VLMConfig
from tests.oracle.weights import draw
from tests.parity.backends import BACKENDS, Torch, on_both
from tests.tolerance import assert_same_function

FIXTURE = Path(__file__).parents[1] / "interchange/fixtures/state_dicts.json"
MODELS: dict[str, dict[str, Any]] = json.loads(FIXTURE.read_text(encoding="utf-8"))
RNG = np.random.default_rng(8)
TOKENS = RNG.integers(0, 64, (2, 6), np.int32)
IMAGE = RNG.standard_normal((2, 8, 48))
FEATURES = RNG.standard_normal((2, 16, 24))


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def drawn(name: str) -> dict[str, np.ndarray]:
    """A state dict of that model; where embeddings are tied, both names hold the same values."""
    shapes = {key: tuple(shape) for key, shape in MODELS[name]["state_dict"].items()}
    state = draw(shapes, seed=9)
    if "model" in MODELS[name]:
        state |= {alias: state[own] for alias, own in aliases(ModelConfig(**MODELS[name]["model"])).items()}
    return state


def build(backend: Torch, fields: dict[str, Any]) -> Any:
    if "adapter" in fields:
        sizes = fields["in_dim"], fields["out_dim"]
        return backend.build(backend.module("model.adapter").build_adapter, AdapterConfig(**fields["adapter"]), *sizes)
    options: dict[str, Any] = {name: fields[name] for name in ("num_image_tokens",) if name in fields}
    if "vlm_fields" in fields:
        options["vlm_config"] = VLMConfig.for_arch(**fields["vlm_fields"])
    return backend.build(backend.module("model.transformer").Transformer, ModelConfig(**fields["model"]), **options)


def result(backend: Torch, model: Any, fields: dict[str, Any]) -> np.ndarray:
    """What an adapter makes of features, or the logits of text, with an image where the model takes one."""
    if "adapter" in fields:
        return backend.run(model.eval() if backend.name == "torch" else model, FEATURES)
    kind = {"cross_attention": "image_features", "mot": "prefix_embeds", "moma": "prefix_embeds"}
    given = kind.get(fields.get("vlm_fields", {}).get("arch", ""))
    context = backend.module("model.modality").ModalityContext

    def logits(tokens: Any, image: Any) -> Any:
        return model.run(tokens, modality=context(**{given: image}) if given else None).logits

    if backend.name == "torch":
        model.eval()
    return backend.run(logits, TOKENS, IMAGE)


@pytest.mark.parametrize("name", MODELS)
def test_weights_load_by_name_and_mean_the_same(name: str, caplog: pytest.LogCaptureFixture) -> None:
    state, found = drawn(name), []
    for backend in BACKENDS:
        model = build(backend, MODELS[name])
        with caplog.at_level(logging.WARNING):
            backend.module("model.state").set_state(model, state)
        own = backend.numpy(backend.module("model.state").get_state(model))
        for key, value in own.items():
            np.testing.assert_array_equal(value, state[key], err_msg=key)
        assert set(state) - set(own) <= {"norm.weight", "output_head.proj.weight"}
        found.append(result(backend, model, MODELS[name]))
    assert_same_function(found[1], found[0], name)
    said = [record.message for record in caplog.records if "norm.weight" in record.message]
    assert said == ["norm.weight: left out, as the model norms by modality (mot_norms)"] * 2 * name.startswith("mot")


def test_an_unused_norm_in_a_file_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fields = MODELS["mot"]
    table = parameter_table(ModelConfig(**fields["model"]), VLMConfig.for_arch(**fields["vlm_fields"]))
    save_weights(tmp_path, drawn("mot"))
    assert list(load_weights(tmp_path, table)) == list(table)
    assert "norm.weight: left out" in caplog.text


@on_both
def test_a_norm_that_the_model_has_not_is_refused_all_the_same(backend: Torch) -> None:
    """Only beside norms of modalities is it known to be unused."""
    state = {**drawn("adapter_linear"), "norm.weight": np.ones(48)}
    with pytest.raises(UserError, match=r"norm\.weight: unknown to the model"):
        backend.module("model.state").set_state(build(backend, MODELS["adapter_linear"]), state)


@on_both
def test_a_mixture_starts_from_the_text_model_of_a_wrapper(backend: Torch) -> None:
    """Names with or without ``transformer.``; other parts of the wrapper don't matter."""
    text = drawn("dense")
    whole = {f"transformer.{name}": value for name, value in text.items()} | {"adapter.proj.weight": np.ones((48, 24))}
    warm_start = backend.module("model.mot").mot_warm_start_from_text_stack
    config = ModelConfig(**MODELS["dense"]["model"])
    states = []
    for source in (text, whole):
        model = backend.build(backend.module("model.transformer").Transformer, config, vlm_config=MoTConfig())
        warm_start(model, source)
        states.append(backend.numpy(backend.module("model.state").get_state(model)))
    np.testing.assert_array_equal(states[0]["layers.3.mlp.image.up_proj.weight"], text["layers.3.mlp.up_proj.weight"])
    assert list(states[0]) == list(states[1])
    for name, value in states[0].items():
        np.testing.assert_array_equal(states[1][name], value)
    with pytest.raises(UserError, match=r"other\.weight: has no place in the mixture"):
        warm_start(model, {**whole, "other.weight": np.ones(1)})
