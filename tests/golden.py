"""Texts that were looked at once, and must stay what they are."""

from __future__ import annotations

from pathlib import Path

FIXTURES = Path(__file__).parent / "fixtures"


def check_golden(name: str, text: str) -> None:
    """Hold a text to the file of this name, line by line; one that is missing is written, to be looked at."""
    file = FIXTURES / name
    if not file.exists():
        file.write_text(text, encoding="utf-8")
        raise AssertionError(f"{file}: was missing, and is written now: look at it")
    expected, found = file.read_text(encoding="utf-8").splitlines(), text.splitlines()
    pairs = enumerate(zip(expected, found, strict=False), 1)
    changed = [f"line {line}\n  was {before}\n  is  {now}" for line, (before, now) in pairs if before != now]
    assert not changed, "\n".join([f"{name}: {len(changed)} lines have changed", *changed[:3]])
    assert len(found) == len(expected), f"{name}: has {len(found)} lines, was to have {len(expected)}"
