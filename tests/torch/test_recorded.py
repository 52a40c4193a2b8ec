"""Micro-batches that are recorded and replayed train as those that are not: what is kept, when, and what is handed out.

Without a GPU a recording is a stand-in: what it replays runs again, and lands where it was first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kempnerforge_torch.model import cuda_graph
from kempnerforge_torch.model.state import to_numpy
from kempnerforge_torch.training import recorded
from kempnerforge_torch.training.train import Trainer
from shared_config.loader import load_config
from shared_config.schema.job import JobConfig
from tests.distributed import layouts
from tests.jobs import draw_batch, tiny_job

MODELS: Mapping[str, Mapping[str, Any]] = {
    "dense": {},
    "experts": {"num_experts": 4, "moe_top_k": 2, "moe_router": "sigmoid_topk"},
}
KINDS = ("plain", "shorter", "fewer labels", "padded", "two", "two padded", "documents")


@dataclasses.dataclass
class Graph:
    """Stands in for a CUDA graph."""

    recorder: Recorder
    function: Callable[[], Any]
    places: Sequence[Tensor]

    def replay(self) -> None:
        self.recorder.launched += 1
        for place, tensor in zip(self.places, tensors_of(self.function()), strict=True):
            place.copy_(tensor)


class Recorder:
    """Counts what is recorded and replayed."""

    def __init__(self) -> None:
        self.recorded = self.launched = 0

    def __call__(self, function: Callable[[], Any]) -> tuple[Any, Graph]:
        first = function()
        places = list(tensors_of(first))
        self.recorded += 1
        for place in places:
            place.fill_(float("nan") if place.is_floating_point() else -1)

        return first, Graph(self, function, places)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Those within tuples, lists and dicts, without a graph."""
    if isinstance(value, Tensor):
        yield value.detach()
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors_of(each)
    elif isinstance(value, dict):
        yield from tensors_of(list(value.values()))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    monkeypatch.setattr(cuda_graph, "recorded", found)
    monkeypatch.setattr(recorded, "has_room", lambda device: True)
    return found


def trainer_of(job: JobConfig, records: bool) -> Trainer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kempnerforge_torch.training.train.can_record", lambda *given, **named: records)
        return Trainer(job, "cpu")


def batches_of(job: JobConfig, kind: str, seed: int) -> list[dict[str, np.ndarray]]:
    batches = [draw_batch(job, seed + place) for place in range(2 if kind.startswith("two") else 1)]
    if kind == "shorter":
        batches = [{name: array[:, :-3] for name, array in batch.items()} for batch in batches]
    if kind == "fewer labels":
        batches[0]["labels"][:, :2] = -100
    if kind.endswith("padded"):
        real = np.ones_like(batches[0]["tokens"], dtype=bool)
        real[0, -2:] = False
        batches = [{**batch, "text_mask": real} for batch in batches]
    if kind.endswith("documents"):
        ends = np.random.default_rng(seed).random(batches[0]["tokens"].shape) < 0.3
        batches = [{**batch, "doc_ids": np.cumsum(ends, axis=1, dtype=np.int32)} for batch in batches]
    return [{name: np.ascontiguousarray(array) for name, array in batch.items()} for batch in batches]


def job_of(model: str, precision: str, optimizer: str = "adamw") -> JobConfig:
    return tiny_job(
        dict(MODELS[model]), train={"mixed_precision": precision}, optimizer={"name": optimizer, "lr": 0.01}
    )


def run(trainer: Trainer, kinds: Sequence[str]) -> list[dict[str, np.ndarray]]:
    """The metrics of steps, read only once all are taken, and the weights."""
    steps = [trainer.step(batches_of(trainer.config, kind, 10 * place)) for place, kind in enumerate(kinds)]
    weights = {name: to_numpy(master.detach()) for name, master in trainer.masters.items()}
    return [*({name: np.asarray(value) for name, value in step.items()} for step in steps), weights]


def assert_same(found: Sequence[Mapping[str, np.ndarray]], expected: Sequence[Mapping[str, np.ndarray]]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            np.testing.assert_array_equal(value, other[name], name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ["plain", "two padded", "two documents"])
def test_steps_are_the_same(model: str, precision: str, kind: str, recorder: Recorder) -> None:
    """To the bit; from the third on they are replayed."""
    job, kinds = job_of(model, precision), [kind] * 5
    assert_same(run(trainer_of(job, True), kinds), run(trainer_of(job, False), kinds))
    assert recorder.recorded == 1
    assert recorder.launched == (3 if kind == "plain" else 2 * 5 - recorded.WARM_UP)


@settings(max_examples=4 if settings.get_current_profile_name() != "nightly" else 40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 4)), min_size=1, max_size=4),
    st.sampled_from(["adamw", "lion"]),
)
def test_kinds_may_change(runs: list[tuple[str, int]], optimizer: str) -> None:
    """Shapes, masks, numbers of labels and of micro-batches."""
    kinds, job = [kind for kind, times in runs for _ in range(times)], job_of("experts", "bf16", optimizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_graph, "recorded", Recorder())
        patch.setattr(recorded, "has_room", lambda device: True)
        assert_same(run(trainer_of(job, True), kinds), run(trainer_of(job, False), kinds))


def test_what_is_frozen_later_stays(recorder: Recorder) -> None:
    job = job_of("dense", "bf16")
    trainers = [trainer_of(job, records) for records in (True, False)]
    for trainer in trainers:
        run(trainer, ["plain"] * 3)
        trainer.masters["layers.0.mlp.up_proj.weight"].requires_grad_(False)
    assert recorder.launched == 1
    assert_same(*(run(trainer, ["plain"] * 2) for trainer in trainers))


