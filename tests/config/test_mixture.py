"""Rows of several sources: once an epoch, in its share, whoever reads which batch, and from where."""

from __future__ import annotations

import importlib
import json
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_config.data import Corpus, MixedData, TextData, TokenStream, open_data
from shared_config.data.batches import Batch
from shared_config.data.mixture import CIRCLE, Phase, arcs, floor_sum, phases_of
from shared_config.errors import ConfigError, UserError
from shared_config.loader import load_config
from shared_config.schema.data import DataConfig, PhaseConfig, SourceConfig
from shared_config.training.loop import run_training
from shared_config.training.metrics import read_metrics
from tests.config.test_jsonl import TEMPLATES, tokenizer_folder
from tests.config.test_loop import VOCAB, BigramTrainer, config_of

SEQ_LEN = 4
WEIGHTS = st.floats(0.05, 20) | st.sampled_from([0.0, 1.0, 3.0])


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[DataConfig, list[int]]:
    """A section of one to four sources and up to three phases, and how many windows each source has."""
    count = draw(st.integers(1, 4))
    weights = st.lists(WEIGHTS, min_size=count, max_size=count).filter(any)
    steps = draw(st.lists(st.integers(1, 12), unique=True, max_size=2))
    data = DataConfig(
        sources=tuple(SourceConfig(path=f"{i}", weight=weight) for i, weight in enumerate(draw(weights))),
        phases=tuple(PhaseConfig(from_step=step, weights=tuple(draw(weights))) for step in sorted(steps)),
        temperature=draw(st.sampled_from([1.0, 0.5, 3.0])),
    )
    return data, draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))


def source_of(number: int, windows: int, batch_size: int, rank: int, world_size: int) -> TextData:
    """Ids say which source and which window they are from: window w of source s begins with 1000 s + SEQ_LEN w."""
    ids = np.arange(1000 * number, 1000 * number + windows * SEQ_LEN + 1, dtype=np.uint32)
    corpus = Corpus(f"source {number}", TokenStream([("train", ids)]), TokenStream([("heldout", ids[: SEQ_LEN + 1])]))
    return TextData(
        corpus, batch_size=batch_size, seq_len=SEQ_LEN, rank=rank, world_size=world_size, vocab_size=10_000, seed=5
    )


def mixed(
    data: DataConfig, windows: list[int], batch_size: int = 1, rank: int = 0, world_size: int = 1, steps_of: int = 3
) -> MixedData:
    sources = [source_of(i, count, batch_size, rank, world_size) for i, count in enumerate(windows)]
    phases = phases_of(data, windows, seed=5)
    return MixedData(sources, phases, batch_size=batch_size, rank=rank, world_size=world_size, rows_per_step=steps_of)


def firsts(batch: Batch) -> list[int]:
    return batch["tokens"][:, 0].tolist()


# The arithmetic


