"""What small files say: ids of tokenizers, TOML, JSON, kinds of files; and every word about those that say no more."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from shared_config.errors import UserError
from shared_config.interchange import files, reading, toml
from shared_config.interchange.files import commit, file_errors, make_aside, make_folder, written_aside
from shared_config.interchange.reading import (
    check_inside,
    check_regular,
    files_below,
    opened,
    parse_json,
    parse_toml,
    read_bytes,
    read_json,
    read_text,
)
from shared_config.interchange.tokens import (
    NOT_READ,
    beside,
    copy_tokenizer,
    has_tokenizer,
    keep_tokenizer,
    special_ids,
    stop_ids,
    tokenizer_problem,
)
from shared_config.interchange.toml import (
    config_from_toml,
    config_to_dict,
    json_schema,
    parse_fields,
    read_fields,
    section_of,
    with_tokenizer_beside,
)
from shared_config.loader import load_config

ADDED = [{"content": "<a>", "id": 11}, {"content": "<b>", "id": 12}, {"content": "<c>", "id": 0}]


def folder_of(folder: Path, **contents: Any) -> Path:
    """A folder with JSON files of these contents."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


IDS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"config": {"eos_token_id": 0}}, {"eos_token_id": 0}),
    ({"config": {"eos_token_id": [3]}}, {"eos_token_id": 3}),
    ({"config": {"eos_token_id": [3, 3]}}, {"eos_token_id": 3}),
    ({"config": {"eos_token_id": []}}, {}),
    ({"config": {"eos_token_id": -1, "pad_token_id": -1, "bos_token_id": None}}, {}),
    ({"config": {"eos_token_id": [3, -1]}}, {"eos_token_id": 3}),
    ({"config": {"eos_token_id": 3}, "generation_config": {"eos_token_id": 3}}, {"eos_token_id": 3}),
    ({"config": {"eos_token_id": 3}, "generation_config": {"eos_token_id": [4, 5]}}, {"eos_token_id": [4, 5, 3]}),
    ({"config": {"bos_token_id": 3}, "generation_config": {"bos_token_id": 4}}, {"bos_token_id": 4}),
    ({"config": {"pad_token_id": 3, "unk_token_id": 5}}, {"pad_token_id": 3}),
    (
        {
            "tokenizer": {"added_tokens": ADDED},
            "tokenizer_config": {"eos_token": "<a>", "bos_token": {"content": "<c>"}},
        },
        {"eos_token_id": 11, "bos_token_id": 0},
    ),
    (
        {
            "tokenizer": {"added_tokens": ADDED},
            "tokenizer_config": {"eos_token": "<a>", "pad_token": "<b>", "bos_token": "none"},
            "config": {"eos_token_id": 7},
        },
        {"eos_token_id": 7, "pad_token_id": 12},
    ),
    ({"tokenizer": {"added_tokens": ADDED}, "tokenizer_config": {"eos_token": 11}}, {}),
    ({"tokenizer": {"added_tokens": None}, "tokenizer_config": {"eos_token": "<a>"}}, {}),
    ({"tokenizer": {}, "tokenizer_config": {"eos_token": {"id": 1}}}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("contents", "expected"), IDS)
def test_special_ids_are_those_that_are_named(
    contents: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    folder = folder_of(tmp_path, **contents)
    assert special_ids(folder) == expected
    ends = expected.get("eos_token_id", [])
    assert stop_ids(folder) == (tuple(ends) if isinstance(ends, list) else (ends,))


@pytest.mark.parametrize("added", [[{"id": 1}], [{"content": "a"}], [3], [{"content": "a", "id": "x"}], 3])
def test_tokens_that_are_none_are_refused(added: Any, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, tokenizer={"added_tokens": added})
    with pytest.raises(UserError) as caught:
        special_ids(folder)
    assert str(caught.value) == f"{folder}/tokenizer.json: added_tokens: must be a list of tokens with content and id"


def test_what_is_no_id_is_said_with_its_folder(tmp_path: Path) -> None:
    for value in (True, "7", [1, 2.0]):
        with pytest.raises(UserError) as caught:
            special_ids(folder_of(tmp_path, config={"pad_token_id": value}))
        needed = "must be an id, or a list of ids for the end of a sequence"
        assert str(caught.value) == f"{tmp_path}: pad_token_id = {value!r}: {needed}"


COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "vocab.json",
    "vocab.txt", "merges.txt",
)  # fmt: skip


