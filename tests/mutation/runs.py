"""Runs of tests in forked processes that import the project from a copy of the tree.

Libraries are imported once, before the forks; the project and its tests are imported by each fork anew.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("kempnerforge_torch", "kempnerforge_jax", "shared_config")
ASLEEP = 1800
LIBRARIES = ("numpy", "pydantic", "rich", "hypothesis", "safetensors.numpy", "torch", "jax", "flax.nnx", "optax")


def copy_tree(folder: Path) -> Path:
    """The tracked files of this tree, as they are now, in ``folder``."""
    shutil.rmtree(folder, ignore_errors=True)
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in listed.decode().split("\0"):
        if name and (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    collect = [sys.executable, "-m", "pytest", "-n0", "--collect-only", "-qq", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    subprocess.run(collect, cwd=folder, env=environment, check=False, stdout=subprocess.DEVNULL)  # leaves byte code
    return folder


def prepare(tree: Path) -> None:
    """Make this process one whose forks find the project in ``tree``, and write neither byte code nor programs."""
    os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"}
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1e9")
    sys.dont_write_bytecode = True
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
    os.chdir(tree)
    sys.path[:] = [str(tree), *(path for path in sys.path if path and Path(path).resolve() not in (ROOT, tree))]
    runpy.run_path(str(tree / "tests" / "conftest.py"))
    for library in LIBRARIES:
        __import__(library)


def run_tests(tree: Path, tests: Sequence[str], plugin: Reporter, seconds: float) -> dict[str, Any]:
    """What the plugin says of a run of these files; {"hangs": True} if it takes more than ``seconds`` of a processor,
    or `ASLEEP` by the clock.
    """
    answer = tree / "answer.json"
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 1))
            _be_quiet(tree / "output.txt")
            _answer(answer, tree / "temporary", tests, plugin)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    end = time.monotonic() + ASLEEP
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return {"hangs": True}
        time.sleep(0.05)
    if os.waitstatus_to_exitcode(ended[1]) in (-signal.SIGXCPU, -signal.SIGKILL):
        return {"hangs": True}
    return json.loads(answer.read_text()) if answer.exists() else {"dies": True}


def _answer(answer: Path, folder: Path, tests: Sequence[str], plugin: Reporter) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in (*PACKAGES, "tests")]:
        del sys.modules[name]
    options = ["-n0", "-W", "ignore:Module already imported", f"--basetemp={folder}", "-p", "no:cacheprovider"]
    options += [] if isinstance(plugin, Recorder) else ["-x"]
    status = pytest.main([*options, "--tb=short", *tests], plugins=[plugin])
    answer.write_text(json.dumps({**plugin.said(), "status": int(status)}))


def _be_quiet(file: Path) -> None:
    output = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)


class Reporter:
    """A pytest plugin that runs chosen tests in the order chosen, and notes the first failure."""

    def __init__(self, chosen: Sequence[str]) -> None:
        self.order = {name: index for index, name in enumerate(chosen)}
        self.failure: dict[str, str] = {}

    def said(self) -> dict[str, Any]:
        return {"failure": self.failure}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in self.order])
        items[:] = sorted(
            (item for item in items if item.nodeid in self.order), key=lambda item: self.order[item.nodeid]
        )

    def pytest_exception_interact(
        self, node: pytest.Item | pytest.Collector, call: pytest.CallInfo[Any], report: Any
    ) -> None:
        if not self.failure and call.excinfo is not None:
            asserts = call.excinfo.errisinstance((AssertionError, pytest.fail.Exception))
            kind = "assertion" if asserts and isinstance(node, pytest.Item) else "error"
            said = f"{call.excinfo.typename}: {call.excinfo.value}"
            self.failure = {"test": node.nodeid, "kind": kind, "said": said[:300]}


class Recorder(Reporter):
    """Notes how many seconds of a processor each test takes and which functions of the project it enters.

    Attributes:
        left_out: names of test functions that are not run.
    """

    def __init__(self, tree: Path, left_out: Collection[str] = ()) -> None:
        super().__init__(())
        self.left_out = left_out
        self.prefixes = tuple(f"{tree}/{package}/" for package in PACKAGES)
        self.start = len(str(tree)) + 1
        self.known: dict[Any, str] = {}
        self.entered: set[str] = set()
        self.tests: dict[str, dict[str, Any]] = {}
        self.unfit: set[str] = set()

    def said(self) -> dict[str, Any]:
        tests = {name: test for name, test in self.tests.items() if name not in self.unfit}
        return {"tests": tests, "functions": sorted(self.entered)}

    def pytest_sessionstart(self) -> None:
        threading.settrace(self._enter)
        sys.settrace(self._enter)

    def _enter(self, frame: Any, event: str, _: object) -> None:
        code = frame.f_code
        if code not in self.known:
            file = code.co_filename
            ours = file.startswith(self.prefixes)
            self.known[code] = function_name(file[self.start :], code.co_qualname) if ours else ""
        if self.known[code]:
            self.entered.add(self.known[code])

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        out = [item for item in items if isinstance(item, pytest.Function) and item.originalname in self.left_out]
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        before, self.entered, start = self.entered, set(), _processor_seconds()
        sys.settrace(self._enter)
        done = yield
        seconds = round(_processor_seconds() - start, 3)
        self.tests[item.nodeid] = {"seconds": seconds, "functions": sorted(self.entered)}
        self.entered |= before
        return done

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:
            self.unfit.add(report.nodeid)


def _processor_seconds() -> float:
    """Of this process and its children, which does not depend on what else the machine does."""
    return sum(os.times()[:4])


def function_name(file: str, qualified: str) -> str:
    """``file:function``, of the outermost function or method; ``file:`` alone for code outside of one."""
    outermost = qualified.partition(".<")[0]
    return f"{file}:{'' if outermost.startswith('<') else outermost}"
