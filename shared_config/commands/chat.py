"""``kempnerforge chat``: a conversation with a model, line by line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence

from shared_config.commands.backends import require_backend
from shared_config.commands.speaking import (
    conversation_ids,
    load_speaker,
    manner_of,
    precision,
    spoken,
    template_of,
    tokenizer_name,
)
from shared_config.data.tokenizer import build_tokenizer
from shared_config.errors import UserError
from shared_config.interchange.source import to_stderr
from shared_config.loader import load_config


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Do it, under the overrides of the config. Returns the exit status."""
    config = load_config(options.config, overrides)
    config.validate(world_size=1)
    if config.vlm is not None:
        raise UserError(f"vlm.arch = {config.vlm.arch!r}: must be absent; chat is for text models")
    tokenizer = build_tokenizer(tokenizer_name(options, config, overrides), config.data.eos_id)
    template = template_of(tokenizer)
    manner = manner_of(options, config, tokenizer)
    require_backend(options.backend)
    with precision(options, config):
        model = load_speaker(options, config, overrides)
    before = [] if options.system is None else [{"role": "system", "content": options.system}]
    messages = list(before)
    for number, question in enumerate(questions()):
        messages.append({"role": "user", "content": question})
        prompt = conversation_ids(template, messages)
        if len(prompt) >= config.model.max_seq_len and len(messages) > len(before) + 1:
            to_stderr(
                f"note: the conversation is longer than model.max_seq_len = {config.model.max_seq_len}; it begins again"
            )
            messages = [*before, messages[-1]]
            prompt = conversation_ids(template, messages)
        length = min(options.max_new_tokens, config.model.max_seq_len - len(prompt))
        if length < 1:
            to_stderr(f"note: {len(prompt)} tokens are too many for model.max_seq_len = {config.model.max_seq_len}")
            messages.pop()
            continue
        seed = None if options.seed is None else (options.seed + number) % 2**63
        with precision(options, config):
            pieces = spoken(model, prompt, manner, tokenizer, options, length=length, seed=seed, times=[])
            messages.append({"role": "assistant", "content": shown(pieces)})
    return 0


def questions() -> Iterator[str]:
    """The lines that are typed, or come from a file or a pipe; blank ones are no questions."""
    while True:
        if sys.stdin.isatty():
            sys.stdout.write("> ")
            sys.stdout.flush()
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def shown(pieces: Iterable[str]) -> str:
    """Write an answer as it comes. Returns it, as far as it went where it was interrupted."""
    answer = ""
    try:
        for piece in pieces:
            answer += piece
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        pass
    sys.stdout.write("\n")
    sys.stdout.flush()
    return answer
