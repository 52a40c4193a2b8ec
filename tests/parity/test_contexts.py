"""Which inputs of a forward pass may be given together: every combination, by the rules of `ModalityContext`."""

from __future__ import annotations

import itertools
from collections.abc import Set as AbstractSet
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.parity.backends import Torch, on_both

SOURCES = ("inputs_embeds", "prefix_embeds", "image_features", "image_keys_values")
FIELDS = (*SOURCES, "image_mask", "prefix_positions", "output_slice", "modality_ids")


def refused_for(given: AbstractSet[str]) -> str:
    """The field that an error must name, or "" where there is none."""
    sources = [name for name in SOURCES if name in given]
    if len(sources) > 1:
        return f"{' and '.join(sources)} are given"
    if "image_mask" in given and not {"image_features", "image_keys_values"} & given:
        return "image_mask is given"
    if "prefix_positions" in given and ("prefix_embeds" not in given or "output_slice" in given):
        return "prefix_positions is given"
    if "modality_ids" in given and not {"inputs_embeds", "prefix_embeds"} & given:
        return "modality_ids is given"
    return ""


@on_both
def test_what_has_no_meaning_together_is_refused(backend: Torch) -> None:
    context = backend.module("model.modality").ModalityContext
    for given in itertools.chain.from_iterable(itertools.combinations(FIELDS, size) for size in range(len(FIELDS))):
        said = refused_for(set(given))
        if said:
            with pytest.raises(ValueError, match=f"^{said}"):
                context(**dict.fromkeys(given, object()))
        else:
            made = context(**dict.fromkeys(given, object()))
            assert made.reads_image == bool({"image_features", "image_keys_values"} & set(given))


@on_both
def test_masks_of_text_follow_its_images(backend: Torch) -> None:
    """One image, or two in any order, each after so many of a row's text tokens."""
    modality = backend.module("model.modality")
    text_mask = np.array([[True, False, True, True], [False, True, True, False], [True, True, False, True]])
    image_mask = np.array([[True, False, True, False], [False, False, True, True], [True, True, True, False]])
    for positions in (np.array([0, 2, 4]), np.array([[1, 3], [4, 0], [2, 2]])):
        expected, size = [], 4 // positions.reshape(3, -1).shape[1]
        for image, text, places in zip(image_mask, text_mask, positions.reshape(3, -1), strict=True):
            row = [(place, part, image[size * part :][:size]) for part, place in enumerate(places)]
            row += [(place, len(places) + place, text[place : place + 1]) for place in range(4)]
            expected.append(np.concatenate([part for *_, part in sorted(row, key=lambda each: each[:2])]))
        context = modality.ModalityContext(
            prefix_embeds=backend.array(np.zeros((3, 4, 2), np.float32)),
            key_padding_mask=backend.array(np.concatenate([image_mask, text_mask], axis=1)),
        )
        found = modality.with_positions(context, backend.array(positions.astype(np.int32)))
        np.testing.assert_array_equal(backend.numpy(found.key_padding_mask), expected)


@on_both
def test_a_layout_knows_the_image_it_begins_with(backend: Torch) -> None:
    layout, names = backend.module("model.layout").Layout, ("image", "text")
    for spans, image in (
        ((("image", 0, 3), ("text", 3, 5)), 3),
        ((("text", 0, 2), ("image", 2, 5)), 0),
        ((("text", 0, 4),), 0),
        (None, 0),
    ):
        assert layout(names, spans=spans).image_tokens == image


@on_both
@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("tokens", [None, object()])
@pytest.mark.parametrize("caches", [None, []])
def test_a_forward_pass_has_one_input_and_beside_caches_no_image(
    backend: Torch, embedded: bool, tokens: Any, caches: Any
) -> None:
    context, check = backend.module("model.modality").ModalityContext, backend.module("model.stream").check_inputs
    beside: list[dict[str, Any]] = [{}, {"output_slice": slice(1)}, {"key_padding_mask": object()}]
    beside += [{"modality_ids": object()}] if embedded else [{"prefix_embeds": object()}, {"image_features": object()}]
    for fields in beside:
        modality = context(**fields, **({"inputs_embeds": object()} if embedded else {}))
        barred = {"output_slice", "modality_ids", "prefix_embeds", "image_features"} & fields.keys()
        said = ""
        if (tokens is None) != embedded:
            said = f"exactly one must be given, {'neither is' if tokens is None else 'both are'}"
        elif caches is not None and barred:
            said = f"modality.{min(barred)} is given: not allowed together with kv_caches"
        if said:
            with pytest.raises(ValueError, match=said):
                check(tokens, modality, caches)
        else:
            check(tokens, modality, caches)


