"""Vision-language training: the trainers take the same steps, frozen parts stay, captions are learned from images."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from kempnerforge_jax.training.train import Trainer as JaxTrainer
from kempnerforge_torch.training.train import Trainer as TorchTrainer
from kempnerforge_torch.training.train import train as train_torch
from shared_config import JobConfig, load_config
from shared_config.data import open_data
from shared_config.data.shapes import caption_entropy
from shared_config.errors import UserError
from shared_config.interchange import checkpoint
from tests.benchmarks.bench_captions import compare_steps, measure_captions, shuffled
from tests.parity.head_checks import chunks_of

SMALL = [
    "--model.dim=32", "--model.n_layers=2", "--model.n_heads=4", "--model.n_kv_heads=2", "--model.ffn_hidden_dim=48",
    "--vision_encoder.image_size=16", "--vision_encoder.feature_dim=24", "--vision_encoder.n_heads=3",
    "--vision_encoder.n_layers=1", "--train.batch_size=4", "--scheduler.warmup_steps=4", "--eval.steps=1",
]  # fmt: skip
ARCHS = ("joint_decoder", "cross_attention", "mot", "moma")
TRAINERS = {"torch": TorchTrainer, "jax": JaxTrainer}
AGREED = 1e-5


def job(arch: str, *overrides: str) -> JobConfig:
    return load_config(f"debug_vlm_{arch}", [*SMALL, *overrides])


def losses(trainer: Any, config: JobConfig, steps: int, start: int = 0) -> list[float]:
    data = open_data(config)
    found = [trainer.step([data.batch(index)])["loss"] for index in range(start, start + steps)]
    return [float(loss) for loss in found]


def pair(
    config: JobConfig, steps: int, chunks: Mapping[str, int] | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Trainers and the losses of their steps; the logits in chunks of so many tokens."""
    trainers, found = {name: build(config, "cpu") for name, build in TRAINERS.items()}, {}
    for name, trainer in trainers.items():
        with chunks_of(chunks[name], config.model.vocab_size, 4) if chunks else contextlib.nullcontext():
            found[name] = np.array(losses(trainer, config, steps))
    return trainers, found


@pytest.mark.parametrize("arch", ARCHS)
def test_both_trainers_take_the_same_steps(arch: str) -> None:
    """JAX with the logits of a few tokens at a time."""
    config = job(arch, "--vlm.max_text_len=48")
    trainers, found = pair(config, 12, chunks={"torch": 10**6, "jax": 32})
    np.testing.assert_allclose(found["torch"], found["jax"], rtol=AGREED)
    assert found["torch"][-1] < found["torch"][0] - 0.5
    evaluated = {
        name: float(trainer.evaluate(open_data(config).heldout())["loss"]) for name, trainer in trainers.items()
    }
    assert evaluated["torch"] == pytest.approx(evaluated["jax"], rel=AGREED)


def test_both_trainers_agree_on_clips_and_experts() -> None:
    clips = ["--video.max_frames=3", "--video.min_frames=2", "--video.frame_size=16"]
    config = job("mot", *clips, "--model.num_experts=3", "--train.grad_accum_steps=1")
    trainers, found = pair(config, 6)
    np.testing.assert_allclose(found["torch"], found["jax"], rtol=AGREED)
    metrics = trainers["torch"].step([open_data(config).batch(7)])
    assert {"aux_loss", "z_loss", "routing_entropy", "dead_experts"} <= set(metrics)


@pytest.mark.parametrize("name", TRAINERS)
def test_micro_batches_have_noise_of_their_own(name: str) -> None:
    config = job("moma")
    batch = open_data(config).batch(0)
    trainer = TRAINERS[name](config, "cpu")
    loud = float(trainer.step([batch, batch])["loss"])
    silent = job("moma", "--vlm.moma_gumbel_noise=false")
    quiet = float(TRAINERS[name](silent, "cpu").step([batch, batch])["loss"])
    assert loud != quiet
    assert loud == pytest.approx(quiet, rel=0.1)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_frozen_part_keeps_its_bits(name: str) -> None:
    config = job("joint_decoder", "--vlm.freeze=[{module = 'vision_encoder'}, {module = 'adapter'}]")
    trainer = TRAINERS[name](config, "cpu")
    before = trainer.state()
    losses(trainer, config, 20)
    after = trainer.state()
    for key, value in before.weights.items():
        same = np.array_equal(value, after.weights[key])
        assert same == key.startswith(("vision_encoder.", "adapter.")), key
    assert all(key[2:].startswith("transformer.") for key in after.optimizer)


SCHEDULE = (
    "--vlm.freeze_schedule=[{start_step = 3, specs = [{module = 'adapter'}]}, {start_step = 5, specs = []}]",
    "--vlm.freeze=[{module = 'vision_encoder'}]",
)