def test_all_files_of_a_tokenizer_are_copied_and_no_others(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "source", generation_config={"top_k": 3}, config={"eos_token_id": 5})
    for name in (*COPIED, "model.safetensors", "notes.txt"):
        (source / name).write_text('{"of": "%s"}' % name)  # noqa: UP031
    copied = copy_tokenizer(source, tmp_path / "target")
    assert copied == [tmp_path / "target" / name for name in (*COPIED, "generation_config.json")]
    assert {file.name for file in (tmp_path / "target").iterdir()} == {file.name for file in copied}
    for name in COPIED:
        assert (tmp_path / "target" / name).read_bytes() == (source / name).read_bytes()
    text = (tmp_path / "target" / "generation_config.json").read_text()
    assert text == '{\n  "top_k": 3,\n  "eos_token_id": 5\n}\n'
    assert copy_tokenizer(source, source) == []
    assert copy_tokenizer(folder_of(tmp_path / "empty"), tmp_path / "nothing") == []
    assert not (tmp_path / "nothing").exists()
    only = folder_of(tmp_path / "only", tokenizer={})
    assert copy_tokenizer(only, tmp_path / "again") == [tmp_path / "again" / "tokenizer.json"]


def test_a_job_keeps_its_tokenizer_or_the_ids_of_its_source(tmp_path: Path) -> None:
    own = folder_of(tmp_path / "own", tokenizer={})
    config = load_config("debug")
    named = config.replace(data=config.data.replace(tokenizer=str(own)))
    kept = keep_tokenizer(named, tmp_path / "run")
    assert kept == config.replace(data=config.data.replace(tokenizer="tokenizer"))
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").exists()
    with_ids = folder_of(tmp_path / "ids", config={"eos_token_id": 5})
    assert keep_tokenizer(config, tmp_path / "second", with_ids) == config
    assert json.loads((tmp_path / "second" / "tokenizer" / "generation_config.json").read_text()) == {"eos_token_id": 5}
    for source in (None, own):
        assert keep_tokenizer(config, tmp_path / "third", source) == config
    assert not (tmp_path / "third").exists()


def test_the_folder_that_belongs_to_weights(tmp_path: Path) -> None:
    native = folder_of(tmp_path / "native")
    for path in (native, native / "model.safetensors", native / "step_00000003", tmp_path / "absent"):
        assert beside(path) is None
    (native / "model.safetensors").touch()
    folder_of(native / "step_00000003")
    kept = folder_of(native / "tokenizer", generation_config={})
    assert beside(native) == beside(native / "model.safetensors") == beside(native / "step_00000003") == kept
    folder_of(native / "other")
    assert beside(native / "other") is None
    inner = folder_of(native / "step_00000003" / "tokenizer", tokenizer={})
    assert beside(native / "step_00000003") == inner
    folder_of(native / "step_00000003", config={})
    assert beside(native / "step_00000003") == native / "step_00000003"
    (native / "tokenizer" / "generation_config.json").unlink()
    assert beside(native) is None
    (native / "tokenizer" / "vocab.json").touch()
    assert beside(native) == kept


def test_tokenizers_that_are_read_and_that_are_not(tmp_path: Path) -> None:
    assert tokenizer_problem(tmp_path) == "must be 'bytes' or a folder with a tokenizer.json"
    assert not has_tokenizer(tmp_path)
    for name in NOT_READ:
        (tmp_path / name).touch()
        assert has_tokenizer(tmp_path)
        if name != NOT_READ[1]:
            (tmp_path / name).unlink()
    (tmp_path / NOT_READ[0]).touch()
    assert tokenizer_problem(tmp_path) == (
        "holds tokenizer.model, spiece.model, which can't be read, and no tokenizer.json; transformers makes one: "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )
    (tmp_path / "tokenizer.json").touch()
    assert (tokenizer_problem(tmp_path), has_tokenizer(tmp_path)) == ("", True)


