"""States that a model comes to by its history: caches that were cut, reordered and filled inside jit, extraction from
experts with a capacity, evaluation between steps in a narrow dtype, experts that no token of a whole step chose.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import torch

from shared_config.contract.noise import image_noise
from shared_config.contract.parameters import parameter_table
from shared_config.contract.routing import RouterId
from shared_config.schema.model import ModelConfig
from tests.jobs import draw_batch, tiny_job
from tests.oracle.transformer import transformer
from tests.oracle.weights import draw
from tests.parity.backends import BACKENDS, Torch, on_both
from tests.parity.state_checks import EXPERTS, MODEL
from tests.tolerance import assert_same_function

SLOTS = 7


@pytest.fixture
def _double_precision() -> Iterator[None]:
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield


def weights_of(config: ModelConfig) -> dict[str, np.ndarray]:
    return draw({name: spec.shape for name, spec in parameter_table(config).items()}, 2)


@pytest.mark.usefixtures("_double_precision")
@pytest.mark.parametrize("window", [None, 3])
def test_a_jitted_cache_that_was_cut_and_reordered(window: int | None) -> None:
    """Rows go on as what they have become; past the end, and in rows that don't exist or lost what they would see, NaN.
    No row does anything to its neighbours.
    """
    backend, config = BACKENDS[1], MODEL.replace(n_layers=2, sliding_window=window)
    weights = weights_of(config)
    model, kind = backend.model(config, weights), backend.module("model.attention").KVCache
    rng = np.random.default_rng(0)
    first, second, third = (rng.integers(0, config.vocab_size, (3, size)) for size in (5, 3, 1))
    ring = {} if window is None else {"sliding_window": window, "spare": 2}

    @jax.jit
    def run(lengths: Any, rows: Any) -> Any:
        caches = [kind(3, SLOTS, 1, config.head_size, "float64", **ring) for _ in range(2)]
        logits = []
        for step, tokens in enumerate((first, second, third)):
            out = model.run(jax.numpy.asarray(tokens), kv_caches=caches)
            caches = [cache.truncate(lengths).reorder(rows) for cache in out.kv_caches] if step == 0 else out.kv_caches
            logits.append(out.logits)
        return jax.numpy.concatenate(logits[1:], axis=1)

    def expected(row: int, source: int, length: int) -> np.ndarray:
        tokens = np.concatenate([first[source, :length], second[row], third[row]])
        logits = transformer(weights, config, tokens[None]).logits[0, length:]
        return np.where(np.arange(length, length + 4)[:, None] < SLOTS, logits, np.nan)

    for lengths, rows in (([5, 4, 3], [2, 0, 2]), ([4, 5, 3], [1, 1, 0]), ([3, 4, 9], [0, 7, -1])):
        found = backend.numpy(run(np.array(lengths), np.array(rows)))
        for row, source in enumerate(rows):
            if source not in range(3):
                assert np.isnan(found[row]).all()
                continue
            assert_same_function(
                found[row], expected(row, source, min(5, lengths[source])), f"{lengths}, {rows}: {row}"
            )
    if window is not None:  # of tokens 0 to 4 the ring holds the last three; a new token 2 would see 0 and 1
        lost = kind(1, 16, 1, 2, "float64", sliding_window=3, spare=0)
        k = np.zeros((1, 1, 1, 2))
        kept = jax.jit(lambda cache, lengths: cache.truncate(lengths).lengths)
        for _ in range(5):
            lost = lost.update(jax.numpy.asarray(k), jax.numpy.asarray(k))[0]
        assert backend.numpy(kept(lost, np.array([4]))).tolist() == [4]
        assert backend.numpy(kept(lost, np.array([2]))).tolist() == [16]


@on_both
@pytest.mark.usefixtures("_double_precision")
def test_extraction_has_no_capacity(backend: Torch) -> None:
    config = MODEL.replace(**{**EXPERTS["every second"], "moe_capacity_factor": 0.2})
    weights, rng = weights_of(config), np.random.default_rng(1)
    tokens, real = rng.integers(0, config.vocab_size, (5, 8)), np.arange(8) >= np.arange(5)[:, None]
    model = backend.model(config, weights)
    samples = [{"tokens": row, "text_mask": mask} for row, mask in zip(tokens, real, strict=True)]
    extract = backend.module("model.hooks").extract_representations
    found = extract(model, samples, ["layers.1", "layers.3"], batch_size=2)
    limited = transformer(weights, config, tokens, key_padding_mask=real).activations
    free = transformer(weights, config.replace(moe_capacity_factor=0.0), tokens, key_padding_mask=real).activations
    for name in ("layers.1", "layers.3"):
        assert np.abs(limited[name] - free[name]).max() > 0.1
        assert_same_function(backend.numpy(found[name]), free[name], name)


@on_both
def test_evaluation_computes_in_the_dtype_of_the_steps(backend: Torch) -> None:
    """The loss of a batch before a step is the step's, and not that of float32."""
    losses: dict[str, list[float]] = {}
    for precision in ("bf16", "fp32"):
        trainer = backend.module("training.train").Trainer(tiny_job(train={"mixed_precision": precision}))
        batch = draw_batch(trainer.config, 0)
        losses[precision] = [float(trainer.evaluate([batch])["loss"]), float(trainer.step([batch])["loss"])]
    assert losses["fp32"][0] == pytest.approx(losses["fp32"][1], rel=1e-6)
    apart = abs(losses["bf16"][1] - losses["fp32"][1])
    assert abs(losses["bf16"][0] - losses["bf16"][1]) < 0.2 * apart, losses


