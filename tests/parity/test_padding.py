"""The content of padding never matters: other ids under it, and other pixels in frames that don't exist, leave the
logits of real positions, the losses, the counts and the gradients as they are. `padding_checks` has the same of runs,
which `test_mutants` checks.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from shared_config.contract.parameters import parameter_table
from shared_config.contract.vision import vit_tower, wrapper_table
from shared_config.data import open_data
from shared_config.interchange.toml import config_from_dict
from shared_config.schema import (
    AdapterConfig,
    CrossAttentionConfig,
    JointDecoderConfig,
    ModelConfig,
    MoMaConfig,
    MoTConfig,
    VisionEncoderConfig,
    VLMConfig,
)
from tests.config.test_jsonl import CHATML, tokenizer_folder
from tests.oracle.weights import draw
from tests.parity.backends import BACKENDS, Torch, on_both

ROWS, LENGTH, FRAMES, VOCAB = 2, 6, 2, 13
DENSE = ModelConfig(
    dim=12, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, vocab_size=VOCAB, ffn_hidden_dim=10, max_seq_len=24
)  # fmt: skip
ROUTED: dict[str, Any] = {"num_experts": 3, "moe_top_k": 2, "moe_router_z_loss_weight": 0.1}
EXPERTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "softmax": ROUTED,
    "softmax, capacity": {**ROUTED, "moe_capacity_factor": 0.5, "moe_gradient_scale": True},
    "sigmoid, capacity": {
        **ROUTED, "moe_router": "sigmoid_topk", "moe_sequence_aux_loss_weight": 0.1, "moe_capacity_factor": 0.5
    },
}  # fmt: skip
ARCHITECTURES: dict[str, VLMConfig | None] = {
    "text": None,
    "joint_decoder": JointDecoderConfig(max_text_len=8),
    "cross_attention": CrossAttentionConfig(max_text_len=8, cross_attention_every_n_layers=1),
    "mot": MoTConfig(max_text_len=8),
    "moma": MoMaConfig(max_text_len=8, moma_experts_per_modality={"image": 2, "text": 3}),
}
VISION = VisionEncoderConfig(type="vit", image_size=4, patch_size=2, feature_dim=6, n_heads=2, n_layers=1)
CASES = [(arch, experts) for arch in ARCHITECTURES for experts in EXPERTS if arch != "moma" or experts == "dense"]
Outputs = dict[str, Any]


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@functools.cache
def objective(backend: Torch, arch: str, experts: str) -> Callable[..., Outputs]:
    """What a model makes of a batch: pixels or None, ids, labels, and the masks of text and frames."""
    config, vlm = DENSE.replace(**EXPERTS[experts]), ARCHITECTURES[arch]
    loss = backend.module("training.loss")
    context = backend.module("model.modality").ModalityContext

    def terms(model: Any, pixels: Any, ids: Any, labels: Any, real: Any, frames: Any) -> tuple[Any, Outputs]:
        if vlm is None:
            logits, stats, *_ = model.run(ids, modality=context(key_padding_mask=real))
        else:
            logits, stats, *_ = model.run(pixels, ids, frames, text_mask=real, noise_seed=backend.array(np.int32(3)))
        aux, z = loss.router_losses(stats)
        total = loss.cross_entropy(logits, labels)[0] + aux + z
        counted = [(each.expert_counts, each.entropy, each.dropped) for each in loss.router_stats(stats)]
        return total, {"logits": logits, "loss": total, "counted": counted}

    model = built(backend, config, vlm)
    if backend.name == "torch":
        return functools.partial(torch_outputs, terms, model)
    graphdef, params, buffers = backend.module("model.state").split(model)

    def run(params: Any, *batch: Any) -> Any:
        return terms(backend.module("model.state").merge(graphdef, params, buffers), *batch)

    compiled = jax.jit(jax.grad(run, has_aux=True))

    def outputs(*batch: Any) -> Outputs:
        gradients, out = compiled(params, *batch)
        return {**out, "gradients": gradients}

    return outputs


def torch_outputs(terms: Callable[..., Any], model: Any, *batch: Any) -> Outputs:
    model.zero_grad()
    total, out = terms(model, *batch)
    total.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**out, "gradients": gradients}


@functools.cache
def built(backend: Torch, config: ModelConfig, vlm: VLMConfig | None) -> Any:
    tower = vit_tower(VISION)
    if vlm is None:
        table = parameter_table(config)
        return backend.model(config, draw({name: spec.shape for name, spec in table.items()}, 3))
    table = wrapper_table(config, vlm, AdapterConfig(), tower, tower.dim)
    builder = backend.module("model.vlm").build_vlm_wrapper
    model = backend.build(builder, config, VISION, None, vlm, FRAMES)
    backend.module("model.state").set_state(model, draw({name: spec.shape for name, spec in table.items()}, 3))
    return model


@st.composite
def masks(draw: st.DrawFn, *shape: int) -> np.ndarray:
    """True where something is real: any pattern, of which some is padding."""
    size = int(np.prod(shape))
    row = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    row[draw(st.integers(0, size - 1))] = False
    return np.array(row).reshape(shape)


@on_both
@pytest.mark.parametrize("experts", EXPERTS)
def test_a_row_does_not_depend_on_the_padding_of_its_neighbours(backend: Torch, experts: str) -> None:
    """Ragged prompts, read in chunks, with what lies beyond their ends, give what each gives alone."""
    model, generate = built(backend, DENSE.replace(**EXPERTS[experts]), None), backend.module("model.generate").generate

    @hypothesis.settings(max_examples=4, deadline=None, database=None)
    @hypothesis.given(st.lists(st.integers(1, LENGTH), min_size=3, max_size=3), st.integers(0, 2**31))
    def holds(lengths: list[int], seed: int) -> None:
        texts = np.random.default_rng(seed).integers(0, VOCAB, (2, 3, LENGTH))
        beyond = np.arange(LENGTH) >= np.array(lengths)[:, None]
        options: dict[str, Any] = {"temperature": 0, "prefill_chunk": 2}
        together = [
            backend.numpy(generate(model, np.where(beyond, other, texts[0]), 3, prompt_lengths=lengths, **options))
            for other in texts
        ]
        np.testing.assert_array_equal(*together)
        for row, length in enumerate(lengths):
            alone = backend.numpy(generate(model, texts[0, row : row + 1, :length], 3, **options))
            np.testing.assert_array_equal(together[0][row, : length + 3], alone[0])

    holds()


@on_both
@pytest.mark.parametrize("experts", EXPERTS)
def test_representations_do_not_depend_on_padding(backend: Torch, experts: str) -> None:
    model, hooks = built(backend, DENSE.replace(**EXPERTS[experts]), None), backend.module("model.hooks")

    @hypothesis.settings(max_examples=4, deadline=None, database=None)
    @hypothesis.given(masks(ROWS, LENGTH), st.integers(0, 2**31))
    def holds(real: np.ndarray, seed: int) -> None:
        texts = np.random.default_rng(seed).integers(0, VOCAB, (2, ROWS, LENGTH))
        truth, other = (
            hooks.extract_representations(
                model,
                [{"tokens": row, "text_mask": mask} for row, mask in zip(ids, real, strict=True)],
                ["layers.0.mlp", "norm"],
            )
            for ids in (texts[0], np.where(real, *texts))
        )
        for name in truth:
            np.testing.assert_allclose(truth[name][real], other[name][real], atol=1e-11)

    holds()


def test_conversations_train_experts_alike_in_both_backends(tmp_path: Path) -> None:
    """Rows of different lengths; their padding is sent to no expert, whatever it holds."""
    rows = [{"prompt": "a" * (5 * place % 7 + 1), "completion": f"b{place}" * (place % 4 + 1)} for place in range(12)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tokenizer_folder(tmp_path / "tokenizer", CHATML)
    model = {"dim": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 300, "max_seq_len": 64, "num_experts": 3}
    config = config_from_dict(
        {
            "model": {**model, "ffn_hidden_dim": 16, "moe_capacity_factor": 0.5},
            "data": {"path": str(tmp_path / "data"), "tokenizer": str(tokenizer), "heldout_fraction": 0.3},
            "train": {"batch_size": 4, "seq_len": 48, "compile_model": False},
        }
    )
    data = open_data(config)
    batches, heldout = [data.batch(index) for index in range(3)], data.heldout()
    assert any(not batch["text_mask"].all() for batch in (*batches, *heldout))
    found: dict[tuple[str, bool], list[Any]] = {}
    for backend in BACKENDS:
        dtype = {"torch": torch.float64, "jax": jax.numpy.float64}[backend.name]
        for changed in (False, True):
            trainer = backend.module("training.train").Trainer(config, "cpu", dtype=dtype)
            steps = [trainer.step([under_padding(batch, 7 * changed)]) for batch in batches]
            held = trainer.evaluate([under_padding(batch, 7 * changed) for batch in heldout])
            terms = [step[name] for step in steps for name in ("loss", "aux_loss", "z_loss", "routing_entropy")]
            found[backend.name, changed] = [float(value) for value in (*terms, held["loss"])]
    truth = found["torch", False]
    for values in found.values():
        np.testing.assert_allclose(values, truth, rtol=1e-9)


def under_padding(batch: dict[str, np.ndarray], token: int) -> dict[str, np.ndarray]:
    return {**batch, "tokens": np.where(batch["text_mask"], batch["tokens"], token).astype(np.int32)}


@on_both
@pytest.mark.parametrize("image", [True, False], ids=["image", "no image"])
@pytest.mark.parametrize(("arch", "experts"), CASES)
def test_the_content_of_padding_never_matters(backend: Torch, arch: str, experts: str, image: bool) -> None:
    if arch == "text" and image:
        pytest.skip("text models read no images")

    @hypothesis.settings(max_examples=8, deadline=None, database=None)
    @hypothesis.given(masks(ROWS, LENGTH), masks(ROWS, FRAMES), st.integers(0, 2**31), st.sampled_from([7.0, np.nan]))
    def holds(real: np.ndarray, frames: np.ndarray, seed: int, noise: float) -> None:
        rng = np.random.default_rng(seed)
        ids, others = rng.integers(0, VOCAB, (2, ROWS, LENGTH))
        labels = np.where(real, rng.integers(0, VOCAB, ids.shape), -100)
        pixels = rng.standard_normal((ROWS, FRAMES, 3, 4, 4))
        shown = np.where(frames[:, :, None, None, None], pixels, noise)
        truth, other = (
            backend.numpy(
                objective(backend, arch, experts)(
                    *(None if array is None else backend.array(array) for array in (seen, text, labels, real, there))
                )
            )
            for seen, text, there in (
                (pixels if image else None, ids, frames if image else None),
                (shown if image else None, np.where(real, ids, others), frames if image else None),
            )
        )
        for outputs in (truth, other):
            outputs["logits"] = np.where(real[..., None], outputs["logits"], 0)
        same(other, truth)

    holds()


def same(other: Any, truth: Any) -> None:
    """Leaf by leaf: integers exactly, numbers up to float64 rounding."""
    leaves, others = jax.tree.leaves(truth), jax.tree.leaves(other)
    assert len(leaves) == len(others)
    for a, b in zip(others, leaves, strict=True):
        assert np.isfinite(b).all()
        if np.issubdtype(np.asarray(b).dtype, np.integer):
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * max(1.0, np.abs(b).max(initial=0)))
