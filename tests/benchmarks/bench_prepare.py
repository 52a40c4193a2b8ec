"""How near `kempnerforge prepare` comes to the tokenizer's own batch speed, and what memory it takes.

    python -m tests.benchmarks.bench_prepare [--mib 100] [--turns 2] [--text packages|words] [--fast] [--workers N]

A byte-level BPE of 16,384 ids is trained on the spot; the text is what Python packages are installed here, or seeded
words, of which a few are frequent and most are rare, as in a language (Zipf's law). In turns, so
that both meet the same machine, `encode_batch` of the library gets texts that are in memory already, with a thread for
each core, and `prepare` makes token files of the same texts as JSON Lines, processes and files included. Seconds of
processors are compared as well, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared_config.data.prepare import Encoding, Progress, prepare
from shared_config.data.workers import available_cores

MIB = 2**20


def main() -> None:
    """Print the speeds, their ratio, and the most memory of a process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=100, help="of text")
    parser.add_argument("--workers", type=int, default=available_cores(), help="default: one a core")
    parser.add_argument("--turns", type=int, default=2, help="in which the text is taken, so much of it at a time")
    parser.add_argument("--text", choices=("packages", "words"), default="packages")
    parser.add_argument("--fast", action="store_true", help="leave out encode_batch, the slower of the library's")
    options = parser.parse_args()
    rivals = ("encode_batch", "encode_batch_fast")[options.fast :]
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), options.text, options.mib, options.turns, rivals, options.workers)


def measure(folder: Path, kind: str, mib: int, turns: int, rivals: Sequence[str], workers: int) -> None:
    """Write texts, train a tokenizer, take turns."""
    import tokenizers

    library, texts_of = tokenizers.Tokenizer, {"packages": packages, "words": words}[kind]
    trained = train(list(texts_of(min(mib * MIB // turns, 32 * MIB), 0, turns)))
    trained.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    most = 0.0

    def watch(progress: Progress) -> None:
        nonlocal most
        most = max([most, *(peak(child.pid) for child in multiprocessing.active_children())])

    seconds, total = dict.fromkeys([*rivals, "prepare"], 0.0), 0.0
    processor = dict(seconds)
    for turn in range(turns):
        texts = list(texts_of(mib * MIB // turns, turn, turns))
        total += sum(len(text.encode()) for text in texts) / MIB
        file = folder / f"{turn}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        for name in rivals:
            encode = getattr(library.from_file(str(folder / "tokenizer.json")), name)
            began, used = time.perf_counter(), processor_seconds()
            for first in range(0, len(texts), 1000):
                encode(texts[first : first + 1000], add_special_tokens=False)
            seconds[name] += time.perf_counter() - began
            processor[name] += processor_seconds() - used
        began, used = time.perf_counter(), processor_seconds()
        size = file.stat().st_size // (2 * workers) + 1
        encoding = Encoding(str(folder))
        made = prepare([file], folder / f"out{turn}", encoding, workers=workers, shard_bytes=size, show=watch)
        seconds["prepare"] += time.perf_counter() - began
        processor["prepare"] += processor_seconds() - used
        file.unlink()
        print(f"turn {turn}: {len(texts):,} documents, {made.tokens:,} tokens; {total:.0f} MiB of text so far")
        report(total, seconds, processor)
        print(f"most memory of a worker: {most:.0f} MiB", flush=True)


def report(total: float, seconds: Mapping[str, float], processor: Mapping[str, float]) -> None:
    """Print speeds, of MiB of text, and how near `prepare` comes."""
    for name, taken in seconds.items():
        share = f"{taken / seconds['prepare']:.0%}, by processors {processor[name] / processor['prepare']:.0%}"
        print(f"{name}: {total / taken:.2f} MiB/s, {processor[name]:.1f} s of processors; prepare has {share}")


def processor_seconds() -> float:
    """What this process and those that it waited for have used; of other work on the machine it knows nothing."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def peak(process: int | None) -> float:
    """The most MiB that a process has held."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return max((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), default=0.0)


def train(texts: list[str]) -> Any:
    """A byte-level BPE, of 8 MiB of the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2**14, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    built.train_from_iterator(texts[:: max(1, sum(map(len, texts)) // (8 * MIB))], trainer)
    return built


def words(size: int, turn: int, turns: int) -> Iterator[str]:
    """Documents of 100 to 3,000 words out of 200,000."""
    letters = np.random.default_rng(0).choice(list("etaoinshrdlcumwfgypbvk"), (200_000, 12))
    lengths = np.random.default_rng(1).integers(1, 12, len(letters))
    known = np.array(["".join(word[:length]) for word, length in zip(letters, lengths, strict=True)], object)
    rng = np.random.default_rng([2, turn])
    while size > 0:
        ranks = rng.zipf(1.2, int(rng.integers(100, 3000)))
        text = " ".join(known[ranks[ranks < len(known)]]) + "."
        size -= len(text)
        yield text


def packages(size: int, turn: int, turns: int) -> Iterator[str]:
    """Every so-many-th file of installed packages, again from the start if they are too few."""
    files = sorted(Path(sysconfig.get_path("purelib")).rglob("*.py"))[turn::turns]
    while size > 0:
        for file in files:
            text = file.read_text(encoding="utf-8", errors="replace")
            if text and len(text) < MIB:
                size -= len(text.encode())
                yield text
            if size <= 0:
                return


if __name__ == "__main__":
    main()
