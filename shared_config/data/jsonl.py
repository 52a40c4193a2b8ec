"""JSON Lines: rows of one kind, each of them checked, with the file and line of those that can't be used.

{"text": "a document"}                                                            any field, see data.text_field
{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
{"prompt": "Hi", "completion": "Hello"}                                           text, or lists of messages
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared_config.errors import UserError
from shared_config.interchange.reading import parse_json, read_text

SUFFIXES = (".jsonl", ".ndjson")
MAX_TEXT_BYTES = 2**30
SHOWN_PROBLEMS = 20
CONVERSATIONS = ("messages", "prompt and completion")


@dataclass(frozen=True)
class Row:
    """One line of a file.

    Attributes:
        place: "file:line", for messages.
        kind: the name of the text field, or one of `CONVERSATIONS`.
        text: the document; "" of a conversation.
        messages: the turns of a conversation; () of a document.
        learned_from: the first turn that may be learned.
        tools: what the assistant may call, as chat templates take it.
        plain: prompt and completion that are text, which needs no chat template.
    """

    place: str
    kind: str
    text: str = ""
    messages: Sequence[Mapping[str, object]] = ()
    learned_from: int = 0
    tools: Sequence[object] | None = None
    plain: tuple[str, str] | None = None

    @property
    def key(self) -> str:
        """Tells rows apart by what they hold."""
        return self.text or json.dumps([self.messages, self.learned_from, self.tools], sort_keys=True)


def is_json_lines(name: str) -> bool:
    """Whether a file of this name has a JSON object on each line."""
    return name.lower().endswith(SUFFIXES)


def lines(text: str) -> Iterator[tuple[int, str]]:
    """Numbers, from 1, and lines that are not blank. Only a line feed ends a line: JSON allows all else in strings."""
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), start=1):
        if line.strip(" \t\r"):
            yield number, line


def parse_object(line: str) -> tuple[dict[str, object], str]:
    """The object on a line, and what is wrong with it."""
    try:
        fields = parse_json(line)
    except ValueError as error:
        return {}, f"not valid JSON: {error}"
    return (fields, "") if isinstance(fields, dict) else ({}, "must be a JSON object")


def read_rows(files: Sequence[Path], text_field: str = "text") -> list[Row]:
    """The rows of files, in order.

    Raises:
        UserError: a file that can't be read, lines that can't be used, rows of several kinds.
    """
    rows: list[Row] = []
    problems: list[str] = []
    for file in files:
        for number, line in lines(read_text(file, MAX_TEXT_BYTES)):
            row, problem = _parse(line, f"{file}:{number}", text_field)
            rows.append(row)
            if not problem and row.kind != rows[0].kind:
                problem = f"a row of {row.kind}, where {rows[0].place} is one of {rows[0].kind}; must be of one kind"
            problems += [f"{row.place}: {problem}"] if problem else []
    refuse(problems)
    return rows


def refuse(problems: Sequence[str]) -> None:
    """Raise the problems found, if there are any; of many the first ones.

    Raises:
        UserError: one problem per line.
    """
    if not problems:
        return
    more = [f"and {len(problems) - SHOWN_PROBLEMS} more"] if len(problems) > SHOWN_PROBLEMS else []
    raise UserError("\n".join([*problems[:SHOWN_PROBLEMS], *more]))


def _parse(line: str, place: str, text_field: str) -> tuple[Row, str]:
    fields, problem = parse_object(line)
    if problem:
        return Row(place, ""), problem
    found = [text_field] if text_field in fields else []
    found += ["messages"] if "messages" in fields else []
    found += ["prompt and completion"] if "prompt" in fields and "completion" in fields else []
    if len(found) != 1:
        needed = f"{text_field!r} (see data.text_field), 'messages', or 'prompt' and 'completion'"
        has = f"has {', '.join(map(repr, fields)) or 'no fields'}"
        return Row(place, ""), f"{has}; must have {'one of' if not found else 'only one of'} {needed}"
    kind = found[0]
    if kind == text_field:
        return _document(fields[text_field], place, kind)
    return _conversation(fields, place, kind)


def _document(text: object, place: str, kind: str) -> tuple[Row, str]:
    if not isinstance(text, str):
        return Row(place, kind), f"{kind!r} must be text, not {type_name(text)}"
    return Row(place, kind, text), text_problem(text)


def _conversation(fields: Mapping[str, object], place: str, kind: str) -> tuple[Row, str]:
    plain = None
    if kind == "messages":
        turns, learned_from = fields["messages"], 0
    else:
        prompt, completion = fields["prompt"], fields["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            plain = prompt, completion
            prompt, completion = _turns("user", prompt), _turns("assistant", completion)
        if not isinstance(prompt, list) or not isinstance(completion, list):
            return Row(place, kind), "'prompt' and 'completion' must both be text, or both lists of messages"
        turns, learned_from = [*prompt, *completion], len(prompt)
    if not isinstance(turns, list) or not turns:
        return Row(place, kind), "'messages' must be a list of at least one message"
    tools = fields.get("tools")
    if tools is not None and not isinstance(tools, list):
        return Row(place, kind), "'tools' must be a list"
    problem = next(filter(None, (_message_problem(index, turn) for index, turn in enumerate(turns))), "")
    return Row(place, kind, messages=turns, learned_from=learned_from, tools=tools, plain=plain), problem


def _turns(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def _message_problem(index: int, message: object) -> str:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return f"message {index} must be an object with 'role' and 'content'"
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return ""
    if not isinstance(content, str):
        return f"message {index}: 'content' must be text, not {type_name(content)}"
    return text_problem(content)


def text_problem(text: str) -> str:
    """What is wrong with a string from JSON; "" if nothing is."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "the text holds half of a surrogate pair, which is no character"
    return ""


def type_name(value: object) -> str:
    """What JSON calls a value, for messages."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
