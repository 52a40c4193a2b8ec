"""Annotations of arrays: every public signature of the backends has them, twins have the same, and they are true of
what functions take and give when they are called (see `tests.array_types`).
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from hypothesis import settings

from tests import array_types
from tests.cli.processes import run_python
from tests.test_twins import BACKENDS, common_files, files_of, path_of

KINDS = {"Float", "Int", "Integer", "Bool", "Num", "Shaped"}
ARRAYS = {"Tensor", "torch.Tensor", "Array", "jax.Array"}

WITHOUT_SHAPE = {
    "jax: model/module.py: named_variables()": "variables, which hold arrays",
}
"""Public signatures that name arrays without shape and dtype, with the reason."""

DIFFERENCES = {
    "model/balancing.py": {"balance(progress)": "jax: an argument of a compiled step"},
    "model/experts.py": dict.fromkeys(
        ("apply_packed(up_w)", "apply_packed(down_w)", "apply_packed(gate_w)"),
        "torch: on a CPU one matrix per expert, where it is",
    ),
    "model/fused.py": dict.fromkeys(("fused_attention(k)", "fused_attention(v)"), "jax: as many keys as queries"),
    "model/generate.py": dict.fromkeys(("generate(seed)", "stream(seed)"), "jax: a key is an array"),
    "model/grouped.py": dict.fromkeys(
        ("grouped_matmul(w_EDF)", "looped_matmul(w_EDF)"), "torch: on a CPU one matrix per group, where it is"
    ),
    "model/linear.py": {"Linear.factors(x)": "torch: of which a rank may have a part, and is given the whole"},
    "model/mask.py": dict.fromkeys(("part(query)", "part(key)"), "jax: numbers of a loop within a program"),
    "model/noise.py": {
        "mix(x)": "torch: of integers of Python too, whose hash is one",
        "mix()": "torch: of integers of Python too, whose hash is one",
        **dict.fromkeys(
            ("fold(index)", "routing_bits(layer)", "gumbel_noise(layer)"), "jax: whatever becomes an array"
        ),
    },
    "model/router.py": dict.fromkeys(
        ("SigmoidTopKRouter.update_bias(progress)", "updated_bias(rate)"), "jax: arguments of a compiled step"
    ),
    "model/sampling.py": dict.fromkeys(
        ("draw(temperature)", "draw(top_k)", "draw(top_p)"), "jax: arguments of a compiled step"
    ),
    "optimizer_states.py": {"optimizer_state(parameters)": "jax: a tree of arrays"},
    "statistics.py": dict.fromkeys(
        ("moments()", "reduced()"), "jax: the halves of numbers, as programs without 64 bits put them out"
    ),
    "training/averaging.py": {"evaluated_weights(parameters)": "jax: name of a type"},
    "training/sampling.py": {"Writer.parameters()": "jax: name of a type"},
    "training/optimizer.py": {
        "build_optimizer(parameters)": "jax: shapes will do",
        "set_optimizer_state(state)": "jax: what is filled, torch: what it is filled with",
        **dict.fromkeys(("clip_by_global_norm(gradients)", "get_optimizer_state()"), "jax: name of a type"),
        "clip_by_global_norm()": "jax: name of a type",
    },
}
"""By file, whose arrays twins describe in another way, with the reason."""

CALLS = {
    "parity/test_head.py": ["test_the_loss_is_that_of_the_whole", "test_who_captures_logits_gets_them_whole"],
    "parity/test_optimizer_states.py": ["test_pairs_of_trainers_keep_the_same"],
    "parity/test_optimizers.py": [
        "test_a_few_steps_are_those_of_the_papers",
        "test_the_average_is_evaluated_and_read_from_checkpoints[schedule_free_adamw]",
    ],
    "parity/test_statistics.py": [
        "test_moments_are_the_same_on_every_device",
        "test_statistics_of_both_backends_are_compared",
    ],
    "torch/test_devices.py": ["test_caches_make_everything_on_their_device"],
    "torch/test_generate.py": [
        "test_the_mode_is_restored_after_an_error",
        "test_a_step_changes_static_caches_where_they_are",
        "test_a_step_is_run_then_recorded_and_replayed_from_there_on",
        "test_generation_leaves_the_model_as_it_was",
    ],
    "torch/test_hooks.py": ["test_an_output_can_be_replaced_for_what_follows"],
    "torch/test_model.py": [
        "test_attention_weights_are_captured_on_the_host",
        "test_cut_makes_room_again",
        "test_share_is_the_same_memory",
    ],
    "torch/test_moe.py": ["test_getters_show_the_last_forward"],
    "torch/test_training.py": [
        "TestLoss::test_without_labels_it_is_0_with_gradient_0",
        "TestOptimizer::test_state_that_does_not_fit_is_refused_whole",
        "TestStep::test_without_labels_nothing_moves_but_by_decay",
        "TestStep::test_gates_stay_in_float32_under_bfloat16",
    ],
    "torch/test_vlm.py": [
        "test_activations_of_every_part_have_names",
        "test_an_absent_modality_still_gets_gradients",
        "test_counts_of_the_last_forward",
    ],
    "jax/test_generate.py": ["test_models_of_any_dtype[float32]", "test_a_step_takes_the_memory_of_the_caches"],
    "jax/test_hooks.py": ["test_an_output_can_be_replaced_for_what_follows"],
    "jax/test_model.py": [
        "test_dense_getters",
        "test_numpy_round_trip_keeps_every_bit",
        "test_share_is_the_same_memory",
    ],
    "jax/test_moe.py": [
        "test_a_fresh_layer_has_no_losses",
        "test_blocks_of_rows_are_all_rows",
        "test_products_are_those_of_the_platform",
        "test_progress_may_be_traced",
    ],
    "jax/test_scan.py": [
        "test_layers_of_one_structure_share_a_program[joint_decoder]",
        "test_what_is_computed_again_is_not_merged_with_what_was",
    ],
    "jax/test_training.py": [
        "TestLoss::test_label_outside_the_vocabulary_gives_nan",
        "TestState::test_optimizer_state_must_be_whole",
        "TestState::test_state_is_a_copy",
    ],
    "jax/test_vlm.py": [
        "test_abstract_models_are_initialised_throughout[cross_attention]",
        "test_abstract_models_are_initialised_throughout[moma]",
        "test_abstract_models_are_initialised_throughout[mot_experts]",
        "test_capture_inside_jit_names_every_part",
        "test_one_jit_serves_every_order_of_modalities[mot]",
    ],
    "parity/test_documented_calls.py": [
        "test_a_block_gives_a_tensor_and_run_its_stats_too[3-torch]",
        "test_a_block_of_streams_starts_as_the_identity[torch]",
        "test_a_strategy_of_a_user_is_a_subclass_and_a_name[torch]",
        "test_a_window_may_be_given_with_a_call[AttentionalPoolAdapter-torch]",
        "test_experts_of_a_modality_see_its_tokens_alone[torch]",
        "test_one_integer_stands_for_a_list_of_one[torch]",
        "test_rows_that_are_sorted_by_expert_are_multiplied_in_groups[relu-counts1-torch]",
        "test_rows_that_are_sorted_by_expert_are_multiplied_in_groups[relu-counts1-jax]",
        "test_strategies_prepare_pixels_for_the_transformer[cross_attention-torch]",
    ],
    "parity/test_recorders.py": [
        "test_containers_repeated_calls_and_integers",
        "test_names_are_seen_within_scans_jitted_and_rematerialised_parts_and_change_nothing",
    ],
    "parity/test_lora.py": [
        "test_steps_are_those_of_the_formulas[torch]",
        "test_steps_are_those_of_the_formulas[jax]",
    ],
    "parity/test_fp8.py": [
        "test_fp8_is_as_the_contract_says[check_products-torch]",
        "test_fp8_is_as_the_contract_says[check_linear-torch]",
        "test_fp8_is_as_the_contract_says[check_linear-jax]",
    ],
}
"""By file, tests that are cheap and call nearly all functions with arrays."""

LEFT_OUT = (
    "tests/parity/test_documented_calls.py::test_the_router_of_each_modality_is_balanced_by_its_own_counts",
    "tests/parity/test_fp8.py::test_planted_bugs_are_found",
    "tests/parity/test_held_states.py::test_counts_are_added_in_new_dicts",
    "tests/parity/test_int8.py::test_planted_bugs_are_found",
    "tests/parity/test_names.py::test_what_names_nothing_is_refused_wherever_it_is_given",
    "tests/parity/test_semantics.py::test_a_step_has_the_mean_over_the_labels_of_all_micro_batches",
    "tests/parity/test_semantics.py::test_the_first_update_has_the_first_rate_of_the_warm_up",
)
"""Tests that give something else in place of arrays, or ids that are refused further within, or that import the
backends anew.
"""

PLANTED = ("mutants", "kernels", "precision", "length_mutants", "fact_mutants", "layer_bugs", "states")
"""Files of tests/parity that import the backends anew."""

NIGHTLY = settings.get_current_profile_name() == "nightly"


def test_public_arrays_say_their_shapes() -> None:
    found = {
        f"{backend}: {file}: {name}"
        for backend in BACKENDS
        for file in files_of(backend) | files_of(backend, engines=True)
        for name, annotation in annotations_of(path_of(backend, file)).items()
        if is_bare(annotation)
    }
    assert found == set(WITHOUT_SHAPE)


def test_twins_say_the_same_of_their_arrays() -> None:
    compared = 0
    for file in common_files():
        torch_own, jax_own = (annotations_of(path_of(backend, file)) for backend in BACKENDS)
        pairs = {name: (arrays_of(torch_own[name]), arrays_of(jax_own[name])) for name in torch_own if name in jax_own}
        differ = {name for name, (in_torch, in_jax) in pairs.items() if in_torch != in_jax}
        assert differ == set(DIFFERENCES.get(file, {})), f"{file}: arrays differ, or are listed and do not"
        compared += sum(bool(in_torch) for in_torch, _ in pairs.values())
    assert compared > 300


def arrays_of(annotation: str) -> set[str]:
    """The arrays of an annotation, in either backend's words."""
    nodes = ast.walk(ast.parse(annotation, mode="eval"))
    return {ast.unparse(node).replace("Tensor", "Array") for node in nodes if _has_shape(node)}