def test_weights_that_are_loaded_count(recorder: Recorder) -> None:
    job = job_of("dense", "bf16")
    source, trainer, plain = trainer_of(job, False), trainer_of(job, True), trainer_of(job, False)
    run(source, ["plain"] * 2)
    for each in (trainer, plain):
        run(each, ["plain"] * 3)
        each.load_state(source.state())
    assert_same(run(trainer, ["plain"] * 4), run(plain, ["plain"] * 4))
    assert recorder.recorded == 1


@pytest.mark.parametrize("where", ["buffer", "master"])
def test_tensors_elsewhere_are_recorded_anew(where: str, recorder: Recorder) -> None:
    """A recording reads the places that they had."""
    trainer = trainer_of(job_of("experts", "bf16"), True)
    run(trainer, ["plain"] * 3)
    router: Any = trainer.model.get_submodule("layers.0.mlp.router")
    if where == "buffer":
        router.expert_bias = router.expert_bias.clone()
    else:
        router.gate.weight.data = router.gate.weight.data.clone()
    run(trainer, ["plain"] * 2)
    assert (recorder.recorded, recorder.launched) == (1, 1)
    run(trainer, ["plain"] * 2)
    assert (recorder.recorded, recorder.launched) == (2, 3)


@pytest.mark.parametrize("where", ["module", "leaf", "accumulated"])
def test_hooks_are_called(where: str, recorder: Recorder) -> None:
    trainer, seen = trainer_of(job_of("dense", "fp32"), True), []
    run(trainer, ["plain"] * 3)
    launched = recorder.launched
    if where == "module":
        trainer.model.layers["0"].register_forward_hook(lambda *given: seen.append(1))  # pyright: ignore
    else:
        leaf = trainer.masters["layers.0.mlp.up_proj.weight"]
        register = leaf.register_hook if where == "leaf" else leaf.register_post_accumulate_grad_hook
        register(lambda *given: seen.append(1))  # pyright: ignore
    run(trainer, ["plain"] * 3)
    assert len(seen) == 3
    assert recorder.launched == launched


@pytest.mark.parametrize("why", ["no room", "an error"])
def test_what_cannot_be_recorded_is_run(why: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(function: Callable[[], Any]) -> Any:
        function()
        raise RuntimeError("operation not permitted when stream is capturing")

    if why == "no room":
        monkeypatch.setattr(recorded, "has_room", lambda device: False)
    else:
        monkeypatch.setattr(cuda_graph, "recorded", refuse)
    job, kinds = job_of("dense", "fp32"), ["two"] * 4
    assert_same(run(trainer_of(job, True), kinds), run(trainer_of(job, False), kinds))
    assert recorder.launched == 0


@pytest.mark.parametrize(("free", "has_room"), [(11, False), (12, True)])
def test_twice_as_much_memory_as_calls_take_is_free(free: int, has_room: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"empty_cache": None, "max_memory_allocated": 10, "memory_allocated": 4, "mem_get_info": (free, 99)}
    for name, value in known.items():
        monkeypatch.setattr(torch.cuda, name, lambda *given, value=value: value)
    assert recorded.has_room(torch.device("cuda")) is has_room


def test_where_calls_are_recorded() -> None:
    compiled, plain = (tiny_job({}, train={"compile_model": value}) for value in (True, False))
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    experts = tiny_job(dict(MODELS["experts"]), train={"compile_model": True})
    assert recorded.can_record(compiled, gpu, is_alone=True)
    assert recorded.can_record(experts, gpu, is_alone=True)
    assert not recorded.can_record(compiled, gpu, is_alone=False)
    assert not recorded.can_record(compiled, cpu, is_alone=True)
    assert not recorded.can_record(plain, gpu, is_alone=True)
    images = load_config("debug_vlm_joint_decoder", ["--train.compile_model=true"])
    assert not recorded.can_record(images, gpu, is_alone=True)


def test_other_inputs_are_not_recorded(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "RECORDED", recorded.RECORDED - {"text_mask"})
    run(trainer_of(job_of("dense", "fp32"), True), ["padded"] * 4)
    assert recorder.recorded == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("model", ["dense", "experts", "limited", "apart"])
@pytest.mark.parametrize("kind", ["plain", "two padded", "two documents"])
def test_steps_on_a_gpu(model: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By real graphs, as kernel by kernel, to the order of their sums."""
    graphs, real = [], cuda_graph.recorded
    monkeypatch.setattr(cuda_graph, "recorded", lambda function: graphs.append(1) or real(function))
    train = {"mixed_precision": "bf16", "compile_model": True}
    sizes = {"dim": 64, "ffn_hidden_dim": 96}
    job = tiny_job({**{**MODELS, **layouts.MODELS}[model], **sizes}, train=train, optimizer={"lr": 0.01})
    trainers = []
    for records in (True, False):
        monkeypatch.setattr(
            "kempnerforge_torch.training.train.can_record", lambda *given, records=records, **named: records
        )
        trainers.append(Trainer(job, "cuda"))
    found, expected = (
        [float(trainer.step(batches_of(job, kind, 10 * place))["loss"]) for place in range(6)] for trainer in trainers
    )
    assert len(graphs) == 1
    assert found == pytest.approx(expected, rel=1e-4)
