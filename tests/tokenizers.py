"""Tokenizers trained on the spot, of the kinds that models come with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

BEGIN, END = "<s>", "</s>"
TEXTS = ["hello world, how are you", "the world is wide and hello is short", "naïve café, größer"] * 4


def byte_level(post: bool = False) -> Any:
    """Like GPT-2 and Llama 3: every byte has a character, and a word begins with its space."""
    library = pytest.importorskip("tokenizers")
    built = library.Tokenizer(library.models.BPE())
    built.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(vocab_size=300, special_tokens=[BEGIN, END], initial_alphabet=alphabet)
    return _trained(built, trainer, post)


def sentence_piece(post: bool = True) -> Any:
    """Like Llama 2 and Mistral: a space before the text, which the decoder takes away; bytes for unknown letters."""
    library = pytest.importorskip("tokenizers")
    normalizers, decoders = library.normalizers, library.decoders
    prepend = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces = library.Tokenizer(library.models.BPE(unk_token="<unk>"))
    pieces.normalizer = prepend
    pieces.train_from_iterator(TEXTS, library.trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", BEGIN, END]))
    model = json.loads(pieces.to_str())["model"]
    own = [piece for piece in model["vocab"] if piece not in ("<unk>", BEGIN, END, "ï", "é", "ö", "ß")]
    words = ["<unk>", BEGIN, END, *(f"<0x{byte:02X}>" for byte in range(256)), *own]
    merges = [tuple(pair) for pair in model["merges"] if {*pair, "".join(pair)} <= set(own)]
    numbers = {word: number for number, word in enumerate(words)}
    built = library.Tokenizer(library.models.BPE(numbers, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    built.normalizer = prepend
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    built.add_special_tokens(["<unk>", BEGIN, END])
    return _with_template(built) if post else built


def metaspace(post: bool = True) -> Any:
    """Like T5 and newer Mistrals: words by Metaspace, no bytes."""
    library = pytest.importorskip("tokenizers")
    built = library.Tokenizer(library.models.BPE(unk_token="<unk>"))
    built.pre_tokenizer = library.pre_tokenizers.Metaspace(prepend_scheme="first")
    built.decoder = library.decoders.Metaspace(prepend_scheme="first")
    return _trained(built, library.trainers.BpeTrainer(vocab_size=100, special_tokens=["<unk>", BEGIN, END]), post)


def words(post: bool = False) -> Any:
    """Words of a list, among them the names of special tokens."""
    library = pytest.importorskip("tokenizers")
    known = ["<unk>", BEGIN, END, "hello", "world"]
    built = library.Tokenizer(library.models.WordLevel({word: id for id, word in enumerate(known)}, unk_token="<unk>"))
    built.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    return _with_template(built) if post else built


KINDS = {"byte_level": byte_level, "sentence_piece": sentence_piece, "metaspace": metaspace}


def save(folder: Path, built: Any, **named: Any) -> Path:
    """A folder as Hugging Face lays it out."""
    folder.mkdir(parents=True, exist_ok=True)
    built.save(str(folder / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END, **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder


def _trained(built: Any, trainer: Any, post: bool) -> Any:
    built.train_from_iterator(TEXTS, trainer)
    return _with_template(built) if post else built


def _with_template(built: Any) -> Any:
    library = pytest.importorskip("tokenizers")
    built.post_processor = library.processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, built.token_to_id(BEGIN))]
    )
    return built
