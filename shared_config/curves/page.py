"""One HTML page with the curves of runs: no network, no other file, for light and dark."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from datetime import datetime
from html import escape

from shared_config.curves.plot import COLOURS, curves_plot
from shared_config.curves.runs import Run, differing_fields
from shared_config.interchange.files import PathLike, written_aside
from shared_config.parity.report.page import PAGE
from shared_config.parity.report.plot import number
from shared_config.parity.report.style import CSS, SCRIPT

PANELS = {
    "loss": "Loss, nats per token",
    "heldout_loss": "Held-out loss, nats per token",
    "lr": "Learning rate",
    "grad_norm": "Norm of the gradient, before clipping",
    "tokens_per_second": "Tokens per second",
}
SLOW_START = 5
"""Steps that compile, and say nothing of the speed."""


def write_page(path: PathLike, runs: Sequence[Run], title: str) -> None:
    """Write the page, atomically.

    Raises:
        UserError: if the file can't be written.
    """
    with written_aside(path) as aside:
        aside.write_text(runs_page(runs, title), encoding="utf-8")


def runs_page(runs: Sequence[Run], title: str) -> str:
    """The page as text."""
    body = [*_header(title), *_overview(runs), *_panels(runs), *_samples(runs), *_differences(runs)]
    return PAGE.format(title=escape(title), css=CSS, body="\n".join(body), script=SCRIPT)


def _header(title: str) -> Iterator[str]:
    when = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    yield f'<h1>{escape(title)}</h1><p class="soft">{escape(when)}</p>'


def _overview(runs: Sequence[Run]) -> Iterator[str]:
    yield '<h2>Runs</h2><div class="card scroll"><table><thead><tr><th>run</th><th>backend</th>'
    yield '<th class="number">steps</th><th class="number">loss</th><th class="number">least held-out loss</th>'
    yield '<th class="number">tokens/s</th></tr></thead><tbody>'
    for place, run in enumerate(runs):
        losses, heldout = run.points("loss"), run.points("heldout_loss")
        speeds = [value for _, value in run.points("tokens_per_second")]
        cells = [
            f"{run.records[-1]['step']:,}",
            f"{losses[-1][1]:.4f}" if losses else "",
            f"{min(value for _, value in heldout):.4f}" if heldout else "",
            f"{statistics.median(speeds[SLOW_START:] or speeds):,.0f}" if speeds else "",
        ]
        numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        yield f'<tr><td class="name">{_mark(place)}{escape(run.name)}</td><td>{escape(run.backend)}</td>{numbers}</tr>'
    yield "</tbody></table></div>"


def _panels(runs: Sequence[Run]) -> Iterator[str]:
    for field, heading in PANELS.items():
        curves = {run.label: run.points(field) for run in runs}
        if not any(curves.values()):
            continue
        yield f'<h2>{escape(heading)}</h2><div class="card"><div class="legend">'
        yield from (f"<span>{_mark(place)}{escape(label)}</span>" for place, label in enumerate(curves))
        yield f'</div><div class="scroll">{curves_plot(curves, heading)}</div></div>'


def _samples(runs: Sequence[Run]) -> Iterator[str]:
    """What the models of the runs wrote, the newest first."""
    found = [(place, run) for place, run in enumerate(runs) if run.samples]
    if not found:
        return
    yield "<h2>Samples</h2>"
    for place, run in found:
        yield f"<h3>{_mark(place)}{escape(run.label)}</h3>"
        for sample in reversed(run.samples):
            yield f"<details><summary>step {sample.step:,}</summary><pre>{escape(sample.text)}</pre></details>"


def _differences(runs: Sequence[Run]) -> Iterator[str]:
    fields = differing_fields(runs)
    if not fields:
        return
    heads = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    yield f'<h2>Settings that differ</h2><div class="card scroll"><table><thead><tr><th>field</th>{heads}</tr></thead>'
    yield "<tbody>"
    for name, values in fields.items():
        cells = "".join(f'<td class="name">{"" if value is None else escape(_text(value))}</td>' for value in values)
        yield f'<tr><td class="name">{escape(name)}</td>{cells}</tr>'
    yield "</tbody></table></div>"


def _text(value: object) -> str:
    return number(value, 3) if isinstance(value, float) else str(value)


def _mark(place: int) -> str:
    dot = "display:inline-block;width:10px;height:10px;border-radius:50%;margin-right:6px"
    return f'<i style="{dot};background:{COLOURS[place % len(COLOURS)]}"></i>'