@on_both
def test_batches_of_text_give_padding_as_a_context(backend: Torch) -> None:
    """Those of images give the mask of the text by its name, and labels are given to no model."""
    inputs = backend.module("training.terms").model_inputs
    tokens, mask, labels, pixels = object(), object(), object(), object()
    assert inputs({"tokens": tokens, "labels": labels}) == {"tokens": tokens}
    padded = inputs({"tokens": tokens, "text_mask": mask, "labels": labels})
    assert padded.keys() == {"tokens", "modality"}
    assert padded["modality"].key_padding_mask is mask
    pictures = {"pixel_values": pixels, "input_ids": tokens, "text_mask": mask}
    assert inputs({**pictures, "labels": labels}) == pictures


@on_both
@pytest.mark.parametrize(("dtype", "size"), [("uint8", 300), ("int8", 200), ("int16", 40_000)])
def test_narrow_ids_are_within_large_sizes(backend: Torch, dtype: str, size: int) -> None:
    """A size that their type can't hold must not be wrapped to it."""
    ids = np.array([0, 60, 127], dtype)
    found = backend.run(
        lambda x, ids: backend.module("model.checks").nan_outside(x, ids, size), np.ones((3, 2), np.float32), ids
    )
    assert np.array_equal(found, np.ones((3, 2)))


@on_both
@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64"])
def test_narrow_lengths_of_a_prefix_are_within_a_long_stream(backend: Torch, dtype: str) -> None:
    context, stream = backend.module("model.modality").ModalityContext, backend.module("model.stream")
    x = backend.array(np.ones((2, 300, 1), np.float32))
    lengths = backend.array(np.array([200, 0], dtype))
    found = stream.with_whole_prefix(x, context(prefix_lengths=lengths), None, None)
    assert np.array_equal(backend.numpy(found), np.ones((2, 300, 1)))


@on_both
def test_names_of_activations_may_come_one_by_one(backend: Torch) -> None:
    check = backend.module("model.hooks").check_activation_names
    assert check(["a", "b", "c"], iter(["c", "a"])) == ["c", "a"]
    assert check(["a", "b"], None) == ["a", "b"]
    with pytest.raises(ValueError, match=r"^name = 'bb': no such module; did you mean 'b'\? Modules: a, b$"):
        check(["a", "b"], iter(["a", "bb"]))


@on_both
@pytest.mark.parametrize("cached", [False, True])
def test_every_fact_of_new_tokens_reaches_their_mask(backend: Torch, cached: bool) -> None:
    """That of a cache, or else the mask itself, is told all facts by their names."""
    given = {
        "doc_ids": backend.array(np.array([[0, 1, 1]])),
        "key_padding_mask": backend.array(np.array([[True, True, False]])),
        "sliding_window": 2,
        "prefix_lengths": backend.array(np.array([1], np.int32)),
    }
    told: dict[str, object] = {}
    cache = SimpleNamespace(mask=lambda length, **facts: told.update(facts, length=length)) if cached else None
    mask = backend.module("model.attention").self_attention_mask(3, kv_cache=cache, **given)
    if cached:
        assert told.keys() == {"length", *given}
        assert told["length"] == 3
        assert all(told[name] is value for name, value in given.items())
    else:
        assert mask.causal
        assert mask.window == 2
        assert mask.query_doc_ids is mask.key_doc_ids is given["doc_ids"]
        assert mask.key_valid is given["key_padding_mask"]
        assert mask.prefix_lengths is given["prefix_lengths"]
