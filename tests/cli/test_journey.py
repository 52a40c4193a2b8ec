"""From a model of transformers to a tuned one, by commands alone: each step against transformers itself.

A folder with a tokenizer and a chat template made on the spot -> validate -> generate -> prepare -> train -> eval ->
convert -> transformers again. ``HYPOTHESIS_PROFILE=nightly`` walks it whole, in both backends and two families; by day
a Llama in PyTorch, without validate.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import settings

from shared_config.cli import main
from shared_config.data import open_data
from shared_config.interchange.source import read_model
from shared_config.loader import load_config
from shared_config.parity.validation import validation_tokens
from shared_config.training.metrics import read_metrics
from tests.config.test_jsonl import MARKED, SPECIAL, turns
from tests.oracle.transformer import transformer
from tests.tolerance import assert_within, perturbation_delta, unit_roundoff

NIGHTLY = settings.get_current_profile_name() == "nightly"
FAMILIES = ("llama", "qwen2") if NIGHTLY else ("llama",)
BACKENDS = ("torch", "jax") if NIGHTLY else ("torch",)
CHATS = [(f"what is {number} and one?", f"{number} and one is {number + 1}, naïvely.") for number in range(24)]
TEXT = "\n".join(f"{question} {answer}" for question, answer in CHATS)
PROMPT = "what is 7 and"
NEW = 12
SEQ_LEN = 72
SETTINGS = (f"--train.seq_len={SEQ_LEN}", "--train.mixed_precision=fp32", "--train.compile_model=false")
THEIRS = 1e-5
"""transformers rotates and takes softmax in float32, whatever the dtype."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A byte-level BPE of the text, whose pieces are longer than a byte."""
    library = pytest.importorskip("tokenizers")
    built = library.Tokenizer(library.models.BPE())
    built.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet)
    built.train_from_iterator([TEXT], trainer)
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "chat_template": MARKED}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=built, **names)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model as transformers saves it, with its tokenizer as AutoTokenizer reads it there: some families split
    words their own way, whatever the tokenizer says, and have special tokens of their own.
    """
    config = transformers.AutoConfig.for_model(
        request.param, vocab_size=304, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=96, initializer_range=0.3,
        tie_word_embeddings=request.param == "qwen2", pad_token_id=None, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    torch.manual_seed(4)
    target = tmp_path_factory.mktemp(request.param)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(target)
    tokenizer.save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(target).save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON Lines of conversations."""
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": turns(*chat)}) + "\n" for chat in CHATS))
    return file


