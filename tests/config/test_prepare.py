"""Text becomes token files: every document once, in order, whatever cuts, workers and kills there are."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_config.data import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    MixedData,
    TextData,
    TokenStream,
    build_tokenizer,
    open_data,
)
from shared_config.data import documents as reading
from shared_config.data import prepare as preparing
from shared_config.data.corpus import split_end
from shared_config.data.prepare import Encoding, Progress, prepare
from shared_config.errors import UserError
from shared_config.interchange import files
from shared_config.interchange.token_index import INDEX, UNFINISHED, read_index
from shared_config.loader import load_config
from shared_config.training.run_folder import write_config
from tests.tokenizers import KINDS, byte_level, save

BYTES = Encoding("bytes")
NIGHTLY = settings.get_current_profile_name() == "nightly"
TEXTS = st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]), max_size=40)
SEPARATOR = "\n\n"


def zstandard(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(data)


def parquet(texts: Sequence[str], rows: int) -> bytes:
    library = pytest.importorskip("pyarrow")
    out = io.BytesIO()
    table = library.table({"number": list(range(len(texts))), "text": library.array(texts, library.string())})
    pytest.importorskip("pyarrow.parquet").write_table(table, out, row_group_size=rows)
    return out.getvalue()


def arrow(texts: Sequence[str | None], rows: int) -> bytes:
    """As `datasets` saves them."""
    library, out = pytest.importorskip("pyarrow"), io.BytesIO()
    table = library.table({"number": list(range(len(texts))), "text": library.array(texts, library.large_string())})
    with library.ipc.new_stream(out, table.schema) as stream:
        stream.write_table(table, max_chunksize=rows)
    return out.getvalue()


def json_lines(texts: Sequence[str]) -> bytes:
    return "".join(
        json.dumps({"text": text, "n": 1}, ensure_ascii=len(text) % 2 == 0) + "\n" for text in texts
    ).encode()


WRITERS: dict[str, Callable[[Sequence[str]], bytes]] = {
    "a.jsonl": json_lines,
    "a.ndjson": lambda texts: b"\xef\xbb\xbf\n" + json_lines(texts).replace(b"\n", b"\n \r\n"),
    "a.jsonl.gz": lambda texts: gzip.compress(json_lines(texts[:1])) + gzip.compress(json_lines(texts[1:])),
    "a.jsonl.zst": lambda texts: zstandard(json_lines(texts[:1])) + zstandard(json_lines(texts[1:])),
    "a.parquet": lambda texts: parquet(texts, 2),
    "a.arrow": lambda texts: arrow(texts, 2),
    "a.txt": lambda texts: SEPARATOR.join(texts).encode(),
    "a.txt.gz": lambda texts: gzip.compress(SEPARATOR.join(texts).encode()) + b"\0" * 7,
}


def ids_of(texts: Sequence[str]) -> list[int]:
    """As bytes, each document within 256 and 257; an empty one is none."""
    return [id for text in texts if text for id in (256, *text.encode(), 257)]


def stored(folder: Path) -> list[int]:
    index = read_index(folder)
    arrays = [np.fromfile(folder / shard.file, np.dtype(index.dtype).newbyteorder("<")) for shard in index.shards]
    return np.concatenate(arrays).tolist()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture(autouse=True)
def _no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_sync", lambda path: None)


@pytest.fixture
def small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Edges of reads, of batches and of rows everywhere."""
    monkeypatch.setattr(reading, "READ_AT_ONCE", 24)
    monkeypatch.setattr(reading, "ROWS_AT_ONCE", 2)
    monkeypatch.setattr(preparing, "ENCODED_AT_ONCE", 30)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.usefixtures("small_reads")
