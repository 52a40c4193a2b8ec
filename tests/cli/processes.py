"""Real processes for tests of the command, optionally without some packages; and a stand-in for those of `validate`."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared_config.cli import main
from shared_config.interchange.toml import config_to_toml
from shared_config.parity.plan import Plan

ROOT = Path(__file__).parent.parent.parent

BLOCKER = """
import importlib.util
import sys

BLOCKED, found = {blocked!r}, importlib.util.find_spec

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
importlib.util.find_spec = lambda name, *of: None if name.partition(".")[0] in BLOCKED else found(name, *of)
"""


PLANTER = """
import sys
from importlib.machinery import PathFinder, SourceFileLoader

CHANGES = {changes!r}

class Loader(SourceFileLoader):
    def get_code(self, name):
        source = self.get_data(self.path).decode()
        for text, replacement in CHANGES[name]:
            if source.count(text) != 1:
                raise RuntimeError(f"{{name}}: {{text!r}} occurs {{source.count(text)}} times, must occur once")
            source = source.replace(text, replacement)
        return compile(source, self.path, "exec")

class Planter:
    def find_spec(self, name, path=None, target=None):
        if name in CHANGES:
            spec = PathFinder.find_spec(name, path)
            spec.loader = Loader(name, spec.origin)
            return spec

sys.meta_path.insert(0, Planter())
"""

Changes = Mapping[str, Sequence[tuple[str, str]]]
"""Module -> (text, replacement): source text, which occurs once, is replaced wherever the module is imported."""


@dataclass(frozen=True)
class Result:
    """How a process ended; ``seconds`` of processor time, which do not depend on what else the machine does."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float


def run_python(
    *arguments: str,
    blocked: Sequence[str] = (),
    changes: Changes | None = None,
    cwd: Path | None = None,
    timeout: float = 120,
) -> Result:
    """Run this interpreter. There and in all processes that it starts, packages in ``blocked`` look as if they were not
    installed, and modules have the ``changes``.
    """
    code = BLOCKER.format(blocked=tuple(blocked)) + (PLANTER.format(changes=dict(changes)) if changes else "")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "sitecustomize.py").write_text(code, encoding="utf-8")
        path = os.pathsep.join([folder, str(ROOT), os.environ.get("PYTHONPATH", "")])
        before = _seconds_of_children()
        ended = subprocess.run(
            [sys.executable, *arguments],
            env={**os.environ, "PYTHONPATH": path},
            cwd=cwd or ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return Result(ended.returncode, ended.stdout, ended.stderr, _seconds_of_children() - before)


def in_this_process(plan: Plan, stage: int = 0) -> None:
    """What `validate.run_processes` does, without processes of its own, which import for longer than they compute."""
    plan.config_file.write_text(config_to_toml(plan.config), encoding="utf-8")
    for backend in plan.processes:
        for job in plan.jobs(backend, stage):
            assert main(job) == 0, job


def _seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
