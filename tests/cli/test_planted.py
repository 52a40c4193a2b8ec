"""Bugs planted behind `validate`, in the processes that it starts: it names the groups of rows that they reach, no
others, and exits with 1.

A run has several bugs at once, in either backend, each kept to groups or dtypes of its own. None moves the first tensor
of a group that has several.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings

from shared_config.cli import main
from shared_config.commands import validate as command
from shared_config.parity import checks
from tests.cli.processes import Changes, Result, in_this_process, run_python

CONFIG = ["debug", "--model.dim=16", "--model.n_layers=2", "--model.ffn_hidden_dim=24", "--model.max_seq_len=32"]
TRAINING = ["--train.batch_size=2", "--train.seq_len=16"]

NIGHTLY = settings.get_current_profile_name() == "nightly"
RATE = "self.rates(self.updates)"


@dataclass(frozen=True)
class Bug:
    """A change of a module of one backend."""

    module: str
    text: str
    replacement: str


LOSS = {
    "torch": Bug("training.loss", "total / count.clamp(min=1)", "total / count.clamp(min=1) + 1e-6"),
    "jax": Bug("training.loss", "total / jnp.maximum(count, 1)", "total / jnp.maximum(count, 1) + 1e-6"),
}
CHUNKS_OF_SEVEN = {
    "torch": Bug(
        "model.decode_state",
        "steps_S = torch.arange(length, device=self.lengths.device)",
        "steps_S = torch.arange(length, device=self.lengths.device) + (length == 7)",
    ),
    "jax": Bug(
        "model.decode_state",
        "+ jnp.arange(length, dtype=jnp.int32)\n",
        "+ jnp.arange(length, dtype=jnp.int32) + (length == 7)\n",
    ),
}
LATER_RATE = {
    "torch": Bug("training.train", RATE, "self.rates(self.updates + 1)"),
    "jax": Bug("training.train", RATE, "self.rates(self.updates + 1)"),
}
NORMS_OF_FLOAT64_STEPPED_WRONG = {
    "torch": Bug(
        "training.optimizer",
        "if group[_DECAYS] else 0.0\n\n\ndef update",
        "if group[_DECAYS] else float(group['params'][0].element_size() == 8)\n\n\ndef update",
    ),
    "jax": Bug(
        "training.optimizer",
        "moved, new_state = optimizer.update(gradients, state,",
        "moved, new_state = optimizer.update({name: g * (g.ndim > 1 or g.itemsize < 8) "
        "for name, g in gradients.items()}, state,",
    ),
}
EMBEDDING_GRADIENT = {  # doubled: of torch in float32, of JAX in float64
    "torch": Bug(
        "model.embedding",
        "        try:\n            return self.embedding(tokens)\n",
        "        try:\n            x = self.embedding(tokens)\n"
        "            return 2 * x - x.detach() if x.element_size() == 4 else x\n",
    ),
    "jax": Bug(
        "model.embedding",
        "        x_BSD = self.embedding(tokens)\n",
        "        x_BSD = self.embedding(tokens)\n"
        "        x_BSD = 2 * x_BSD - jax.lax.stop_gradient(x_BSD) if x_BSD.itemsize == 8 else x_BSD\n",
    ),
}
NORMED = {
    "torch": Bug(
        "model.norm", "(wide * scale * self", "(wide * scale * (1.001 if x.element_size() == 4 else 1) * self"
    ),
    "jax": Bug("model.norm", "(wide * scale * self", "(wide * scale * (1.001 if x.itemsize == 8 else 1) * self"),
}
INPUTS_DOUBLED = {
    "torch": Bug("model.fp8", "product(quantise(x_RI, FORWARD),", "product(quantise(2 * x_RI, FORWARD),"),
    "jax": Bug("model.fp8", "product(quantise(x_RI, FORWARD),", "product(quantise(2 * x_RI, FORWARD),"),
}
GRADIENT_HALVED = {
    "torch": Bug("model.fp8", "quantise(x_RI.t().contiguous(), FORWARD)", "quantise(x_RI.t() / 2, FORWARD)"),
    "jax": Bug("model.fp8", "quantise(x_RI.T, FORWARD)", "quantise(x_RI.T / 2, FORWARD)"),
}
REACHED_BY_FORWARD = ("forward", "loss", "decode", "gradient", "updated")
RUN = "training, 3 steps"


@pytest.mark.parametrize(("one", "other"), [("torch", "jax"), ("jax", "torch")])
def test_groups_that_nothing_else_depends_on(one: str, other: str) -> None:
    """Loss and decoding of one backend; the update and the training run of the other."""
    result = validate(
        ["--dtypes=float64"],
        plant({one: [LOSS, CHUNKS_OF_SEVEN], other: [LATER_RATE, NORMS_OF_FLOAT64_STEPPED_WRONG]}),
    )
    assert named(result) - {(RUN, "grad_norm")} == {
        ("float64", "loss"),
        ("601 positions", "loss"),
        ("float64", "decode"),
        ("float64", "updated"),
        ("cached decoding", f"{one}: decode = forward"),
        (RUN, "losses"),
        (RUN, "lr"),
    }
    assert result.returncode == 1


def test_gradients_of_torch_and_the_forward_of_jax() -> None:
    """In float32 and in float64."""
    result = validate(["--dtypes=float64,float32"], plant({"torch": [EMBEDDING_GRADIENT], "jax": [NORMED]}))
    float64 = {("float64", group) for group in REACHED_BY_FORWARD}
    float64 |= {("601 positions", "forward"), ("601 positions", "loss")}
    assert named(result) == {*float64, ("float32", "gradient"), ("float32", "updated"), (RUN, "grad_norm")}
    assert result.returncode == 1


def test_gradients_of_jax_and_the_forward_of_torch() -> None:
    result = validate(["--dtypes=float64,float32"], plant({"jax": [EMBEDDING_GRADIENT], "torch": [NORMED]}))
    float32 = {("float32", group) for group in REACHED_BY_FORWARD}
    assert named(result) == {*float32, ("float64", "gradient"), ("float64", "updated"), (RUN, "grad_norm")}
    assert result.returncode == 1


def test_one_backend_in_both_processes_is_no_agreement(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = checks.trace_command
    monkeypatch.setattr(checks, "trace_command", lambda plan, _, *overrides: asked(plan, "torch", *overrides))
    monkeypatch.setattr(command, "run_processes", in_this_process)
    assert main(["validate", *CONFIG, *TRAINING, "--dtypes=float64", "--steps=0"]) == 2
    said = capsys.readouterr()
    assert "agree" not in said.out
    assert "jax-float64.safetensors: is not the trace that was asked for" in said.err
    assert "backend = 'torch': was to be 'jax'" in said.err


@pytest.mark.skipif(not NIGHTLY, reason="three validations: HYPOTHESIS_PROFILE=nightly")
@pytest.mark.parametrize(("one", "other"), [("torch", "jax"), ("jax", "torch")])
def test_products_in_fp8(one: str, other: str) -> None:
    """Forward and backward, each in a backend of its own. Within a chunk that is decoded sizes do not fit."""
    options = [
        "--train.mixed_precision=fp8", "--dtypes=fp8", "--steps=0", "--model.n_layers=4", "--model.dim=32",
        "--model.n_heads=2", "--model.head_dim=16", "--model.ffn_hidden_dim=48",
    ]  # fmt: skip
    correct = validate(options, {})
    assert correct.returncode == 0, correct.stdout + correct.stderr
    assert named(validate(options, plant({one: [INPUTS_DOUBLED]}))) >= {("fp8", "forward"), ("fp8", "loss")}
    backward = named(validate(options, plant({other: [GRADIENT_HALVED]})))
    assert {("fp8", "gradient")} <= backward <= {("fp8", "gradient"), ("fp8", "updated")}


def plant(bugs: dict[str, list[dict[str, Bug]]]) -> Changes:
    """Backend -> its bugs, as changes of modules."""
    changes: dict[str, list[tuple[str, str]]] = {}
    for backend, kinds in bugs.items():
        for bug in (kind[backend] for kind in kinds):
            changes.setdefault(f"kempnerforge_{backend}.{bug.module}", []).append((bug.text, bug.replacement))
    return changes


def validate(options: list[str], changes: Changes) -> Result:
    return run_python(
        "-m", "shared_config.cli", "validate", *CONFIG, *TRAINING, "--steps=3", *options, changes=changes, timeout=300
    )


def named(result: Result) -> set[tuple[str, str]]:
    """Check and subject of the lines of the table that are not the same in both backends."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    assert rows, result.stderr
    return {(row[0], row[1]) for row in rows if row[-1].endswith(("DIFFERENT", "INCONSISTENT"))}
