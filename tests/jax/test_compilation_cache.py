"""The cache of compiled programs that test processes share: a torn entry is a miss, and killed processes tear none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tests.cli.processes import run_python
from tests.jobs import environment_of_killed

COMPILE = """
import jax, jax.numpy as jnp
print(float(jax.jit(lambda x: jnp.sin(x) * 3)(1.0)))
"""


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """An empty cache folder, which alone is read and written."""
    options = {"jax_compilation_cache_dir": str(tmp_path), "jax_persistent_cache_min_compile_time_secs": 0}
    before = {name: getattr(jax.config, name) for name in options}
    compilation_cache.reset_cache()
    for name, value in options.items():
        jax.config.update(name, value)
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def tear(folder: Path, kept: int) -> int:
    """Cut every entry to its first ``kept`` bytes; the number of entries."""
    entries = [file for file in folder.iterdir() if file.is_file()]
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[:kept])
    return len(entries)


@pytest.mark.parametrize("kept", [0, 1, 100])
def test_a_torn_entry_is_compiled_again_without_a_word(cache: Path, kept: int) -> None:
    def compiled() -> float:
        jax.clear_caches()
        return float(jax.jit(lambda x: jnp.sin(x) * 3)(1.0))

    first = compiled()
    assert tear(cache, kept) > 0
    assert compiled() == first


def test_a_torn_entry_does_not_show_in_what_a_child_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    first = run_python("-c", COMPILE)
    assert tear(tmp_path, 100) > 0
    again = run_python("-c", COMPILE)
    assert (again.returncode, again.stdout, again.stderr) == (0, first.stdout, "")


def test_a_process_that_will_be_killed_writes_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    for name, value in environment_of_killed().items():
        monkeypatch.setenv(name, value)
    assert run_python("-c", COMPILE).returncode == 0
    assert list(tmp_path.iterdir()) == []
