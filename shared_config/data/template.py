"""Chat templates: conversations as token ids, and which of the ids the assistant is to learn.

A template is the Jinja text that a Hugging Face tokenizer folder carries; it is rendered as transformers renders it, in
a sandbox. Dates that a template asks for are always the same one, so that the data of a run are too.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared_config.data.tokenizer import load_library_tokenizer
from shared_config.errors import UserError
from shared_config.interchange.reading import MAX_JSON_BYTES, read_json, read_text

FILE = "chat_template.jinja"
TODAY = datetime.date(2024, 7, 26)
STAND_IN = "KempnerForgeContent"
BEGIN, END, IMAGE = "\ufdd0", "\ufdd1", "\ufdd2"
"""Noncharacters around what a template marks as generated, and where the text of a message has an image."""

Spans = list[tuple[int, int]]


class TemplateError(Exception):
    """A conversation that the template refuses or can't render; the message says why."""


class ChatTemplate:
    """The chat template of a tokenizer folder.

    Raises:
        UserError: the folder has none, it can't be read, Jinja2 is not installed, or no token has the id.
    """

    def __init__(self, folder: str | Path, image_token: int | None = None):
        """
        Args:
            image_token: the id that stands for an image; None: messages have none.
        """
        self.folder = Path(folder)
        config = _optional_json(self.folder / "tokenizer_config.json")
        self._sources = _sources(self.folder, config)
        if not self._sources:
            raise UserError(f"{self.folder}: has no chat template, neither {FILE} nor one in tokenizer_config.json")
        self._variables = {
            **_special_tokens(_optional_json(self.folder / "special_tokens_map.json")),
            **_special_tokens(config),
        }
        self._environment = _environment(self.folder)
        self._tokenizer = load_library_tokenizer(self.folder / "tokenizer.json")
        self._image = None if image_token is None else self._tokenizer.id_to_token(image_token)
        if image_token is not None and self._image is None:
            raise UserError(f"vlm.image_token_id = {image_token}: must be the id of a token of {self.folder}")
        special = [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]
        special += [] if self._image is None or self._image in special else [self._image]
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")

    def encode(
        self, messages: Sequence[Mapping[str, object]], *, learned_from: int = 0, tools: Sequence[object] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """A conversation as the model reads it.

        Special tokens come from the template alone: their text in a message stays text.

        Args:
            learned_from: the first message that may be learned; of those the turns of the assistant are.

        Returns:
            ids: uint32.
            learned: bool, as long; True at what a turn of the assistant adds, its end included.

        Raises:
            TemplateError: the template refuses the conversation, or its turns can't be told apart.
        """
        self._check_marks(messages)
        rendered = self._render(messages, tools)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        text, marked = _without_marks(rendered)
        spans = marked if "generation" in self._source(tools) and marked else []
        if spans and len(spans) != len(turns) and learned_from:
            raise TemplateError(f"the template marks {len(spans)} turns as generated, and there are {len(turns)}")
        if spans and len(spans) == len(turns):
            spans = [span for turn, span in zip(turns, spans, strict=True) if turn >= learned_from]
        if not spans:
            spans = [self._span(text, messages, turn, tools) for turn in turns if turn >= learned_from]
        ids, offsets = self._tokens(text, self._plain(text, messages, tools))
        learned = np.zeros(len(ids), bool)
        for start, stop in spans:
            learned |= (offsets[:, 0] < stop) & (offsets[:, 1] > start)
        return ids, learned

    def encode_prompt(self, messages: Sequence[Mapping[str, object]]) -> list[int]:
        """The ids of a conversation up to where the assistant is to write.

        Args:
            messages: where there is an image token, their content may be a list of parts, as transformers has them:
                {"type": "image"} and {"type": "text", "text": ...}. A template that takes text alone gets the text with
                the token and a line break where an image is.

        Raises:
            TemplateError: as `encode`.
        """
        self._check_marks(messages)
        if self._image is not None:
            messages = [_as_parts(one) if self._takes_parts else _as_text(one) for one in messages]
        text = _without_marks(self._render(messages, None, add_generation_prompt=True))[0]
        plain = self._plain(text, messages, None, add_generation_prompt=True)
        return self._tokens(text, plain)[0].tolist()

    def _check_marks(self, messages: Sequence[Mapping[str, object]]) -> None:
        if any(mark in text for message in messages for text in _texts(message) for mark in (BEGIN, END, IMAGE)):
            raise TemplateError("a message holds a noncharacter (U+FDD0, U+FDD1 or U+FDD2)")

    @functools.cached_property
    def _takes_parts(self) -> bool:
        """Whether the template shows the text of a content that is a list, and not how Python or JSON writes one."""
        shown = self._part([_as_parts({"role": "user", "content": STAND_IN})], None)
        return STAND_IN in shown and not re.search("""['"]type['"]""", shown)

    def _span(self, text: str, messages: Sequence[Mapping[str, object]], turn: int, tools: Any) -> tuple[int, int]:
        """Where a turn of the assistant stands in the text: from the end of its header to its end.

        Both come from the conversation cut off before and after the turn. Templates that show a turn another way once
        others follow (that leave out what was thought, say) are asked with a stand-in for its content.
        """
        head = self._part(messages[:turn], tools, add_generation_prompt=True)
        whole = self._part(messages[: turn + 1], tools)
        start = len(head) if head and text.startswith(head) else None
        if start is not None and whole and text.startswith(whole) and len(whole) > start:
            return start, len(whole)
        replaced = {**messages[turn], "content": STAND_IN}
        before, _, after = self._part([*messages[:turn], replaced, *messages[turn + 1 :]], tools).partition(STAND_IN)
        tail = self._part([*messages[:turn], replaced], tools).rpartition(STAND_IN)[2]
        if not after.startswith(tail):
            tail = after[: _common_prefix(after, tail)]
        if start is None:
            start = _common_prefix(text, before)
        stop = len(text) - len(after) + len(tail)
        if not before or not text.endswith(after) or stop <= start:
            raise TemplateError(f"the turn of message {turn} can't be told apart in what the template makes of it")
        return start, stop

    def _part(self, messages: Sequence[Mapping[str, object]], tools: Any, **options: Any) -> str:
        """Part of a conversation; "" where the template refuses it."""
        try:
            return _without_marks(self._render(messages, tools, **options))[0]
        except TemplateError:
            return ""

    def _render(self, messages: Sequence[Mapping[str, object]], tools: Any, **options: Any) -> str:
        given = {"add_generation_prompt": False, "documents": None, **self._variables, **options}
        try:
            template = self._environment.from_string(self._source(tools))
            rendered = template.render(messages=list(messages), tools=tools, **given)
            return rendered if self._image is None else rendered.replace(IMAGE, self._image)
        except Exception as error:  # templates run their own code
            raise TemplateError(f"the chat template of {self.folder} refuses it: {error}") from None

    def _source(self, tools: Any) -> str:
        if tools is not None and "tool_use" in self._sources:
            return self._sources["tool_use"]
        return self._sources["default"]

    def _plain(self, text: str, messages: Sequence[Mapping[str, object]], tools: Any, **options: Any) -> list[bool]:
        """For each special token in the text, whether it is part of a message and so is plain text."""
        if not any(self._special.search(part) for message in messages for part in _texts(message)):
            return [False for _ in self._special.finditer(text)]
        hidden = [_rewritten(message, lambda part: self._special.sub(STAND_IN, part)) for message in messages]
        found = re.compile(f"{STAND_IN}|{self._special.pattern}").findall(self._part(hidden, tools, **options))
        plain = [token == STAND_IN for token in found]
        if len(plain) != len(self._special.findall(text)):
            raise TemplateError("holds the text of a special token that can't be told from the template's own")
        return plain

    def _tokens(self, text: str, plain: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
        """Ids, and the characters (N, 2) that each stands for."""
        if not any(plain):
            self._tokenizer.encode_special_tokens = False
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            return np.array(encoding.ids, np.uint32), np.array(encoding.offsets, np.int64).reshape(-1, 2)
        self._tokenizer.encode_special_tokens = True
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        place = 0
        matches = [match for match, is_plain in zip(self._special.finditer(text), plain, strict=True) if not is_plain]
        for match in [*matches, None]:
            stop = len(text) if match is None else match.start()
            encoding = self._tokenizer.encode(text[place:stop], add_special_tokens=False)
            ids += encoding.ids
            offsets += [(place + low, place + high) for low, high in encoding.offsets]
            if match is not None:
                special = self._tokenizer.token_to_id(match[0])
                assert special is not None
                ids.append(special)
                offsets.append(match.span())
                place = match.end()
        return np.array(ids, np.uint32), np.array(offsets, np.int64).reshape(-1, 2)


def has_template(folder: Path) -> bool:
    """Whether a tokenizer folder has a chat template.

    Raises:
        UserError: it can't be read.
    """
    return bool(_sources(folder, _optional_json(folder / "tokenizer_config.json")))


def _texts(message: Mapping[str, object]) -> list[str]:
    """The texts of a message."""
    parts = _as_parts(message)["content"]
    return [str(part.get("text", "")) for part in parts] if isinstance(parts, list) else []


def _rewritten(message: Mapping[str, object], rewrite: Callable[[str], str]) -> dict[str, object]:
    """A message with other text."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": rewrite(content)}
    parts = content if isinstance(content, list) else []
    changed = [{**part, "text": rewrite(part["text"])} if "text" in part else part for part in parts]
    return {**message, "content": changed} if parts else dict(message)


def _as_parts(message: Mapping[str, object]) -> dict[str, object]:
    """A message whose content is a list, if it has one."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}] if isinstance(content, str) else content}


def _as_text(message: Mapping[str, object]) -> dict[str, object]:
    """A message whose content is text, with `IMAGE` for an image."""
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    texts = [f"{IMAGE}\n" if part["type"] == "image" else str(part["text"]) for part in content]
    return {**message, "content": "".join(texts)}


def _sources(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name. A separate file takes precedence over the config's entry."""
    if (folder / FILE).exists():
        return {"default": read_text(folder / FILE, MAX_JSON_BYTES)}
    given = config.get("chat_template")
    if isinstance(given, str):
        return {"default": given}
    entries = given if isinstance(given, list) else []
    named = {entry.get("name"): entry.get("template") for entry in entries if isinstance(entry, dict)}
    if given is not None and not isinstance(named.get("default"), str):
        raise UserError(f"{folder / 'tokenizer_config.json'}: chat_template must be text, or a list with one 'default'")
    return {str(name): str(source) for name, source in named.items()}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """What a template knows of the tokenizer: bos_token, eos_token and their like."""
    entries = {name: value for name, value in config.items() if name.endswith("_token")}
    named = {name: value.get("content") if isinstance(value, dict) else value for name, value in entries.items()}
    return {name: value for name, value in named.items() if isinstance(value, str)}


def _optional_json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}


def _environment(folder: Path) -> Any:
    try:
        from jinja2 import nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise UserError(
            f"{folder}: its chat template needs the package 'jinja2' (pip install kempnerforge-twin[chat])"
        ) from None

    class Generation(Extension):
        """``{% generation %}`` ... ``{% endgeneration %}``: what the assistant writes."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller: Any) -> str:
            return BEGIN + caller() + END

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = TODAY.strftime
    return environment


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise(message: str) -> None:
    raise TemplateError(message)


def _without_marks(rendered: str) -> tuple[str, Spans]:
    spans: Spans = []
    text = ""
    for piece in re.split(f"({BEGIN}|{END})", rendered):
        if piece == BEGIN:
            spans.append((len(text), len(text)))
        elif piece == END:
            spans[-1] = (spans[-1][0], len(text))
        else:
            text += piece
    return text, spans


def _common_prefix(one: str, other: str) -> int:
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return min(len(one), len(other))
