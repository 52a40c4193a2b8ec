"""Signals to real processes: an interrupt ends them quietly at any moment; a lost terminal harms no run."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from shared_config.interchange import checkpoint, run_layout
from shared_config.training.metrics import read_metrics
from tests.jobs import environment_of_killed

ROOT = Path(__file__).parents[2]
SCRIPT = Path(sys.executable).with_name("kempnerforge")
TINY = (
    "--model.dim=16", "--model.n_layers=1", "--model.n_heads=2", "--model.n_kv_heads=1", "--model.ffn_hidden_dim=24",
    "--model.max_seq_len=32", "--train.seq_len=32", "--train.batch_size=2", "--train.compile_model=false",
    "--eval.steps=1", "--scheduler.warmup_steps=2",
)  # fmt: skip
LONG = (
    "--device=cpu", "--prompt=a", "--max-new-tokens=30000", "--model.max_seq_len=32768", "--temperature=0", "--seed=1",
)  # fmt: skip
"""Of these weights the most probable token never ends the text, as one that is drawn may."""
COMMANDS = {
    "show": ("show", "debug"),
    "train torch": ("train", "debug", "--backend=torch", "--device=cpu", *TINY, "--train.max_steps=100000"),
    "train jax": ("train", "debug", "--backend=jax", "--device=cpu", *TINY, "--train.max_steps=100000"),
    "generate torch": ("generate", "debug", "--backend=torch", *LONG),
    "generate jax": ("generate", "debug", "--backend=jax", *LONG),
    "validate": ("validate", "debug", "--steps=100000", *TINY),
}
HOOK = """
import os, signal, sys

class Interrupting:
    at = {at!r}.split(",")
    def find_spec(self, name, path=None, target=None):
        if name == "shared_config.training.streams" and "ARRIVED" in os.environ:
            os.write(int(os.environ.pop("ARRIVED")), b"x")
        if name in self.at:
            self.at.remove(name)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
"""
"""Tells when the command has taken interrupts over, and interrupts the process as it begins to import modules."""


def start(folder: Path, arguments: Sequence[str], at: str = "", script: bool = False) -> subprocess.Popen[str]:
    """The command, once it has begun."""
    (folder / "sitecustomize.py").write_text(HOOK.format(at=at), encoding="utf-8")
    reading, writing = os.pipe()
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [str(SCRIPT), *arguments] if script else [sys.executable, "-m", "shared_config.cli", *arguments],
        env={**environment_of_killed(), "PYTHONPATH": path, "ARRIVED": str(writing)},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=[writing],
    )
    os.close(writing)
    assert os.read(reading, 1) == b"x"
    os.close(reading)
    return process


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_gone(pid: int) -> bool:
    """Whether a process has ended, within a few seconds."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("show", "shared_config.training.streams"),
        ("show", "shared_config.commands.line"),
        ("show", "argparse"),
        ("show", "shared_config.commands.show"),
        ("show", "pydantic"),
        ("show", "rich.table"),
        ("train torch", "numpy"),
        ("train torch", "torch"),
        ("train torch", "torch.nn.functional"),
        ("train torch", "kempnerforge_torch.training.train"),
        ("train jax", "jax"),
        ("train jax", "jax._src.lax.lax"),
        ("train jax", "flax.nnx"),
        ("generate torch", "torch._tensor"),
        ("generate jax", "jax.numpy"),
        ("validate", "safetensors"),
    ],
)
def test_an_interrupt_of_any_import_is_no_traceback(tmp_path: Path, command: str, module: str) -> None:
    assert end(start(tmp_path, COMMANDS[command], at=module)) == (130, "")


