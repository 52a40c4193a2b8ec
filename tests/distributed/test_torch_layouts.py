"""PyTorch in each layout does what it does on one device: the same losses, gradients, steps, counts of experts and
biases, in float64 to rounding; replicas have the same bits.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import settings

from kempnerforge_torch.distributed import fsdp, parallelize, tensor_parallel
from shared_config.contract.parameters import parameter_table
from shared_config.contract.sharding import Layout
from shared_config.errors import ConfigError
from tests.distributed.layouts import Case, run_processes
from tests.jobs import EXPERTS, tiny_job
from tests.mutants_distributed import ADAPTED, DISTRIBUTED_MUTANTS, FROZEN, LATER, LORA, MUON, SCHEDULE_FREE

NIGHTLY = settings.get_current_profile_name() == "nightly"
NOISE = {"vlm": {"moma_gumbel_noise": "true"}}
SKIPPING, RECOMPUTED = {"train": {"on_nonfinite": "skip"}}, {"train": {"activation_checkpointing": "full"}}
DOCUMENTS = {"data": {"pack_documents": True}, **RECOMPUTED}
COMPILED = {"train": {"compile_model": True}}
COMPUTED_AGAIN = {"train": {"compile_model": True, "activation_checkpointing": "selective"}}
WINDOW = {"model": {"sliding_window": 3}}
OVERFLOWING = {**SKIPPING, "model": {"embedding_scale": 2.5, "tie_embeddings": False}}
BY_DAY = (
    Case("softmax", 2, {}),
    ADAPTED,
    Case("moma", 2, {}, NOISE),
    Case("sigmoid", 2, {"tp": 2}, RECOMPUTED),
    Case("dense", 4, {"tp": 2}, MUON),
    Case("sigmoid", 2, {"cp": 2}, {**DOCUMENTS, "model": {"max_seq_len": 10}}),
    Case("sigmoid", 4, {"ep": 2, "tp": 2}),
    Case("scaled", 2, {"ep": 2}),
    Case("staged", 2, {"pp": 2}, DOCUMENTS),
    Case("softmax", 2, {"ep": 2}, OVERFLOWING, overflows=True),
)
BY_NIGHT = (
    Case("limited", 4, {"ep": 2, "dp_replicate": 2}),
    Case("staged", 4, {"pp": 2, "tp": 2}),
    Case("mot", 2, {"tp": 2}),
    Case("dense", 2, {}, SKIPPING),
    Case("dense", 4, {"dp_replicate": 2}, {**LORA, **RECOMPUTED}),
    Case("dense", 2, {"cp": 2}, LORA),
    Case("softmax", 2, {"ep": 2}, LORA),
    *(Case(model, 2, {"ep": 2}, exchanges=True) for model in ("sigmoid", "limited", "scaled")),
    Case("sigmoid", 4, {"ep": 2, "tp": 2}, exchanges=True),
    Case("softmax", 2, {"ep": 2}, DOCUMENTS),
    Case("softmax", 4, {"ep": 4}, {"model": {"num_experts": 8, "moe_top_k": 3}}),
    Case("limited", 4, {"ep": 4}, {"model": {"moe_capacity_factor": 1.3}}),
    Case("dense", 4, {"tp": 2}),
    *(Case(model, 2, {}, options) for model in ("dense", "sigmoid") for options in (MUON, SCHEDULE_FREE)),
    Case("sigmoid", 4, {"ep": 2, "tp": 2}, MUON),
    Case("dense", 2, {"cp": 2}, MUON),
    Case("staged", 2, {"pp": 2}, MUON),
    *(Case(model, 2, {}) for model in ("dense", "sigmoid", "limited", "apart")),
    Case("joint_decoder", 2, {}, {"vlm": {"freeze": FROZEN, "freeze_schedule": LATER}}),
    Case("sigmoid", 4, {"dp_replicate": 2}),
    Case("dense", 4, {"cp": 2, "tp": 2}, {**WINDOW, "train": {"seq_len": 12}}),
    *(Case(model, 2, {"tp": 2}) for model in ("dense", "mixed", "sigmoid", "limited", "apart", "scaled")),
    Case("mixed", 2, {"cp": 2}, DOCUMENTS),
    *(Case(model, 2, {"tp": 2}) for model in ("cross_attention", "joint_decoder")),
    Case("dense", 2, {"tp": 2}, {"train": {"seq_len": 9}}),
    Case("softmax", 2, {"tp": 2}, DOCUMENTS),
    Case("dense", 2, {"tp": 2}, {**DOCUMENTS, **WINDOW}),
    *(Case(model, 2, {"tp": 2}, COMPILED) for model in ("dense", "sigmoid")),
    *(Case("sigmoid", ranks, {"ep": 2}, COMPILED) for ranks in (2, 4)),
    *(Case("dense", 2, layout, COMPUTED_AGAIN) for layout in ({}, {"tp": 2})),
    Case("dense", 2, {"tp": 2}, {"train": {"activation_checkpointing": "selective"}}),
    Case("dense", 4, {"tp": 4}, {"train": {"seq_len": 12}}),
    Case("softmax", 4, {"tp": 2}, DOCUMENTS),
    Case("sigmoid", 4, {"cp": 2, "tp": 2}, {"train": {"seq_len": 12}, "data": {"pack_documents": True}}),
    *(Case(model, 2, {"ep": 2}) for model in ("sigmoid", "limited")),
    Case("moma", 2, {"tp": 2}, NOISE),
    *(Case("dense", 4, {}, options) for options in ({}, {"model": {"vocab_size": 3, "dim": 9}})),
    Case("sigmoid", 4, {"ep": 2}),
    Case("dense", 4, {"tp": 2, "dp_replicate": 2}),
    *(Case(model, 2, {"cp": 2}) for model in ("dense", "softmax", "scaled", "apart")),
    Case("dense", 2, {"cp": 2}, {**DOCUMENTS, **WINDOW}),
    Case("sigmoid", 2, {"cp": 2}, COMPILED),
    Case("dense", 4, {"cp": 2}, DOCUMENTS),
    Case("dense", 4, {"cp": 4}, {"train": {"seq_len": 12}}),
    Case("sigmoid", 4, {"cp": 2, "ep": 2}, WINDOW),
    Case("sigmoid", 4, {"cp": 2, "dp_replicate": 2}),
    Case("staged", 2, {"pp": 2}, {**WINDOW, **SKIPPING}),
    Case("staged", 4, {"pp": 4}),
    Case("staged", 4, {"pp": 2}, DOCUMENTS),
    Case("staged", 4, {"pp": 2, "cp": 2}, DOCUMENTS),
    Case("staged", 4, {"pp": 2, "dp_replicate": 2}),
    *(Case("dense", 2, layout, OVERFLOWING, overflows=True) for layout in ({}, {"cp": 2}, {"dp_replicate": 2})),
    Case("dense", 2, {}, {**OVERFLOWING, "optimizer": {"name": "muon"}}, overflows=True),
    Case("sigmoid", 2, {"tp": 2}, OVERFLOWING, overflows=True),
    *(Case("staged", ranks, {"pp": 2}, OVERFLOWING, overflows=True) for ranks in (2, 4)),
)
CASES = (*BY_DAY, *BY_NIGHT) if NIGHTLY else BY_DAY
MUTANTS = DISTRIBUTED_MUTANTS if NIGHTLY else DISTRIBUTED_MUTANTS[::6]

REFUSED = (
    (Case("dense", 2, {"tp": 2}, {"model": {"n_heads": 3, "n_kv_heads": 3}}),
     "distributed.tp = 2: must divide model.n_heads = 3 and model.n_kv_heads = 3"),
    (Case("dense", 2, {"ep": 2}), "distributed.ep = 2: must divide model.num_experts = 0"),
    (Case("apart", 2, {"ep": 2}), "model.moe_packed_experts = False: must be True for distributed.ep = 2"),
    (Case("limited", 2, {"cp": 2}), "model.moe_capacity_factor = 0.6: must be 0 for distributed.cp = 2"),
    (Case("moma", 2, {"cp": 2}), "distributed.cp = 2: must be 1 for vlm.arch = 'moma'"),
    (Case("dense", 2, {"tp": 2}, LORA),
     "distributed.tp = 2: must be 1 with a [lora] section, as an adapter's matrices are not split by heads or widths"),
    (Case("dense", 2, {"pp": 2}), "model.tie_embeddings = True: must be False for distributed.pp = 2"),
    (Case("softmax", 2, {"pp": 2}), "distributed.pp = 2: must be 1 for model.num_experts = 4"),
    (Case("staged", 2, {"pp": 2}, {"train": {"grad_accum_steps": 1}}),
     "train.grad_accum_steps = 1: must be at least distributed.pp = 2"),
    (Case("mot", 2, {"tp": 2}, {"vision_encoder": {"n_heads": 3}}),
     "distributed.tp = 2: must divide vision_encoder.n_heads = 3 for backend torch"),
    (Case("dense", 2, {"dp_shard": 4}),
     "distributed.dp_shard = 4: dp_replicate 1 * dp_shard 4 * cp 1 * tp 1 * pp 1 = 4 must equal the world size 2"),
)  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What differs in every case and under every mutant."""
    every: dict[str, list[str]] = {}
    for ranks in (2, 4):
        cases = [case for case in CASES if case.ranks == ranks]
        bugs = [(mutant, case) for mutant, case in MUTANTS if isinstance(case, Case)]
        mutants = [(mutant, case) for mutant, case in bugs if case.ranks == ranks]
        refused = [case for case, _ in REFUSED if case.ranks == ranks]
        every |= run_processes(tmp_path_factory.mktemp(f"of_{ranks}"), ranks, cases, mutants, refused)
    return every


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_layout_is_one_device(case: Case, found: dict[str, list[str]]) -> None:
    """Some of them, all under HYPOTHESIS_PROFILE=nightly."""
    assert found[str(case)] == []