def test_freeze_schedules_are_the_same_in_both() -> None:
    config = job("cross_attention", *SCHEDULE)
    trainers = {name: build(config, "cpu") for name, build in TRAINERS.items()}
    seen: dict[str, list[float]] = {"torch": [], "jax": []}
    for step in range(8):
        for name, trainer in trainers.items():
            before = trainer.state().weights
            seen[name] += losses(trainer, config, 1, start=step)
            after = trainer.state().weights
            moved = {
                part: any(not np.array_equal(before[key], after[key]) for key in before if key.startswith(part))
                for part in ("vision_encoder", "adapter", "transformer")
            }
            frozen = "vision_encoder" if step < 3 else "adapter" if step < 5 else None
            assert moved == {part: part != frozen for part in moved}, (name, step)
    np.testing.assert_allclose(seen["torch"], seen["jax"], rtol=AGREED)


@pytest.mark.parametrize("source", TRAINERS)
def test_a_state_goes_on_in_the_other_backend(source: str) -> None:
    config = job("mot", *SCHEDULE)
    first = TRAINERS[source](config, "cpu")
    losses(first, config, 4)
    other = next(build for name, build in TRAINERS.items() if name != source)(config, "cpu")
    other.load_state(first.state())
    np.testing.assert_allclose(losses(other, config, 3, start=4), losses(first, config, 3, start=4), rtol=AGREED)


def test_a_run_that_goes_on_may_freeze_other_parts() -> None:
    """Moments of what is frozen now are dropped; what is trained for the first time starts with none."""
    frozen = ("--vlm.max_text_len=48", "--vlm.freeze=[{module = 'vision_encoder'}, {module = 'adapter'}]")
    before, after = job("joint_decoder", *frozen), job("joint_decoder", frozen[0])
    first = TorchTrainer(before, "cpu")
    losses(first, before, 2)
    found = {}
    for name, build in TRAINERS.items():
        trainer = build(after, "cpu")
        trainer.load_state(first.state())
        found[name] = losses(trainer, after, 3, start=2)
    np.testing.assert_allclose(found["torch"], found["jax"], rtol=AGREED)
    again = TorchTrainer(before, "cpu")
    again.load_state(trainer.state())
    assert set(again.state().optimizer) == set(first.state().optimizer)
    losses(again, before, 1, start=5)


def test_nothing_left_to_train_is_refused() -> None:
    everything = "--vlm.freeze=[{module = 'vision_encoder'}, {module = 'adapter'}, {module = 'transformer'}]"
    for build in TRAINERS.values():
        with pytest.raises(UserError, match="freezes all there is"):
            build(job("mot", everything), "cpu")


@pytest.mark.parametrize("name", TRAINERS)
def test_bfloat16_and_less_memory(name: str) -> None:
    options = ["--train.mixed_precision=bf16", "--train.activation_checkpointing=full", "--train.scan_layers=true"]
    for arch in ("mot", "moma"):
        plain, narrow = (TRAINERS[name](job(arch, *extra), "cpu") for extra in ([], options))
        a, b = (losses(trainer, job(arch), 4) for trainer in (plain, narrow))
        np.testing.assert_allclose(b, a, rtol=0.02)


LEARNING = [
    "--model.dim=64", "--model.n_layers=2", "--model.ffn_hidden_dim=128", "--model.n_heads=2", "--model.n_kv_heads=2",
    "--vision_encoder.image_size=16", "--vision_encoder.patch_size=4", "--vision_encoder.feature_dim=48",
    "--vision_encoder.n_layers=1", "--optimizer.lr=5e-3", "--scheduler.warmup_steps=20", "--train.max_steps=200",
    "--eval.steps=4",
]  # fmt: skip


def test_captions_are_learned_from_images(tmp_path: Path) -> None:
    """Held-out captions cost less than any model could do without the image, and other images make them cost more."""
    config = load_config("debug_vlm_cross_attention", [*LEARNING, f"--checkpoint.dir={tmp_path}"])
    summary = train_torch(config, device="cpu")
    trainer = JaxTrainer(config, "cpu")
    assert summary.checkpoint is not None
    trainer.load_state(checkpoint.load(summary.checkpoint).state)
    heldout = open_data(config).heldout()
    loss = float(trainer.evaluate(heldout)["loss"])
    assert loss == pytest.approx(summary.heldout_loss, rel=1e-4)
    tokens = np.mean([np.count_nonzero(batch["labels"] != -100, axis=1).mean() for batch in heldout])
    assert loss < 0.85 * caption_entropy() / tokens
    assert float(trainer.evaluate(shuffled(heldout))["loss"]) > 1.5 * loss


nightly = pytest.mark.skipif(
    settings.get_current_profile_name() != "nightly", reason="a minute per run: HYPOTHESIS_PROFILE=nightly"
)


@nightly
@pytest.mark.parametrize("arch", ARCHS)
def test_presets_take_the_same_steps_as_they_are(arch: str) -> None:
    found = compare_steps(load_config(f"debug_vlm_{arch}"))
    assert found["largest_difference"] <= AGREED, found


@nightly
@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("arch", ARCHS)
def test_presets_learn_captions_from_images(arch: str, name: str) -> None:
    """No model without the image gets below the entropy of a caption; one that looks is misled by another image."""
    found = measure_captions(load_config(f"debug_vlm_{arch}"), name)
    assert found["heldout_loss"] < 0.8 * found["entropy_without_image"], found
    assert found["with_other_images"] > 1.5 * found["entropy_without_image"], found