def is_bare(annotation: str) -> bool:
    """Whether an annotation names arrays without shape and dtype."""
    return any(ast.unparse(node) in ARRAYS for node in _outside_shapes(ast.parse(annotation, mode="eval")))


def _outside_shapes(node: ast.AST) -> Iterator[ast.AST]:
    if not _has_shape(node):
        yield node
        for child in ast.iter_child_nodes(node):
            yield from _outside_shapes(child)


def _has_shape(node: ast.AST) -> bool:
    return isinstance(node, ast.Subscript) and ast.unparse(node.value) in KINDS


def annotations_of(path: Path) -> dict[str, str]:
    """Annotations of public arguments, results and fields of a file, and its aliases of types, as source text."""
    return dict(_annotations(ast.parse(path.read_text(encoding="utf-8")), ""))


def _is_public(name: str) -> bool:
    return not name.startswith("_") or name in {"__init__", "__call__"}


def _annotations(owner: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, str]]:
    for node in owner.body:
        if isinstance(node, ast.ClassDef) and _is_public(node.name):
            yield from _annotations(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef) and _is_public(node.name):
            yield from _signature(node, prefix + node.name)
        elif isinstance(node, ast.AnnAssign) and _is_public(ast.unparse(node.target)):
            yield prefix + ast.unparse(node.target), ast.unparse(node.annotation)
        elif isinstance(node, ast.Assign) and _is_public(ast.unparse(node.targets[0])):
            yield prefix + ast.unparse(node.targets[0]), ast.unparse(node.value)


