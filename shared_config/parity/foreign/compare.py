"""Are two recordings of any functions the same? Names by a map, limits by the better deltas, causes where confirmed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from shared_config.errors import UserError
from shared_config.parity.align import execution_order, fed_hash
from shared_config.parity.compare import compare_traces
from shared_config.parity.foreign.causes import PLACES, cause_of
from shared_config.parity.foreign.containers import ARGUMENT
from shared_config.parity.foreign.mapping import ACTIVATIONS, END, SECTION_OF, WEIGHTS, Map, matches
from shared_config.parity.foreign.options import values_hash
from shared_config.parity.foreign.site import made_in
from shared_config.parity.foreign.transfer import rules_of_inputs
from shared_config.parity.result import ONLY_A, ONLY_B, Comparison, Row
from shared_config.parity.selection import RefedFields
from shared_config.parity.traces import FOREIGN, FORWARD, Trace, TraceMeta

LISTED = 12
"""Names of what only one side has that are listed one by one."""


def compare_functions(
    a: Trace,
    b: Trace,
    names: Map | None = None,
    *,
    common: bool = False,
    truth: Trace | None = None,
    labels: tuple[str, str] | None = None,
) -> Comparison:
    """Compare two recordings, in the names and layouts of ``b``.

    Args:
        names: from the names and layouts of ``a`` to those of ``b``; None where they are the same.
        common: whether what only one side has is listed and does not count.
        truth: a float64 recording with the names of ``b``, that both are measured against.
        labels: names of the two for messages; by default their frameworks.

    Returns:
        rows in the order of execution; notes say where the first difference was made and, where a check confirms one,
        by what cause.

    Raises:
        UserError: recordings of other inputs, a map that does not fit, or nothing that says how far rounding goes.
    """
    _check_inputs(a, b, names)
    moved = a if names is None else names.apply_to_trace(a)
    moved, b, notes = _aligned(a, moved, b)
    notes += (*_losses_note(a, b), *_unread_rules(a, names))
    if common:
        moved, b, left_out = _in_common(moved, b, labels or _labels(a, b))
        notes += left_out
    found = compare_traces(moved, b, truth, labels or _labels(a, b))
    said = tuple(_findings(found, moved, b))
    return dataclasses.replace(found, notes=(*said, *notes, *found.notes))


def is_foreign(trace: Trace) -> bool:
    """Whether a trace is of a function that this package does not define."""
    return bool(trace.meta.extra.get(FOREIGN))


def _labels(a: Trace, b: Trace) -> tuple[str, str]:
    if a.meta.backend != b.meta.backend:
        return a.meta.backend, b.meta.backend
    return f"{a.meta.backend} (a)", f"{b.meta.backend} (b)"


def _check_inputs(a: Trace, b: Trace, names: Map | None) -> None:
    if _agree(a, b, "inputs"):
        return
    moved = _agree(a, b, "numbers", unknown=False)
    if moved and rules_of_inputs(names).weights:
        return
    hint = f"; the numbers are the same: [[weights]] of the map says how {ARGUMENT}0, {ARGUMENT}NAME are laid out"
    raise UserError(f"inputs: other values: the two were called with different arrays{hint if moved else ''}")


def _agree(a: Trace, b: Trace, field: str, unknown: bool = True) -> bool:
    """Whether one was called with all that the other was called with, by its hashes; ``unknown`` without hashes."""
    given_a, given_b = (set(each) if isinstance(each := side.meta.extra.get(field), list) else set() for side in (a, b))
    return given_a <= given_b or given_b <= given_a if given_a and given_b else unknown


def _losses_note(a: Trace, b: Trace) -> tuple[str, ...]:
    """What is to be said of losses that draw outputs towards other values."""
    drawn = [each if isinstance(each := side.meta.extra.get("drawn"), list) else [] for side in (a, b)]
    if not all(drawn) or set(drawn[0]) == set(drawn[1]):
        return ()
    of_a, of_b = (", ".join(map(str, names)) for names in drawn)
    return (
        f"loss: a draws {of_a} towards random values, b {of_b}, so that gradients are of other losses: record b with "
        f"the map (names=, --map), or give both a loss",
    )


def _unread_rules(a: Trace, names: Map | None) -> tuple[str, ...]:
    """What a map names and a, of which all was kept, does not have: a pattern with a typing error moves nothing."""
    if names is None or a.meta.selection:
        return ()
    unread: list[str] = []
    for section in (WEIGHTS, ACTIVATIONS):
        groups = [group for group, of in SECTION_OF.items() if of == section]
        full = [name.partition("/")[2] for name in a.tensors if name.partition("/")[0] in groups]
        own = {*full, *(END.sub("", name) for name in full)}
        patterns = [pattern for rule in getattr(names, section) for pattern in rule.a]
        unread += [one for one in patterns if own and not one.startswith(ARGUMENT) and not matches(one, own)]
    more = f" and {len(unread) - LISTED} more" if len(unread) > LISTED else ""
    return (f"map: a has nothing that {', '.join(unread[:LISTED])}{more} names",) if unread else ()


def _aligned(original: Trace, a: Trace, b: Trace) -> tuple[Trace, Trace, tuple[str, ...]]:
    """Traces that say to be of one run, with the better deltas, and notes."""
    for side, own, other in (("a", a, b), ("b", b, original)):
        if own.meta.refed and own.meta.refed.get("hash") != values_hash(other):
            raise UserError(f"trace {side}: was fed with another recording than the one that it is compared with")
    metas = [_of_one_run(own.meta, b.meta, other) for own, other in ((a, b), (b, a))]
    measured = [bool(meta.deltas) for meta in metas]
    exact = [bool(meta.deltas) and bool(meta.extra.get("exact", True)) for meta in metas]
    notes = []
    for place, meta in enumerate(metas):
        if measured[place] and not exact[place]:
            better = exact[1 - place]
            metas[place] = dataclasses.replace(meta, deltas={}, parts={}) if better else meta
            kept = "the deltas of the other side are used" if better else "its deltas hold rounding of their own"
            notes.append(f"{meta.backend}: does not compute in float64 throughout: {kept}")
    return Trace(a.tensors, metas[0]), Trace(b.tensors, metas[1]), tuple(notes)


def _of_one_run(meta: TraceMeta, of: TraceMeta, other: Trace) -> TraceMeta:
    """The metadata as if it were of the same run as ``of``: what the two were called with has been compared."""
    refed = meta.refed
    if refed:
        refed = RefedFields(**{**refed, "hash": fed_hash(other, [])})
    return dataclasses.replace(
        meta,
        seed=of.seed,
        config=of.config,
        weights_hash="",
        tokens_hash="",
        initial_hash="",
        selection=meta.selection if meta.selection == of.selection else {},
        refed=refed,
    )


def _in_common(a: Trace, b: Trace, labels: tuple[str, str]) -> tuple[Trace, Trace, tuple[str, ...]]:
    """The two without what only one has, and what that is, in words."""
    notes = []
    for label, own, other in ((labels[0], a, b), (labels[1], b, a)):
        alone = [name for name in own.tensors if name not in other.tensors and other.meta.wants(name)]
        if alone:
            more = f" and {len(alone) - LISTED} more" if len(alone) > LISTED else ""
            notes.append(f"only {label} has {', '.join(alone[:LISTED])}{more}")
    shared = a.tensors.keys() & b.tensors.keys()
    if not any(name.startswith(f"{FORWARD}/") for name in shared):
        raise UserError("the two have no activation in common: a map is needed (--map)")
    kept_a, kept_b = (
        Trace({name: tensor for name, tensor in side.tensors.items() if name in shared}, side.meta) for side in (a, b)
    )
    return kept_a, kept_b, tuple(notes)


def _findings(found: Comparison, a: Trace, b: Trace) -> Iterator[str]:
    """Where the first difference of each pass was made, and why, in words."""
    order = [name for name in execution_order(a, b) if name in a.tensors and name in b.tensors]
    for what, row in (("forward", found.first_forward), ("backward", found.first_backward)):
        if row is None:
            continue
        if row.status not in (ONLY_A, ONLY_B):
            yield f"{what}: made in {made_in(row.name, (a.meta, b.meta))}"
            yield from _cause(row, a, b, order)
        else:
            side = found.label_a if row.status == ONLY_A else found.label_b
            yield f"{what}: only {side} has {row.name}: a map names it on the other side, --common leaves it out"


def _cause(row: Row, a: Trace, b: Trace, order: list[str]) -> Iterator[str]:
    cause = cause_of(row, a, b, order)
    if cause is not None:
        yield f"{'where' if cause.kind in PLACES else 'cause'}: {cause.text}"