@pytest.mark.parametrize("mutant", [str(mutant) for mutant, _ in MUTANTS])
def test_a_bug_of_a_layout_is_seen(mutant: str, found: dict[str, list[str]]) -> None:
    """A sixth of them, all under HYPOTHESIS_PROFILE=nightly."""
    assert found[mutant] != []


@pytest.mark.parametrize(("case", "said"), REFUSED, ids=[str(case) for case, _ in REFUSED])
def test_a_layout_that_can_not_be_is_refused(case: Case, said: str, found: dict[str, list[str]]) -> None:
    assert found[str(case)]
    assert [line.partition(": ")[2] for line in found[str(case)] if said in line] == [said] * case.ranks


@pytest.mark.parametrize(("dim", "place"), [(9, 1), (10, None)])
def test_ranks_with_the_same_experts_must_divide_an_axis_of_these(dim: int, place: int | None) -> None:
    mesh: Any = SimpleNamespace(layout=Layout(dp_shard=3, ep=2))
    table = parameter_table(tiny_job({**EXPERTS, "num_experts": 4, "moe_frequency": 1, "dim": dim}).model)
    if place is not None:
        assert fsdp.fsdp_place("layers.0.mlp.gate_w", mesh, table) == place
        return
    with pytest.raises(ConfigError) as refusal:
        fsdp.fsdp_place("layers.0.mlp.gate_w", mesh, table)
    said = "3 ranks hold the same experts, which must divide an axis of layers.0.mlp.gate_w (4, 10, 32)"
    assert str(refusal.value) == f"distributed.ep = 2: {said}"


