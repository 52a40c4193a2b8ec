"""Tokenizers: documents are data, prompts are as transformers reads them, a stream is the text of all its ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from shared_config.data import build_tokenizer, document_starts, load_corpus, open_data
from shared_config.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from shared_config.errors import UserError
from shared_config.interchange.tokens import beside, copy_tokenizer, special_ids, stop_ids
from shared_config.interchange.toml import config_from_toml
from shared_config.loader import load_config
from tests.tokenizers import BEGIN, END, KINDS, byte_level, save, sentence_piece, words

LETTERS = st.text(st.sampled_from("helowrd ,ïéß你😀\ufffd"), max_size=12)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HuggingFaceTokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {name: HuggingFaceTokenizer(save(folder / name, built())) for name, built in KINDS.items()}


def whole(tokenizer: HuggingFaceTokenizer, prompt: list[int], new: list[int]) -> str:
    return tokenizer.decode([*prompt, *new])


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_stream_of_a_text_adds_up_to_it(kind: str, opened: dict[str, Any], data: st.DataObject) -> None:
    """Prompt and continuation are decoded as one text: spaces and letters of several ids are kept."""
    tokenizer = opened[kind]
    prompt = tokenizer.encode_prompt(data.draw(LETTERS))
    new = tokenizer.encode(data.draw(LETTERS)).tolist()
    pieces = list(tokenizer.decode_stream(new, after=prompt))
    assert tokenizer.decode(prompt) + "".join(pieces) == whole(tokenizer, prompt, new)
    assert len(pieces) == len(new) + 1


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_stream_of_any_ids_adds_up_to_their_text(kind: str, opened: dict[str, Any], data: st.DataObject) -> None:
    """Also of bytes that are no text, and of special ids, which show nothing."""
    tokenizer = opened[kind]
    new = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    prompt = tokenizer.encode_prompt("hello")
    streamed = "".join(tokenizer.decode_stream(new, after=prompt))
    assert tokenizer.decode(prompt) + streamed == whole(tokenizer, prompt, new)


def test_a_space_between_prompt_and_continuation_is_kept(opened: dict[str, Any]) -> None:
    tokenizer = opened["sentence_piece"]
    prompt, new = tokenizer.encode_prompt("hello"), tokenizer.encode("world").tolist()
    assert "".join(tokenizer.decode_stream(new, after=prompt)) == " world"
    assert "".join(tokenizer.decode_stream(new)) == "world"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["hello world ", "ß", "\ufffd", "你"])
def test_the_work_of_a_stream_grows_as_its_length(
    kind: str, text: str, opened: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = opened[kind]
    decoded: list[int] = []
    decode = HuggingFaceTokenizer.decode
    monkeypatch.setattr(
        HuggingFaceTokenizer, "decode", lambda self, ids: (decoded.append(len(ids)), decode(self, ids))[1]
    )
    ids = tokenizer.encode(text * 500).tolist()
    assert "".join(tokenizer.decode_stream(ids)) == decode(tokenizer, ids)
    assert sum(decoded) < 50 * len(ids)


def test_the_work_of_a_stream_of_broken_bytes_grows_as_its_length(
    opened: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = opened["byte_level"]
    decoded: list[int] = []
    decode = HuggingFaceTokenizer.decode
    monkeypatch.setattr(
        HuggingFaceTokenizer, "decode", lambda self, ids: (decoded.append(len(ids)), decode(self, ids))[1]
    )
    continuation = tokenizer.encode("ß").tolist()[-1]
    ids = [continuation] * 1000
    assert "".join(tokenizer.decode_stream(ids)) == "\ufffd" * 1000
    assert sum(decoded) < 100 * len(ids)


@pytest.mark.parametrize("key", ["bos_token", "eos_token"])
@pytest.mark.parametrize("value", [7, ["a"], {"content": 7}])
def test_a_special_token_that_is_no_text_is_refused(key: str, value: object, tmp_path: Path) -> None:
    folder = save(tmp_path / "own", byte_level(), **{key: value})
    with pytest.raises(UserError, match=rf"{key} = .*: must be the text of a token"):
        HuggingFaceTokenizer(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("post", [True, False])
@pytest.mark.parametrize("add_bos_token", [None, True, False])
@pytest.mark.parametrize("prompt", ["hello world", f"{BEGIN}hello{END} world", "", "  how"])
def test_a_prompt_begins_as_its_own_tokenizer_begins_it(
    kind: str, post: bool, add_bos_token: bool | None, prompt: str, tmp_path: Path
) -> None:
    """What transformers makes of the text, with no token before it twice."""
    transformers = pytest.importorskip("transformers")
    named = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
    folder = save(tmp_path, KINDS[kind](post), **named)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)(prompt)["input_ids"]
    ours = HuggingFaceTokenizer(folder).encode_prompt(prompt)
    begin = HuggingFaceTokenizer(folder)._id(BEGIN)
    doubled = theirs[:2] == [begin, begin]
    assert ours == (theirs[1:] if doubled else theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rendered_chat_begins_once(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    folder = save(tmp_path, KINDS[kind](True), chat_template=template)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "hello"}]
    rendered = theirs.apply_chat_template(chat, tokenize=False)
    ids = theirs.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert HuggingFaceTokenizer(folder).encode_prompt(rendered) == ids


@pytest.mark.parametrize("built", [byte_level, sentence_piece, words])
@given(parts=st.lists(st.sampled_from([BEGIN, END, " ", "hello", "<unk>"]), max_size=8))
def test_names_of_special_tokens_in_a_document_are_text(
    built: Any, tmp_path_factory: pytest.TempPathFactory, parts: list[str]
) -> None:
    tokenizer = HuggingFaceTokenizer(save(tmp_path_factory.mktemp("named"), built()))
    text = "".join(parts)
    ids = tokenizer.encode(text).tolist()
    assert not {tokenizer._id(BEGIN), tokenizer._id(END)} & set(ids)
    if built is not words:
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("post", [True, False])
def test_a_document_is_one_document_whatever_it_says(tmp_path: Path, special: bool, post: bool) -> None:
    folder = save(tmp_path / "tokenizer", sentence_piece(post))
    fields = json.loads((folder / "tokenizer.json").read_text())
    for token in fields["added_tokens"]:
        token["special"] = special
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(f"hello {END}{BEGIN} world" * 3)
    tokenizer = build_tokenizer(str(folder))
    corpus = load_corpus(tmp_path / "text", tokenizer=tokenizer)
    ids = np.concatenate([corpus.train.read(0, 10**6), corpus.heldout.read(0, 10**6)])
    assert (tokenizer.bos is not None) == post
    assert ids.tolist().count(1) == int(post)
    assert ids.tolist().count(2) == 1
    assert document_starts(ids, tokenizer).sum() == int(post)


TINY = (
    "--model.dim=16",
    "--model.n_layers=1",
    "--model.ffn_hidden_dim=24",
    "--train.seq_len=8",
    "--train.batch_size=1",
)


def packed(path: Path, *flags: str) -> Any:
    config = load_config("debug", [*TINY, f"--data.path={path}", "--data.pack_documents=true", *flags])
    return open_data(config).batch(0)["doc_ids"]


@pytest.mark.parametrize("suffix", ["npy", "bin"])
def test_token_files_are_packed_by_an_id_that_is_known(tmp_path: Path, suffix: str) -> None:
    ids = np.array([5, 6, 256, 7, 2, 8, 9, 10, 11] * 2, np.uint16)
    file = tmp_path / f"ids.{suffix}"
    np.save(file, ids) if suffix == "npy" else ids.tofile(file)
    with pytest.raises(UserError, match=r"set data\.eos_id"):
        packed(file)
    assert packed(file, "--data.eos_id=2")[0].tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    named = save(tmp_path / "tokenizer", sentence_piece(post=False))
    assert packed(file, f"--data.tokenizer={named}")[0].tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    with pytest.raises(UserError, match=r"data\.eos_id = 260: must be below model\.vocab_size = 260"):
        packed(file, "--data.eos_id=260")


def test_an_id_given_for_the_end_of_documents_ends_them(tmp_path: Path) -> None:
    assert ByteTokenizer(eos=7).bos is None
    tokenizer = build_tokenizer(str(save(tmp_path, sentence_piece())), 3)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.stops) == (None, 3, (3, 2))


def test_documents_need_something_that_tells_them_apart(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("hello world " * 30)
    folder = save(tmp_path / "tokenizer", sentence_piece(post=False), eos_token=None)
    flags = [*TINY, "--model.vocab_size=600", f"--data.path={tmp_path / 'text'}", f"--data.tokenizer={folder}"]
    with pytest.raises(UserError, match="names no token that begins or ends a document"):
        open_data(load_config("debug", flags))
    assert open_data(load_config("debug", [*flags, "--data.eos_id=2"])).tokens_per_batch > 1


@pytest.mark.parametrize("preset", ["debug", "debug_vlm_mot"])
@pytest.mark.parametrize(("size", "told"), [(258, False), (1024, False), (1025, True), (32000, True)])
def test_a_vocabulary_far_beyond_the_tokenizer_is_told(
    preset: str, size: int, told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    open_data(load_config(preset, [f"--model.vocab_size={size}"]))
    said = f"model.vocab_size = {size}: data.tokenizer = 'bytes' has only 258 ids; the others are never seen\n"
    assert capsys.readouterr().err == (said if told else "")


@pytest.mark.parametrize("preset", ["debug", "debug_vlm_mot"])
def test_a_vocabulary_below_the_tokenizer_is_refused(preset: str) -> None:
    with pytest.raises(UserError, match=r"model\.vocab_size = 257: must be at least 258"):
        open_data(load_config(preset, ["--model.vocab_size=257"]))


def test_ids_that_end_a_sequence_are_united(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", sentence_piece())
    (folder / "config.json").write_text('{"eos_token_id": [5, 6], "pad_token_id": 9, "bos_token_id": 1}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [6, 7], "pad_token_id": 8, "top_k": 3}')
    assert special_ids(folder) == {"bos_token_id": 1, "eos_token_id": [6, 7, 5], "pad_token_id": 8}
    assert build_tokenizer(str(folder)).stops == (2, 6, 7, 5)
    copy_tokenizer(folder, tmp_path / "b" / "tokenizer")
    assert special_ids(tmp_path / "b" / "tokenizer") == special_ids(folder)
    assert json.loads((tmp_path / "b" / "tokenizer" / "generation_config.json").read_text())["top_k"] == 3
    assert beside(tmp_path / "b" / "model.safetensors") == beside(tmp_path / "b") == tmp_path / "b" / "tokenizer"
    assert stop_ids(save(tmp_path / "c", sentence_piece())) == (2,)


@pytest.mark.parametrize("value", ['"2"', "true", "[[2]]", "2.0", '{"a": 2}', "[1, null]"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_what_is_no_id_is_one_message(tmp_path: Path, value: str, name: str) -> None:
    (tmp_path / name).write_text(f'{{"eos_token_id": {value}}}')
    with pytest.raises(UserError, match=r"eos_token_id = .*: must be an id, or a list of ids"):
        special_ids(tmp_path)


def test_a_tokenizer_beside_a_config_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "model" / "tokenizer", sentence_piece())
    text = '[data]\ntokenizer = "tokenizer"\n'
    (tmp_path / "model" / "config.toml").write_text(text)
    assert config_from_toml(text).data.tokenizer == "tokenizer"
    assert load_config(str(tmp_path / "model" / "config.toml")).data.tokenizer == str(tmp_path / "model" / "tokenizer")
    monkeypatch.chdir(tmp_path)
    assert load_config("model/config.toml").data.tokenizer == "model/tokenizer"
