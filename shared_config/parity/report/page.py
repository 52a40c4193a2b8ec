"""One HTML page that shows what comparisons found: no network, no other file, for light and dark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from html import escape

from shared_config.errors import UserError
from shared_config.interchange.files import PathLike, written_aside
from shared_config.parity.checks import findings_of
from shared_config.parity.compare import Comparison, Row
from shared_config.parity.plan import Finding
from shared_config.parity.report.plot import error_plot, heat_picture, number, relative_limit
from shared_config.parity.report.style import CSS, SCRIPT
from shared_config.parity.traces import COTANGENT, DECODE, FORWARD, GRADIENT, LOSS, ROUTING, UPDATED, TraceMeta

PANELS = {
    "Forward, in the order of execution": (FORWARD, ROUTING, LOSS, DECODE),
    "Gradients, in the order of the backward pass": (COTANGENT, GRADIENT),
    "Parameters after one optimiser step": (UPDATED,),
}
FEW = 3
"""Panels of fewer tensors say nothing that the table does not."""

TIMES = " \N{MULTIPLICATION SIGN} "

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""


def write_report(
    path: PathLike,
    comparisons: Mapping[str, Comparison],
    findings: Iterable[Finding] | None = None,
    title: str = "One config, two backends",
) -> None:
    """Write the page, atomically.

    Args:
        comparisons: by heading, at least one.
        findings: lines of the overview; by default one for each group of tensors of each comparison.

    Raises:
        UserError: if the file can't be written, or there is nothing to report.
    """
    page = report_page(comparisons, findings, title)
    with written_aside(path) as aside:
        aside.write_text(page, encoding="utf-8")


def report_page(
    comparisons: Mapping[str, Comparison], findings: Iterable[Finding] | None = None, title: str = ""
) -> str:
    """The page as text."""
    if not comparisons:
        raise UserError("comparisons: nothing to report")
    if findings is None:
        findings = [line for heading, found in comparisons.items() for line in findings_of(heading, found)]
    findings = list(findings)
    sections = [section for heading, found in comparisons.items() for section in _comparison(heading, found)]
    first = next(iter(comparisons.values()))
    body = [*_header(title, findings, first), *_overview(findings), *sections, *_config(first.meta_a)]
    return PAGE.format(title=escape(title), css=CSS, body="\n".join(body), script=SCRIPT)


# What was compared, and the verdict


def _header(title: str, findings: Sequence[Finding], comparison: Comparison) -> Iterator[str]:
    failed = sum(not finding.ok for finding in findings)
    verdict = "the same function" if not failed else f"{failed} of {len(findings)} comparisons differ"
    when = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    yield f"<h1>{escape(title)}</h1>"
    yield f'<p>{_badge(not failed, verdict)} <span class="soft">{escape(when)}</span></p>'
    yield '<div class="card origins">'
    yield _origin(comparison.label_a, comparison.meta_a)
    yield _origin(comparison.label_b, comparison.meta_b)
    yield "</div>"


def _origin(label: str, meta: TraceMeta) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in meta.versions.items())
    lines = {
        "device": meta.device,
        "machine": meta.machine,
        "versions": versions,
        "seed": str(meta.seed),
        "weights": f"{meta.weights} {meta.weights_hash[:12]}".strip(),
        "tokens": meta.tokens_hash[:12],
        "initial weights": meta.initial_hash[:12],
    }
    pairs = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in lines.items() if text)
    return f"<div><h3>{escape(label)}</h3><dl>{pairs}</dl></div>"


def _overview(findings: Sequence[Finding]) -> Iterator[str]:
    yield "<h2>Overview</h2>"
    yield '<div class="card scroll"><table><thead><tr><th>check</th><th>compared</th><th class="number">tensors</th>'
    yield '<th>nearest to its limit</th><th class="number">relative error</th><th class="number">allowed</th>'
    yield "<th>share of the limit</th><th>verdict</th></tr></thead><tbody>"
    yield from (_finding(finding) for finding in findings)
    yield "</tbody></table></div>"
    details = [f"<p>{escape(finding.check)}: {escape(finding.detail)}</p>" for finding in findings if finding.detail]
    if details:
        yield f'<div class="card name">{"".join(details)}</div>'


def _finding(finding: Finding) -> str:
    share = finding.error / finding.limit if finding.limit else (0.0 if finding.ok else math.inf)
    numbers = [number(finding.error), number(finding.limit), _bar(share)] if finding.worst else ["", "", ""]
    return (
        f"<tr{_bad(finding.ok)}><td>{escape(finding.check)}</td><td>{escape(finding.subject)}</td>"
        f'<td class="number">{finding.count}</td><td class="name">{escape(finding.worst)}</td>'
        f'<td class="number">{numbers[0]}</td><td class="number">{numbers[1]}</td><td>{numbers[2]}</td>'
        f"<td>{_verdict(finding.ok, finding.verdict)}</td></tr>"
    )


# One comparison


def _comparison(heading: str, comparison: Comparison) -> Iterator[str]:
    failed = len(comparison.failures)
    verdict = f"all {len(comparison.rows)} the same" if not failed else f"{failed} of {len(comparison.rows)} differ"
    yield f"<h2>{escape(heading)} {_badge(not failed, verdict)}</h2>"
    yield from (f'<p class="soft">{escape(note)}</p>' for note in comparison.notes)
    yield from _first_divergences(comparison)
    yield from _plots(comparison)
    yield from _all_tensors(comparison)


def _first_divergences(comparison: Comparison) -> Iterator[str]:
    found = {"forward": comparison.first_forward, "backward": comparison.first_backward}
    if not any(found.values()):
        return
    yield '<div class="firsts">'
    yield from (_divergence(kind, row, comparison) for kind, row in found.items() if row is not None)
    yield "</div>"


def _divergence(kind: str, row: Row, comparison: Comparison) -> str:
    lines = {
        "status": row.status,
        "at": str(row.position) if row.position else "",
        comparison.label_a: _exactly(row.value_a),
        comparison.label_b: _exactly(row.value_b),
        "truth": _exactly(row.value_truth),
        "error": f"{number(row.error)} rms, {_times(row.error, row.limit)} times the limit of {number(row.limit)}",
        **_part(row),
        "rounding": "" if row.multiple is None else f"{number(row.multiple)} times what rounding does",
        "not finite in both": f"{row.nonfinite} of {math.prod(row.shape)} places" if row.nonfinite else "",
        "not equal": f"{row.mismatched} of {math.prod(row.shape)} places" if row.mismatched else "",
    }
    pairs = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in lines.items() if text)
    return (
        f'<div class="card"><h3>First to diverge, {kind}</h3><p class="name verdict bad">{escape(row.name)}</p>'
        f"<dl>{pairs}</dl>{_heat(row, comparison)}</div>"
    )


def _part(row: Row) -> dict[str, str]:
    """A part that is beyond its limit, in words."""
    part = row.part
    if part is None or part.share <= 1:
        return {}
    text = f"{number(part.error)} rms, {number(part.share)} times its limit of {number(part.limit)}"
    others = "" if part.count == 1 else f"; {part.beyond} of {part.count} {part.kind}s are beyond theirs"
    return {part.label: text + others}


def _times(error: float, limit: float) -> str:
    return number(error / limit if limit else (math.inf if error else 0.0))


def _heat(row: Row, comparison: Comparison) -> str:
    heat = comparison.heatmaps.get(row.name)
    if heat is None or heat.shape == (1, 1):
        return ""
    rows, columns = heat.shape
    largest = max((x for line in heat.values for x in line if math.isfinite(x)), default=0.0)
    text = f"|difference| by place: {_shape(row)} as {rows} rows of {columns}; "
    text += f"strongest {number(largest)}, four decades shown"
    return f'{heat_picture(heat)}<p class="soft">{text}</p>'


def _plots(comparison: Comparison) -> Iterator[str]:
    panels = {
        caption: [row for row in comparison.rows if row.group in groups and row.dtype_a]
        for caption, groups in PANELS.items()
    }
    panels = {caption: rows for caption, rows in panels.items() if len(rows) >= FEW}
    if not panels:
        return
    yield '<div class="card">'
    yield _legend(comparison)
    for caption, rows in panels.items():
        yield f"<h3>{caption}</h3>"
        yield f'<div class="scroll">{error_plot(rows, f"{caption}: relative error of each tensor")}</div>'
    yield "</div>"


def _legend(comparison: Comparison) -> str:
    sides = {"a": comparison.label_a, "b": comparison.label_b}
    if comparison.meta_truth is None:
        dots = f'<span><i style="background:var(--b)"></i>{escape(sides["b"])} against {escape(sides["a"])}</span>'
    else:
        dots = "".join(
            f'<span><i style="background:var(--{side})"></i>{escape(label)} is further from the float64 truth</span>'
            for side, label in sides.items()
        )
    return (
        f'<div class="legend"><span>relative error</span>{dots}'
        '<span><i style="background:var(--bad)"></i>beyond its limit</span>'
        '<span><i style="border:1.5px solid var(--soft)"></i>no error at all</span>'
        '<span><i class="dash"></i>limit</span></div>'
    )


def _all_tensors(comparison: Comparison) -> Iterator[str]:
    with_truth = comparison.meta_truth is not None
    values = [comparison.label_a, comparison.label_b, *(["truth"] if with_truth else [])]
    yield f"<details><summary>All {len(comparison.rows)} tensors</summary>"
    yield '<div class="card"><input type="search" placeholder="filter by name or status" aria-label="filter">'
    yield '<div class="scroll"><table><thead><tr><th>tensor</th><th class="number">shape</th>'
    yield '<th class="number">relative error</th>'
    yield '<th class="number">/ delta</th><th>share of the limit</th><th class="number">largest at</th>'
    yield from (f'<th class="number">{escape(value)}</th>' for value in values)
    yield "<th>status</th></tr></thead><tbody>"
    yield from (_tensor(row, with_truth) for row in comparison.rows)
    yield "</tbody></table></div></div></details>"


def _tensor(row: Row, with_truth: bool) -> str:
    position = "" if row.position is None else ", ".join(str(i) for i in row.position)
    values = [row.value_a, row.value_b, *([row.value_truth] if with_truth else [])]
    estimated = "≈ " if row.estimated else ""
    return (
        f'<tr{_bad(row.ok)}><td class="name">{escape(row.name)}</td>'
        f'<td class="number">{_shape(row)}</td>'
        f'<td class="number">{estimated}{number(row.relative)}</td><td class="number">{number(row.multiple)}</td>'
        f'<td title="limit {number(relative_limit(row))}">{_bar(row.share)}{_label(row)}</td>'
        f'<td class="number">{position}</td>'
        + "".join(f'<td class="number">{number(value, 5)}</td>' for value in values)
        + f"<td>{_verdict(row.ok, row.status)}</td></tr>"
    )


def _config(meta: TraceMeta) -> Iterator[str]:
    yield "<h2>Config</h2>"
    yield f"<details><summary>Resolved settings of the run</summary><pre>{escape(meta.config)}</pre></details>"


def _shape(row: Row) -> str:
    return TIMES.join(str(size) for size in row.shape) or ("scalar" if row.dtype_a else "")


def _bar(share: float) -> str:
    width, bad = 100 * min(1.0, share), " bad" if share > 1 else ""
    return f'<span class="bar{bad}" title="{number(share)}"><i style="width:{width:.0f}%"></i></span>'


def _label(row: Row) -> str:
    """The part that the share of the limit is of; nothing where that is the whole tensor."""
    return "" if row.part is None else f' <span class="soft">{escape(row.part.label)}</span>'


def _badge(ok: bool, text: str) -> str:
    return f'<span class="badge{"" if ok else " bad"}">{escape(text)}</span>'


def _verdict(ok: bool, text: str) -> str:
    return f'<span class="verdict{"" if ok else " bad"}">{escape(text)}</span>'


def _bad(ok: bool) -> str:
    return "" if ok else ' class="bad"'


def _exactly(value: float | None) -> str:
    return "" if value is None else repr(value)