@pytest.mark.parametrize("name", ["n_heads", "n_kv_heads"])
def test_heads_that_only_a_module_knows_are_checked(name: str) -> None:
    """As those of an encoder that is read from a folder."""
    tower: Any = torch.nn.Module()
    setattr(tower, name, 3)
    with pytest.raises(ConfigError, match=rf"distributed\.tp = 2: must divide tower\.{name} = 3"):
        tensor_parallel._check_heads("tower", tower, 2)


@pytest.mark.parametrize("mode", ["none", "narrow", "selective", "full"])
@pytest.mark.parametrize("sizes", [{}, {"dp_shard": 4}, {"ep": 2}, {"tp": 2}, {"cp": 2}, {"pp": 2}], ids=str)
def test_blocks_that_are_computed_again_are_compiled_where_they_hold_no_collectives(
    sizes: dict[str, int], mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_job(train={"activation_checkpointing": mode})
    mesh: Any = SimpleNamespace(layout=Layout(**sizes))
    split = [axis for axis in ("ep", "tp", "cp") if axis in sizes]
    assert parallelize._can_compile(config, mesh) is (mode == "none" or not split)
    assert parallelize._can_compile(config, None)
    said = [f"distributed.{axis} splits are not compiled" in caplog.text for axis in split]
    assert said == [mode != "none" for _ in split]
    assert split or not caplog.text
