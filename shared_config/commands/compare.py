"""``kempnerforge compare``: two traces, models that are recorded first, or folders of traces, tensor by tensor, and the
first that diverges.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from shared_config.commands.common import console, writable_file
from shared_config.commands.recordings import recordings
from shared_config.commands.verdict import show_findings, show_first_differences
from shared_config.errors import UserError
from shared_config.interchange.files import written_aside
from shared_config.interchange.outputs import refuse_overwriting
from shared_config.parity.checks import findings_of
from shared_config.parity.compare import Comparison, compare_traces
from shared_config.parity.foreign.compare import compare_functions, is_foreign
from shared_config.parity.foreign.derive import derive_tolerance, tolerance_lines
from shared_config.parity.foreign.mapping import Map, read_map
from shared_config.parity.foreign.named import file_of
from shared_config.parity.report import write_report
from shared_config.parity.traces import Trace, read_trace

DIFFERENT = 1
SUFFIX = ".safetensors"


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Do it, under the overrides of the config. Returns the exit status."""
    if overrides:
        raise UserError(f"{overrides[0]}: compare takes no config; the traces hold theirs")
    report, numbers = (None if path is None else writable_file(path) for path in (options.report, options.json))
    for output in filter(None, (report, numbers)):
        sources = (file_of(side) or side for side in (options.a, options.b))
        refuse_overwriting(output, *sources, options.truth, options.map)
    truth = None if options.truth is None else read_trace(options.truth)
    names = None if options.map is None else read_map(options.map)
    with recordings(options) as recorded:
        pairs = recorded or pairs_of(Path(options.a), Path(options.b))
        screen = console()
        if options.derive_tolerance is not None:
            wanted = options.derive_tolerance
            if len(pairs) < wanted:
                raise UserError(f"--derive-tolerance {wanted}: the two folders have {len(pairs)} pairs")
            found = derive_tolerance(_compared(*pair, names, True, None) for pair in list(pairs.values())[:wanted])
            for line in tolerance_lines(found):
                screen.print(line, markup=False)
            return 0
        same, comparisons = True, {}
        for heading, (a, b) in pairs.items():
            comparison = _compared(a, b, names, options.common, truth)
            comparisons[heading or comparison.dtype] = comparison
            same &= show_findings(screen, findings_of(heading or comparison.dtype, comparison))
            show_first_differences(screen, comparison)
    first = next(iter(comparisons.values()))
    if numbers is not None:
        content = first.to_json() if "" in pairs else {name: one.to_json() for name, one in comparisons.items()}
        _write(numbers, json.dumps(content, indent=1))
    if report is not None:
        write_report(report, comparisons, title=f"{first.label_a} and {first.label_b}")
    return 0 if same else DIFFERENT


def pairs_of(a: Path, b: Path) -> dict[str, tuple[Path, Path]]:
    """Files to compare, by name; "" for two files.

    Raises:
        UserError: a folder and a file, folders whose files are not named alike, or folders without traces.
    """
    if not a.is_dir() and not b.is_dir():
        return {"": (a, b)}
    if not (a.is_dir() and b.is_dir()):
        raise UserError(f"{a}, {b}: must be two traces, or two folders of traces")
    names_a, names_b = ({file.stem for file in folder.glob(f"*{SUFFIX}")} for folder in (a, b))
    alone = [f"{folder / name}{SUFFIX}" for folder, own, other in ((a, names_a, names_b), (b, names_b, names_a))
             for name in sorted(own - other)]  # fmt: skip
    if alone:
        raise UserError(f"{', '.join(alone)}: has no counterpart of this name in the other folder")
    if not names_a:
        raise UserError(f"{a}: holds no trace, a {SUFFIX} file")
    return {name: (a / f"{name}{SUFFIX}", b / f"{name}{SUFFIX}") for name in sorted(names_a)}


def _compared(a: Path, b: Path, names: Map | None, common: bool, truth: Trace | None) -> Comparison:
    trace_a, trace_b = read_trace(a), read_trace(b)
    if names is None and not common and not (is_foreign(trace_a) or is_foreign(trace_b)):
        return compare_traces(trace_a, trace_b, truth)
    return compare_functions(trace_a, trace_b, names, common=common, truth=truth)


def _write(path: Path, text: str) -> None:
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")
