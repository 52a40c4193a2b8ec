"""Set up for every test process, before torch or jax are imported: threads, compilation cache, Hypothesis profiles."""

from __future__ import annotations

import gc
import os
import sys
import zlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] != "cpu":  # accelerators by themselves round the factors of float32 products
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # to read a program takes half the time
torn_entry_is_a_miss = "ignore:Error reading persistent compilation cache entry"  # it is compiled again
os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), torn_entry_is_a_miss]))
quick_compilation = "--xla_backend_optimization_level=0"  # compiling is most of what JAX does here
if version("jaxlib").startswith("0.10."):  # others abort at the sight of it
    quick_compilation += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("XLA_FLAGS", quick_compilation)

HALF = (
    "tests/jax/test_export.py::test_forward_and_gradient_export_for_every_platform",
    "tests/jax/test_scan.py::test_presets_that_ask_for_scans_get_them",
    "tests/jax/test_wrappers.py::test_wrapped_models_do_what_plain_ones_do",
    "tests/parity/test_capacity.py::test_a_correct_model_decodes_as_its_forward_whatever_its_capacity",
    "tests/parity/test_decode.py::test_any_chunking_is_the_full_forward_and_the_oracle",
    "tests/parity/test_depth.py::test_deep_architectures",
    "tests/parity/test_differences.py::test_differences_are_what_they_are_said_to_be",
    "tests/parity/test_false_alarms.py::test_a_bug_in_a_part_of_a_tensor_is_found",
    "tests/parity/test_foreign_weights.py::test_weights_load_by_name_and_mean_the_same",
    "tests/parity/test_frames.py::test_absent_frames_are_masked_where_they_stand",
    "tests/parity/test_generate.py::test_images_are_seen_as_in_the_full_forward",
    "tests/parity/test_layer_bugs.py::test_a_wrong_layer_is_named_first_and_alone",
    "tests/parity/test_lengths.py::test_sizes_around_the_edges_of_tiles",
    "tests/parity/test_names.py::test_what_names_nothing_is_refused_wherever_it_is_given",
    "tests/parity/test_padding.py::test_a_row_does_not_depend_on_the_padding_of_its_neighbours",
    "tests/parity/test_padding.py::test_representations_do_not_depend_on_padding",
    "tests/parity/test_padding.py::test_the_content_of_padding_never_matters",
    "tests/parity/test_registration.py::test_a_training_step_is_the_same_step",
    "tests/parity/test_registration.py::test_functions_and_gradients_agree",
    "tests/parity/test_results.py::test_run_keeps_nothing_and_a_documented_call_what_getters_show",
    "tests/parity/test_stages.py::test_two_stages_are_the_whole_model",
    "tests/parity/test_states.py::test_forward_and_gradients",
    "tests/parity/test_trainer_states.py::test_both_trainers_do_the_same",
    "tests/parity/test_vlm.py::test_models",
    "tests/torch/test_function_fields.py::test_fields_that_count_as_the_same_function_keep_it",
    "tests/torch/test_vlm.py::test_compiles_without_graph_breaks",
)
"""Tests of which each second case runs by day, as a hash of its name has it; all under HYPOTHESIS_PROFILE=nightly, and
when tests are asked for by name.
"""
LONGEST = ("test_every_mutant_is_killed_and_the_unchanged", "test_calls_take_and_give_what_signatures_say")

slow_is_fine = (HealthCheck.too_slow, HealthCheck.data_too_large)
settings.register_profile("dev", max_examples=10, deadline=None, suppress_health_check=slow_is_fine)
settings.register_profile("ci", max_examples=20, deadline=None, derandomize=True, suppress_health_check=slow_is_fine)
settings.register_profile(
    "nightly", max_examples=200, deadline=None, print_blob=True, suppress_health_check=slow_is_fine
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True, scope="module")
def _programs_of_few_modules_at_a_time() -> Iterator[None]:
    yield
    if "jax" in sys.modules and crowded():
        sys.modules["jax"].clear_caches()
        gc.collect()


def crowded() -> bool:
    """Whether JAX has to forget what it compiled: a process may map 65,530 pieces of memory, and dies of one more."""
    try:
        pieces = len(Path("/proc/self/maps").read_bytes().splitlines())
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # a system that does not say
        return True
    return pieces > 20_000 or resident > 2 << 30


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest tests go first, so that no process waits for one at the end; by day without half of the cases of
    some.
    """
    items.sort(key=lambda item: not item.name.startswith(LONGEST))
    names = {item.nodeid.partition("[")[0] for item in items}
    if config.args == config.getini("testpaths") and (stale := set(HALF) - names):
        raise pytest.UsageError(f"HALF in {__file__} names tests that there are not: {', '.join(sorted(stale))}")
    if settings.get_current_profile_name() != "nightly" and not any("::" in argument for argument in config.args):
        config.hook.pytest_deselected(items=[item for item in items if not is_of_the_day(item.nodeid)])
        items[:] = [item for item in items if is_of_the_day(item.nodeid)]


def is_of_the_day(name: str) -> bool:
    """Whether a test runs by day."""
    return name.partition("[")[0] not in HALF or zlib.crc32(name.encode()) % 2 == 0


def pytest_collection_finish() -> None:
    """What imports leave behind is no garbage; to look for some in it takes a tenth of the time of the tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests recorded as ``record_property("figure", ...)``, in whichever process they ran."""
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if getattr(report, "when", "") == "call":
            for name, value in report.user_properties:
                if name == "figure":
                    terminalreporter.write_line(str(value))
