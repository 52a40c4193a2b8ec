"""Files and names in the place of others: the message says what would be right."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_config.commands.line import MAY_BE_EMPTY, NAMES, Parser, check_given, line_of
from shared_config.errors import UserError
from shared_config.interchange.toml import config_to_toml
from shared_config.loader import load_config
from tests.cli.test_bad_input import refused

PREPARED = ("a.parquet", "a.arrow", "a.txt.gz", "a.jsonl.zst", "sub/A.PARQUET")


@given(st.sampled_from(sorted(NAMES)), st.data())
def test_no_name_is_empty(command: str, data: st.DataObject) -> None:
    """Of no command: a path that is empty would be the folder in which it runs."""
    parser = Parser()
    line_of(command).add_arguments(parser)
    name = data.draw(st.sampled_from([each for each in parser.destinations if each != "help"]))
    value = data.draw(st.sampled_from(["", [""], ["a", ""]]))
    given_options = argparse.Namespace(command=command, **{name: value})
    if name in MAY_BE_EMPTY:
        check_given(given_options, [])
        return
    with pytest.raises(UserError, match=f"^{name} = '': must not be empty$"):
        check_given(given_options, [])
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(UserError, match=f"^{flag} = '': must not be empty$"):
        check_given(given_options, [f"{flag}="])


def test_a_command_refuses_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert refused(capsys, "convert", "", "--output", str(tmp_path / "x")) == "source = '': must not be empty"
    assert refused(capsys, "train", "debug", "--backend=torch", "--output=") == "--output = '': must not be empty"


def test_a_file_of_a_folder_that_knows_its_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff\x00")
    (tmp_path / "notes.txt").write_text("no TOML")
    for name in ("model.safetensors", "notes.txt"):
        assert "knows its config" not in refused(capsys, "show", str(tmp_path / name))
    (tmp_path / "config.toml").write_text(config_to_toml(load_config("debug")))
    for name in ("model.safetensors", "notes.txt"):
        said = refused(capsys, "show", str(tmp_path / name))
        assert said.startswith(f"config = {str(tmp_path / name)!r}: ")
        assert said.endswith(f"; the folder that it is in, {str(tmp_path)!r}, knows its config")
    said = refused(capsys, "show", str(tmp_path / "absent.toml"))
    assert said == f"config = {str(tmp_path / 'absent.toml')!r}: can't be read: No such file or directory"


@pytest.mark.parametrize("name", PREPARED)
def test_data_that_prepare_alone_reads(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "data" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"PAR1\0")
    (tmp_path / "data" / "plain.txt").write_text("text " * 100)
    for path in (file, tmp_path / "data"):
        said = refused(
            capsys, "train", "debug", "--backend=torch", f"--data.path={path}", f"--output={tmp_path / 'run'}"
        )
        assert said.endswith("must be made into token files first, by kempnerforge prepare")
        assert Path(name).name in said


@pytest.mark.parametrize(
    ("value", "said"), [("null", "null"), ("3", "a number"), ("[1]", "a list"), ('{"a": 1}', "an object")]
)
def test_rows_whose_text_is_none(value: str, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"text": {value}}}\n')
    message = refused(capsys, "prepare", str(file), "--tokenizer=bytes", f"--output={tmp_path / 'tokens'}")
    assert message == f"{file}, byte 0: 'text' must be text, not {said}"


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Path.mkdir, "is a folder; must be a regular file"),
        (lambda file: file.write_bytes(b"no picture"), "can't be read: cannot identify image file"),
        (lambda file: None, "can't be read: No such file or directory"),
    ],
)
def test_pictures_that_can_not_be_decoded(
    make: Callable[[Path], object], why: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    make(file := tmp_path / "a.png")
    line = ["generate", "debug_vlm_joint_decoder", "--backend=torch", "--prompt=a", f"--image={file}"]
    assert refused(capsys, *line) == f"{file}: can't be decoded: {why}"


def test_several_values_are_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "show", "debug", "--optimizer.betas=(0.9, 0.99)")
    assert said == "optimizer.betas = '(0.9, 0.99)': must be a list, as ['a', 'b'] or [1, 2]"
