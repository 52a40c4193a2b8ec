"""How near `kempnerforge prepare` comes to the tokenizer's own batch speed, and what memory it takes.

    python -m tests.benchmarks.bench_prepare [--mib 100] [--workers N]

A byte-level BPE of 16,384 ids is trained on the spot; the text is what Python packages are installed here. In turns, so
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared_config.data.prepare import Encoding, Progress, prepare
from shared_config.data.workers import available_cores

MIB = 2**20
TURNS = 2


def main() -> None:
    """Print the speeds, their ratio, and the most memory of a process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=100, help="of text")
    parser.add_argument("--workers", type=int, default=available_cores(), help="default: one a core")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), options.mib, options.workers)


def measure(folder: Path, mib: int, workers: int) -> None:
    """Write texts, train a tokenizer, take turns."""
    import tokenizers

    pieces, library = [list(texts_of(mib * MIB // TURNS, turn)) for turn in range(TURNS)], tokenizers.Tokenizer
    trained = train(pieces[0])
    trained.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    most = 0.0

    def watch(progress: Progress) -> None:
        nonlocal most
        most = max([most, *(peak(child.pid) for child in multiprocessing.active_children())])

    seconds = {"encode_batch": 0.0, "encode_batch_fast": 0.0, "prepare": 0.0}
    processor = dict(seconds)
    for turn, texts in enumerate(pieces):
        file = folder / f"{turn}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        for name in ("encode_batch", "encode_batch_fast"):
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
        print(f"turn {turn}: {len(texts):,} documents, {made.tokens:,} tokens")
    total = sum(len(text.encode()) for texts in pieces for text in texts) / MIB
    print(f"{total:.0f} MiB of text, {workers} workers")
    for name, taken in seconds.items():
        share = f"{taken / seconds['prepare']:.0%}, by processors {processor[name] / processor['prepare']:.0%}"
        print(f"{name}: {total / taken:.2f} MiB/s, {processor[name]:.1f} s of processors; prepare has {share}")
    print(f"most memory of a worker: {most:.0f} MiB")


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


def texts_of(size: int, turn: int) -> Iterator[str]:
    """Every second file of installed packages, again from the start if they are too few."""
    files = sorted(Path(sysconfig.get_path("purelib")).rglob("*.py"))[turn::TURNS]
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
