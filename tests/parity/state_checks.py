"""Checks of one backend in combinations of its switches: forwards and gradients of every architecture against the
oracle, and what a jitted cache does after it was cut, reordered or filled.

Rows of settings come from `tests.covering`: every two values of two switches occur together.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from shared_config.contract.noise import gumbel_noise
from shared_config.contract.parameters import parameter_table
from shared_config.schema.model import ModelConfig
from shared_config.schema.vlm import CrossAttentionConfig, JointDecoderConfig, MoMaConfig, MoTConfig, VLMConfig
from tests.covering import Row, covering
from tests.oracle.gradient import directional_derivative, random_direction
from tests.oracle.transformer import transformer
from tests.oracle.vlm import VLMOutput, cross_attention_decoder, moma_decoder, mot_decoder
from tests.oracle.weights import draw
from tests.parity.backends import BACKENDS, Torch
from tests.parity.components import cotangent
from tests.tolerance import assert_same_function

Arrays = dict[str, np.ndarray]
Counts = dict[int, dict[str, np.ndarray]]

ROWS, TEXT, IMAGE, SEED, NOISE = 2, 7, 4, 6, 9
MODEL = ModelConfig(
    dim=10, n_layers=4, n_heads=2, n_kv_heads=1, head_dim=4, vocab_size=13, ffn_hidden_dim=6, max_seq_len=16,
    rope_theta=50.0,
)  # fmt: skip
ARCHITECTURES: dict[str, VLMConfig | None] = {
    "text": None,
    "joint_decoder": JointDecoderConfig(max_text_len=8),
    "cross after 1": CrossAttentionConfig(max_text_len=8, cross_attention_every_n_layers=1),
    "cross after 2": CrossAttentionConfig(max_text_len=8, cross_attention_every_n_layers=2),
    "mot": MoTConfig(max_text_len=8),
    "moma": MoMaConfig(max_text_len=8, moma_experts_per_modality={"image": 2, "text": 3}),
}
EXPERTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "every second": {"num_experts": 3, "moe_frequency": 2, "moe_top_k": 2, "moe_capacity_factor": 0.6},
    "packed": {
        "num_experts": 3, "moe_packed_experts": True, "moe_router": "sigmoid_topk", "moe_capacity_factor": 0.6,
        "moe_shared_experts": 1,
    },
}  # fmt: skip
SWITCHES: dict[str, tuple[Any, ...]] = {
    "arch": tuple(ARCHITECTURES),
    "experts": tuple(EXPERTS),
    "image": (False, True),
    "documents": (False, True),
    "padding": (False, True),
    "window": (None, 3),
    "tied": (False, True),
    "qk_norm": (False, True),
    "limited": (None, False),
    "noise": (False, True),
    "cut": (False, True),
    "frozen": (False, True),
    "observed": (None, "captured", "replaced"),
    "scan": (None, "here", "held", "gives way"),
    "remat": (False, True, "products"),
}
"""``scan``: layers are stacked in the call, or beforehand, or are to be (and recomputed) but can't; ``cut``: logits of
some positions; ``observed``: what the second layer puts out goes into the loss, or is replaced: layers run one by one.
"""


def goes_together(row: Row) -> bool:
    """Whether a model takes these switches at once; each rule is of two of them, or follows from such."""
    arch, experts, limited, noise = (row.get(name) for name in ("arch", "experts", "limited", "noise"))
    if arch == "moma" and (experts not in (None, "dense") or limited is False):
        return False
    if noise and (arch not in (None, "moma") or experts not in (None, "dense") or limited is False):
        return False
    if (arch == "text" and row.get("image")) or (experts == "dense" and limited is False):
        return False
    if (row.get("scan") in ("here", "held") or row.get("remat") in (True, "products")) and row.get("observed"):
        return False
    if row.get("scan") in ("here", "held") and arch == "cross after 1":
        return False
    one_by_one = row.get("observed", "captured") or ("scan" in row and arch in (None, "cross after 1"))
    return row.get("scan") != "gives way" or one_by_one


STATES = covering(SWITCHES, goes_together)


def config_of(row: Row) -> ModelConfig:
    own = {"sliding_window": row["window"], "tie_embeddings": row["tied"], "qk_norm": row["qk_norm"]}
    return MODEL.replace(**own, **EXPERTS[row["experts"]])


def weights_of(row: Row) -> Arrays:
    table = parameter_table(config_of(row), ARCHITECTURES[row["arch"]])
    return draw({name: spec.shape for name, spec in table.items()}, SEED)


def inputs_of(row: Row) -> Arrays:
    """Tokens, and what else the row has; masks are over the residual stream."""
    rng = np.random.default_rng(SEED)
    in_stream = row["image"] and not row["arch"].startswith("cross")
    length = TEXT + IMAGE * in_stream
    given: Arrays = {"tokens": rng.integers(0, MODEL.vocab_size, (ROWS, TEXT), dtype=np.int32)}
    if row["image"]:
        given["image"] = rng.standard_normal((ROWS, IMAGE, MODEL.dim))
    if row["documents"]:
        given["documents"] = np.cumsum(np.arange(length) == np.array([[3], [length - 2]]), axis=1).astype(np.int32)
    if row["padding"]:
        places = np.arange(length)
        given["real"] = np.stack([places < length - 1, places >= 2])
        if row["image"] and not in_stream:
            given["image_mask"] = np.array([[True, False, True, True], [False] * IMAGE])
    return given


def oracle_output(row: Row, weights: Arrays, given: Arrays) -> VLMOutput:
    """Logits, activations and router losses."""
    config, arch, vlm = config_of(row), row["arch"], ARCHITECTURES[row["arch"]]
    if row["limited"] is False:
        config = config.replace(moe_capacity_factor=0.0)
    masks: dict[str, Any] = {"doc_ids": given.get("documents"), "key_padding_mask": given.get("real")}
    tokens, image = given["tokens"], given.get("image")
    if arch in ("text", "joint_decoder"):
        out = transformer(weights, config, tokens, prefix_embeds=image, **masks)
        counts = {layer: {"all": count} for layer, count in out.expert_counts.items()}
        found = VLMOutput(out.logits, out.activations, out.aux_loss, out.z_loss, counts)
    elif isinstance(vlm, CrossAttentionConfig):
        found = cross_attention_decoder(weights, config, vlm, tokens, image, given.get("image_mask"), **masks)
    else:
        embeds = weights["token_embedding.embedding.weight"][tokens]
        embeds = embeds if image is None else np.concatenate([image, embeds], axis=1)
        ids = np.repeat(np.arange(2), [embeds.shape[1] - TEXT, TEXT])[None].repeat(ROWS, axis=0)
        if isinstance(vlm, MoMaConfig):
            noise = moma_noise(vlm, ids, given.get("real")) if row["noise"] else None
            found = moma_decoder(weights, config, vlm, embeds, ids, **masks, noise=noise)
        else:
            assert isinstance(vlm, MoTConfig)
            found = mot_decoder(weights, config, vlm, embeds, ids, **masks)
    found.logits = found.logits[:, slice_of(row)]
    return found


def moma_noise(vlm: MoMaConfig, ids: np.ndarray, real: np.ndarray | None) -> dict[int, dict[str, np.ndarray]]:
    real = np.ones(ids.shape, bool) if real is None else real

    def of(layer: int, group: int, name: str) -> np.ndarray:
        noise = gumbel_noise(NOISE, layer, group, ids.size, vlm.moma_experts_per_modality[name])
        return noise[(np.equal(ids, group) & real).ravel()]

    return {
        layer: {name: of(layer, group, name) for group, name in enumerate(vlm.moma_modalities)}
        for layer in range(MODEL.n_layers)
    }


def slice_of(row: Row) -> slice:
    return slice(2, -1) if row["cut"] else slice(None)


def loss_of(row: Row, logits: Any, second: Any, aux_loss: Any, z_loss: Any, array: Callable[[Any], Any]) -> Any:
    """A scalar of all that a forward gives; routers before a replaced output have no part in it."""
    loss = (logits * array(cotangent(logits.shape))).sum()
    if row["observed"] == "captured":
        loss = loss + (second * array(cotangent(second.shape))).sum()
    return loss if row["observed"] == "replaced" else loss + 3 * aux_loss + 2 * z_loss


def router_sums(stats: Mapping[int, Any]) -> tuple[Any, Any]:
    routers = [r for layer in stats.values() for r in (layer.values() if isinstance(layer, dict) else [layer])]
    return sum(r.aux_loss for r in routers), sum(r.z_loss for r in routers)


def check_state(name: str, row: Row) -> None:
    """Logits are the oracle's; so are the gradients, along a random direction. What is frozen gets none, nor what is
    before a replaced output.
    """
    backend = next(backend for backend in BACKENDS if backend.name == name)
    weights, given = weights_of(row), inputs_of(row)
    truth = oracle_output(row, weights, given)
    own = {"second": truth.activations["layers.1"]} if row["observed"] == "replaced" else {}
    logits, gradients, counts = (run_torch if name == "torch" else run_jax)(backend, row, weights, {**given, **own})
    context = "\n".join(f"{key} = {value}" for key, value in row.items())
    assert_same_function(logits, truth.logits, "logits", context=context)
    assert {k: {m: n.tolist() for m, n in layer.items()} for k, layer in counts.items()} == {
        k: {m: n.tolist() for m, n in layer.items()} for k, layer in truth.expert_counts.items()
    }, context
    assert set(gradients) == trained_names(row), context
    before = {key for key in gradients if own and is_before(row, key)}
    for key in before - {"token_embedding.embedding.weight"}:
        assert not gradients[key].any(), f"{key}: {context}"
    after = {key: value for key, value in gradients.items() if key not in before}
    direction = random_direction(after, np.random.default_rng(1))

    def loss(moved: Arrays) -> Any:
        out = oracle_output(row, moved, given)
        return loss_of(row, out.logits, out.activations["layers.1"], out.aux_loss, out.z_loss, np.asarray)

    parts = [float(np.sum(gradient * direction[key])) for key, gradient in after.items()]
    gap = abs(sum(parts) - float(directional_derivative(loss, weights, direction)))
    assert gap <= 1e-11 * float(np.linalg.norm(parts)), f"gradients against a complex step: off by {gap}\n{context}"


def trained_names(row: Row) -> set[str]:
    """All parameters but those that are frozen: of the first layer, and the embedding."""
    table = parameter_table(config_of(row), ARCHITECTURES[row["arch"]])
    frozen = ("layers.0.", "token_embedding") if row["frozen"] else ()
    return {key for key, spec in table.items() if not spec.is_buffer and not key.startswith(frozen)}


def is_before(row: Row, key: str) -> bool:
    """Whether a parameter acts only through what the second layer puts out; a tied embedding acts at the end too."""
    first_block = row["arch"] == "cross after 1" and key.startswith("cross_attention_layers.0.")
    return key.startswith(("token_embedding", "layers.0.", "layers.1.")) or first_block


def run_torch(backend: Torch, row: Row, weights: Arrays, given: Arrays) -> tuple[np.ndarray, Arrays, Counts]:
    model = backend.model(config_of(row), weights, vlm_config=ARCHITECTURES[row["arch"]]).eval()
    parameters = dict(model.named_parameters())
    for key in parameters.keys() - trained_names(row):
        parameters[key].requires_grad_(False)
    logits, loss, counts = forward(backend, row, model, {key: backend.array(value) for key, value in given.items()})
    loss.backward()
    gradients = {
        key: np.zeros(weights[key].shape) if parameter.grad is None else backend.numpy(parameter.grad)
        for key, parameter in parameters.items()
        if parameter.requires_grad or parameter.grad is not None
    }
    return backend.numpy(logits), gradients, backend.numpy(counts)


def run_jax(backend: Torch, row: Row, weights: Arrays, given: Arrays) -> tuple[np.ndarray, Arrays, Counts]:
    state, stack, trained = backend.module("model.state"), backend.module("model.stack"), trained_names(row)
    model = backend.model(config_of(row), weights, vlm_config=ARCHITECTURES[row["arch"]])
    graphdef, params, buffers = state.split(model, scan_layers=row["scan"] == "held")
    products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    options = {
        "scan_layers": row["scan"] in ("here", "gives way"),
        "remat": products if row["remat"] == "products" else bool(row["remat"] or row["scan"] == "gives way"),
    }
    kept = {
        key: params.pop(key) for key in list(params) if not trained & stack.unstack_layers({key: params[key]}).keys()
    }

    @jax.jit
    def run(params: Any, kept: Any, buffers: Any, arrays: Any) -> Any:
        def loss(params: Any) -> Any:
            merged = state.merge(graphdef, {**params, **kept}, buffers)
            logits, loss, counts = forward(backend, row, merged, arrays, **options)
            return loss, (logits, counts)

        gradients, (logits, counts) = jax.grad(loss, has_aux=True)(params)
        return logits, gradients, counts

    logits, gradients, counts = run(params, kept, buffers, {key: backend.array(value) for key, value in given.items()})
    found = backend.numpy(stack.unstack_layers(gradients))
    if row["scan"] == "held":  # a stack is trained as a whole
        found = {key: value for key, value in found.items() if key in trained}
    return backend.numpy(logits), found, backend.numpy(counts)


def forward(backend: Torch, row: Row, model: Any, arrays: Mapping[str, Any], **options: Any) -> tuple[Any, Any, Any]:
    """Logits, the loss, and the choices of each expert by layer and modality, of one call."""
    hooks, image = backend.module("model.hooks"), arrays.get("image")
    is_cross = row["arch"].startswith("cross")
    inside = backend.module("model.modality").ModalityContext(
        prefix_embeds=None if is_cross else image,
        image_features=image if is_cross else None,
        image_mask=arrays.get("image_mask"),
        key_padding_mask=arrays.get("real"),
        noise_seed=backend.array(np.int32(NOISE)) if row["noise"] else None,
        output_slice=slice_of(row) if row["cut"] else None,
    )
    captured = hooks.capture(model, ["layers.1"]) if row["observed"] == "captured" else contextlib.nullcontext({})
    instead = {"layers.1": arrays["second"]} if row["observed"] == "replaced" else None
    replaced = contextlib.nullcontext() if instead is None else hooks.replacing(model, instead)
    with captured as seen, replaced:
        out = model.run(
            arrays["tokens"], modality=inside, doc_ids=arrays.get("documents"), limit_capacity=row["limited"], **options
        )
    assert row["observed"] != "captured" or seen.get("layers.1") is not None, "nothing was captured"
    loss = loss_of(row, out.logits, seen.get("layers.1"), *router_sums(out.stats), backend.array)
    routers = {k: layer if isinstance(layer, dict) else {"all": layer} for k, layer in out.stats.items()}
    counts = {k: {key: stats.expert_counts for key, stats in layer.items()} for k, layer in routers.items()}
    return out.logits, loss, counts


def state(**switches: Any) -> Callable[[str], None]:
    """The check of one row: what is not named is off."""
    row = {name: switches.get(name, values[0]) for name, values in SWITCHES.items()}
    assert goes_together(row)
    return functools.partial(check_state, row=row)


STATE_CHECKS: Mapping[str, tuple[Callable[[str], None], ...]] = {
    "model.transformer": (
        state(arch="joint_decoder", image=True, documents=True, padding=True, scan="here"),
        state(arch="text", experts="every second", limited=False, scan="here"),
        state(arch="cross after 2", image=True, scan="held"),
        state(observed="captured", scan="gives way"),
    ),
    "model.stack": (state(arch="text", experts="every second", limited=False, scan="here"),),
    "model.scan": (
        state(arch="text", experts="every second", scan="held"),
        state(arch="cross after 2", image=True, scan="here"),
    ),
    "model.moma": (state(arch="moma", noise=True, scan="here"),),
    "model.module": (state(observed="replaced", scan="gives way"),),
    "model.hooks": (state(observed="captured"), state(observed="replaced")),
    "model.cross_attention": (state(arch="cross after 1", image=True),),
}
"""What bugs that show in a combination of switches must not pass, by the module that they are in."""