# TOML


def test_a_tokenizer_is_found_beside_its_file_and_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "bytes").mkdir()
    (tmp_path / "file").touch()
    for name in ("bytes", "", "absent", "file", 3, None):
        fields = {"data": {"tokenizer": name, "path": "p"}, "model": {}}
        assert with_tokenizer_beside(fields, tmp_path) == fields
    for other in ({}, {"data": 3}, {"data": {}}):
        assert with_tokenizer_beside({**other}, tmp_path) == other
    given = {"data": {"tokenizer": "here", "path": "p"}, "model": {}}
    found = with_tokenizer_beside(given, tmp_path)
    assert found == {"data": {"tokenizer": str(tmp_path / "here"), "path": "p"}, "model": {}}
    assert given["data"]["tokenizer"] == "here"
    (tmp_path / "config.toml").write_text('data.tokenizer = "here"')
    assert read_fields(tmp_path / "config.toml") == {"data": {"tokenizer": str(tmp_path / "here")}}


def test_toml_that_is_none_says_whose_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("a =")
    with pytest.raises(UserError, match=f"^{tmp_path}/config.toml: not valid TOML: Invalid value"):
        read_fields(tmp_path / "config.toml")
    with pytest.raises(UserError, match=r"^config: not valid TOML: "):
        config_from_toml("a =")
    with pytest.raises(UserError, match=r"^there: not valid TOML: "):
        parse_fields("[" * 5000, "there")


def test_a_config_as_plain_values_leaves_out_what_is_none() -> None:
    config = load_config("debug_vlm_moma")
    plain = config_to_dict(config)

    def check(value: Any) -> None:
        assert value is not None
        assert type(value) in (dict, list, str, int, float, bool)
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            check(inner)

    check(plain)
    assert toml._plain({"a": (1, (2, {"b": ()})), "c": {"d": (3,)}}) == {"a": [1, [2, {"b": []}]], "c": {"d": [3]}}
    assert section_of(plain, "vlm")["arch"] == "moma"
    schema: Any = json_schema()
    assert schema["type"] == "object"
    assert {"model", "train", "data"} <= schema["properties"].keys()


# Reading


def test_kinds_of_files_are_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    said = {tmp_path: "a folder", tmp_path / "pipe": "a named pipe", Path("/dev/null"): "a device"}
    for path, kind in said.items():
        with pytest.raises(UserError) as caught:
            check_regular(path)
        assert str(caught.value) == f"{path}: is {kind}; must be a regular file"
        with pytest.raises(UserError, match=f"{path}: is {kind}; "), opened(path):
            pass
    with pytest.raises(UserError, match=r"absent: can't be read: No such file or directory$"):
        check_regular(tmp_path / "absent")
    with pytest.raises(UserError, match="can't be read: embedded null byte"):
        check_regular("a\0b")
    (tmp_path / "five").write_bytes(b"12345")
    assert check_regular(tmp_path / "five") == 5


def test_a_pipe_is_neither_opened_nor_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    flags: list[int] = []
    real = os.open

    def recorded(path: Any, flag: int) -> int:
        flags.append(flag)
        return real(path, flag)

    monkeypatch.setattr(os, "open", recorded)
    with pytest.raises(UserError, match="is a named pipe"):
        read_bytes(tmp_path / "pipe", 5)
    assert flags == []
    read_bytes(tmp_path / "file", 5)
    assert flags == [os.O_RDONLY | os.O_NONBLOCK]


def test_an_error_without_words_of_the_system_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def odd(*_: object) -> None:
        raise OSError("odd")

    monkeypatch.setattr(os, "stat", odd)
    with pytest.raises(UserError, match=r"^there: can't be read: odd$"):
        check_regular("there")