@on_both
def test_dead_experts_are_counted_over_routers_and_micro_batches(backend: Torch) -> None:
    """Of three layers of six experts, which three micro-batches of four tokens choose among."""
    job = tiny_job(
        {"num_experts": 6, "moe_top_k": 1, "moe_frequency": 1, "n_layers": 3}, train={"batch_size": 1, "seq_len": 4}
    )
    trainer = backend.module("training.train").Trainer(job)
    weights = {name: np.asarray(value, np.float64) for name, value in trainer.state().weights.items()}
    batches = [draw_batch(job, seed) for seed in range(3)]
    counts = [transformer(weights, job.model, batch["tokens"]).expert_counts for batch in batches]
    totals = [np.sum([count[layer] for count in counts], axis=0) for layer in range(3)]
    unused = [int(np.count_nonzero(total == 0)) for total in totals]
    assert sum(unused) > max(unused) > 0
    assert int(trainer.step(batches)["dead_experts"]) == sum(unused)


@on_both
@pytest.mark.usefixtures("_double_precision")
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_before_any_call_counts_and_losses_are_of_the_types_they_will_have(backend: Torch, dtype: str) -> None:
    layer = backend.build(backend.module("model.moe").build_moe, 4, 6, 3, 2, dtype=dtype)
    wide = "float64" if dtype == "float64" else "float32"

    def types() -> list[str]:
        held = [layer, layer.router]
        return [str(value.dtype).removeprefix("torch.") for each in held for value in (
            each.aux_loss, each.z_loss, each.expert_counts)]  # fmt: skip

    before = types()
    layer(backend.array(np.zeros((1, 3, 4)), dtype))
    assert before == types() == [wide, wide, "int32"] * 2


@on_both
@pytest.mark.usefixtures("_double_precision")
def test_noise_does_not_let_experts_take_what_is_no_token(backend: Torch) -> None:
    """Scores of tokens that may be taken, noise included, are far below those of any that may not, and all negative."""
    router = backend.build(backend.module("model.moma").ExpertChoiceSigmoidRouter, 2, 2, 0.5)
    backend.module("model.state").set_state(router, {"gate.weight": np.eye(2)})
    x, valid = np.array([[5.0, 5.0], [-9.0, -7.0], [-8.0, -9.0], [6.0, 6.0]]), np.array([False, True, True, False])
    given = (backend.array(x), backend.array(valid), backend.array(np.full((4, 2), -3.0)))
    weights, tokens = (backend.numpy(part) for part in router(*given))
    assert tokens[0].tolist() == [2, 1]
    np.testing.assert_allclose(weights[0], 1 / (1 + np.exp([8.0, 7.0])))


@on_both
def test_counts_are_added_in_new_dicts(backend: Torch) -> None:
    add = backend.module("model.stats").added
    image, text = RouterId(1, "image"), RouterId(1, "text")
    total, counts = {RouterId(0): 1, image: 2}, {RouterId(0): 10, image: 20, text: 30, RouterId(2): 40}
    assert add(total, counts) == {RouterId(0): 11, image: 22, text: 30, RouterId(2): 40}
    assert total == {RouterId(0): 1, image: 2}
    assert counts == {RouterId(0): 10, image: 20, text: 30, RouterId(2): 40}


@on_both
@pytest.mark.usefixtures("_double_precision")
def test_without_a_mask_of_its_own_an_image_is_real_and_text_is_as_told(backend: Torch) -> None:
    modality, vlm = backend.module("model.modality"), backend.module("model.vlm")
    text = np.array([[True, False], [True, True]])
    for prefix in (None, np.zeros((2, 3, 4))):
        context = modality.ModalityContext() if prefix is None else modality.ModalityContext(
            prefix_embeds=backend.array(prefix))  # fmt: skip
        found = vlm.with_text(context, backend.array(text), None).key_padding_mask
        before = np.ones((2, 0 if prefix is None else 3), bool)
        np.testing.assert_array_equal(backend.numpy(found), np.concatenate([before, text], axis=1))


