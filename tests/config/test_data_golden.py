"""What data give, row by row and word by word: order, labels and pictures of a run stay the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shared_config.data import batches as batching
from shared_config.data import corpus as corpora
from shared_config.data import image_sources, media
from shared_config.data import tokenizer as tokenizers
from shared_config.data.batches import TextData, document_starts, permute
from shared_config.data.conversations import Conversation, ConversationData, encode_conversations
from shared_config.data.corpus import Corpus, TokenStream, is_held_out, load_corpus
from shared_config.data.image_sources import (
    Example,
    Folder,
    Shapes,
    is_held_out_row,
    open_folder,
    row_tokens,
)
from shared_config.data.images import ImageTextData, collate, with_noise_seeds
from shared_config.data.jsonl import Row, lines, parse_object, read_rows, refuse
from shared_config.data.media import drawn_frames, framed, nearest_frames, sample_times, to_rgb
from shared_config.data.shapes import caption_entropy, shape_clip, shape_image
from shared_config.data.template import ChatTemplate, TemplateError
from shared_config.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, check_vocabulary
from shared_config.errors import UserError
from shared_config.interchange.preprocessor import PixelRange
from shared_config.loader import load_config
from shared_config.schema import VideoConfig
from tests.config.test_jsonl import TEMPLATES, tokenizer_folder, turns
from tests.golden import check_golden

PLAIN = PixelRange(6, (0.5, 0.25, 0.5), (0.5, 0.5, 0.25))


def digest(array: Any) -> str:
    array = np.ascontiguousarray(array)
    return f"{array.dtype}{list(np.shape(array))}:{hashlib.sha256(array.tobytes()).hexdigest()[:10]}"


def shown(batch: dict[str, np.ndarray]) -> str:
    """All small arrays, and hashes of large ones."""
    short = lambda array: array.astype(int).tolist() if array.size <= 40 else digest(array)  # noqa: E731
    return " ".join(f"{name}:{array.dtype}={short(array)}" for name, array in batch.items())


def refusal(call: Callable[[], Any], folder: Path | str = "") -> str:
    with pytest.raises((UserError, ValueError, TemplateError)) as caught:
        call()
    return f"{type(caught.value).__name__}: {caught.value}".replace(str(folder) or "\0", "")


def written(name: str, lines: Sequence[str]) -> None:
    check_golden(name, "\n".join(lines) + "\n")


def stream_of(*parts: Sequence[int], dtype: Any = np.uint16) -> TokenStream:
    return TokenStream([(f"file {place}", np.array(part, dtype)) for place, part in enumerate(parts)])


TEXT = [256, 1, 2, 3, 257, 256, 4, 5, 257, 256, 256, 257, 6, 7, 8, 9, 256, 10, 11, 12, 257, 256, 13, 257]


def test_text_batches() -> None:
    lines = []
    for seq_len, size, world, packed, held, mask in (
        (3, 2, 1, False, 9, False), (3, 2, 2, True, 9, True), (4, 1, 3, True, 5, False), (23, 1, 1, True, 1, True),
        (1, 3, 1, True, 0, True), (5, 2, 1, False, 10, True), (5, 2, 1, True, 11, True),
    ):  # fmt: skip
        corpus = Corpus("here", stream_of(TEXT[:7], [], TEXT[7:]), stream_of(range(held)))
        for rank in range(world):
            data = TextData(corpus, batch_size=size, seq_len=seq_len, seed=size, rank=rank, world_size=world,
                            pack_documents=packed, heldout_batch_size=None if size == 1 else 2, heldout_steps=2,
                            text_mask=mask, vocab_size=300)  # fmt: skip
            lines.append(f"{seq_len} {size} {rank}/{world} {data.windows} {data.rows_per_batch} "
                         f"{data.tokens_per_batch} {data.notes} {data.fingerprint} {data.vocab_size}")  # fmt: skip
            lines += [f"  {shown(data.batch(index))}" for index in (0, 1, 7)]
            lines += [f"  held out {shown(batch)}" for batch in data.heldout()]
    for size in (1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000):
        lines.append(f"{size} {permute(np.arange(min(size, 12)), size, 'key').tolist()}")
    lines.append(str(permute(np.array([0, 2**40]), 2**50 + 1, "x").tolist()))
    without = ByteTokenizer(eos=5)
    lines += [str(document_starts(np.array(TEXT), each).astype(int).tolist()) for each in (ByteTokenizer(), without)]
    written("text_batches.txt", lines)


def test_refusals_of_text_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = Corpus("here", stream_of(TEXT), stream_of([1, 2]))
    make = lambda corpus=corpus, **given: lambda: TextData(corpus, **{"batch_size": 1, "seq_len": 3, **given})  # noqa: E731
    starts = Corpus("here", stream_of([1, *[256] * 12]), stream_of([1]))
    data = TextData(corpus, batch_size=1, seq_len=3, vocab_size=257)
    calls = [make(rank=1), make(rank=-1), make(rank=2, world_size=2), make(batch_size=0), make(seq_len=0),
             make(seq_len=24), make(starts, pack_documents=True, seq_len=4), lambda: data.batch(-1),
             lambda: [data.batch(index) for index in range(9)]]  # fmt: skip
    lines = [refusal(call) for call in calls]
    assert TextData(corpus, batch_size=1, seq_len=23).windows == 1
    assert TextData(corpus, batch_size=2, seq_len=3).vocab_size == 258
    monkeypatch.setattr(batching, "COUNTED_AT_ONCE", 4)
    monkeypatch.setattr(batching, "COUNTED_IDS", 12)
    part = Corpus("here", stream_of([1, *[256] * 8, *[7] * 30]), stream_of([1]))
    lines += [str(TextData(part, batch_size=1, seq_len=size, pack_documents=True).notes) for size in (1, 2, 4, 5, 9)]
    written("refused_text_batches.txt", lines)


def test_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "SAMPLED_BLOCKS", 3)
    monkeypatch.setattr(corpora, "BLOCK_LENGTH", 2)
    stream = TokenStream([("a", np.arange(3, dtype=np.uint16)), ("none", np.empty(0, np.uint16)),
                          ("b", np.arange(10, 14, dtype=np.uint32)),
                          ("c", np.array([2**32 - 1], np.uint32))])  # fmt: skip
    digests = [part.digest()[:12] for part in (stream, stream.slice(0, 6), stream.slice(0, 7))]
    lines = [f"{len(stream)} {' '.join(digests)}"]
    for start in range(9):
        for stop in range(start, 10):
            read, part = stream.read(start, stop), stream.slice(start, stop)
            assert read.dtype == np.int64
            assert part.read(0, 99).tolist() == read.tolist()
            lines.append(f"{start} {stop} {read.tolist()} {len(part)}")
    lines += [stream.source(index) for index in range(len(stream))]
    ids = stream.read(2, 7)
    stream.check_ids(ids, 2, 14)
    lines += [
        refusal(lambda: stream.check_ids(ids, 2, 13)),
        refusal(lambda: stream.check_ids(stream.read(7, 8), 7, 99)),
    ]
    stream.check_ids(ids[:0], 0, 1)
    lines.append(Corpus("x", stream.slice(0, 4), stream.slice(4, 8)).fingerprint)
    written("streams.txt", lines)


def corpus_said(corpus: Corpus) -> str:
    parts = (corpus.train, corpus.heldout)
    first = parts[0].source(0) if len(parts[0]) else ""
    return f"{corpus.name} {[part.read(0, 40).tolist() for part in parts]} {list(map(len, parts))} {first}"


def test_corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {
        name: tmp_path / name for name in ("text", "one", "ids", "mixed", "rows", "empty", "both", "json", "raw")
    }
    for folder in folders.values():
        folder.mkdir()
    for index in range(9):
        (folders["text"] / f"{index}.txt").write_text("é" * index)
    (folders["one"] / "x").write_text("some words of text")
    np.save(folders["ids"] / "a.npy", np.arange(7, dtype=np.uint32))
    np.arange(9, 12, dtype="<u2").tofile(folders["ids"] / "b.bin")
    (folders["ids"] / "c.bin").write_bytes(b"")
    np.save(folders["mixed"] / "a.npy", np.arange(9, dtype=np.uint16))
    (folders["mixed"] / "b.txt").write_text("x")
    documents = [json.dumps({"text": f"row {index}"}) for index in range(6)]
    (folders["rows"] / "r.jsonl").write_text("\n".join(documents))
    (folders["both"] / "r.jsonl").write_text("\n".join(documents))
    (folders["both"] / "other.txt").write_text("x")
    (folders["json"] / "a.json").write_text("[]")
    (folders["raw"] / "a.bin").write_bytes(b"123")
    lines = []
    for name, fraction in (("text", 0.3), ("text", 0.0), ("text", 1.0), ("one", 0.05), ("one", 0.5), ("ids", 0.2),
                           ("ids", 0.0), ("rows", 0.3), ("rows", 0.0)):  # fmt: skip
        corpus = load_corpus(folders[name], heldout_fraction=fraction)
        lines.append(f"{fraction} {corpus_said(corpus)}".replace(str(tmp_path), ""))
    lines.append(
        corpus_said(load_corpus(folders["one"] / "x", tokenizer=ByteTokenizer(eos=7))).replace(str(tmp_path), "")
    )
    (folders["one"] / "x").write_text("12")
    np.save(folders["mixed"] / "float.npy", np.ones(3))
    for name in ("mixed", "both", "json", "empty", "raw", "nothing"):
        lines.append(refusal(lambda name=name: load_corpus(tmp_path / name), tmp_path))
    assert len(load_corpus(folders["one"]).train) == 2
    (folders["one"] / "x").write_text("1")
    lines.append(refusal(lambda: load_corpus(folders["one"]), tmp_path))
    lines.append(refusal(lambda: load_corpus(folders["ids"], vocab_size=11), tmp_path))
    assert len(load_corpus(folders["ids"], vocab_size=12).train)
    (folders["mixed"] / "b.txt").unlink()
    lines.append(refusal(lambda: load_corpus(folders["mixed"]), tmp_path))
    (folders["one"] / "x").write_bytes(b"ab\0cd")
    lines.append(refusal(lambda: load_corpus(folders["one"]), tmp_path))
    monkeypatch.setattr(corpora, "MAX_TEXT_BYTES", 72)
    assert load_corpus(folders["text"])
    (folders["text"] / "9.txt").write_text("x")
    lines.append(refusal(lambda: load_corpus(folders["text"]), tmp_path))
    lines.append(str([is_held_out(f"row {index}", 0.25) for index in range(12)]).replace("False", "0"))
    written("corpora.txt", lines)


# Conversations


def talk(length: int, learned: Sequence[int], first: int = 0) -> Conversation:
    return Conversation(np.arange(first, first + length, dtype=np.uint32), np.isin(np.arange(length), learned))


TALKS = [talk(4, [2, 3]), talk(3, [0]), talk(9, [7, 8], 20), talk(2, [1], 40), talk(3, [2], 50), talk(6, [1, 5], 60),
         talk(7, [6], 70), talk(0, []), talk(8, [1, 7], 80)]  # fmt: skip


def test_conversation_batches() -> None:
    lines = []
    for seq_len, size, world, packed, mask in (
        (5, 2, 1, False, False), (5, 2, 2, True, True), (6, 1, 1, True, False), (7, 3, 1, False, True),
        (8, 2, 1, True, True),
    ):  # fmt: skip
        for rank in range(world):
            data = ConversationData(TALKS, TALKS[2:6], name="here", batch_size=size, seq_len=seq_len, seed=size,
                                    rank=rank, world_size=world, pack_documents=packed, text_mask=mask, heldout_steps=2,
                                    heldout_batch_size=None if size == 1 else 2)  # fmt: skip
            lines.append(f"{seq_len} {size} {rank}/{world} {data.notes} {data.fingerprint} {data.rows_per_batch} "
                         f"{data.tokens_per_batch}")  # fmt: skip
            lines += [f"  {shown(data.batch(index))}" for index in (0, 1, 6)]
            lines += [f"  held out {shown(batch)}" for batch in data.heldout()]
    make = lambda **given: lambda: ConversationData(  # noqa: E731
        [TALKS[1]], [], **{"name": "here", "batch_size": 1, "seq_len": 5, **given})  # fmt: skip
    lines += [refusal(make()), refusal(make(rank=1)), refusal(make(rank=-1)), refusal(lambda: data.batch(-1))]
    written("conversation_batches.txt", lines)


TALKED = {
    "two": turns("hello", "hell", "he", "llo"),
    "one": turns("hello", "w"),
    "asked": turns("hello"),
    "special": turns("say <|im_end|> </s>", "<|im_start|>hello"),
    "system": [{"role": "system", "content": "be"}, *turns("hello", "he")],
}


def test_templates(tmp_path: Path) -> None:
    lines = []
    for name, template in TEMPLATES.items():
        chat = ChatTemplate(tokenizer_folder(tmp_path / name, template, file=name == "marked"))
        for said, messages in TALKED.items():
            for learned_from in (0, 2):
                try:
                    ids, learned = chat.encode(messages, learned_from=learned_from)
                    lines.append(
                        f"{name} {said} {learned_from} {ids.dtype} {ids.tolist()} {learned.astype(int).tolist()}"
                    )
                except TemplateError as error:
                    lines.append(f"{name} {said} {learned_from} {error}".replace(str(tmp_path), ""))
    folder = tokenizer_folder(tmp_path / "named", None)
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    tools = "{{ tools | tojson }}{{ bos_token }}{{ strftime_now('%d %m %Y') }}" + TEMPLATES["chatml"]
    for given in ([{"name": "default", "template": TEMPLATES["chatml"]}, {"name": "tool_use", "template": tools}],
                  [{"name": "other", "template": "x"}], 5, None):  # fmt: skip
        (folder / "tokenizer_config.json").write_text(json.dumps({**fields, "chat_template": given}))
        if not isinstance(given, list) or len(given) == 1:
            lines.append(refusal(lambda: ChatTemplate(folder), tmp_path))
            continue
        chat = ChatTemplate(folder)
        for asked in (None, [], [{"é": 1}]):
            ids, learned = chat.encode(TALKED["two"], tools=asked)
            lines.append(f"tools {asked} {ids.tolist()} {learned.astype(int).tolist()}")
        for marked in (turns("a\ufdd0", "b"), turns("a", "b\ufdd1")):
            lines.append(refusal(lambda chat=chat, marked=marked: chat.encode(marked)))
    odd = "{{ 'always the same' }}"
    chat = ChatTemplate(tokenizer_folder(tmp_path / "odd", odd))
    lines.append(refusal(lambda: chat.encode(TALKED["two"])))
    written("templates.txt", lines)


def test_conversations_are_encoded_and_parted(tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(tokenizer_folder(tmp_path / "t", TEMPLATES["chatml"]))
    rows = [Row(f"f:{index}", "messages", messages=turns(f"he{index}", "llo")) for index in range(8)]
    given: dict[str, Any] = {"name": "here", "vocab_size": 300}
    lines = []
    for fraction, count in ((0.3, 8), (0.0, 8), (1.0, 8), (0.0, 1), (0.25, 2), (0.0, 2)):
        parts = encode_conversations(rows[:count], tokenizer, heldout_fraction=fraction, **given)
        lines.append(f"{fraction} {[[int(one.ids[6]) for one in part] for part in parts]}")
    small = {**given, "vocab_size": int(parts[0][0].ids.max())}
    lines.append(refusal(lambda: encode_conversations(rows[:2], tokenizer, heldout_fraction=0.1, **small)))
    lines.append(refusal(lambda: encode_conversations(rows, ByteTokenizer(), heldout_fraction=0.1, **given)))
    written("encoded_conversations.txt", lines)


def test_conversations_keep_their_side(tmp_path: Path) -> None:
    """Whatever other rows there are, in whichever order."""
    tokenizer = HuggingFaceTokenizer(tokenizer_folder(tmp_path / "t", TEMPLATES["chatml"]))
    rows = [Row(f"f:{index}", "messages", messages=turns(f"{index:02}", "llo")) for index in range(40)]
    sides = []
    for some in (rows, rows[::-1], rows[10:]):
        parts = encode_conversations(some, tokenizer, name="here", vocab_size=300, heldout_fraction=0.3)
        assert sum(map(len, parts)) == len(some)
        assert all(parts)
        sides.append([{one.ids.tobytes() for one in part} for part in parts])
    assert sides[0] == sides[1]
    assert all(few <= every for few, every in zip(sides[2], sides[0], strict=True))


def test_rows(tmp_path: Path) -> None:
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    texts = [
        '{"text": "a"}', '{"text": 5}', '{"text": null}', '{"text": {}}', '{"text": []}', '{"text": true}', "{}", "[1]",
        '{"other": 1, "b": 2}', json.dumps({"messages": [user, assistant]}), '{"messages": []}', '{"messages": 3}',
        json.dumps({"messages": [user], "text": "x"}), '{"prompt": "p", "completion": "c"}', '{"prompt": "p"}',
        json.dumps({"prompt": [user, assistant, user], "completion": [assistant], "tools": [1]}),
        '{"prompt": "p", "completion": []}', '{"prompt": 1, "completion": 2}', '{"messages": [1]}',
        json.dumps({"messages": [user, {"role": 5, "content": "x"}]}), json.dumps({"messages": [user], "tools": {}}),
        json.dumps({"messages": [user, {"role": "assistant"}]}), '{"text": "\\ud800"}',
        json.dumps({"messages": [user, {"role": "assistant", "tool_calls": [1]}]}),
        json.dumps({"messages": [{"role": "user", "content": 1}]}),
    ]  # fmt: skip
    lines_ = []
    for place, text in enumerate(texts):
        file = tmp_path / f"{place}.jsonl"
        file.write_text(f"\n{text}\n \t\n")
        try:
            (row,) = read_rows([file])
            lines_.append(f"{dataclasses.replace(row, place='')} {row.key}")
        except UserError as error:
            lines_.append(str(error).replace(str(tmp_path), ""))
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("\n".join([texts[0], texts[10], texts[0], texts[14]]))
    lines_.append(refusal(lambda: read_rows([mixed]), tmp_path))
    refuse([])
    for count in (1, 20, 21, 25):
        said = refusal(lambda count=count: refuse([f"p{place}" for place in range(count)])).splitlines()
        lines_.append(f"{count} {len(said)} {said[-1]}")
    lines_.append(str(list(lines("\ufeffa\n\n \n b\r\nc\x0bd"))))
    lines_.append(str([parse_object(text) for text in ("{}", "1", '{"a": 1}')]))
    written("rows.txt", lines_)


# Images


def test_shapes() -> None:
    lines = []
    for index in range(14):
        for split in ("train", "heldout"):
            image, caption = shape_image(index, 20 + index, split)
            clip, moving = shape_clip(index, 12, 1 + index % 4, split, draw_times=index % 3 == 0)
            lines.append(f"{index} {split} {digest(image)} {caption}; {digest(clip)} {moving}")
    lines.append(f"{caption_entropy():.12g} {caption_entropy(True):.12g}")
    videos = (None, VideoConfig(max_frames=4, min_frames=2), VideoConfig(max_frames=3, min_frames=3),
              VideoConfig(max_frames=4, min_frames=1, sampling_policy="random_segments"))  # fmt: skip
    for video in videos:
        shapes = Shapes(8, video)
        for index in (0, 1, 2, 3, 2**33):
            for split in ("train", "heldout"):
                example = shapes.example(index, split)
                lines.append(f"{index} {split} {digest(example.frames)} {example.text} {example.prompt!r}")
        assert shapes.fingerprint != Shapes(9, video).fingerprint
    written("shapes.txt", lines)


def folder_of_pictures(path: Path) -> Path:
    path.mkdir()
    for place in range(7):
        grey = np.full((5 + place, 8, 3), 30 * place, np.uint8)
        Image.fromarray(grey).save(path / f"{place}.png")
    (path / "bad.png").write_bytes(b"no picture")
    rows: list[dict[str, Any]] = [{"file_name": f"{place}.png", "text": f"t{place}"} for place in range(7)]
    rows += [
        {"text": "alone"},
        {"file_name": "bad.png", "text": "lost"},
        {"file_name": "1.png", "prompt": "what? ", "text": "x"},
    ]
    rows += [{"file_name": "2.png", "prompt": "a long prompt that fills the row", "text": "y"}]
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


def test_image_batches(tmp_path: Path) -> None:
    folder = folder_of_pictures(tmp_path / "pictures")
    lines = []
    video = VideoConfig(max_frames=3, min_frames=2)
    drawn = VideoConfig(max_frames=2, min_frames=1, sampling_policy="random_segments")
    for name, frames, text_len, size, world, mask in (
        ("shapes", 0, 12, 2, 1, False), ("shapes", 3, 60, 2, 2, True), ("folder", 0, 9, 2, 2, True),
        ("folder", 2, 40, 3, 1, False),
    ):  # fmt: skip
        clip = None if frames == 0 else video if frames == 3 else drawn
        for rank in range(world):
            source = Shapes(6, clip) if name == "shapes" else open_folder(folder, PLAIN, clip, 0.4)
            data = ImageTextData(source, tokenizer=ByteTokenizer(), pixels=PLAIN, batch_size=size, text_len=text_len,
                                 vocab_size=258, frames=frames, text_mask=mask, seed=size, rank=rank, world_size=world,
                                 heldout_batch_size=None if frames else 3, heldout_steps=2)  # fmt: skip
            sizes = f"{data.rows_per_batch} {data.tokens_per_batch}"
            lines.append(f"{name} {rank}/{world} {data.notes} {sizes} {data.fingerprint if name == 'shapes' else ''}")
            lines += [f"  {shown(data.batch(index))}" for index in (0, 1, 5)]
            lines += [f"  held out {shown(batch)}" for batch in data.heldout()]
            if isinstance(source, Folder):
                lines.append(f"  {sorted(source.undecodable)} {[len(rows) for rows in source.rows.values()]}")
    given: dict[str, Any] = {"tokenizer": ByteTokenizer(), "pixels": PLAIN, "batch_size": 1, "text_len": 9}

    def make(**own: Any) -> Callable[[], Any]:
        return lambda: ImageTextData(open_folder(folder, PLAIN, None, 0.0), **{"vocab_size": 258, **given, **own})

    lines += [refusal(make(vocab_size=257)), refusal(make(rank=1)), refusal(make(rank=-1))]
    lines.append(refusal(lambda: data.batch(-1)))
    (folder / "metadata.jsonl").write_text(json.dumps({"prompt": "a long prompt that fills the row", "text": "y"}))
    lines.append(refusal(make(), tmp_path))
    written("image_batches.txt", [line.replace(str(tmp_path), "") for line in lines])


def test_rows_of_pictures(tmp_path: Path) -> None:
    lines = []
    empty = np.zeros((0, 6, 6, 3), np.uint8)
    frames = np.arange(3 * 108, dtype=np.int64).reshape(3, 6, 6, 3).astype(np.uint8)
    examples = [
        Example(empty, "abc"),
        Example(frames[:1], "d", "ef"),
        Example(frames, "a longer text", "p"),
        Example(frames[:2], ""),
    ]
    for text_len in (1, 2, 4, 9):
        for count in (0, 1, 2, 4):
            lines.append(shown(collate(examples, ByteTokenizer(), PLAIN, text_len, count)))
    for tokenizer in (ByteTokenizer(), ByteTokenizer(eos=3)):
        ids, learned, _ = row_tokens("ab", "c", tokenizer)
        lines.append(f"{ids.tolist()} {learned.astype(int).tolist()}")
    config = load_config("debug_vlm_moma")
    assert config.vlm is not None
    micro = [{"x": np.ones(1)}] * 3
    for noise in (False, True):
        vlm = config.vlm.replace(moma_gumbel_noise=noise)
        seeded = with_noise_seeds(config.replace(vlm=vlm, train=config.train.replace(seed=3000)), micro, 7, 1, 4)
        lines.append(str([int(batch.get("noise_seed", -1)) for batch in seeded]))
    texts = ['{"text": 1}', '{"text": "a", "prompt": 2}', '{"text": "a", "file_name": 3}',
             '{"text": "a", "file_name": [1]}',
             '{"text": "a", "file_name": ["x.png", "y.png"]}', '{"text": "a", "file_name": "../x.png"}', "[]",
             '{"text": "\\ud800"}', '{"text": "a", "prompt": "\\udfff"}']  # fmt: skip
    (tmp_path / "metadata.jsonl").write_text("\n".join(texts))
    lines.append(refusal(lambda: open_folder(tmp_path, PLAIN, None, 0.1), tmp_path))
    (tmp_path / "metadata.jsonl").write_text("\n\n")
    lines.append(refusal(lambda: open_folder(tmp_path, PLAIN, None, 0.1), tmp_path))
    lines.append(refusal(lambda: open_folder(tmp_path / "none", PLAIN, None, 0.1), tmp_path))
    rows: list[Any] = [{"text": f"t{i}", **({"file_name": f"{i}.png"} if i % 2 else {})} for i in range(16)]
    lines.append(str([int(is_held_out_row(row, 0.5)) for row in rows]))
    for available, limit in ((0, 2), (2, 2), (3, 2), (7, 3)):
        places = [image_sources._places(available, limit, rng) for rng in (None, np.random.default_rng(0))]
        lines.append(f"{available} {limit} {places}")
    written("rows_of_pictures.txt", lines)


def test_frames_of_clips() -> None:
    lines = []
    for first, last, available in ((0.0, 2.0, 50), (1.0, 1.0, 1), (0.0, 10.0, 4), (0.5, 3.2, 90)):
        for fps, least, most in ((1.0, 1, 8), (2.0, 4, 6), (0.3, 2, 3)):
            config = VideoConfig(fps=fps, min_frames=least, max_frames=most)
            times = sample_times(first, last, available, config)
            near = nearest_frames(np.linspace(first, last, available).tolist(), times)
            lines.append(f"{first} {last} {available} {fps} {least} {most} {[f'{time:.6g}' for time in times]} {near}")
    lines.append(str(nearest_frames([0, 0, 0, 5, 6], np.array([0.0, 0.1, 5.5, 9.0]))))
    lines += [str(drawn_frames(available, count, np.random.default_rng(available))) for available, count in
              ((1, 1), (5, 5), (9, 2), (10, 3))]  # fmt: skip
    written("frames_of_clips.txt", lines)


def test_pictures_of_every_mode() -> None:
    ramp = np.arange(24).reshape(4, 6)
    grey = Image.fromarray((ramp * 10).astype(np.uint8))
    whole = {"small": ramp * 11, "large": ramp * 12, "negative": ramp - 5}
    floats = {"one": ramp / 23, "bytes": ramp * 11, "large": ramp * 100, "negative": ramp - 9, "above": ramp / 22}
    modes: dict[str, Any] = {"L": grey, "LA": grey.convert("LA"), "1": Image.fromarray(ramp % 2 == 0)}
    modes["I;16"] = Image.fromarray((ramp * 2600).astype(np.uint16))
    modes |= {f"I {name}": Image.fromarray(values.astype(np.int32)) for name, values in whole.items()}
    modes |= {f"F {name}": Image.fromarray(values.astype(np.float32)) for name, values in floats.items()}
    rgba = np.dstack([np.full((4, 6), 200), ramp * 10, ramp, ramp * 11]).astype(np.uint8)
    modes["RGBA"] = Image.fromarray(rgba)
    palette = Image.fromarray((ramp % 4).astype(np.uint8)).convert("P")
    palette.info["transparency"] = 1
    modes["P"] = palette
    plain = {name: np.asarray(to_rgb(image)) for name, image in modes.items()}
    lines = [f"{name} {digest(image)} {image[1, :, 0].tolist()}" for name, image in plain.items()]
    for bad in (np.nan, np.inf):
        with pytest.raises(media.UndecodableError, match=r"^holds pixels that are not finite$"):
            to_rgb(Image.fromarray(np.full((2, 2), bad, np.float32)))
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 9, 3), dtype=np.uint8))
    for side in (3, 4, 6, 12):
        for edge, crop in ((0, True), (4, True), (7, True), (10, True)):
            for image in (wide, wide.transpose(Image.Transpose.ROTATE_90)):
                pixels = PixelRange(
                    side, (0, 0, 0), (1, 1, 1), shortest_edge=edge, stretch=False, crop=crop, resample=0
                )
                lines.append(f"{side} {edge} {image.size} {digest(framed(image, pixels))}")
    lines.append(f"{framed(wide, PixelRange(3, (0, 0, 0), (1, 1, 1), resample=0)).tolist()}")
    thin = Image.fromarray(np.zeros((1, 3000, 3), np.uint8))
    with pytest.raises(media.UndecodableError) as caught:
        framed(thin, PixelRange(4, (0, 0, 0), (1, 1, 1), shortest_edge=212, stretch=False, crop=True))
    lines.append(str(caught.value))
    lines.append(str(np.round(PLAIN.numbers(np.arange(108, dtype=np.uint8).reshape(1, 6, 6, 3)), 5)[0, :, 0].tolist()))
    written("pictures.txt", lines)


# Bytes


def test_bytes_as_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    lines = []
    text = "é€😀a"
    for tokenizer in (ByteTokenizer(), ByteTokenizer(eos=97), ByteTokenizer(eos=300)):
        ids = tokenizer.encode(text).tolist()
        said = [*ids[:1], 300, *ids, 256, 257, 97, 999, 240, 159]
        lines.append(f"{tokenizer.bos} {tokenizer.eos} {tokenizer.stops} {tokenizer.encode_prompt(text)} {said}")
        lines.append(f"  {tokenizer.decode(said)!r} {list(tokenizer.decode_stream(said))}")
        lines.append(f"  {list(tokenizer.decode_stream(ids[1:], after=ids[:1]))}")
    for size in (258, 259, 1024, 1025, 2000):
        check_vocabulary(ByteTokenizer(), "bytes", size)
        lines.append(f"{size} {capsys.readouterr().err.strip()}")
    lines.append(refusal(lambda: check_vocabulary(ByteTokenizer(), "bytes", 257)))
    pairs = (("", ""), ("ab", "abc"), ("abc", "ab"), ("abc", "axc"), ("x", "y"))
    lines.append(str([tokenizers._common_length(*pair) for pair in pairs]))
    written("bytes.txt", lines)