@given(count=st.integers(0, 40), modulus=st.integers(1, 60), factor=st.integers(0, 99), offset=st.integers(-99, 99))
def test_a_sum_of_floors_is_that(count: int, modulus: int, factor: int, offset: int) -> None:
    expected = sum((factor * i + offset) // modulus for i in range(count))
    assert floor_sum(count, modulus, factor, offset) == expected


@given(
    weights=st.lists(WEIGHTS, min_size=1, max_size=5).filter(any), offset=st.integers(0, CIRCLE - 1),
    start=st.integers(0, 10**15), length=st.integers(1, 60),
)  # fmt: skip
def test_counts_are_those_of_the_rows(weights: list[float], offset: int, start: int, length: int) -> None:
    phase = Phase(0, arcs(weights, 1.0), offset)
    counts = np.array(phase.before(start))
    assert counts.sum() == start
    for row in range(start, start + length):
        counts[phase.source_of(row)] += 1
        assert counts.tolist() == phase.before(row + 1)


@given(weights=st.lists(st.floats(0.05, 20), min_size=2, max_size=5), temperature=st.sampled_from([0.5, 1.0, 2.0]))
def test_sources_have_their_shares_of_any_stretch(weights: list[float], temperature: float) -> None:
    """Every stretch of 500 rows has them but for a few."""
    phase = Phase(0, arcs(weights, temperature), 12345)
    powers = np.array(weights) ** (1 / temperature)
    for start in (0, 777, 10**12):
        found = np.array(phase.before(start + 500)) - phase.before(start)
        np.testing.assert_allclose(found, 500 * powers / powers.sum(), atol=4)


def test_a_source_of_no_weight_gives_nothing() -> None:
    phase = Phase(0, arcs([0.0, 2.0, 0.0, 1.0, 0.0], 1.0), 99)
    assert [count > 0 for count in phase.before(10**6)] == [False, True, False, True, False]
    assert [Phase(0, (10, CIRCLE), point).source_of(0) for point in (9, 10)] == [0, 1]
    assert arcs([3.0, 1.0], 1.0) == (3 * CIRCLE // 4, CIRCLE)
    assert Fraction(arcs([8.0, 1.0], 3.0)[0], CIRCLE) == pytest.approx(2 / 3)


def test_the_order_is_written_in_stone() -> None:
    """Numbers of this version: checkpoints and other machines rely on them."""
    section = DataConfig(
        sources=tuple(SourceConfig(path=name, weight=w) for name, w in zip("abc", (5, 2, 1), strict=True))
    )
    (phase,) = phases_of(section, [1, 1, 1], seed=42)
    assert "".join("abc"[phase.source_of(row)] for row in range(24)) == ORDER
    assert phase.before(10**9) == COUNTS


ORDER = "baabacaabaababaabacaabaa"
COUNTS = [624999996, 250000001, 125000003]


# Rows


@settings(max_examples=12)
@given(mixture=mixtures())
def test_every_row_of_a_source_comes_once_an_epoch(mixture: tuple[DataConfig, list[int]]) -> None:
    data, windows = mixture
    run = mixed(data, windows)
    seen: dict[int, list[int]] = {}
    for index in range(40):
        (first,) = firsts(run.batch(index))
        seen.setdefault(first // 1000, []).append(first % 1000)
    for source, places in seen.items():
        count = windows[source]
        whole = len(places) // count * count
        for start in range(0, whole, count):
            assert sorted(places[start : start + count]) == [SEQ_LEN * window for window in range(count)]
        assert len(set(places[whole:])) == len(places) - whole
        alone = source_of(source, count, 1, 0, 1)
        assert places == [firsts(alone.batch(index))[0] % 1000 for index in range(len(places))]


@given(
    mixture=mixtures(), batch_size=st.integers(1, 4), world_size=st.integers(1, 3), index=st.integers(0, 20),
    steps_of=st.integers(1, 5),
)  # fmt: skip
def test_ranks_together_read_what_one_reads(
    mixture: tuple[DataConfig, list[int]], batch_size: int, world_size: int, index: int, steps_of: int
) -> None:
    data, windows = mixture
    ranks = [mixed(data, windows, batch_size, rank, world_size, steps_of) for rank in range(world_size)]
    one = mixed(data, windows, 1, steps_of=steps_of)
    rows = batch_size * world_size
    together = [first for rank in ranks for first in firsts(rank.batch(index))]
    assert together == [firsts(one.batch(row))[0] for row in range(index * rows, (index + 1) * rows)]
    assert {rank.rows_per_batch for rank in ranks} == {rows}
    assert ranks[0].tokens_per_batch == rows * SEQ_LEN


@settings(max_examples=12)
@given(mixture=mixtures(), worlds=st.tuples(st.integers(1, 3), st.integers(1, 3)), steps=st.integers(0, 5))
def test_no_row_is_lost_or_comes_twice_where_a_run_goes_on_on_other_ranks(
    mixture: tuple[DataConfig, list[int]], worlds: tuple[int, int], steps: int
) -> None:
    data, windows = mixture
    places: dict[int, list[int]] = {}
    for step in range(8):
        world = worlds[step >= steps]
        for rank in range(world):
            for first in firsts(mixed(data, windows, 6 // world, rank, world).batch(step)):
                places.setdefault(first // 1000, []).append(first % 1000)
    for source, own in places.items():
        for start in range(0, len(own), windows[source]):
            epoch = own[start : start + windows[source]]
            assert len(set(epoch)) == len(epoch)
            assert set(epoch) <= {SEQ_LEN * window for window in range(windows[source])}


@given(mixture=mixtures(), rows=st.integers(1, 5))
def test_phases_begin_with_their_steps(mixture: tuple[DataConfig, list[int]], rows: int) -> None:
    data, windows = mixture
    run = mixed(data, windows, steps_of=99).in_steps_of(rows)
    given = [source.weight for source in data.sources]
    phases = [(0, given), *((phase.from_step, phase.weights) for phase in data.phases), (14, given)]
    for (start, weights), (end, _) in pairwise(phases):
        chosen = {source for source, _ in run.places(start * rows, (end - start) * rows)}
        assert chosen <= {source for source, weight in enumerate(weights) if weight}
        placed = run.places(start * rows, 1)[0][0]
        assert placed == run.phases[[s for s, _ in phases].index(start)].source_of(0)
    assert run.fingerprint == mixed(data, windows, steps_of=99).fingerprint


def test_a_source_goes_on_where_the_phase_before_left_it() -> None:
    phases = tuple(PhaseConfig(from_step=step, weights=(1.0,)) for step in (2, 5))
    run = mixed(DataConfig(sources=(SourceConfig(path="a"),), phases=phases), [3])
    assert [run.places(row, 1)[0] for row in range(20)] == run.places(0, 20) == [(0, row) for row in range(20)]


def test_another_mixture_has_another_fingerprint() -> None:
    first = DataConfig(sources=(SourceConfig(path="a", weight=1.0), SourceConfig(path="b", weight=2.0)))
    second = first.replace(temperature=2.0)
    third = first.replace(phases=(PhaseConfig(from_step=3, weights=(1.0, 2.0)),))
    prints = [mixed(data, windows).fingerprint for data in (first, second, third) for windows in ([3, 4], [3, 5])]
    assert len(set(prints)) == 6


def run_on(ranks: int, folder: Path, max_steps: int, accumulated: int = 2) -> BigramTrainer:
    """The rows of all ranks, as one process reads them; other weights from step 5 on."""
    steps = f"train.max_steps={max_steps}", f"train.grad_accum_steps={accumulated}"
    config = config_of(folder, *steps, "eval.steps=0", "eval.interval=0", "scheduler.name=constant")
    corpora = []
    for number in range(2):
        ids = np.random.default_rng(number).integers(0, VOCAB, 200 + 100 * number).astype(np.uint16)
        corpora.append(Corpus(f"{number}", TokenStream([("ids", ids)]), TokenStream([])))
    sources = [TextData(corpus, batch_size=2 * ranks, seq_len=8, vocab_size=VOCAB) for corpus in corpora]
    given = tuple(SourceConfig(path="x", weight=weight) for weight in (3.0, 1.0))
    data = DataConfig(sources=given, phases=(PhaseConfig(from_step=5, weights=(0.0, 1.0)),))
    rows = 2 * ranks * config.train.grad_accum_steps
    mixture = MixedData(sources, phases_of(data, [1, 1], 0), batch_size=2 * ranks, rows_per_step=rows)
    trainer = BigramTrainer(config)
    run_training(config, trainer, mixture)
    return trainer


def test_a_run_goes_on_in_its_mixture_on_any_number_of_ranks(tmp_path: Path) -> None:
    """No file but the checkpoint tells where it was."""
    for ranks, steps in ((2, 3), (4, 6)):
        run_on(ranks, tmp_path / "moved", steps)
    moved, stayed = run_on(1, tmp_path / "moved", 9, accumulated=1), run_on(2, tmp_path / "stayed", 9)
    np.testing.assert_allclose(moved.table, stayed.table, rtol=0, atol=1e-5)


# Jobs


def job(folder: Path, *overrides: str) -> Any:
    (folder / "a.txt").write_text("a" * 3000)
    (folder / "b").mkdir(exist_ok=True)
    (folder / "b" / "b.jsonl").write_text("".join(json.dumps({"body": "b" * 40}) + "\n" for _ in range(40)))
    sources = f'[{{path = "{folder}/a.txt", weight = 3}}, {{path = "{folder}/b", text_field = "body", weight = 1}}]'
    small = ["--train.seq_len=16", "--train.batch_size=4", f"--data.sources={sources}"]
    return load_config("debug", [*small, *overrides])


def test_a_job_mixes_its_sources(tmp_path: Path) -> None:
    data = open_data(job(tmp_path, "--data.phases=[{from_step = 10, weights = [0, 1]}]"))
    assert isinstance(data, MixedData)
    letters = [chr(int(np.median(row))) for k in range(12) for row in data.batch(k)["tokens"]]
    assert (letters[:40].count("a"), letters[40:]) == (29, ["b"] * 8)
    heldout = data.heldout()
    assert {chr(int(np.median(batch["tokens"][0]))) for batch in heldout} == {"a", "b"}
    unweighted = job(tmp_path).data
    unweighted = unweighted.replace(sources=tuple(source.replace(weight=None) for source in unweighted.sources))
    assert arcs([178, 106], 1.0) == phases_of(unweighted, [178, 106], 0)[0].ends


def test_text_and_conversations_mix(tmp_path: Path) -> None:
    """Of a model with experts conversations mark their padding: then all rows of a batch do."""
    tokenizer = tokenizer_folder(tmp_path / "tokenizer", TEMPLATES["plain"]) if "plain" in TEMPLATES else None
    tokenizer = tokenizer or tokenizer_folder(tmp_path / "tokenizer", next(iter(TEMPLATES.values())))
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}] * 4
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text.txt").write_text("hello world " * 200)
    paths = ", ".join(f'{{path = "{tmp_path / name}", weight = 1}}' for name in ("chats.jsonl", "text.txt"))
    flags = [
        f"--data.sources=[{paths}]",
        f"--data.tokenizer={tokenizer}",
        "--train.seq_len=32",
        "--model.vocab_size=400",
    ]
    data = open_data(load_config("debug", [*flags, "--model.num_experts=4", "--train.batch_size=6"]))
    batch = data.batch(0)
    assert set(batch) == {"tokens", "labels", "text_mask"}
    assert 0 < batch["text_mask"].all(axis=1).sum() < 6
    assert {frozenset(held) for held in data.heldout()} == {frozenset(batch)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"path": "x"}, "data.path = 'x': must be empty beside data.sources"),
        ({"sources": "[]", "phases": "[{from_step = 1, weights = []}]"}, "data.phases = 1 phases: need data.sources"),
        ({"sources": '[{path = "a", weight = 0}]'}, "data.sources = every weight is 0: one of them must be above 0"),
        ({"sources": '[{path = ""}]'}, "data.sources = a source with path '': must be a folder or file"),
        ({"sources": '[{path = "a", weight = -1}]'}, "data.sources.0.weight = -1: must be greater than or equal to 0"),
        ({"phases": "[{from_step = 0, weights = [1, 1]}]"}, "data.phases.0.from_step = 0: must be greater than 0"),
        ({"phases": "[{from_step = 5, weights = [1]}]"}, "data.phases = weights of [1.0]: must be a number for each"),
        ({"phases": "[{from_step = 5, weights = [0, 0]}]"}, "data.phases = weights of [0.0, 0.0]: must be a number"),
        (
            {"phases": "[{from_step = 5, weights = [1, 1]}, {from_step = 5, weights = [1, 1]}]"},
            "data.phases = from_step of [5, 5]: must increase from each phase to the next",
        ),
    ],
)  # fmt: skip
def test_a_mixture_that_means_nothing_is_refused(changes: dict[str, str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        job(tmp_path, *(f"--data.{name}={value}" for name, value in changes.items()))
    assert any(line.startswith(said) for line in caught.value.problems), caught.value.problems


def test_a_vision_language_model_has_one_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.sources = 1 sources: must be empty with a \[vlm\] section"):
        load_config("debug_vlm_mot", ['--data.sources=[{path = "a"}]'])


@pytest.mark.skipif(settings.get_current_profile_name() != "nightly", reason="compiles")
def test_a_run_changes_backend_within_its_mixture(tmp_path: Path) -> None:
    """The losses of six steps, with other weights from step 3 on, are those of PyTorch alone."""
    small = ("dim=16", "n_layers=1", "n_heads=2", "n_kv_heads=1", "ffn_hidden_dim=24", "max_seq_len=16")
    config = job(tmp_path, *(f"--model.{size}" for size in small), "--data.phases=[{from_step = 3, weights = [1, 4]}]")
    config = config.replace(eval=config.eval.replace(steps=1, interval=0), optimizer=config.optimizer.replace(lr=0.01))
    losses = []
    for folder, parts in ("alone", [("torch", 6)]), ("both", [("torch", 2), ("jax", 4), ("torch", 6)]):
        for backend, steps in parts:
            module = importlib.import_module(f"kempnerforge_{backend}.training.train")
            train = config.train.replace(max_steps=steps, compile_model=False, mixed_precision="fp32")
            place = config.checkpoint.replace(dir=str(tmp_path / folder), interval=2)
            scheduler = config.scheduler.replace(name="constant", warmup_steps=0, decay_steps=None)
            module.train(config.replace(train=train, checkpoint=place, scheduler=scheduler), device="cpu")
        losses.append([record["loss"] for record in read_metrics(tmp_path / folder / "metrics.jsonl")])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert len(losses[0]) == 6