@pytest.mark.skipif(not NIGHTLY, reason="runs both backends and transformers in processes")
def test_the_folder_is_the_same_model_everywhere(folder: Path) -> None:
    assert main(["validate", str(folder)]) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_is_tuned_and_goes_back(
    backend: str, folder: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, tuned, numbers = tmp_path / "run", tmp_path / "tuned", tmp_path / "numbers.json"
    assert said(capsys, backend, folder) == PROMPT + continued(folder, PROMPT)

    untuned = evaluated(backend, folder, chats, numbers)
    assert untuned["tokens"] == sum(sum(mask[1:]) for _, mask in learned(folder, chats))
    assert untuned["loss"] == pytest.approx(loss_of(folder, chats), rel=1e-5)
    train(backend, folder, run, chats, "--train.max_steps=8", "--optimizer.lr=0.01")
    assert evaluated(backend, run, chats, numbers)["loss"] < 0.9 * untuned["loss"]

    assert main(["convert", str(run), "--output", str(tuned)]) == 0
    capsys.readouterr()
    assert evaluated(backend, run, chats, numbers)["loss"] == pytest.approx(loss_of(tuned, chats), rel=1e-5)
    check_logits(run, tuned)
    assert said(capsys, backend, run) == PROMPT + continued(tuned, PROMPT)
    question = {"role": "user", "content": CHATS[5][0]}
    answers = [said(capsys, backend, source, "--chat", prompt=CHATS[5][0]) for source in (run, tuned)]
    assert answers == [continued(tuned, [question])] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_prepared_text_is_what_their_tokenizer_makes_of_it_and_is_learned(
    backend: str, folder: Path, tmp_path: Path
) -> None:
    """The first loss of the run is transformers' own, of the rows that were read."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    prepared = tmp_path / "prepared"
    line = ["prepare", str(tmp_path / "text.txt"), "--tokenizer", str(folder), "--output", str(prepared)]
    assert main([*line, "--workers=1"]) == 0
    (shard,) = prepared.glob("*.bin")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = np.array([*tokenizer(TEXT).input_ids, tokenizer.eos_token_id])
    assert np.array_equal(np.fromfile(shard, np.uint16), ids)
    losses = train(backend, folder, tmp_path / "run", prepared, "--train.max_steps=1")
    batch = open_data(load_config(str(tmp_path / "run"))).batch(0)
    windows = np.lib.stride_tricks.sliding_window_view(ids, SEQ_LEN + 1)
    for row in np.concatenate([batch["tokens"], batch["labels"][:, -1:]], axis=1):
        assert (windows == row).all(axis=1).any()
    with torch.no_grad():
        logits = theirs(folder)[0](torch.from_numpy(batch["tokens"]).long()).logits
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(batch["labels"]).long().flatten()
    )
    assert losses == pytest.approx([float(expected)], rel=1e-5)


# Commands


def said(capsys: pytest.CaptureFixture[str], backend: str, source: Path, *options: str, prompt: str = PROMPT) -> str:
    """What `generate` writes, greedily."""
    capsys.readouterr()
    own = ["--temperature=0", f"--max-new-tokens={NEW}", "--device=cpu", f"--prompt={prompt}"]
    assert main(["generate", str(source), f"--backend={backend}", *own, *options]) == 0
    return capsys.readouterr().out.removesuffix("\n")


def train(backend: str, source: Path, run: Path, data: Path, *options: str) -> list[float]:
    """The losses of a run."""
    own = [*SETTINGS, "--train.batch_size=4", "--eval.interval=0", "--eval.steps=0", "--scheduler.warmup_steps=0"]
    where = ["--backend", backend, "--output", str(run), "--device=cpu", "--quiet", f"--data.path={data}"]
    assert main(["train", str(source), *where, *own, *options]) == 0
    return [float(record["loss"]) for record in read_metrics(run / "metrics.jsonl") if "loss" in record]


def evaluated(backend: str, source: Path, data: Path, numbers: Path) -> dict[str, Any]:
    """What `eval` writes of all of the data."""
    own = ["--json", str(numbers), "--device=cpu", *SETTINGS]
    assert main(["eval", str(source), f"--backend={backend}", "--data", str(data), *own]) == 0
    return json.loads(numbers.read_text())


# What transformers does


def theirs(folder: Path, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """Model and tokenizer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def continued(folder: Path, prompt: str | list[dict[str, str]]) -> str:
    """What it adds to a text, or answers to messages, greedily."""
    model, tokenizer = theirs(folder, torch.float32)
    if isinstance(prompt, str):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
    else:
        ids = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids
    with torch.no_grad():
        out = model.generate(ids, do_sample=False, max_new_tokens=NEW, pad_token_id=0)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def learned(folder: Path, chats: Path) -> list[tuple[list[int], list[int]]]:
    """Of each conversation the ids of the assistant, and where they stand, by their template."""
    found = []
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for row in map(json.loads, chats.read_text().splitlines()):
        made = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        found.append((made["input_ids"], made["assistant_masks"]))
    return found


def loss_of(folder: Path, chats: Path) -> float:
    """Nats per token of the assistant."""
    model, _ = theirs(folder)
    nats = []
    for ids, mask in learned(folder, chats):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        nats += losses[torch.tensor(mask[1:], dtype=torch.bool)].tolist()
    return float(np.mean(nats))


def check_logits(run: Path, tuned: Path) -> None:
    """Theirs of the exported folder are those of the specification for the weights of the run."""
    source = read_model(run)
    tokens = validation_tokens(source.config.model.vocab_size, 2, 20, seed=3)

    def logits(weights: Mapping[str, np.ndarray]) -> np.ndarray:
        wide = {name: np.asarray(value, np.float64) for name, value in weights.items()}
        return transformer(wide, source.config.model, tokens).logits

    weights = {name: np.asarray(value) for name, value in source.weights.items()}
    expected = logits(weights)
    delta = perturbation_delta(logits, weights, unit_roundoff(np.float32))["output"]
    for dtype in (torch.float64, torch.float32):
        with torch.no_grad():
            found = theirs(tuned, dtype)[0](torch.from_numpy(tokens).long()).logits.numpy()
        if dtype is torch.float64:
            assert np.abs(found - expected).max() < THEIRS * np.abs(expected).max()
        assert_within(found, expected, delta, name=str(dtype), roundoff=unit_roundoff(np.float32))
