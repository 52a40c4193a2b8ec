"""``kempnerforge chat``: a conversation with a model, line by line, and with pictures if it sees them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shared_config.commands.backends import require_backend
from shared_config.commands.pictures import (
    Prompt,
    image_token_of,
    prompt_with,
    read_frames,
    takes_several,
    user_message,
)
from shared_config.commands.speaking import (
    conversation_ids,
    load_speaker,
    manner_of,
    precision,
    spoken,
    template_of,
    tokenizer_name,
)
from shared_config.contract.decoding import check_architecture
from shared_config.data.template import ChatTemplate
from shared_config.data.tokenizer import build_tokenizer
from shared_config.errors import UserError
from shared_config.interchange.source import to_stderr
from shared_config.loader import load_config
from shared_config.schema.job import JobConfig

IMAGE = "/image"
"""Begins a line that shows a picture with the next question."""


@dataclass(frozen=True)
class Message:
    """What was said, and the pictures uint8 (s, s, 3) that were shown with it."""

    role: str
    text: str
    pictures: tuple[np.ndarray, ...] = ()


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Do it, under the overrides of the config. Returns the exit status."""
    config = load_config(options.config, overrides)
    config.validate(world_size=1)
    check_architecture(config.vlm)
    if config.video is not None:
        raise UserError("video: must be absent; chat shows pictures")
    tokenizer = build_tokenizer(tokenizer_name(options, config, overrides), config.data.eos_id)
    template = template_of(tokenizer, image_token_of(config))
    shown = [picture for file in options.image for picture in read_picture(file, config)]
    manner = manner_of(options, config, tokenizer)
    require_backend(options.backend)
    with precision(options, config):
        model = load_speaker(options, config, overrides)
    before = [] if options.system is None else [Message("system", options.system)]
    messages, limit = list(before), config.model.max_seq_len
    for number, question in enumerate(questions(shown, config)):
        messages.append(question)
        prompt = prompt_of(messages, template, config)
        if prompt.length >= limit and len(messages) > len(before) + 1:
            to_stderr(f"note: the conversation is longer than model.max_seq_len = {limit}; it begins again")
            messages = [*before, question]
            prompt = prompt_of(messages, template, config)
        length = min(options.max_new_tokens, limit - prompt.length)
        if length < 1:
            to_stderr(f"note: {prompt.length} tokens are too many for model.max_seq_len = {limit}")
            messages.pop()
            continue
        seed = None if options.seed is None else (options.seed + number) % 2**63
        with precision(options, config):
            pieces = spoken(model, prompt, manner, tokenizer, options, length=length, seed=seed, times=[])
            messages.append(Message("assistant", shown_text(pieces)))
    return 0


def prompt_of(messages: Sequence[Message], template: ChatTemplate, config: JobConfig) -> Prompt:
    """A conversation up to where the model is to answer. A model that sees one picture sees the last.

    Raises:
        UserError: the template refuses it, or has no place for its pictures.
    """
    pictures = [picture for message in messages for picture in message.pictures]
    pictures = pictures if takes_several(config) else pictures[-1:]
    said = [
        user_message(message.text, len(message.pictures), config)
        if message.role == "user"
        else {"role": message.role, "content": message.text}
        for message in messages
    ]
    ids = conversation_ids(template, said)
    return prompt_with("the conversation", ids, np.stack(pictures) if pictures else None, config)


def read_picture(file: str, config: JobConfig) -> np.ndarray:
    """Uint8 (1, s, s, 3).

    Raises:
        UserError: it can't be read, or the model sees no pictures.
    """
    if config.vlm is None:
        raise UserError(f"{file}: can't be shown, as the config has no [vlm] section")
    return read_frames([file], config)


def questions(shown: Sequence[np.ndarray], config: JobConfig) -> Iterator[Message]:
    """The lines that are typed, or come from a file or a pipe; blank ones are no questions.

    Args:
        shown: pictures for the first question.
    """
    pictures = list(shown)
    for line in lines():
        command, _, file = line.strip().partition(" ")
        if command != IMAGE:
            yield Message("user", line, tuple(pictures))
            pictures = []
        elif not file.strip():
            to_stderr(f"note: {IMAGE} must be followed by the file of a picture")
        else:
            try:
                pictures.extend(read_picture(str(Path(file.strip()).expanduser()), config))
            except UserError as error:
                to_stderr(f"note: {error}")


def lines() -> Iterator[str]:
    """Those that are not blank."""
    while True:
        if sys.stdin.isatty():
            sys.stdout.write("> ")
            sys.stdout.flush()
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def shown_text(pieces: Iterable[str]) -> str:
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