def _signature(node: ast.FunctionDef, name: str) -> Iterator[tuple[str, str]]:
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
    for argument in every:
        if argument is not None and argument.annotation is not None:
            yield f"{name}({argument.arg})", ast.unparse(argument.annotation)
    if node.returns is not None:
        yield f"{name}()", ast.unparse(node.returns)


def test_calls_take_and_give_what_signatures_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a sample of tests; HYPOTHESIS_PROFILE=nightly: in all of the backends, with as many draws as by day."""
    monkeypatch.setenv("HYPOTHESIS_PROFILE", "ci")
    tests = [f"tests/{file}::{name}" for file, names in CALLS.items() for name in names]
    if NIGHTLY:
        tests = ["tests/torch", "tests/jax", "tests/parity"]
        tests += [f"--ignore=tests/parity/test_{name}.py" for name in PLANTED]
        tests += [f"--deselect={test}" for test in LEFT_OUT]
    options = ("-p", "tests.array_types", "-n", "0", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'child'}")
    ended = run_python("-m", "pytest", *options, *tests, timeout=7200)
    assert ended.returncode == 0, ended.stdout[-4000:]
    found = re.search(r"annotated functions entered: (\d+) of (\d+)", ended.stdout)
    assert found is not None, ended.stdout[-4000:]
    assert int(found[1]) > 0.75 * int(found[2]), ended.stdout[-8000:]


def test_an_array_without_shape_is_seen(tmp_path: Path) -> None:
    source = """