def test_every_document_is_there_once_and_in_order(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    WRITERS[name](["x", "y"])  # what is not installed is skipped here

    @settings(max_examples=12)
    @given(groups=st.lists(st.lists(TEXTS, max_size=6), min_size=1, max_size=3), size=st.integers(9, 200))
    def check(groups: list[list[str]], size: int) -> None:
        folder = tmp_path_factory.mktemp("all")
        (folder / "in" / "deep").mkdir(parents=True)
        groups = [[*texts, "end"] for texts in groups]
        if ".txt" in name:
            groups = [[text.replace("\n", "|") for text in texts] for texts in groups]
        for number, texts in enumerate(groups):
            (folder / "in" / ("deep" if number else "") / f"{number}{name}").write_bytes(WRITERS[name](texts))
        index = prepare([folder / "in"], folder / "out", Encoding("bytes", separator=SEPARATOR), shard_bytes=size)
        texts = [text for texts in groups for text in texts]
        assert stored(folder / "out") == ids_of(texts)
        assert (index.documents, index.tokens) == (sum(map(bool, texts)), len(ids_of(texts)))
        assert {file.name for file in (folder / "out").iterdir()} == {INDEX, *(shard.file for shard in index.shards)}

    check()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(3):
        rows = [f"document {number} {row} " * (row % 5) for row in range(20)]
        (folder / f"{number}.jsonl").write_bytes(json_lines(rows))
    return folder


class Killed(BaseException):
    """As SIGKILL, nobody catches it."""


@settings(max_examples=15)
@given(kills=st.lists(st.integers(1, 30), min_size=1, max_size=4), torn=st.integers(0, 60), size=st.integers(200, 2000))
@pytest.mark.usefixtures("small_reads")
def test_what_was_killed_ends_as_if_it_had_not_been(
    kills: list[int], torn: int, size: int, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("killed")
    prepare([corpus], folder / "whole", BYTES, shard_bytes=size)
    made: list[str] = []
    for kill in kills:
        calls = itertools.count()

        def show(progress: Progress, kill: int = kill, calls: Any = calls) -> None:
            if next(calls) == kill:
                raise Killed

        try:
            prepare([corpus], folder / "out", BYTES, shard_bytes=size, show=show)
        except Killed:
            (folder / "out" / ".shard_00000.bin.dead.part").write_text("left by what was killed")
            journal = folder / "out" / UNFINISHED
            made = [line for line in journal.read_text().splitlines()[1:] if '"number"' in line]
            with journal.open("a") as file:
                file.write('{"number": 0, "file": "shard_00000.bin", "documents": 1, "tokens": 1}'[:torn])
    before = {file: file.stat().st_ino for file in (folder / "out").glob("shard*")}
    prepare([corpus], folder / "out", BYTES, shard_bytes=size)
    assert tree(folder / "out") == tree(folder / "whole")
    kept = [json.loads(line)["file"] for line in made]
    assert all((folder / "out" / name).stat().st_ino == before[folder / "out" / name] for name in kept)


def test_several_workers_write_the_same_files(tmp_path: Path, corpus: Path) -> None:
    tokenizer = Encoding(str(save(tmp_path / "tokenizer", byte_level())))
    told: list[Progress] = []
    prepare([corpus], tmp_path / "one", tokenizer, shard_bytes=500)
    prepare([corpus], tmp_path / "two", tokenizer, shard_bytes=500, workers=2, show=told.append)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert (told[-1].done, told[-1].tokens) == (told[-1].total, read_index(tmp_path / "two").tokens)


@pytest.mark.skipif(not NIGHTLY, reason="takes seconds")
@pytest.mark.parametrize("shards", range(1, 20, 3))
def test_a_killed_command_goes_on(shards: int, tmp_path: Path, corpus: Path) -> None:
    preparing.prepare([corpus], tmp_path / "whole", BYTES, shard_bytes=300)
    script = (
        "import sys; from pathlib import Path; from shared_config.data.prepare import Encoding, prepare; "
        "prepare([Path(sys.argv[1])], Path(sys.argv[2]), Encoding('bytes'), shard_bytes=300, workers=2)"
    )
    line = [sys.executable, "-c", script, str(corpus), str(tmp_path / "out")]
    process = subprocess.Popen(line)
    journal = tmp_path / "out" / UNFINISHED
    while process.poll() is None and (not journal.exists() or journal.read_text().count("\n") <= shards):
        time.sleep(0.001)
    process.kill()
    process.wait()
    subprocess.run(line, check=True)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_has_the_ids_of_its_texts(kind: str, tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(save(tmp_path, KINDS[kind]()))
    texts = ["hello world", "", "<s> and </s>", "naïve café, größer\n\n  world ", "hello</s>"]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids.tolist() == tokenizer.encode(text).tolist()
        assert ids.dtype == np.uint32


# What a run reads


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> tuple[Path, Path]:
    """A tokenizer, and what it has made."""
    folder = tmp_path_factory.mktemp("ready")
    tokenizer = save(folder / "tokenizer", byte_level())
    prepare([corpus], folder / "tokens", Encoding(str(tokenizer)), shard_bytes=500)
    return tokenizer, folder / "tokens"


def opened(ready: tuple[Path, Path], *overrides: str) -> TextData:
    fields = {"model.vocab_size": 300, "train.seq_len": 16, "data.path": ready[1], "data.pack_documents": "true"}
    data = open_data(load_config("debug", [*(f"--{name}={value}" for name, value in fields.items()), *overrides]))
    assert isinstance(data, TextData)
    return data


def test_a_run_reads_what_was_prepared(ready: tuple[Path, Path], tmp_path: Path) -> None:
    ids = np.array(stored(ready[1]), np.uint16)
    data = opened(ready)
    corpus = split_end("here", TokenStream([("here", ids)]), 0.05)
    tokenizer = build_tokenizer(str(ready[0]))
    plain = TextData(corpus, batch_size=data.batch_size, seq_len=16, seed=42, tokenizer=tokenizer, pack_documents=True)
    for index in (0, 7):
        for name, array in plain.batch(index).items():
            np.testing.assert_array_equal(data.batch(index)[name], array)
    assert data.fingerprint == plain.fingerprint
    assert len(data.corpus.train) + len(data.corpus.heldout) == read_index(ready[1]).tokens == len(ids)
    opened(ready, f"--data.tokenizer={ready[0]}", "--data.eos_id=1", "--data.token_dtype=uint16")
    opened(ready, f"--data.tokenizer={ready[1] / 'tokenizer'}")


def test_a_config_that_is_not_as_the_index_is_refused(ready: tuple[Path, Path], tmp_path: Path) -> None:
    other = save(tmp_path / "other", KINDS["metaspace"]())
    wrong = ["--model.vocab_size=299", "--data.eos_id=7", "--data.token_dtype=uint32", f"--data.tokenizer={other}"]
    with pytest.raises(UserError) as caught:
        opened(ready, *wrong)
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert lines[0] == f"model.vocab_size = 299: must be at least vocab_size = 300 of {ready[1] / INDEX}"
    assert lines[1].startswith("data.token_dtype = 'uint32': must be dtype = 'uint16' of")
    assert lines[2].startswith("data.eos_id = 7: must be eos = 1 of")
    assert lines[3].startswith(f"data.tokenizer = {str(other)!r}: must be the tokenizer 'tokenizer' that made")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, r"version = 2: must be 1"),
        ({"dtype": "int8"}, r"dtype = 'int8': must be one of uint16, uint32"),
        ({"dtype": "uint32"}, r"shard_00000.bin: has \d+ bytes; must be \d+, as token_index.json has \d+ tokens of"),
        ({"eos": "1"}, r"eos = '1': must be a number or null"),
        ({"vocab_size": None}, r"vocab_size = None: must be a number"),
        ({"tokens": 3}, r"tokens = 3: its shards have \d+"),
        ({"shards": [{"file": "../a", "documents": 1, "tokens": 1}]}, r"shards\[0\].file = '../a': must be the name"),
        ({"shards": [{"file": "a", "documents": -1, "tokens": 1}]}, r"shards\[0\].documents = -1: must be at least 0"),
        ({"shards": [{"file": "a.bin", "documents": 1, "tokens": 1}], "documents": 1, "tokens": 1}, r"a.bin: can't be"),
    ],
)  # fmt: skip
def test_a_damaged_index_is_refused(
    change: dict[str, Any], said: str, ready: tuple[Path, Path], tmp_path: Path
) -> None:
    for file in ready[1].glob("*.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    fields = json.loads((tmp_path / INDEX).read_text())
    (tmp_path / INDEX).write_text(json.dumps(fields | change))
    with pytest.raises(UserError, match=said):
        opened((ready[0], tmp_path))


@pytest.mark.parametrize("change", [-2, 2])
def test_a_file_of_another_length_is_refused(change: int, ready: tuple[Path, Path], tmp_path: Path) -> None:
    for file in ready[1].glob("*.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = tmp_path / "shard_00001.bin"
    os.truncate(shard, shard.stat().st_size + change)
    with pytest.raises(UserError, match=r"shard_00001.bin: has \d+ bytes; must be"):
        opened((ready[0], tmp_path))


def test_ids_beyond_two_bytes_get_four(tmp_path: Path, corpus: Path) -> None:
    index = prepare([corpus], tmp_path / "out", Encoding("bytes", eos_id=70_000))
    assert (index.dtype, index.vocab_size, index.bos, index.eos) == ("uint32", 70_001, None, 70_000)
    assert stored(tmp_path / "out")[-1] == 70_000
    exact = prepare([corpus], tmp_path / "exact", Encoding("bytes", eos_id=2**16 - 1))
    assert exact.dtype == "uint16"
    assert stored(tmp_path / "exact")[-1] == 2**16 - 1
    assert isinstance(build_tokenizer("bytes"), ByteTokenizer)


def test_sources_of_one_mixture_have_one_tokenizer(ready: tuple[Path, Path], tmp_path: Path, corpus: Path) -> None:
    """Ids of two would mean different texts."""
    other = save(tmp_path / "other", KINDS["metaspace"]())
    prepare([corpus], tmp_path / "tokens", Encoding(str(other)))
    (tmp_path / "a.txt").write_text("hello world " * 400)

    def mixed(*paths: Path, tokenizer: Path | str = "bytes") -> MixedData:
        given = ", ".join(f'{{path = "{path}"}}' for path in paths)
        fields = {
            "model.vocab_size": 300,
            "train.seq_len": 16,
            "data.sources": f"[{given}]",
            "data.tokenizer": tokenizer,
        }
        data = open_data(load_config("debug", [f"--{name}={value}" for name, value in fields.items()]))
        assert isinstance(data, MixedData)
        return data

    with pytest.raises(UserError, match=r"tokens' by 'other' \(.*tokens' by 'tokenizer' \(.*must be made by one"):
        mixed(ready[1], tmp_path / "tokens")
    with pytest.raises(UserError, match=r"data.tokenizer = 'bytes': must be the tokenizer 'tokenizer' that made"):
        mixed(ready[1], tmp_path / "a.txt")
    assert len(mixed(ready[1], tmp_path / "a.txt", tokenizer=ready[0]).sources) == 2
    assert len(mixed(ready[1], ready[1]).sources) == 2


def test_a_run_keeps_the_tokenizer_of_its_tokens(ready: tuple[Path, Path], tmp_path: Path) -> None:
    for number, flag in enumerate([f"--data.path={ready[1]}", f'--data.sources=[{{path = "{ready[1]}"}}]']):
        write_config(load_config("debug", [flag]), tmp_path / f"{number}")
        kept = tmp_path / f"{number}" / "tokenizer" / "tokenizer.json"
        assert kept.read_bytes() == (ready[0] / "tokenizer.json").read_bytes()


def test_a_worker_that_is_killed_is_told(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where memory is short; started again, the command goes on."""

    def kill(progress: Progress) -> None:
        for child in multiprocessing.active_children():
            child.kill()

    with pytest.raises(
        UserError, match="a worker process has ended early, as by a lack of memory; run the command again"
    ):
        prepare([corpus], tmp_path / "out", BYTES, shard_bytes=300, workers=2, show=kill)
    assert not multiprocessing.active_children()
    prepare([corpus], tmp_path / "out", BYTES, shard_bytes=300)
    prepare([corpus], tmp_path / "whole", BYTES, shard_bytes=300)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


# What is refused


def refusal(tmp_path: Path, given: dict[str, bytes], encoding: Encoding = BYTES) -> str:
    for name, content in given.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        prepare([tmp_path / "in"], tmp_path / "out", encoding)
    return str(caught.value).replace(str(tmp_path), "")


GOOD = b'{"text": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.csv",
            b"a",
            "/in/a.csv: must be one of .txt, .jsonl, .ndjson, .parquet, .arrow; text and JSON Lines",
        ),
        ("a.parquet.gz", b"a", "/in/a.parquet.gz: must be one of"),
        ("a.jsonl", GOOD + b"{\n", "/in/a.jsonl, byte 14: not valid JSON"),
        ("a.jsonl", GOOD + b'{"t": 1}\n', "/in/a.jsonl, byte 14: 'text' must be text (see --text-field); has 't'"),
        ("a.jsonl", GOOD + b'{"text": "\\ud800"}\n', "/in/a.jsonl, byte 14: the text holds half of a surrogate pair"),
        ("a.jsonl", GOOD + b"\xff\n", "/in/a.jsonl, byte 14: can't be read as text"),
        ("a.txt", b"a\0", "/in/a.txt, byte 0: contains zero bytes, so it is no text"),
        ("a.jsonl.gz", gzip.compress(GOOD)[:-9], "/in/a.jsonl.gz: can't be uncompressed: it ends too early"),
        ("a.jsonl.gz", GOOD, "/in/a.jsonl.gz: can't be uncompressed: "),
        ("a.txt", b"", "/in: hold no document"),
    ],
    ids=range(10),
)
def test_what_is_no_text_is_refused(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, {name: content}).startswith(said)


def test_what_was_compressed_and_cut_off_is_refused(tmp_path: Path) -> None:
    whole = zstandard(json_lines(["some text"] * 50))
    assert refusal(tmp_path, {"a.jsonl.zst": whole[:-5]}) == "/in/a.jsonl.zst: can't be uncompressed: it ends too early"
    assert refusal(tmp_path, {"a.jsonl.zst": GOOD}).startswith("/in/a.jsonl.zst: can't be uncompressed: ")


def test_columns_of_other_kinds_are_refused(tmp_path: Path) -> None:
    content = parquet(["a"], 1)
    said = refusal(tmp_path, {"a.parquet": content}, Encoding("bytes", text_field="body"))
    assert said == "/in/a.parquet: must have a column 'body' (see --text-field); has 'number', 'text'"
    said = refusal(tmp_path, {"a.parquet": content}, Encoding("bytes", text_field="number"))
    assert said == "/in/a.parquet, row 0: 'number' must be text, not 0"
    assert refusal(tmp_path, {"a.parquet": content[:-3]}).startswith("/in/a.parquet: can't be read as Parquet: ")


def test_a_folder_that_datasets_saved_is_its_data(tmp_path: Path) -> None:
    """Without descriptions, and without results that were cached beside the data."""
    for split, texts in {"test": ["c"], "train": ["a", "b"]}.items():
        folder = tmp_path / "in" / split
        folder.mkdir(parents=True)
        files = [f"data-{number:05}-of-{len(texts):05}.arrow" for number in range(len(texts))]
        for file, text in zip(files, texts, strict=True):
            (folder / file).write_bytes(arrow([text], 1))
        (folder / "cache-0123.arrow").write_bytes(arrow(["twice"], 1))
        (folder / "dataset_info.json").write_text("{}")
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": file} for file in files]}))
    (tmp_path / "in" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    prepare([tmp_path / "in"], tmp_path / "out", BYTES)
    assert stored(tmp_path / "out") == ids_of(["c", "a", "b"])
    prepare([tmp_path / "in" / "train"], tmp_path / "train", BYTES)
    assert stored(tmp_path / "train") == ids_of(["a", "b"])
    (tmp_path / "in" / "train" / "data-00000-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"train/state.json: lists data-00000-of-00002.arrow, which is not there"):
        prepare([tmp_path / "in"], tmp_path / "new", BYTES)
    (tmp_path / "in" / "train" / "state.json").write_text("[]")
    with pytest.raises(UserError, match=r"state.json: is no state of a folder that datasets saved"):
        prepare([tmp_path / "in"], tmp_path / "new", BYTES)


def test_streams_of_arrow_that_can_not_be_read_are_refused(tmp_path: Path) -> None:
    content = arrow(["a", "b"], 1)
    said = refusal(tmp_path, {"a.arrow": content}, Encoding("bytes", text_field="number"))
    assert said == "/in/a.arrow, row 0: 'number' must be text, not 0"
    said = refusal(tmp_path, {"a.arrow": arrow(["a", "b", "c", None], 2)})
    assert said == "/in/a.arrow, row 3: 'text' must be text, not None"
    said = refusal(tmp_path, {"a.arrow": content}, Encoding("bytes", text_field="body"))
    assert said == "/in/a.arrow: must have a column 'body' (see --text-field); has 'number', 'text'"
    assert refusal(tmp_path, {"a.arrow": content[:-90]}).startswith("/in/a.arrow: can't be read as a stream of Arrow: ")


@pytest.mark.parametrize(
    ("name", "package"), [("a.parquet", "pyarrow"), ("a.arrow", "pyarrow"), ("a.jsonl.zst", "zstandard")]
)
def test_a_missing_package_is_named_with_its_extra(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    said = refusal(tmp_path, {name: b"a"})
    assert said == f"/in/{name}: reading it needs the package '{package}' (pip install 'kempnerforge-twin[prepare]')"


def test_other_sources_and_options_are_not_mixed_in(tmp_path: Path, corpus: Path) -> None:
    prepare([corpus], tmp_path / "out", BYTES)
    assert prepare([corpus], tmp_path / "out", BYTES) == read_index(tmp_path / "out")
    for encoding in (Encoding("bytes", eos_id=1), Encoding("bytes", separator="x")):
        with pytest.raises(UserError, match="was made of other sources or by other options; give another folder"):
            prepare([corpus], tmp_path / "out", encoding)
    with pytest.raises(UserError, match=r"0.jsonl: is read already, as"):
        prepare([corpus, corpus / "0.jsonl"], tmp_path / "new", BYTES)
    with pytest.raises(UserError, match=r"is, is within, or holds the folder that is read"):
        prepare([corpus], corpus / "out", BYTES)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.md").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes.md, and is no folder of tokens"):
        prepare([corpus], tmp_path / "mine", BYTES)


def test_a_document_may_not_be_longer_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_DOCUMENT_BYTES", 1000)
    assert "a document of more than 1000 bytes; must be at most" in refusal(tmp_path, {"a.txt": b"a" * 1001})
    assert "(--separator parts the documents of a text)" in refusal(tmp_path, {"a.txt": b"a" * 1001})
