"""Models of one's own on the command line: recorded, given recorded inputs, compared; as processes or machines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from shared_config.cli import main
from shared_config.parity import read_trace
from shared_config.parity.foreign.options import DTYPES
from shared_config.parity.foreign.site import site_of
from shared_config.parity.result import EQUAL, WITHIN
from tests.cli.processes import run_python
from tests.examples import small_in_numpy

NIGHTLY = settings.get_current_profile_name() == "nightly"
nightly = pytest.mark.skipif(not NIGHTLY, reason="takes seconds: HYPOTHESIS_PROFILE=nightly")
SOURCE = Path(small_in_numpy.__file__)
FOLDER = SOURCE.parent
MAP = str(FOLDER / "small.toml")
THEIRS, OURS = (f"tests.examples.small_in_{name}" for name in ("torch:theirs", "numpy:ours"))

BUGS = {
    "embedding scaled": ('["weight"][tokens]', '["weight"][tokens] * 1.1', ("embedding",)),
    "eps": ("keepdims=True) + eps", "keepdims=True) + 0.1", ("norm_1", "norm_2", "final_norm")),
    "mask off by one": ("np.ones((S, S), bool))", "np.ones((S, S), bool), 1)", ("mixer",)),
    "scores not scaled": (" / (D // HEADS) ** 0.5", "", ("mixer",)),
    "one head of one layer": (
        'f"{name}.mixer", attention(normed, layer["attention"])',
        'f"{name}.mixer", attention(normed, layer["attention"]) * np.where(np.arange(12) // 4 == number, 2, 1)',
        ("mixer",),
    ),
    "another activation": ("hidden / (1 + np.exp(-hidden))", "np.tanh(hidden)", ("ffn",)),
    "residual from the norm": ('f"{name}.middle", x +', 'f"{name}.middle", normed +', ("middle",)),
    "second layer alone": (
        'f"{name}.ffn", mlp(normed,',
        'f"{name}.ffn", (1 + number) * mlp(normed,',
        ("layers.1.ffn",),
    ),
    "logits moved": ('@ weights["head"]["weight"].T', '@ np.roll(weights["head"]["weight"].T, 1, 1)', ("output",)),
}
"""Text, what stands in its place, and the ends of the names of what is wrong then, alone."""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = str(tmp_path_factory.mktemp("there") / "theirs.safetensors")
    assert main(["record", THEIRS, "--output", file]) == 0
    return file


def planted(folder: Path, bug: str) -> str:
    """A port with a bug, on a line of its own."""
    old, new, _ = BUGS[bug]
    source = SOURCE.read_text(encoding="utf-8")
    assert source.count(old) == 1
    (folder / "wrong.py").write_text(source.replace(old, new), encoding="utf-8")
    return f"{folder / 'wrong.py'}:ours"


def differing(comparison: Mapping[str, Any]) -> set[str]:
    """Names of what differs, of a comparison as JSON."""
    return {row["name"] for row in comparison["rows"] if row["status"] not in (EQUAL, WITHIN)}


def failing(folder: Path, *arguments: str) -> dict[str, set[str]]:
    """Names of what differs, for each kind of inputs."""
    status = main(["compare", *arguments, "--map", MAP, "--common", "--json", str(folder / "found.json")])
    found = json.loads((folder / "found.json").read_text())
    kinds = {"": found} if "rows" in found else found
    names = {kind: differing(one) for kind, one in kinds.items()}
    assert status == (1 if any(names.values()) else 0)
    return names


def test_a_port_is_the_same_with_recorded_inputs_on_either_side(theirs: str, tmp_path: Path) -> None:
    mine, fed = (str(tmp_path / name) for name in ("mine.safetensors", "fed.safetensors"))
    assert main(["record", OURS, "--no-deltas", "--output", mine]) == 0
    assert failing(tmp_path, theirs, mine) == {"": set()}
    assert main(["record", OURS, "--refeed", theirs, "--map", MAP, "--output", fed]) == 0
    assert failing(tmp_path, theirs, fed) == {"": set()}
    assert main(["record", THEIRS, "--refeed", mine, "--map", MAP, "--inverse", "--output", fed]) == 0
    assert failing(tmp_path, fed, mine) == {"": set()}
    assert not any(name.startswith("gradient/") for name in read_trace(fed).tensors)


@pytest.mark.parametrize("bug", BUGS)
def test_each_bug_stands_alone_where_recorded_inputs_are_given(theirs: str, tmp_path: Path, bug: str) -> None:
    port, mine, fed = planted(tmp_path, bug), *(str(tmp_path / f"{name}.safetensors") for name in ("mine", "fed"))
    sites = BUGS[bug][2]
    assert main(["record", port, "--no-deltas", "--output", mine]) == 0
    (free,) = failing(tmp_path, theirs, mine).values()
    assert main(["record", port, "--refeed", theirs, "--map", MAP, "--output", fed]) == 0
    (alone,) = failing(tmp_path, theirs, fed).values()
    assert alone
    assert {site_of(name) for name in alone} <= {site for site in map(site_of, free) if site.endswith(sites)}
    assert bug == "logits moved" or alone < free


def test_two_models_are_compared_in_processes_of_their_own(tmp_path: Path) -> None:
    """The command needs the framework of neither side, and each side not that of the other."""
    arguments = [
        *("-m", "shared_config.cli", "compare", OURS, planted(tmp_path, "mask off by one"), "--refeed"),
        *("--dtype", "bfloat16", "--json", str(tmp_path / "found.json")),
    ]
    done = run_python(*arguments, blocked=("torch", "jax", "flax", "optax"))
    assert done.returncode == 1, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == ["own inputs", "recorded inputs"]
    for kind, one in found.items():
        assert one["b"]["dtype"] == "bfloat16"
        sites = set(map(site_of, differing(one)))
        assert "layers.0.mixer" in sites
        assert (kind == "recorded inputs") == (sites <= {"layers.0.mixer", "layers.1.mixer"})


@nightly
@pytest.mark.parametrize("bug", ["scores not scaled", "second layer alone"])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_model_and_a_trace_of_another_machine(theirs: str, tmp_path: Path, bug: str, swapped: bool) -> None:
    """Each side lacks the framework of the other; what is fed is the one that is a model."""
    port, mine = planted(tmp_path, bug), str(tmp_path / "mine.safetensors")
    assert main(["record", port, "--output", mine]) == 0
    sides, blocked = ((THEIRS, mine), "jax") if swapped else ((theirs, port), "torch")
    arguments = ["-m", "shared_config.cli", "compare", *sides, "--map", MAP, "--common", "--refeed"]
    done = run_python(*arguments, "--json", str(tmp_path / "found.json"), blocked=(blocked, "flax", "optax"))
    assert done.returncode == 1, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["recorded inputs"]
    alone = set(map(site_of, differing(found)))
    assert alone
    assert all(site.endswith(BUGS[bug][2]) for site in alone)


SCRIPTS = {
    "fine": "def made(**options):\n    return record(np.tanh, (np.ones((2, 3), np.float32),), **options)\n",
    "unasked": "def made(**options):\n    return record(np.tanh, (np.ones((2, 3), np.float32),))\n",
    "deaf": "def made():\n    return record(np.tanh, (np.ones((2, 3), np.float32),))\n",
    "number": "def made(**options):\n    return 3\n",
    "raises": "def made(**options):\n    return {}['key']\n",
    "needs": "import absent_framework\n",
}


@pytest.fixture
def script(tmp_path: Path) -> Path:
    for name, text in SCRIPTS.items():
        head = "import numpy as np\nfrom shared_config.parity import record\n"
        (tmp_path / f"{name}.py").write_text(head + text, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fine"], "'fine': must be file.py:name or package.module:name"),
        (["none.py:made"], "none.py: is no file"),
        (["no_module_here:made"], "no module no_module_here in the current folder"),
        (["fine.py:mad"], "fine.py:mad: mad is not there; it has made"),
        (["fine.py:np"], "fine.py:np: np is not callable; it has"),
        (["number.py:made"], "number.py:made: returned int: must be what record(model, inputs, **options) gives"),
        (["raises.py:made"], "raises.py:made, line 4: KeyError: 'key'"),
        (["needs.py:made"], "needs.py:made, line 3: ModuleNotFoundError: No module named 'absent_framework'"),
        (["deaf.py:made", "--seed", "1"], "must be called as name(**options), and give what record(model,"),
        (["unasked.py:made", "--dtype", "bfloat16"], "dtype = 'float32' where 'bfloat16' was asked for: must pass"),
        (
            ["unasked.py:made", "--refeed", "given"],
            "unasked.py:made: recorded without refeed: must pass its options on",
        ),
        ([OURS, "--refeed", "given"], "has none of the activations that the other trace holds, as forward/"),
        (["fine.py:made", "--inverse"], "--inverse: there is no --map to turn round"),
        (["fine.py:made", "--refeed", "given", "--inverse"], "--inverse: there is no --map to turn round"),
        (["fine.py:made", "--model.dim", "3"], "--model.dim: record takes no config"),
        (["fine.py:made", "--only", "nothing*"], "only = 'nothing*': matches no tensor; names are as forward/output"),
    ],
)
def test_what_can_not_be_recorded_is_said(
    arguments: list[str], said: str, theirs: str, script: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(script)
    before = sorted(script.iterdir())
    status = main(["record", *(theirs if word == "given" else word for word in arguments), "--output", "out"])
    error = capsys.readouterr().err
    assert status == 2
    assert said in error
    assert len(error.splitlines()) == 1
    assert [file for file in sorted(script.iterdir()) if file.name != "__pycache__"] == before


def test_inputs_that_were_fed_themselves_or_have_another_shape_are_refused(
    theirs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fed, out = str(tmp_path / "fed.safetensors"), str(tmp_path / "out.safetensors")
    assert main(["record", OURS, "--refeed", theirs, "--map", MAP, "--no-deltas", "--output", fed]) == 0
    assert main(["record", OURS, "--refeed", fed, "--output", out]) == 2
    assert "was itself given recorded inputs" in capsys.readouterr().err
    turned = tmp_path / "turned.toml"
    turned.write_text(Path(MAP).read_text().replace('b = "embedding"', 'b = "embedding"\nlayout = ["transpose"]'))
    assert main(["record", OURS, "--refeed", theirs, "--map", str(turned), "--output", out]) == 2
    assert "embedding: shape = (2, 12, 9): must be (2, 9, 12), as here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["theirs", "theirs", "--refeed"], "--refeed: is for models, as ours.py:ours"),
        (["theirs", "theirs", "--dtype", "float32"], "--dtype: is for models"),
        (["folder", OURS], "is a folder; a model is compared with a trace"),
        ([OURS, "no_module_here:ours"], "no module no_module_here"),
    ],
)
def test_what_can_not_be_compared_is_said(
    arguments: list[str], said: str, theirs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"theirs": theirs, "folder": str(tmp_path)}
    assert main(["compare", *(given.get(word, word) for word in arguments)]) == 2
    assert said in capsys.readouterr().err


def test_dtypes_of_the_line_are_those_of_recorders() -> None:
    from shared_config.commands.lines import record

    assert record.DTYPES == DTYPES
