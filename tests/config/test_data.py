"""Token data: the corpus and its split, tokenizers, and that batch k is fixed by seed, rank and sizes alone."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared_config.data import (
    BOS,
    EOS,
    VOCAB_SIZE,
    ByteTokenizer,
    Corpus,
    TextData,
    TokenStream,
    build_tokenizer,
    load_corpus,
    open_text_data,
    permute,
)
from shared_config.data import corpus as corpora
from shared_config.errors import UserError
from shared_config.loader import load_config


def corpus_of(train: np.ndarray, heldout: np.ndarray | None = None) -> Corpus:
    heldout = heldout if heldout is not None else np.arange(40, dtype=np.uint16)
    return Corpus("here", TokenStream([("train", train)]), TokenStream([("heldout", heldout)]))


def numbered(length: int) -> Corpus:
    """A corpus whose id at position i is i, so that a batch shows where it was taken from."""
    return corpus_of(np.arange(length, dtype=np.uint32))


def numbered_data(length: int, **arguments) -> TextData:
    return TextData(numbered(length), vocab_size=length, **arguments)


# Order


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 600), key=st.text(max_size=8))
def test_a_permutation_takes_each_place_once(size: int, key: str) -> None:
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


@settings(deadline=None)
@given(size=st.integers(1, 2**50), data=st.data())
def test_an_index_is_permuted_alone_as_among_others(size: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, size - 1))
    alone = permute(np.array([index]), size, "key")
    assert 0 <= alone[0] < size
    assert alone[0] == permute(np.array([size - 1, index, 0]), size, "key")[1]


def test_permutations_look_random() -> None:
    """Fixed points, neighbours kept together, and correlation with the identity and with other keys, over 200 keys."""
    size = 1000
    orders = np.array([permute(np.arange(size), size, str(key)) for key in range(200)], dtype=np.int64)
    fixed = np.equal(orders, np.arange(size)).sum(axis=1)
    kept = np.equal(np.diff(orders, axis=1), 1).sum(axis=1)
    matrix = np.asarray(np.corrcoef(np.vstack([orders, np.arange(size)])))
    correlations = matrix[np.triu_indices(201, 1)]
    assert abs(fixed.mean() - 1) < 0.3
    assert abs(kept.mean() - 1) < 0.3
    assert abs(correlations.std() * np.sqrt(size) - 1) < 0.05
    assert abs(correlations.mean() * np.sqrt(size)) < 0.05


def test_the_order_is_written_in_stone() -> None:
    """Numbers of this version: checkpoints and other machines rely on them."""
    assert permute(np.arange(10), 10, "train 0 0").tolist() == PERMUTATION
    batch = numbered_data(1001, batch_size=4, seq_len=10, seed=3).batch(30)
    assert batch["tokens"][:, 0].tolist() == FIRST_TOKENS


PERMUTATION = [3, 8, 2, 1, 0, 9, 6, 7, 5, 4]
FIRST_TOKENS = [870, 840, 280, 520]


@settings(max_examples=50, deadline=None)
@given(
    windows=st.integers(1, 60), tail=st.integers(0, 3), batch_size=st.integers(1, 7), world_size=st.integers(1, 3),
    seed=st.integers(0, 2**40),
)  # fmt: skip
def test_an_epoch_visits_every_window_once(
    windows: int, tail: int, batch_size: int, world_size: int, seed: int
) -> None:
    seq_len, epochs = 4, 3
    length = windows * seq_len + 1 + tail
    ranks = [
        numbered_data(length, batch_size=batch_size, seq_len=seq_len, seed=seed, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert ranks[0].windows == windows
    batches = -(-windows * epochs // (batch_size * world_size))
    firsts = [row[0] for k in range(batches) for data in ranks for row in data.batch(k)["tokens"].tolist()]
    for epoch in range(epochs):
        visited = firsts[epoch * windows : (epoch + 1) * windows]
        assert sorted(visited) == [window * seq_len for window in range(windows)]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return numbered_data(401, batch_size=100, seq_len=4, seed=seed).batch(epoch)["tokens"][:, 0].tolist()

    orders = [order(0, 0), order(0, 1), order(1, 0)]
    assert all(orders[i] != orders[j] for i in range(3) for j in range(i))


@settings(max_examples=50, deadline=None)
@given(world_size=st.integers(1, 4), batch_size=st.integers(1, 5), k=st.integers(0, 10**6), seed=st.integers(0, 99))
def test_ranks_together_are_the_batch_of_one_rank(world_size: int, batch_size: int, k: int, seed: int) -> None:
    length = 4 * 50 + 1
    whole = numbered_data(length, batch_size=batch_size * world_size, seq_len=4, seed=seed)
    ranks = [
        numbered_data(length, batch_size=batch_size, seq_len=4, seed=seed, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for name, expected in whole.batch(k).items():
        np.testing.assert_array_equal(np.concatenate([data.batch(k)[name] for data in ranks]), expected)
    assert {data.rows_per_batch for data in ranks} == {whole.rows_per_batch}
    assert {data.tokens_per_batch for data in ranks} == {whole.tokens_per_batch}


def test_micro_batches_together_are_the_large_batch() -> None:
    large = numbered_data(4001, batch_size=12, seq_len=8).batch(5)
    small = [numbered_data(4001, batch_size=4, seq_len=8).batch(5 * 3 + i) for i in range(3)]
    for name in large:
        np.testing.assert_array_equal(np.concatenate([batch[name] for batch in small]), large[name])


def test_a_batch_does_not_depend_on_the_process() -> None:
    script = (
        "import hashlib; from shared_config.data import *; "
        "data = TextData(load_corpus(), batch_size=3, seq_len=50, seed=7, pack_documents=True); "
        "print(hashlib.sha256(b''.join(array.tobytes() for array in data.batch(1234).values())).hexdigest())"
    )
    data = TextData(load_corpus(), batch_size=3, seq_len=50, seed=7, pack_documents=True)
    here = hashlib.sha256(b"".join(array.tobytes() for array in data.batch(1234).values())).hexdigest()
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert here == there


# Labels, documents, held-out batches


def test_labels_are_the_next_ids() -> None:
    batch = numbered_data(1001, batch_size=6, seq_len=10).batch(0)
    assert batch["tokens"].dtype == batch["labels"].dtype == np.int32
    assert batch["tokens"].shape == batch["labels"].shape == (6, 10)
    np.testing.assert_array_equal(batch["labels"], batch["tokens"] + 1)
    assert set(batch) == {"tokens", "labels"}


def test_packed_documents_have_ids_and_no_label_crosses() -> None:
    text = [BOS, 65, 66, EOS, BOS, 67, EOS, BOS, 68, 69, 70, EOS, BOS]
    data = TextData(corpus_of(np.array(text, np.uint16)), batch_size=1, seq_len=12, pack_documents=True)
    batch = data.batch(0)
    assert batch["doc_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2]]
    assert batch["doc_ids"].dtype == np.int32
    assert batch["labels"].tolist() == [[65, 66, EOS, -100, 67, EOS, -100, 68, 69, 70, EOS, -100]]
    plain = TextData(corpus_of(np.array(text, np.uint16)), batch_size=1, seq_len=12).batch(0)
    assert plain["labels"].tolist() == [text[1:]]


def test_without_a_first_id_documents_part_after_the_last_id() -> None:
    corpus, end_only = corpus_of(np.array([65, 66, EOS, 67, 68, EOS, 69], np.uint16)), ByteTokenizer(eos=EOS)
    batch = TextData(corpus, batch_size=1, seq_len=6, pack_documents=True, tokenizer=end_only).batch(0)
    assert batch["doc_ids"].tolist() == [[0, 0, 0, 1, 1, 1]]
    assert batch["labels"].tolist() == [[66, EOS, -100, 68, EOS, -100]]


@settings(max_examples=60, deadline=None)
@given(text=st.lists(st.sampled_from([65, 66, BOS, EOS]), min_size=9, max_size=60), seq_len=st.integers(1, 8))
def test_packing_masks_exactly_the_crossings(text: list[int], seq_len: int) -> None:
    data = TextData(corpus_of(np.array(text, np.uint16)), batch_size=2, seq_len=seq_len, pack_documents=True)
    plain = TextData(corpus_of(np.array(text, np.uint16)), batch_size=2, seq_len=seq_len)
    for k in range(4):
        packed, whole = data.batch(k), plain.batch(k)
        np.testing.assert_array_equal(packed["tokens"], whole["tokens"])
        crosses = whole["labels"] == BOS
        np.testing.assert_array_equal(packed["labels"], np.where(crosses, -100, whole["labels"]))
        np.testing.assert_array_equal(np.diff(packed["doc_ids"], axis=1), crosses[:, :-1])


def test_packed_documents_end_with_a_short_held_out_stream() -> None:
    heldout = np.array([BOS, 65, EOS, BOS, 66, 67, BOS, 68, 69], np.uint16)  # 8 predictions: a window of 5, one of 3
    data = TextData(corpus_of(np.arange(40, dtype=np.uint16), heldout), batch_size=2, seq_len=5, pack_documents=True)
    (batch,) = data.heldout()
    rows = {tuple(tokens): place for place, tokens in enumerate(batch["tokens"].tolist())}
    whole, short = rows[BOS, 65, EOS, BOS, 66], rows[67, BOS, 68, 0, 0]
    assert batch["doc_ids"][[whole, short]].tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 0, 0]]
    assert batch["labels"][[whole, short]].tolist() == [[65, EOS, -100, 66, 67], [-100, 68, 69, -100, -100]]


def test_heldout_batches_are_fixed_and_cover_a_short_stream_once() -> None:
    heldout = np.arange(100, 147, dtype=np.uint16)  # 46 predictions: five windows of 10, the last one short
    corpus = corpus_of(np.arange(100, dtype=np.uint16), heldout)

    def batches(**arguments) -> list[dict]:
        return TextData(corpus, batch_size=2, seq_len=10, **arguments).heldout()

    labels = np.concatenate([batch["labels"] for batch in batches()])
    assert labels.shape == (6, 10)
    assert sorted(labels[labels != -100].tolist()) == list(range(101, 147))
    for one, other in zip(batches(seed=0), batches(seed=1), strict=True):
        np.testing.assert_array_equal(one["labels"], other["labels"])
    assert [len(batches(heldout_steps=steps)) for steps in (0, 1, 3, 9)] == [0, 1, 3, 3]
    assert batches(heldout_batch_size=3)[0]["tokens"].shape == (3, 10)
    for batch in batches(text_mask=True):
        np.testing.assert_array_equal(batch["text_mask"], batch["labels"] != -100)


def test_heldout_ranks_have_the_same_number_of_batches_and_share_no_row() -> None:
    corpus = corpus_of(np.arange(100, dtype=np.uint16), np.arange(100, 147, dtype=np.uint16))
    ranks = [TextData(corpus, batch_size=2, seq_len=10, rank=rank, world_size=4).heldout() for rank in range(4)]
    assert [len(batches) for batches in ranks] == [1, 1, 1, 1]
    labels = np.concatenate([batches[0]["labels"] for batches in ranks])
    assert sorted(labels[labels != -100].tolist()) == list(range(101, 147))


# The embedded corpus


def test_the_embedded_corpus_is_this_pythons_sources() -> None:
    corpus = load_corpus()
    total = len(corpus.train) + len(corpus.heldout)
    assert total > 2_000_000
    assert 0.01 < len(corpus.heldout) / total < 0.12
    streams = [stream.read(0, len(stream)) for stream in (corpus.train, corpus.heldout)]
    text = b"".join(ids[ids < 256].astype(np.uint8).tobytes() for ids in streams)
    assert Path(json.__file__).read_bytes() in text
    assert corpus.train.read(0, 1).tolist() == [BOS]
    assert corpus.train.read(len(corpus.train) - 1, len(corpus.train)).tolist() == [EOS]


def test_the_embedded_corpus_splits_by_file(tmp_path: Path) -> None:
    """Files go to a side by their own name alone: adding one moves no other."""
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"<{i}>")

    def sides() -> tuple[set[str], set[str]]:
        corpus = load_corpus(tmp_path, heldout_fraction=0.2)
        texts = [ByteTokenizer().decode(stream.read(0, len(stream))) for stream in (corpus.train, corpus.heldout)]
        train, heldout = ({part + ">" for part in text.split(">")[:-1]} for text in texts)
        return train, heldout

    train, heldout = sides()
    assert not train & heldout
    assert len(train | heldout) == 60
    assert 3 <= len(heldout) <= 25
    (tmp_path / "added.txt").write_text("<added>")
    more_train, more_heldout = sides()
    assert train <= more_train
    assert heldout <= more_heldout
    assert (more_train | more_heldout) - (train | heldout) == {"<added>"}


def test_fingerprints_tell_corpora_apart(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    first = load_corpus(tmp_path).fingerprint
    assert load_corpus(tmp_path).fingerprint == first
    (tmp_path / "a.txt").write_text("some tex!")
    assert load_corpus(tmp_path).fingerprint != first


# The user's data


def test_a_file_of_text_gives_its_end_as_heldout(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes(bytes(range(1, 101)))
    corpus = load_corpus(tmp_path / "book.txt", heldout_fraction=0.1)
    assert corpus.train.read(0, 999).tolist() == [BOS, *range(1, 92)]
    assert corpus.heldout.read(0, 999).tolist() == [*range(92, 101), EOS]


def test_a_folder_is_read_in_order_without_hidden_files(tmp_path: Path) -> None:
    for name, text in {
        "b/1.txt": "B",
        "a.txt": "A",
        ".hidden": "X",
        ".git/config": "X",
        "c.md": "C",
        "empty": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    corpus = load_corpus(tmp_path, heldout_fraction=1e-9)
    ids = [*corpus.train.read(0, 99).tolist(), *corpus.heldout.read(0, 99).tolist()]
    assert ByteTokenizer().decode(ids) == "ABC"
    assert ids.count(BOS) == ids.count(EOS) == 3


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("suffix", [".npy", ".bin"])
def test_token_files_are_mapped_and_joined(tmp_path: Path, dtype: type, suffix: str) -> None:
    ids = np.arange(1000, dtype=dtype)
    for name, part in {"0": ids[:300], "1": ids[300:301], "2": ids[301:]}.items():
        np.save(tmp_path / f"{name}.npy", part) if suffix == ".npy" else part.tofile(tmp_path / f"{name}.bin")
    corpus = load_corpus(tmp_path, vocab_size=1000, token_dtype=np.dtype(dtype).name)
    assert len(corpus.train) == 950
    assert isinstance(corpus.train._parts[0], np.memmap)
    np.testing.assert_array_equal(corpus.train.read(0, 950), ids[:950])
    np.testing.assert_array_equal(corpus.heldout.read(0, 50), ids[950:])
    np.testing.assert_array_equal(corpus.train.read(298, 303), ids[298:303])


@given(cuts=st.lists(st.integers(0, 30), max_size=6), start=st.integers(0, 30), length=st.integers(0, 30))
def test_a_stream_reads_like_one_array(cuts: list[int], start: int, length: int) -> None:
    whole = np.arange(30, dtype=np.uint16)
    parts = np.split(whole, sorted(cuts))
    stream = TokenStream([(str(i), part) for i, part in enumerate(parts)])
    assert len(stream) == 30
    np.testing.assert_array_equal(stream.read(start, start + length), whole[start : start + length])
    np.testing.assert_array_equal(stream.slice(start, start + length).read(0, 99), whole[start : start + length])


def test_each_unusable_path_says_why(tmp_path: Path) -> None:
    def refused(name: str, content: bytes | np.ndarray | None, **arguments) -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            np.save(path, content)
        with pytest.raises(UserError) as caught:
            load_corpus(path, **arguments)
        return str(caught.value)

    (tmp_path / "nothing").mkdir()
    assert "no such file or folder" in refused("absent", None)
    assert "holds no files" in refused("nothing", None)
    assert "holds 0 tokens" in refused("empty.txt", b"")
    assert "image.png" in refused("image.png", b"\x89PNG\0\0")
    assert "not text" in refused("image.png", b"\x89PNG\0\0")
    assert "odd.bin" in refused("odd.bin", b"123")
    assert "3 bytes are no whole number of uint16 ids" in refused("odd.bin", b"123")
    assert "short.npy" in refused("short.npy", b"\x93NUMPY")
    assert "is int64 of shape (5,)" in refused("signed.npy", np.zeros(5, np.int64))
    assert "is uint16 of shape (5, 2)" in refused("square.npy", np.zeros((5, 2), np.uint16))
    ids = np.array([1, 2, 3, 300, 4, 5], np.uint16)
    assert "large.npy, token 3: id 300 is outside the vocabulary" in refused("large.npy", ids, vocab_size=257)
    (tmp_path / "mixed").mkdir()
    np.save(tmp_path / "mixed" / "a.npy", ids)
    (tmp_path / "mixed" / "b.txt").write_text("text")
    assert "(b.txt); must be of one kind" in refused("mixed", None)


def test_a_vocabulary_below_the_byte_ids_is_refused() -> None:
    with pytest.raises(UserError, match=r"id 25[67] is outside the vocabulary; must be below model.vocab_size = 256"):
        load_corpus(vocab_size=256)


def test_ids_beyond_the_first_check_are_refused_when_read() -> None:
    data = numbered_data(41, batch_size=10, seq_len=4)
    data.vocab_size = 17
    with pytest.raises(UserError, match=r"train, token 32: id 32 is outside the vocabulary; .* model.vocab_size = 17"):
        data.batch(0)


def test_the_first_check_reads_no_more_than_it_checks_and_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Watched(TokenStream):
        def read(self, start: int, stop: int) -> np.ndarray:
            read.append((start, stop))
            return super().read(start, stop)

    read: list[tuple[int, int]] = []
    monkeypatch.setattr(corpora, "BLOCK_LENGTH", 4)
    monkeypatch.setattr(corpora, "CHECKED_AT_ONCE", 10)
    streams = [Watched([("ids", np.arange(length, dtype=np.uint32))]) for length in (25, 6)]
    corpora._check_vocabulary(Corpus("here", *streams), 100)
    assert read == [(0, 4), (4, 8), (8, 10), (0, 4), (4, 6)]


def test_a_stream_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.seq_len = 50: needs at least 51 training tokens, but here has 50"):
        numbered_data(50, batch_size=1, seq_len=50)
    assert numbered_data(51, batch_size=1, seq_len=50).windows == 1


# Tokenizers


@given(text=st.text())
def test_bytes_decode_to_what_was_encoded(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert tokenizer.decode(ids) == text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    pieces = list(tokenizer.decode_stream(ids))
    assert "".join(pieces) == tokenizer.decode(ids)
    assert len(pieces) == len(ids) + 1


def test_special_and_unknown_ids_decode() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([BOS, 104, 105, EOS]) == "hi"
    assert tokenizer.decode([104, VOCAB_SIZE, 105]) == "h\ufffdi"
    assert list(tokenizer.decode_stream([0xC3, 0xA4, 0xC3])) == ["", "ä", "", "\ufffd"]


def test_a_tokenizer_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must be 'bytes' or a folder with a tokenizer\.json"):
        build_tokenizer(str(tmp_path))


def test_a_job_opens_its_data() -> None:
    config = load_config("debug", ["--data.pack_documents=true", "--eval.batch_size=3", "--eval.steps=2"])
    data = open_text_data(config, rank=1, world_size=2)
    batch = data.batch(0)
    assert batch["tokens"].shape == (config.train.batch_size, config.train.seq_len)
    assert "doc_ids" in batch
    assert [held["tokens"].shape for held in data.heldout()] == [(3, config.train.seq_len)] * 2
    assert data.rows_per_batch == 2 * config.train.batch_size


def test_a_file_of_ids_may_hold_all_that_the_model_knows(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.full(4_000, 299, np.uint16))
    paths = [f"--data.path={tmp_path / 'ids.npy'}", "--data.token_dtype=uint16"]
    data = open_text_data(load_config("debug", [*paths, "--model.vocab_size=300"]))
    assert isinstance(data, TextData)
    assert data.vocab_size == 300
    assert data.batch(0)["tokens"].max() == 299
    with pytest.raises(UserError, match="id 299 is outside the vocabulary"):
        open_text_data(load_config("debug", [*paths, "--model.vocab_size=299"]))
