"""One HTML page with what was measured: no network, no other file, for light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from html import escape

from shared_config.bench.result import Line, Result
from shared_config.interchange.files import PathLike, written_aside
from shared_config.parity.report.page import PAGE
from shared_config.parity.report.style import CSS, SCRIPT

GIB, TERA, GIGA = 2**30, 1e12, 1e9


def write_page(path: PathLike, found: Result, title: str) -> None:
    """Write the page, atomically.

    Raises:
        UserError: if the file can't be written.
    """
    body = "\n".join([*_header(found, title), *_lines(found), *_memory(found), *_profiles(found), *_notes(found)])
    with written_aside(path) as aside:
        aside.write_text(PAGE.format(title=escape(title), css=CSS, body=body, script=SCRIPT), encoding="utf-8")


def _header(found: Result, title: str) -> Iterator[str]:
    when = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    yield f'<h1>{escape(title)}</h1><p class="soft">{escape(when)}</p>'
    facts = {"device": found.device, **found.versions}
    if (limits := found.limits) is not None:
        size = f"{limits.size} \N{MULTIPLICATION SIGN} {limits.size}, {limits.dtype}"
        facts["product"] = f"{limits.product / TERA:.4g} TFLOP/s ({size}; spread {limits.spread[0]:.1%})"
        facts["copy"] = f"{limits.copy / GIGA:.4g} GB/s ({limits.copied / GIB:.4g} GiB; spread {limits.spread[1]:.1%})"
    pairs = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    yield f'<div class="card"><dl>{pairs}</dl></div>'


def _lines(found: Result) -> Iterator[str]:
    if not found.lines:
        return
    yield "<h2>Work</h2>"
    yield '<div class="card scroll"><table><thead><tr><th>work</th><th>by</th><th class="number">median</th>'
    yield '<th class="number">spread</th><th class="number">tokens/s</th><th class="number">share of the limit</th>'
    yield '<th></th><th class="number">peak memory</th><th class="number">compilation</th></tr></thead><tbody>'
    yield from (_line(line, found) for line in found.lines)
    yield "</tbody></table></div>"


def _line(line: Line, found: Result) -> str:
    share = None if found.limits is None else line.share(found.limits)
    of = "of products" if line.flops is not None else "of copies"
    cells = [
        f"{1e3 * line.timing.median:.4g} ms",
        f"{line.timing.spread:.1%}",
        f"{line.tokens_per_second:,.0f}",
        "" if share is None else f"{share:.1%} {of}",
    ]
    rest = ["" if line.peak is None else f"{line.peak / GIB:.3g} GiB", f"{line.timing.compilation:.1f} s"]
    return (
        f"<tr><td>{escape(line.work)}</td><td>{escape(line.of)}</td>{_numbers(cells)}"
        f"<td>{'' if share is None else _bar(share)}</td>{_numbers(rest)}</tr>"
    )


def _memory(found: Result) -> Iterator[str]:
    if found.memory:
        yield "<h2>Memory of a training step</h2>"
        largest = max(found.memory.values()) or 1
        yield _bars({name: (value / largest, f"{value / GIB:.3g} GiB") for name, value in found.memory.items()})


def _profiles(found: Result) -> Iterator[str]:
    for work, shares in found.profiles.items():
        yield f"<h2>Time of kernels: {escape(work)}</h2>"
        yield _bars({kind: (share, f"{share:.1%}") for kind, share in shares.items()})


def _notes(found: Result) -> Iterator[str]:
    yield from (f'<p class="soft">{escape(note)}</p>' for note in found.notes)


def _bars(rows: Mapping[str, tuple[float, str]]) -> str:
    lines = "".join(
        f"<tr><td>{escape(name)}</td>{_numbers([text])}<td>{_bar(share)}</td></tr>"
        for name, (share, text) in rows.items()
    )
    return f'<div class="card scroll"><table><tbody>{lines}</tbody></table></div>'


def _numbers(cells: Iterable[str]) -> str:
    return "".join(f'<td class="number">{escape(cell)}</td>' for cell in cells)


def _bar(share: float) -> str:
    return f'<span class="bar"><i style="width:{100 * min(1.0, share):.0f}%"></i></span>'