def test_limits_of_sizes_are_reached_and_not_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "five"
    file.write_bytes(b"12345")
    assert read_bytes(file, 5) == b"12345"
    assert read_bytes(file, 6) == b"12345"
    with pytest.raises(UserError) as caught:
        read_bytes(file, 4)
    assert str(caught.value) == f"{file}: has 5 bytes; must be at most 4"
    with opened(file, 5) as handle:
        assert handle.read() == b"12345"
    with opened(file) as handle:
        assert handle.read() == b"12345"
    monkeypatch.setattr(reading, "_size", lambda *_: 0)  # a file system that tells no sizes
    assert read_bytes(file, 5) == b"12345"
    with pytest.raises(UserError) as caught:
        read_bytes(file, 4)
    assert str(caught.value) == f"{file}: has more than 4 bytes"
    assert (reading.MAX_TOML_BYTES, reading.MAX_JSON_BYTES) == (16 * 2**20, 256 * 2**20)


def test_text_is_utf_8_with_its_own_ends_of_lines(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_bytes("ä\r\nb\n".encode())
    assert read_text(file, 10) == "ä\r\nb\n"
    file.write_bytes(b"\xff")
    with pytest.raises(UserError, match=f"^{file}: can't be read: 'utf-8' codec"):
        read_text(file, 10)


def test_json_and_toml_nested_too_deep_are_no_json_and_no_toml(tmp_path: Path) -> None:
    assert parse_json(b'{"a": [1]}') == {"a": [1]}
    assert parse_toml("a = [1]") == {"a": [1]}
    deep = "[" * 100_000
    for parse, text in ((parse_json, deep), (parse_toml, f"a = {deep}")):
        with pytest.raises(ValueError, match="recursion"):
            parse(text)
    file = tmp_path / "a.json"
    for text, said in (("[]", "must hold a JSON object"), ("{", "not valid JSON: Expecting property name")):
        file.write_text(text)
        with pytest.raises(UserError, match=f"^{file}: {said}"):
            read_json(file)
    file.write_text('{"a": 1}')
    assert read_json(file) == {"a": 1}
    with pytest.raises(UserError, match="has 8 bytes; must be at most 7"):
        read_json(file, 7)


OUT = "is a link out of the folder; set data.follow_symlinks = true to follow it"


def test_files_below_a_folder(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for name in ("b/c.txt", "a.txt", "b/.hidden", ".git/x", "skip/y", "b/skip/z", "b0"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    elsewhere.mkdir()
    (elsewhere / "far.txt").touch()
    (root / "inner").symlink_to("b")
    (root / "near").symlink_to("a.txt")
    (root / "out").symlink_to(elsewhere)
    (root / "round").symlink_to("round")
    os.mkfifo(root / "pipe")
    os.mkfifo(root / "b" / "pipe")
    names, problems = files_below(root, frozenset({"skip", "a.txt"}))
    assert names == ["a.txt", "b/c.txt", "b0", "near"]
    circle = f"{root}/round: is a link that leads nowhere: "
    assert [problem for problem in problems if not problem.startswith(circle)] == [
        f"{root}/b/pipe: is a named pipe; must be a regular file", f"{root}/out: {OUT}",
        f"{root}/pipe: is a named pipe; must be a regular file",
    ]  # fmt: skip
    assert len(problems) == 4
    (root / "second way out").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    (tmp_path / "link").symlink_to(root)
    for name in (root, tmp_path / "link"):
        names, problems = files_below(name, frozenset({"skip"}), follow_symlinks=True)
        assert names == ["a.txt", "b/c.txt", "b0", "near", "out/far.txt"], "each folder once, by whatever way"
        assert len(problems) == 3
    with pytest.raises(UserError, match="absent: can't be read: No such file or directory"):
        files_below(root / "absent")


def test_names_within_a_folder_are_told_from_others(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "b").mkdir(parents=True)
    (root / "a.txt").touch()
    (tmp_path / "far.txt").touch()
    (root / "far").symlink_to(tmp_path / "far.txt")
    (root / "round").symlink_to("round")
    within = "must lie within the folder"
    said = {"a.txt": "", "absent": "", "b/absent": "", "../root/a.txt": within, "/etc/passwd": within, "a\0b": within,
            "b/..": within, "far": OUT, "b": "is a folder; must be a regular file"}  # fmt: skip
    assert {name: check_inside(root, name) for name in said} == said
    assert check_inside(root, "round").startswith("is a link that leads nowhere: ")
    assert check_inside(root, "far", follow_symlinks=True) == ""
    assert check_inside(root, "../far.txt", follow_symlinks=True) == within


# Writing


def test_a_file_is_written_aside_in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, open_before = [], len(os.listdir("/proc/self/fd"))
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (synced.append(os.readlink(f"/proc/self/fd/{handle}")), real(handle))
    )
    target = tmp_path / "deep" / "file.txt"
    with written_aside(target) as aside:
        assert aside.parent == target.parent
        assert aside.name.startswith(".file.txt.")
        assert aside.name.endswith(".part")
        assert aside.read_bytes() == b""
        aside.write_text("new")
        assert not target.exists()
        assert synced == []
    assert synced == [str(aside), str(target.parent)], "what is in the file, then the name"
    assert target.read_text() == "new"
    assert [file.name for file in target.parent.iterdir()] == ["file.txt"]
    assert len(os.listdir("/proc/self/fd")) == open_before

    def fail() -> None:
        with written_aside(target) as aside:
            aside.write_text("newer")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert target.read_text() == "new"
    assert [file.name for file in target.parent.iterdir()] == ["file.txt"]


def test_names_of_files_aside_are_never_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asides = {make_aside(tmp_path / "file") for _ in range(4)}
    assert len(asides) == 4
    (tmp_path / "link").symlink_to("elsewhere/real")
    beside_target = make_aside(tmp_path / "link")
    assert beside_target.parent == tmp_path / "elsewhere", "where it can be renamed within one file system"
    assert beside_target.name.startswith(".real.")
    assert all(len(aside.name) == len(".file.") + 8 + len(".part") for aside in asides)
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "same")
    make_aside(tmp_path / "file")
    with pytest.raises(FileExistsError):
        make_aside(tmp_path / "file")


def test_what_is_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught, written_aside(tmp_path / "folder"):
        pass
    assert str(caught.value) == f"{tmp_path}/folder: is a folder; the name of a file to write is needed"
    aside = make_aside(tmp_path / "other")
    with pytest.raises(UserError, match="folder: is a folder; the name of a file to write is needed"):
        commit(aside, tmp_path / "folder")
    with pytest.raises(UserError) as caught, written_aside("/dev/null"):
        pass
    assert str(caught.value) == "/dev/null: is a device; only regular files are written"
    with pytest.raises(UserError) as caught:
        make_folder(tmp_path / "file")
    assert str(caught.value) == f"{tmp_path}/file: is a file; the name of a folder is needed"
    with pytest.raises(UserError) as caught:
        make_folder("/dev/null")
    assert str(caught.value) == "/dev/null: is a device; the name of a folder is needed"
    long = tmp_path / ("x" * 300)
    with pytest.raises(UserError) as caught, written_aside(long):
        pass
    assert str(caught.value) == f"{str(long)!r}: can't be written: File name too long"
    with pytest.raises(UserError) as caught:
        make_folder(long)
    assert str(caught.value) == f"{str(long)!r}: can't be written to: File name too long"


def test_errors_of_the_system_name_the_file() -> None:
    errors = [(OSError(28, "No space"), "No space"), (OSError("odd"), "odd"), (SafetensorError("header"), "header")]
    for error, said in errors:
        with pytest.raises(UserError) as caught, file_errors("here", "can't be done"):
            raise error
        assert str(caught.value) == f"here: can't be done: {said}"
        assert caught.value.__cause__ is error
