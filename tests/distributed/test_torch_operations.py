"""What befalls one of several processes of PyTorch befalls the run: numbers that are not finite, a signal to stop; and
metrics that are of all.
"""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from kempnerforge_torch.distributed.context_parallel import of_all_parts
from kempnerforge_torch.distributed.ranks import local
from kempnerforge_torch.distributed.sequence_parallel import can_split_stream
from kempnerforge_torch.distributed.spawn import together
from kempnerforge_torch.model.build import build_model
from kempnerforge_torch.training.train import Trainer
from shared_config.contract.sharding import layout_of
from shared_config.data import open_data
from shared_config.interchange.checkpoint import load
from shared_config.loader import load_config
from shared_config.schema.distributed import DistributedConfig
from shared_config.training.loop import run_training
from shared_config.training.metrics import read_metrics
from shared_config.training.speed import resident_peak
from shared_config.training.trainer import TrainingDivergedError
from tests.jobs import EXPERTS, draw_batch, text_job, tiny_job

RANKS = 2
BALLAST = 2**28
"""Bytes that the second rank holds besides."""
DENSE = {"n_heads": 4, "n_kv_heads": 4}


def on_the_second(what: str, trainer: Trainer) -> None:
    """Spoil something of the second rank alone: its loss, its gradients, or its moments, whose update overflows."""
    if dist.get_rank() != 1:
        return
    if what == "moments":
        state = next(iter(trainer.optimizer.state.values()))
        local(state["exp_avg"]).fill_(torch.inf)
        return
    differentiate: Any = trainer._differentiate

    def spoiled(*arguments: Any) -> Any:
        terms = differentiate(*arguments)
        if what == "loss":
            return [each._replace(loss=each.loss * torch.nan) for each in terms]
        local(next(p.grad for p in trainer.parameters.values() if p.grad is not None)).fill_(torch.nan)
        return terms

    changed: Any = trainer
    changed._differentiate = spoiled


def take(what: str, policy: str, sizes: dict[str, int]) -> tuple[list[list[bool]], list[bool]]:
    """What all ranks say of steps before, while and after something of one of them is spoiled: whether they were taken;
    and whether the weights of each have stayed what they were meanwhile.
    """
    model = {**DENSE, **EXPERTS, "num_experts": 4} if "ep" in sizes else DENSE
    job = tiny_job(model, train={"on_nonfinite": policy, "grad_accum_steps": 2}, distributed=sizes)
    trainer = Trainer(job, "cpu")
    batches = [draw_batch(job, trainer.ranks.rank + 2 * index) for index in range(2)]
    taken = [trainer.step(batches)]
    before = {name: local(tensor).detach().clone() for name, tensor in trainer.parameters.items()}
    on_the_second(what, trainer)
    taken.append(trainer.step(batches))
    stays = all(torch.equal(local(tensor), before[name]) for name, tensor in trainer.parameters.items())
    found: list[Any] = [None] * RANKS
    dist.all_gather_object(found, ([bool(metrics["taken"]) for metrics in taken], stays))
    return [each for each, _ in found], [stay for _, stay in found]


def losses(sizes: dict[str, int], lengths: Sequence[int]) -> list[float | str]:
    """Those of batches of these lengths, of which the longest may be 10; or why there is none."""
    job, found = tiny_job({**DENSE, "max_seq_len": 10}, train={"grad_accum_steps": 2}, distributed=sizes), []
    trainer = Trainer(job, "cpu", dtype=torch.float64)
    for length in lengths:
        batch = draw_batch(tiny_job({"max_seq_len": length}, train={"seq_len": length}), 0)
        try:
            found.append(float(trainer.evaluate([batch])["loss"]))
        except ValueError as error:
            found.append(str(error))
    return found


def labels_of_parts() -> tuple[float, int]:
    """The sum, and the number of labels, that each of several ranks has of 1 and 2, and of 3 and 4."""
    group = dist.group.WORLD
    assert group is not None
    own = torch.tensor(1 + 2 * group.rank()), torch.tensor(2 + 2 * group.rank())
    total, count = of_all_parts(lambda *_, **__: own, group)(torch.zeros(()), torch.zeros(()))
    return float(total), int(count)


