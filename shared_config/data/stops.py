"""Texts that end what is generated, wherever tokens part them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def until_stop(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """The text of pieces up to the first of ``stops`` that is complete, or all of it; what may be the beginning of one
    waits for what follows. No piece is asked for after it.

    Args:
        stops: none of them empty; of several that are complete at once the longest counts.
    """
    held = ""
    for piece in pieces:
        shown = ""
        for letter in piece:
            held += letter
            complete = [len(stop) for stop in stops if held.endswith(stop)]
            if complete:
                yield shown + held[: len(held) - max(complete)]
                return
            kept = _beginning(held, stops)
            shown, held = shown + held[: len(held) - kept], held[len(held) - kept :]
        yield shown
    yield held


def _beginning(text: str, stops: Sequence[str]) -> int:
    """How many of the last letters may be the beginning of a stop."""
    longest = min(len(text), max(map(len, stops), default=1) - 1)
    return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in stops)), 0)