def f(x: Tensor, y: dict[str, Float[Tensor, "S D"]], *rest: jax.Array | None) -> tuple[Int[Array, ""], Array]: ...
def _g(x: Tensor): ...
class A:
    z: torch.Tensor | None
    def h(self, k: Callable[[Bool[Tensor, "B"]], Tensor], n: int) -> Shaped[Tensor, "..."]: ...
"""
    (tmp_path / "one.py").write_text(source)
    found = annotations_of(tmp_path / "one.py")
    assert {name for name, text in found.items() if is_bare(text)} == {"f(x)", "f(rest)", "f()", "A.z", "A.h(k)"}
    assert {name for name, text in found.items() if arrays_of(text)} == {"f(y)", "f()", "A.h(k)", "A.h()"}
    assert arrays_of('dict[str, Float[Tensor, "S"]]') == arrays_of('list[Float[Array, "S"]]') != arrays_of("int")


def checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> Any:
    """A module of this source in the package of PyTorch, loaded as ``-p tests.array_types`` loads all of them."""
    (tmp_path / "planted.py").write_text(source, encoding="utf-8")
    name = "kempnerforge_torch.planted"
    loader = array_types.CheckingLoader(name, str(tmp_path / "planted.py"))
    spec = importlib.util.spec_from_file_location(name, tmp_path / "planted.py", loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    loader.exec_module(module)
    return module


MODULE = """
from __future__ import annotations
from typing import NamedTuple
from jaxtyping import Float, Integer
from torch import Tensor

class Pair(NamedTuple):
    x: Float[Tensor, "B D"]
    y: Float[Tensor, "B"]

def product(x: Float[Tensor, "B D"], y: Float[Tensor, "D F"]) -> Float[Tensor, "B F"]:
    return x @ y if len(x) > 1 else (x @ y)[0]

def rows(x: Float[Tensor, "B D"], ids: Integer[Tensor, "R"]) -> dict[str, Float[Tensor, "R D"]]:
    if ids.ndim != 1:
        raise ValueError(f"ids.shape = {tuple(ids.shape)}: must be (rows,)")
    return {"rows": x[ids.long()]}

def pair(x: Float[Tensor, "B D"], size: int) -> Pair:
    return Pair(x, x.new_zeros(size))
"""


def test_what_is_not_as_annotated_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = checked(tmp_path, monkeypatch, MODULE)
    x, y = torch.ones(2, 3), torch.ones(3, 4)
    assert module.product(x, y).shape == (2, 4)
    assert module.pair(x, 2).y.shape == (2,)
    with pytest.raises(array_types.ArrayArgumentError, match=r"product.* parameter y"):
        module.product(x, torch.ones(3))
    with pytest.raises(array_types.ArrayArgumentError, match=r"rows.* parameter ids"):
        module.rows(x, torch.ones(2))
    with pytest.raises(ValueError, match=re.escape("ids.shape = (1, 2): must be (rows,)")):
        module.rows(x, torch.zeros(1, 2, dtype=torch.int64))
    for wrong in (lambda: module.product(torch.ones(1, 3), y), lambda: module.pair(x, 3)):
        with pytest.raises(BeartypeCallHintViolation):
            wrong()
    assert {"product", "rows", "pair"} <= {name.rpartition(".")[2] for name in array_types.entered}


def test_a_wrong_annotation_of_a_backend_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = path_of("torch", "model/position.py").read_text(encoding="utf-8")
    x, angles = torch.ones(2, 3, 5, 8), torch.ones(5, 4)
    assert checked(tmp_path, monkeypatch, source).apply_rope(x, angles, angles).shape == x.shape
    wrong = source.replace('sin: Float[Tensor, "... h//2"]', 'sin: Float[Tensor, "... h"]')
    assert wrong != source
    with pytest.raises(array_types.ArrayArgumentError, match=r"apply_rope.* parameter sin"):
        checked(tmp_path, monkeypatch, wrong).apply_rope(x, angles, angles)