def stop(folder: str, event: str) -> list[Any]:
    """How a run ends for each rank, of which the second has an event of its own before its third step."""
    job = text_job(
        Path(folder),
        DENSE,
        train={"max_steps": 50},
        eval={"steps": 0},
        checkpoint={"dir": f"{folder}/run", "interval": 0},
    )
    trainer = Trainer(job, "cpu")
    np.ones(BALLAST * dist.get_rank(), np.uint8)
    step: Any = trainer.step

    def stepping(micro_batches: Any) -> Any:
        if trainer.updates == 2 and dist.get_rank() == 1:
            if event == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                on_the_second("loss", trainer)
        return step(micro_batches)

    changed: Any = trainer
    changed.step = stepping
    processes = importlib.import_module("kempnerforge_torch.distributed.processes").processes()
    data = open_data(job, rank=trainer.ranks.rank, world_size=trainer.ranks.count)
    try:
        summary = run_training(job, trainer, data, processes=processes)
        end: Any = summary.step, summary.exit_status, resident_peak()
    except TrainingDivergedError as error:
        end = str(error)
    found: list[Any] = [None] * RANKS
    dist.all_gather_object(found, end)
    return found


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_an_update_that_one_rank_can_not_take_is_taken_by_none(what: str) -> None:
    taken, stays = together(take, RANKS, what, "skip", {})
    assert taken == [[True, False]] * RANKS
    assert stays == [True] * RANKS


@pytest.mark.parametrize("sizes", [{}, {"pp": 2}, {"tp": 2}, {"cp": 2}, {"ep": 2}], ids=str)
def test_moments_of_one_rank_that_would_overflow_let_none_take_the_update(sizes: dict[str, int]) -> None:
    """Of which the losses and the norm of the gradients, which all have alike, say nothing."""
    taken, stays = together(take, RANKS, "moments", "skip", sizes)
    assert taken == [[True, False]] * RANKS
    assert stays == [True] * RANKS


def test_batches_of_any_length_follow_one_another() -> None:
    """In stages, and in parts, as on one device."""
    alone, staged, cut = (
        together(losses, count, sizes, (10, 6, *more))
        for count, sizes, more in ((1, {}, [12]), (RANKS, {"pp": 2}, []), (RANKS, {"cp": 2}, [12]))
    )
    assert staged == pytest.approx(alone[:2], rel=1e-12)
    assert cut[:2] == pytest.approx(alone[:2], rel=1e-12)
    assert cut[2] == alone[2] == "sequence length = 12: must be at most max_seq_len = 10"


def test_losses_and_labels_are_those_of_all_parts() -> None:
    assert together(labels_of_parts, RANKS) == (4.0, 6)


def test_a_signal_to_one_stops_all_after_one_step_with_one_checkpoint(tmp_path: Path) -> None:
    ends = together(stop, RANKS, str(tmp_path), "signal")
    assert [end[:2] for end in ends] == [(3, 128 + signal.SIGTERM)] * RANKS
    assert [folder.name for folder in (tmp_path / "run").glob("step_*")] == ["step_00000003"]
    assert load(tmp_path / "run").state.step == 3
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3]
    for record in records:
        assert record["tokens_per_second"] * record["seconds"] == pytest.approx(RANKS * 3 * 10)
        assert ends[0][2] + BALLAST / 2 < record["peak_memory_bytes"] <= 1.01 * ends[1][2]


def test_a_loss_of_one_rank_that_is_not_finite_ends_all(tmp_path: Path) -> None:
    ends = together(stop, RANKS, str(tmp_path), "loss")
    assert len(set(ends)) == 1
    assert "step 3: loss is nan; training stopped, there is no checkpoint" in ends[0]


@pytest.mark.parametrize(("images", "length", "divides"), [(1, 3, True), (1, 2, False), (3, 2, False), (3, 1, True)])
def test_the_stream_is_divided_by_all_images_of_a_row(images: int, length: int, divides: bool) -> None:
    """Each has 9 positions, and 4 ranks have a part of the stream: of 12, 11, 29 and 28 positions."""
    given = [f"--data.max_images={images}", f"--train.seq_len={length}", "--vlm.image_token_id=1"]
    config = load_config("debug_vlm_joint_decoder", [*given, "--vision_encoder.image_size=24", "--model.n_layers=1"])
    with torch.device("meta"):
        model = build_model(config)
    mesh: Any = SimpleNamespace(layout=layout_of(DistributedConfig(tp=4), 4))
    assert can_split_stream(model, config, mesh) == divides
