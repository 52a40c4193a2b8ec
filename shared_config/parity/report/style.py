"""Looks and behaviour of the report: one style sheet for light and dark, one filter for long tables."""

from __future__ import annotations

CSS = """
:root {
  color-scheme: light dark;
  --page: #f7f8fa; --card: #ffffff; --ink: #1b2230; --soft: #5d6779; --line: #e2e6ec; --band: #f1f4f8;
  --a: #2f6fdb; --b: #e08a1e; --bad: #d6303a; --good: #1e8e5a; --limit: #8a93a5; --code: #f3f5f8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12151b; --card: #1a1f28; --ink: #e6eaf1; --soft: #98a3b5; --line: #2b323e; --band: #202632;
    --a: #6fa3f5; --b: #f0ac54; --bad: #ff6b70; --good: #54c48c; --limit: #7c879a; --code: #141922;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
main { max-width: 1200px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 6px; letter-spacing: -.01em; }
h2 { font-size: 19px; margin: 40px 0 12px; letter-spacing: -.005em; }
h3 { font-size: 14px; margin: 18px 0 6px; font-weight: 600; }
p { margin: 6px 0; }
.soft, .legend { color: var(--soft); }
.card {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; margin: 12px 0;
}
.card > :first-child, .origins h3 { margin-top: 0; }
.badge {
  display: inline-block; border-radius: 999px; padding: 3px 12px; font-weight: 600; font-size: 14px;
  color: var(--good); background: color-mix(in srgb, var(--good) 13%, transparent);
}
.badge.bad { color: var(--bad); background: color-mix(in srgb, var(--bad) 13%, transparent); }
.origins { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); gap: 0 28px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; margin: 6px 0; font-size: 14px; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
code, pre, .name, .number { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.name, .number, code { font-size: 12.5px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th {
  text-align: left; font-weight: 600; color: var(--soft); font-size: 12.5px; padding: 6px 10px;
  border-bottom: 1px solid var(--line); white-space: nowrap;
}
td { padding: 5px 10px; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
.number { text-align: right; white-space: nowrap; }
th.number { font-family: inherit; }
.name { overflow-wrap: anywhere; }
tr.bad .name, .verdict.bad { color: var(--bad); }
.verdict { font-weight: 600; color: var(--good); white-space: nowrap; }
.bar { display: block; width: 90px; height: 7px; margin-top: 7px; border-radius: 4px; background: var(--line); }
.bar i { display: block; height: 100%; border-radius: 4px; background: var(--good); }
.bad .bar i, .bar.bad i { background: var(--bad); }
svg { display: block; width: 100%; min-width: 720px; height: auto; }
svg .band { fill: var(--band); }
svg .grid { stroke: var(--line); }
svg .label { fill: var(--soft); font-size: 11px; text-anchor: middle; }
svg .axis { text-anchor: end; }
svg .limit { fill: none; stroke: var(--limit); stroke-width: 1.5; stroke-dasharray: 5 3; }
svg .dot { stroke: var(--card); stroke-width: .8; }
svg .side-a { fill: var(--a); } svg .side-b { fill: var(--b); } svg .bad { fill: var(--bad); }
svg .exact { fill: var(--card); stroke: var(--soft); stroke-width: 1.2; }
.legend { font-size: 13px; display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 2px 0 8px; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 6px; }
.legend .dash { width: 20px; height: 0; border-radius: 0; border-top: 2px dashed var(--limit); vertical-align: middle; }
.firsts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 0 16px; }
.heat {
  display: block; width: 100%; height: 220px; image-rendering: pixelated; border: 1px solid var(--line);
  border-radius: 6px; background: var(--code); margin: 10px 0 4px;
}
details { margin: 12px 0; }
summary { cursor: pointer; font-weight: 600; padding: 4px 0; }
pre {
  background: var(--code); border-radius: 8px; padding: 12px 14px; overflow-x: auto; font-size: 12.5px; margin: 8px 0;
}
input[type=search] {
  font: inherit; width: 100%; max-width: 380px; margin: 6px 0 8px; padding: 6px 10px; color: var(--ink);
  background: var(--page); border: 1px solid var(--line); border-radius: 7px;
}
@media (max-width: 560px) {
  main { padding: 20px 12px 40px; } .card { padding: 12px; }
}
@media print { body { background: #fff; } .card { break-inside: avoid; } input[type=search] { display: none; } }
"""

SCRIPT = """
for (const box of document.querySelectorAll("input[type=search]")) {
  const rows = box.parentElement.querySelectorAll("tbody tr");
  box.addEventListener("input", () => {
    const words = box.value.toLowerCase().split(/\\s+/);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every(word => text.includes(word));
    }
  });
}
"""
