"""Set up for every test process, before torch or jax are imported: threads, compilation cache, Hypothesis profiles."""

from __future__ import annotations

import ctypes
import gc
import importlib
import itertools
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, settings

from tests import daytime

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
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's; what it keeps would count as resident
            trim(0)


def crowded() -> bool:
    """Whether JAX has to forget what it compiled: a process may map 65,530 pieces of memory, and dies of one more."""
    try:
        pieces = len(Path("/proc/self/maps").read_bytes().splitlines())
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # a system that does not say
        return True
    return pieces > 20_000 or resident > 3 << 30


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest tests go first, so that no process waits for one at the end; by day without some cases."""
    items.sort(key=lambda item: not item.name.startswith(LONGEST))
    names = [item.nodeid for item in items]
    if config.args == config.getini("testpaths") and (stale := daytime.stale(names)):
        raise pytest.UsageError(f"{daytime.__file__} names tests that there are not: {', '.join(stale)}")
    if settings.get_current_profile_name() != "nightly" and not any("::" in argument for argument in config.args):
        chosen = daytime.by_day(names)
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in chosen])
        items[:] = [item for item in items if item.nodeid in chosen]


def pytest_collection_finish() -> None:
    """What imports leave behind is no garbage; to look for some in it takes a tenth of the time of the tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    if "jax" in sys.modules:
        share_contexts(importlib.import_module("jax._src.interpreters.mlir"))


def share_contexts(mlir: ModuleType, programs: int = 100) -> None:
    """Let JAX write many programs in one context of MLIR: to make one for each takes 4 % of the time of the tests."""
    make, held, count = mlir.make_ir_context, [], itertools.count()

    def context() -> object:
        if next(count) % programs == 0:
            held[:] = [make()]
        return held[0]

    mlir.make_ir_context = context  # pyright: ignore[reportAttributeAccessIssue]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests recorded as ``record_property("figure", ...)``, in whichever process they ran."""
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if getattr(report, "when", "") == "call":
            for name, value in report.user_properties:
                if name == "figure":
                    terminalreporter.write_line(str(value))