@on_both
@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 2**32 + 7, 2**63 + 1])
def test_noise_of_images_has_seeds_of_any_size(backend: Torch, seed: int) -> None:
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 3, 2, 2)).astype(np.float32)
    found = backend.module("model.noise").image_noise(backend.array(pixels), 2, 3, seed)
    np.testing.assert_array_equal(backend.numpy(found), image_noise(pixels, 2, 3, seed))


@on_both
@pytest.mark.usefixtures("_double_precision")
@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_seen_whether_its_weight_is_its_own_or_not(backend: Torch, tied: bool) -> None:
    config = MODEL.replace(n_layers=1, tie_embeddings=tied)
    model, hooks = backend.model(config, weights_of(config)), backend.module("model.hooks")
    with hooks.capture(model) as seen:
        logits = model.run(backend.array(np.array([[1, 2, 3]]))).logits
    for name in ("output_head", "output_head.proj"):
        np.testing.assert_array_equal(backend.numpy(seen[name]), backend.numpy(logits))


@on_both
@pytest.mark.usefixtures("_double_precision")
@pytest.mark.parametrize("padded", [False, True])
def test_tokens_that_experts_took_are_counted_in_integers(backend: Torch, padded: bool) -> None:
    layer = backend.build(backend.module("model.moma").ExpertChoiceMoE, 4, 6, 3, 0.5)
    valid = backend.array(np.array([[True, True, False, True]])) if padded else None
    _, stats = layer(backend.array(np.ones((1, 4, 4))), valid, return_stats=True)
    assert str(stats.expert_counts.dtype).removeprefix("torch.") == "int32"
    assert backend.numpy(stats.expert_counts).tolist() == [2, 2, 2]
    assert str(stats.dropped.dtype).removeprefix("torch.") == "int32"


@on_both
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((1, 4), np.float32), r"valid\.dtype = .*float"),
        (np.ones((1, 3), bool), r"valid\.shape = \(1, 3\): must be \(1, 4\)"),
    ],
)
def test_experts_choose_among_tokens_of_a_mask(backend: Torch, mask: np.ndarray, message: str) -> None:
    layer = backend.build(backend.module("model.moma").ExpertChoiceMoE, 4, 6, 3, 0.5, dtype="float32")
    with pytest.raises(ValueError, match=message):
        layer(backend.array(np.ones((1, 4, 4), np.float32)), backend.array(mask))


@on_both
@pytest.mark.parametrize("packed", [True, False])
def test_matrices_of_experts_held_as_integers_are_given_wide(backend: Torch, packed: bool) -> None:
    """Whole numbers of steps, unless a narrow dtype is asked for."""
    config = MODEL.replace(n_layers=1, num_experts=3, moe_packed_experts=packed)
    model = backend.model(config, weights_of(config), dtype="float32")
    moe = model.layers["0"].mlp
    before = backend.numpy(moe.expert_weights())
    backend.module("model.int8").hold_int8(model)
    narrow = backend.numpy(moe.expert_weights(torch.bfloat16 if backend.name == "torch" else "bfloat16"))
    for name, held in backend.numpy(moe.expert_weights()).items():
        steps = held / (np.abs(before[name]).max(axis=1, keepdims=True) / 127)
        np.testing.assert_allclose(steps, np.rint(steps), atol=1e-4, rtol=0)
        np.testing.assert_allclose(held, before[name], atol=0.51 * np.abs(before[name]).max() / 127, rtol=0)
        np.testing.assert_array_equal(narrow[name], held.astype(ml_dtypes.bfloat16))
        assert (held.dtype, narrow[name].dtype) == (np.float32, ml_dtypes.bfloat16)


@on_both
def test_capped_numbers_are_rounded_once(backend: Torch) -> None:
    """Narrow ones as well; the functions of two libraries may part at a tie."""
    capped = backend.module("model.softcap").soft_capped
    given = np.random.default_rng(0).normal(0, 6, 4000).astype(ml_dtypes.bfloat16)
    found = backend.run(lambda x: capped(x, 5.0), given)
    expected = (np.float32(5) * np.tanh(given.astype(np.float32) / np.float32(5))).astype(ml_dtypes.bfloat16)
    assert found.dtype == given.dtype
    assert np.mean(found != expected) < 0.01


@on_both
@pytest.mark.parametrize(("longest", "slots"), [(11, 10), (10, 10), (9, 9), (6, 6)])
def test_a_ring_is_held_where_it_is_smaller(backend: Torch, longest: int, slots: int) -> None:
    module = backend.module("model.slots")
    found = module.slots_for(longest, 8, 2)
    assert isinstance(found, module.RingSlots if longest > slots else module.LinearSlots)
    assert found.count == slots


@on_both
def test_rows_that_a_cache_keeps_are_a_list(backend: Torch) -> None:
    cache = backend.module("model.attention").KVCache(2, 8, 1, 4)
    with pytest.raises(ValueError, match=r"rows\.shape = \(1, 2\): must be \(2,\)"):
        cache.reorder(backend.array(np.array([[1, 0]])))
