"""``kempnerforge record``: what any model computes, in a file to be compared anywhere."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from shared_config.commands.common import writable_file
from shared_config.errors import UserError
from shared_config.interchange.outputs import refuse_overwriting
from shared_config.parity.foreign.mapping import read_map
from shared_config.parity.foreign.named import file_of, recorded
from shared_config.parity.traces import read_trace, write_trace


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Do it. Returns the exit status."""
    if overrides:
        raise UserError(f"{overrides[0]}: record takes no config; MODEL makes what it records")
    output = writable_file(options.output)
    refuse_overwriting(output, options.refeed, options.map, file_of(options.model))
    write_trace(output, recorded(options.model, asked(options)))
    return 0


def asked(options: argparse.Namespace) -> dict[str, object]:
    """What ``record`` is asked for: nothing that the command line does not say.

    Raises:
        UserError: no map to turn round; files that can't be read.
    """
    if options.map is None and options.inverse:
        raise UserError("--inverse: there is no --map to turn round")
    names = None if options.map is None else read_map(options.map)
    given = {
        "dtype": options.dtype,
        "only": [pattern.strip() for patterns in options.only for pattern in patterns.split(",")] or None,
        "above": options.summary,
        "seed": options.seed,
        "deltas": None if options.deltas else False,
        "refeed": None if options.refeed is None else read_trace(options.refeed),
        "names": names.inverse() if names is not None and options.inverse else names,
    }
    return {name: value for name, value in given.items() if value is not None}