@pytest.mark.parametrize("delay", [0.05, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupt_at_any_time_is_no_traceback(tmp_path: Path, command: str, delay: float) -> None:
    process = start(tmp_path, COMMANDS[command], script=SCRIPT.exists() and command == "show")
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    status, errors = end(process)
    assert "Traceback" not in errors
    assert status == 130 or (command == "show" and status == 0), errors


def test_an_interrupt_that_a_callback_swallows_is_raised_again(tmp_path: Path) -> None:
    code = """
import os, signal, sys, time
from shared_config.training.signals import INTERRUPTS
INTERRUPTS.take()
INTERRUPTS.caught()
class Swallowing:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)
try:
    Swallowing()
    time.sleep(20)
except KeyboardInterrupt:
    sys.exit(7)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (7, "")


def test_an_interrupt_of_code_from_a_text_ends_with_the_status_of_an_interrupt(tmp_path: Path) -> None:
    """As data classes and named tuples compile it."""
    code = """
import atexit, os, signal, sys
from shared_config import cli
from shared_config.commands import line
def status_of(given):
    cli.INTERRUPTS.caught()
    atexit.register(print, "cleaned up", flush=True)
    try:
        exec("os.kill(os.getpid(), signal.SIGINT)")
    except KeyboardInterrupt:
        return 130
line.status_of = status_of
sys.exit(cli.main())
"""
    (tmp_path / "interrupting.py").write_text(code, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "interrupting"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (130, "cleaned up\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_of_validate_outlives_it(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, COMMANDS["validate"])
    for _ in range(300):
        workers = children(process.pid)
        if len(workers) == 2:
            break
        time.sleep(0.1)
    process.send_signal(number)
    status, errors = end(process)
    assert status == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in errors
    assert len(workers) == 2
    assert all(is_gone(worker) for worker in workers)


def run_on_a_terminal(folder: Path, *options: str) -> tuple[subprocess.Popen[bytes], int]:
    """A long run of a session of its own on a terminal, after its first line; the other end of the terminal."""
    ours, theirs = pty.openpty()
    arguments = [*COMMANDS["train torch"], "--train.max_steps=100000", f"--checkpoint.dir={folder}", *options]
    code = (
        "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); from shared_config.cli import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys\n{code.replace('main()', 'sys.exit(main())')}", *arguments],
        env={**environment_of_killed(), "TERM": "xterm"},
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    seen = b""
    while b"tokens/s" not in seen:
        assert select.select([ours], [], [], 60)[0], seen
        seen += os.read(ours, 65536)
    return process, ours


def test_a_run_whose_terminal_is_closed_saves_and_ends_with_its_status(tmp_path: Path) -> None:
    process, terminal = run_on_a_terminal(tmp_path)
    os.close(terminal)
    assert process.wait(timeout=60) == 129
    saved = run_layout.latest(tmp_path)
    assert saved is not None
    assert checkpoint.load(saved).state.step == read_metrics(tmp_path / "metrics.jsonl")[-1]["step"]


def test_a_run_that_ignores_hanging_up_goes_on_without_its_terminal(tmp_path: Path) -> None:
    """As nohup and disown leave it: nobody can see what it prints."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process, terminal = run_on_a_terminal(tmp_path)
    finally:
        signal.signal(signal.SIGHUP, before)
    os.close(terminal)
    then = len(read_metrics(tmp_path / "metrics.jsonl"))
    for _ in range(300):
        if len(read_metrics(tmp_path / "metrics.jsonl")) > then + 20:
            break
        time.sleep(0.1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert len(read_metrics(tmp_path / "metrics.jsonl")) > then + 20
    assert run_layout.latest(tmp_path) is not None


def test_a_run_whose_output_nobody_reads_goes_on(tmp_path: Path) -> None:
    arguments = [*COMMANDS["train torch"], "--train.max_steps=3", "--checkpoint.interval=1", "--output=run"]
    process = start(tmp_path, arguments)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    status, errors = end(process)
    assert status == 0, errors
    assert errors.count("Broken pipe") == 1
    assert "Traceback" not in errors
    assert checkpoint.load(tmp_path / "run").state.step == 3
