"""Where the models differ from the `kempnerforge.model` package on purpose: one test for each line of the list that the
docstrings of both packages hold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

from shared_config.contract.parameters import parameter_table
from shared_config.schema import CrossAttentionConfig, JointDecoderConfig, ModelConfig, MoMaConfig, MoTConfig, VLMConfig
from tests.oracle.mlp import mlp
from tests.oracle.vlm import mot_decoder
from tests.oracle.weights import draw
from tests.parity.backends import BACKENDS, Torch, on_both
from tests.parity.moe_layers import GATE, Layer, run
from tests.tolerance import assert_same_function

MODEL = ModelConfig(
    dim=12, n_layers=1, n_heads=3, head_dim=4, vocab_size=13, ffn_hidden_dim=10, max_seq_len=24, qk_norm=True,
    norm_eps=0.25,
)  # fmt: skip
EXPERTS = MODEL.replace(num_experts=3, moe_top_k=2)
CROSS, MOT = CrossAttentionConfig(cross_attention_every_n_layers=1, max_text_len=8), MoTConfig(max_text_len=8)
ARCHITECTURES: tuple[VLMConfig | None, ...] = (
    None, JointDecoderConfig(max_text_len=8), CROSS, MOT, MoMaConfig(max_text_len=8)
)  # fmt: skip
IMAGE, TEXT = np.split(np.random.default_rng(3).standard_normal((2, 7, MODEL.dim)), [3], axis=1)


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def check_norm_eps(backend: Torch) -> None:
    for norm_type in ("rmsnorm", "layernorm"):
        for vlm in ARCHITECTURES:
            model = backend.build(
                backend.module("model.transformer").Transformer, MODEL.replace(norm_type=norm_type), vlm_config=vlm
            )
            found = {name: module.eps for name, module in modules(backend, model).items() if hasattr(module, "eps")}
            norms = {name.rpartition(".")[0] for name in parameter_table(model.config, vlm) if "norm" in name}
            assert found == dict.fromkeys(norms, MODEL.norm_eps)


def check_bias(backend: Torch) -> None:
    """The expert with the lowest scores is chosen by its bias, and weighs what its score says."""
    layer = Layer(num_experts=3, router_type="sigmoid_topk")
    x, weights = np.ones((1, 2, layer.dim)), layer.weights()
    weights[GATE][:] = np.array([[0.1], [0.05], [-0.1]])
    weights["router.expert_bias"] = np.array([0.0, -5.0, 5.0])
    found, scores = run(backend.name, layer, weights, x), 1 / (1 + np.exp(-np.array([1.0, -1.0])))
    for indices, combined in zip(found.indices_Tk, found.weights, strict=True):
        weight_of = dict(zip(indices.tolist(), combined, strict=True))
        assert_same_function(np.array([weight_of[0], weight_of[2]]), scores / scores.sum(), "weights")


def check_capacity(backend: Torch) -> None:
    """Two experts that take two assignments each: the first choices of four tokens, and none of their second ones."""
    layer = Layer(num_experts=2, capacity_factor=0.5)
    weights, x = layer.weights(), np.zeros((1, 4, layer.dim))
    weights[GATE][:] = np.eye(2, layer.dim)
    x[0, :, 0], x[0, :, 1] = [1, 2, 0.5, 1], [0.5, 1, 1, 2]
    found = run(backend.name, layer, weights, x)
    assert found.indices_Tk.tolist() == [[0, 1], [0, 1], [1, 0], [1, 0]]
    assert found.dropped == 4
    for token, (expert, _) in enumerate(found.indices_Tk):
        prefix = f"experts.{expert}."
        own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        expected = found.weights[token, 0] * mlp(x[:, token], own, layer.activation)[0]
        assert_same_function(found.output[:, token], expected, f"token {token}")


def check_gradient_scale(backend: Torch) -> None:
    """Two of three tokens choose the first expert, whose gradient is that of half as many, the mean being one."""
    weights, x = Layer(num_experts=3, top_k=1).weights(), np.random.default_rng(5).standard_normal((1, 3, 10)) / 10
    weights[GATE][:] = np.eye(3, 10)
    x[0, :, :3] = np.eye(3)[[0, 0, 1]]
    plain, scaled = (
        run(backend.name, Layer(num_experts=3, top_k=1, gradient_scale=on), weights, x) for on in (False, True)
    )
    assert plain.counts_E.tolist() == [2, 1, 0]
    assert_same_function(scaled.output, plain.output, "output")
    for expert, factor in enumerate((0.5, 1.0)):
        name = f"experts.{expert}.down_proj.weight"
        assert_same_function(scaled.gradients[name], plain.gradients[name] * factor, name)


def check_mot(backend: Torch) -> None:
    """Two documents, an image and a text, give the same in either order."""
    model = filled(backend, MODEL, MOT)
    image, text = np.zeros((2, 3), int), np.ones((2, 4), int)

    def logits(embeds: Any, ids: Any, documents: Any) -> Any:
        context = backend.module("model.modality").ModalityContext(inputs_embeds=embeds, modality_ids=ids)
        return model.run(modality=context, doc_ids=documents).logits

    ids = np.concatenate([image, text], axis=1)
    one = backend.run(logits, np.concatenate([IMAGE, TEXT], axis=1), ids, ids)
    ids = np.concatenate([text, image], axis=1)
    two = backend.run(logits, np.concatenate([TEXT, IMAGE], axis=1), ids, ids)
    assert_same_function(two, np.concatenate([one[:, 3:], one[:, :3]], axis=1), "logits")
    exchanged = backend.run(logits, np.concatenate([TEXT, IMAGE], axis=1), 1 - ids, ids)
    assert np.abs(exchanged - two).max() > 1e-3


def check_getters(backend: Torch) -> None:
    """Of a forward that sends an image and a text to experts of their own."""
    model, weights = filled(backend, EXPERTS, MOT), weights_of(EXPERTS, MOT)
    ids = np.repeat([[0] * 3 + [1] * 4], 2, axis=0)
    stream = np.concatenate([IMAGE, TEXT], axis=1)
    context = backend.module("model.modality").ModalityContext
    model(modality=context(inputs_embeds=backend.array(stream), modality_ids=backend.array(ids)))
    truth = mot_decoder(weights, EXPERTS, MOT, stream, ids)
    assert_same_function(backend.numpy(model.get_moe_aux_loss()), np.asarray(truth.aux_loss), "aux_loss")
    assert_same_function(backend.numpy(model.get_moe_router_z_loss()), np.asarray(truth.z_loss), "z_loss")
    counts = backend.numpy(model.get_expert_counts())
    assert counts.keys() == truth.expert_counts.keys() == {0}
    for modality, tokens in (("image", 6), ("text", 8)):
        np.testing.assert_array_equal(counts[0][modality], truth.expert_counts[0][modality])
        assert counts[0][modality].sum() == 2 * tokens


def check_rows_without_keys(backend: Torch) -> None:
    """In attention of either kind the first row sees nothing; as a whole, a row without an image is text alone."""
    attention = backend.build(backend.module("model.attention").Attention, 12, 3, 3, 4)
    cross = backend.build(backend.module("model.cross_attention").CrossAttention, 12, 3, 3)
    model, seen = filled(backend, MODEL, CROSS), np.array([[False] * 3, [True] * 3])
    tokens = backend.array(np.array([[1, 2, 3]] * 2))
    context = backend.module("model.modality").ModalityContext
    for module in (attention, cross):
        state = backend.module("model.state")
        shapes = {name: tuple(value.shape) for name, value in state.get_state(module).items()}
        state.set_state(module, draw(shapes, 4))

    def outputs(x: Any, image: Any, mask: Any) -> Any:
        ones = backend.array(np.ones((3, 2)))
        read = model.run(tokens, modality=context(image_features=image, image_mask=mask)).logits
        alone = attention(x, ones, ones * 0, key_padding_mask=mask), cross(x, image, mask)
        return *alone, read, model.run(tokens).logits

    own, other, read, text = backend.run(outputs, TEXT[:, :3], IMAGE, seen)
    for out in (own, other):
        assert not out[0].any()
        assert out[1].all()
    assert_same_function(read[0], text[0], "row without an image")
    assert np.abs(read[1] - text[1]).max() > 1e-3


def check_shared_experts(backend: Torch) -> None:
    """Routed experts that give 0 leave the shared one, for every token."""
    layer = Layer(shared_experts=3)
    weights, x = layer.weights(), np.random.default_rng(6).standard_normal((2, 3, layer.dim))
    weights |= {name: value * 0 for name, value in weights.items() if name.startswith("experts.")}
    shared = {
        name.removeprefix("shared_expert."): value for name, value in weights.items() if name.startswith("shared")
    }
    built = backend.module("model.state").get_state(layer.build(backend.name))
    assert built["shared_expert.down_proj.weight"].shape == (layer.dim, 3 * layer.hidden_dim)
    assert_same_function(run(backend.name, layer, weights, x).output, mlp(x, shared, layer.activation)[0], "output")


DIFFERENCES: dict[str, Callable[[Torch], None]] = {
    "Every norm has ``norm_eps``": check_norm_eps,
    "A balancing bias chooses experts and weighs none": check_bias,
    "Capacity counts the assignments of all slots together": check_capacity,
    "``gradient_scale`` scales the gradients of experts": check_gradient_scale,
    "Documents and modality ids are honoured in MoT": check_mot,
    "Getters of losses and counts see every router": check_getters,
    "A row without a visible key gives 0 in attention": check_rows_without_keys,
    "``shared_experts`` = n is one expert n times as wide": check_shared_experts,
}


@on_both
@pytest.mark.parametrize("line", DIFFERENCES)
def test_differences_are_what_they_are_said_to_be(backend: Torch, line: str) -> None:
    DIFFERENCES[line](backend)


def test_every_difference_that_is_listed_is_tested_and_the_other_way_round() -> None:
    for backend in BACKENDS:
        lines = [line[2:] for line in backend.module("model").__doc__.splitlines() if line.startswith("- ")]
        assert len(lines) == len(DIFFERENCES)
        for line, start in zip(lines, DIFFERENCES, strict=True):
            assert line.startswith(start)


def modules(backend: Torch, model: Any) -> dict[str, Any]:
    return dict(
        model.named_modules() if backend.name == "torch" else backend.module("model.module").named_modules(model)
    )


@functools.cache
def weights_of(config: ModelConfig, vlm: VLMConfig) -> dict[str, np.ndarray]:
    return draw({name: spec.shape for name, spec in parameter_table(config, vlm).items()}, 3)


def filled(backend: Torch, config: ModelConfig, vlm: VLMConfig) -> Any:
    return backend.model(config, weights_of(config, vlm), vlm_config=vlm)
