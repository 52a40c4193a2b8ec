"""Integers that name something, and masks: what names nothing is refused wherever it is given, with field, value and
what is allowed; where values can't be seen it becomes NaN. The type that holds the integers makes no difference.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from shared_config.contract.parameters import parameter_table
from shared_config.schema import ModelConfig, MoMaConfig, MoTConfig, VLMConfig
from tests.oracle.weights import draw
from tests.parity.backends import Jax, Torch, on_both
from tests.parity.test_padding import ARCHITECTURES, DENSE, FRAMES, built

ROWS, LENGTH, IMAGE, VOCAB, DIM = 2, 3, 4, DENSE.vocab_size, DENSE.dim
ROUTED = DENSE.replace(num_experts=3)
IGNORED = -100
PIXELS = np.random.default_rng(0).standard_normal((ROWS, FRAMES, 3, 4, 4))
STREAM = np.random.default_rng(1).standard_normal((ROWS, LENGTH, DIM))
FEATURES = np.random.default_rng(2).standard_normal((ROWS, IMAGE, DIM))
TOKENS = np.array([[1, 2, 3], [4, 5, 6]], np.int32)
VISION = [arch for arch in ARCHITECTURES if arch != "text"]

Call = Callable[[Torch, Any], Any]
"""What a backend makes of one argument, an array of its own."""


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@dataclass(frozen=True)
class Argument:
    """An argument that a public call takes.

    Attributes:
        field: how an error names it.
        size: ids are in [0, size); None: any integer is one, or it is a mask.
        hidden: what the call gives where values can't be seen has NaN for a bad id.
        seen: a bad id is refused where values can be seen; False: there too it becomes NaN, for no call may wait for
            what it computes itself.
    """

    field: str
    call: Call
    good: np.ndarray
    size: int | None = None
    ignored: int | None = None
    hidden: bool = False
    seen: bool = True

    @property
    def is_mask(self) -> bool:
        return self.good.dtype == bool


@functools.cache
def transformer(backend: Torch, config: ModelConfig, vlm: VLMConfig | None = None) -> Any:
    table = parameter_table(config, vlm) if vlm else parameter_table(config)
    weights = draw({name: spec.shape for name, spec in table.items()}, 3)
    return backend.model(config, weights, vlm_config=vlm) if vlm else backend.model(config, weights)


def context(backend: Torch, **given: Any) -> Any:
    arrays = {name: backend.array(value) if isinstance(value, np.ndarray) else value for name, value in given.items()}
    return backend.module("model.modality").ModalityContext(**arrays)


def run_tokens(backend: Torch, tokens: Any) -> Any:
    return transformer(backend, DENSE).run(tokens).logits


def run_labels(backend: Torch, labels: Any) -> Any:
    logits = backend.array(np.linspace(-1, 1, ROWS * LENGTH * VOCAB).reshape(ROWS, LENGTH, VOCAB))
    return backend.module("training.loss").cross_entropy(logits, labels)[0]


def run_documents(backend: Torch, documents: Any) -> Any:
    return transformer(backend, DENSE).run(backend.array(TOKENS), doc_ids=documents).logits


def run_attention(field: str) -> Call:
    def call(backend: Torch, given: Any) -> Any:
        tables = [backend.array(np.ones((LENGTH, DENSE.head_size // 2))) for _ in range(2)]
        attention = transformer(backend, DENSE).layers["0"].attention
        return attention(backend.array(STREAM), *tables, **{field: given})

    return call


def run_text(field: str, config: ModelConfig = ROUTED) -> Call:
    def call(backend: Torch, given: Any) -> Any:
        return (
            transformer(backend, config).run(backend.array(TOKENS), modality=context(backend, **{field: given})).logits
        )

    return call


def run_modalities(vlm: VLMConfig, experts: bool) -> Call:
    def call(backend: Torch, ids: Any) -> Any:
        model = transformer(backend, ROUTED if experts else DENSE, vlm)
        return model.run(modality=context(backend, inputs_embeds=STREAM, modality_ids=ids)).logits

    return call


def run_image_mask(read_once: bool) -> Call:
    def call(backend: Torch, mask: Any) -> Any:
        model = transformer(backend, DENSE, ARCHITECTURES["cross_attention"])
        given = context(backend, image_features=FEATURES)
        given = model.precompute_image_kv(given) if read_once else given
        parts = {"image_features": given.image_features, "image_keys_values": given.image_keys_values}
        return model.run(backend.array(TOKENS), modality=context(backend, **parts, image_mask=mask)).logits

    return call


def run_cross_attention(backend: Torch, mask: Any) -> Any:
    block = transformer(backend, DENSE, ARCHITECTURES["cross_attention"]).cross_attention_layers["0"]
    return block(backend.array(STREAM), backend.array(FEATURES), mask)


def run_wrapper(arch: str, field: str) -> Call:
    def call(backend: Torch, given: Any) -> Any:
        arguments = {"pixel_values": backend.array(PIXELS), "input_ids": backend.array(TOKENS), field: given}
        return built(backend, DENSE, ARCHITECTURES[arch]).run(**arguments).logits

    return call


def run_experts(field: str) -> Call:
    def call(backend: Torch, mask: Any) -> Any:
        return transformer(backend, ROUTED).layers["0"].mlp(backend.array(STREAM), **{field: mask})

    return call


def run_router(backend: Torch, indices: Any) -> Any:
    """A router of its own, which names these experts."""
    layer = transformer(backend, ROUTED).layers["0"].mlp
    weights = backend.array(np.ones((ROWS * LENGTH, 2)))
    *_, stats = layer.router(backend.array(STREAM.reshape(-1, DIM)), None, batch_size=ROWS, return_stats=True)
    with rerouted(backend, type(layer.router), (weights, indices, stats)):
        return layer(backend.array(STREAM))


@contextlib.contextmanager
def rerouted(backend: Torch, kind: Any, output: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "forward", lambda *_, **__: output)
        yield


def run_choice(field: str) -> Call:
    def call(backend: Torch, given: Any) -> Any:
        experts = transformer(backend, DENSE, ARCHITECTURES["moma"]).layers["0"].mlp
        if field == "valid":
            return experts.experts["text"](backend.array(STREAM), given)[0]
        router = experts.experts["text"].router
        output = router(backend.array(STREAM.reshape(-1, DIM)), return_scores=True)
        return router.rerouted(output, given)[0]

    return call


def run_cache(method: str) -> Call:
    def call(backend: Torch, given: Any) -> Any:
        cache = backend.module("model.attention").KVCache(ROWS, 8, 1, 4)
        new = [backend.array(np.ones((ROWS, 1, LENGTH, 4)), "float32") for _ in range(2)]
        updated = cache.update(*new)
        cache = updated[0] if backend.name == "jax" else cache
        changed = getattr(cache, method)(given) or cache
        return changed.lengths

    return call


def run_generate(field: str) -> Call:
    def call(backend: Torch, given: Any) -> Any:
        model = built(backend, DENSE, ARCHITECTURES["joint_decoder"])
        options: dict[str, Any] = {"prompt_tokens": backend.array(TOKENS), "pixel_values": backend.array(PIXELS)}
        options |= {"max_new_tokens": 2, "temperature": 0, field: given}
        return backend.module("model.generate").generate(model, **options)

    return call


def run_extraction(backend: Torch, given: Any) -> Any:
    samples = list(backend.numpy(given))
    return backend.module("model.hooks").extract_representations(transformer(backend, ROUTED), samples, ["norm"])


REAL = np.array([[True, True, False], [True, False, True]])
ARGUMENTS = {
    "tokens": Argument("tokens", run_tokens, TOKENS, VOCAB, hidden=True),
    "labels": Argument("labels", run_labels, np.array([[1, IGNORED, 3], [4, 5, 6]]), VOCAB, IGNORED, hidden=True),
    "doc_ids": Argument("doc_ids", run_documents, np.array([[0, 0, 1], [0, 1, 1]])),
    "doc_ids of attention": Argument("doc_ids", run_attention("doc_ids"), np.array([[0, 0, 1], [0, 1, 1]])),
    "key_padding_mask": Argument("key_padding_mask", run_text("key_padding_mask"), REAL),
    "key_padding_mask of attention": Argument("key_padding_mask", run_attention("key_padding_mask"), REAL),
    "noise_seed": Argument("noise_seed", run_text("noise_seed"), np.array(3)),
    **{
        f"modality_ids of {name}": Argument("modality_ids", run_modalities(vlm, experts), REAL * 1, 2, hidden=True)
        for name, vlm, experts in (
            ("mot", MoTConfig(max_text_len=8), False),
            ("mot with experts", MoTConfig(max_text_len=8), True),
            ("moma", MoMaConfig(max_text_len=8, moma_experts_per_modality={"image": 2, "text": 3}), False),
        )
    },
    "image_mask": Argument("image_mask", run_image_mask(False), np.ones((ROWS, IMAGE), bool)),
    "image_mask of what was read": Argument("image_mask", run_image_mask(True), np.ones((ROWS, IMAGE), bool)),
    "image_mask of a block": Argument("image_mask", run_cross_attention, np.ones((ROWS, IMAGE), bool)),
    **{f"text_mask, {arch}": Argument("text_mask", run_wrapper(arch, "text_mask"), REAL) for arch in VISION},
    **{
        f"frame_mask, {arch}": Argument("frame_mask", run_wrapper(arch, "frame_mask"), np.ones((ROWS, FRAMES), bool))
        for arch in VISION
    },
    **{
        f"input_ids, {arch}": Argument("tokens|input_ids", run_wrapper(arch, "input_ids"), TOKENS, VOCAB)
        for arch in VISION
    },
    "valid of experts": Argument("valid", run_experts("valid"), REAL),
    "members of experts": Argument("members", run_experts("members"), REAL),
    "indices of a router": Argument("indices", run_router, np.array([[0, 1], [2, 0]] * 3), 3, hidden=True, seen=False),
    "valid of experts that choose": Argument("valid", run_choice("valid"), REAL),
    "choices given to experts": Argument(
        "tokens_CE", run_choice("tokens_CE"), np.array([[0, 1, 2], [3, 4, 5]]), ROWS * LENGTH, hidden=True
    ),
    "rows of a cache": Argument("rows", run_cache("reorder"), np.array([1, 0]), ROWS),
    "lengths of a cache": Argument("lengths", run_cache("truncate"), np.array([1, 2]), 2**31),
    "prompt_tokens": Argument("prompt_tokens", run_generate("prompt_tokens"), TOKENS, VOCAB),
    "prompt_lengths": Argument("prompt_lengths", run_generate("prompt_lengths"), np.array([1, 2]), LENGTH + 1),
    "frame_mask of generate": Argument("frame_mask", run_generate("frame_mask"), np.ones((ROWS, FRAMES), bool)),
    "eos_token_id": Argument("eos_token_id", run_generate("eos_token_id"), np.array([1, 2]), VOCAB),
    "tokens to extract of": Argument("tokens|dataset", run_extraction, TOKENS, VOCAB),
}
SHAPELESS = ("eos_token_id",)  # an id, or any number of them
OWN_ROWS = ("rows of a cache", "prompt_tokens", "tokens", "tokens to extract of")  # any number of them
OWN_LENGTH = ("prompt_tokens", "tokens", "tokens to extract of", *(f"input_ids, {arch}" for arch in VISION))
on_all = pytest.mark.parametrize("name", ARGUMENTS)


def bad_ids(argument: Argument) -> st.SearchStrategy[int]:
    assert argument.size is not None
    far = st.integers(argument.size, 2**62)
    return st.one_of(st.integers(-(2**31), -1), far, st.just(argument.size), st.just(-1)).filter(
        lambda value: value != argument.ignored
    )


@st.composite
def without_meaning(draw: st.DrawFn, name: str) -> tuple[np.ndarray, int | None]:
    """An array that the argument can't be, and the id in it that names nothing, if that is why."""
    argument = ARGUMENTS[name]
    good = argument.good
    kinds = ["type"]
    kinds += [] if name in SHAPELESS else ["shape"]
    kinds += [] if argument.size is None or not argument.seen else ["range"] * 3
    kind = draw(st.sampled_from(kinds))
    if kind == "range":
        bad = np.array(good, np.int64)
        place = draw(st.integers(0, good.size - 1))
        value = draw(bad_ids(argument))
        bad.ravel()[place] = value
        return bad, value
    if kind == "type":
        types = ["float32", "float64", "complex64"] + (["int32", "uint8"] if argument.is_mask else ["bool"])
        return good.astype(draw(st.sampled_from(types))), None
    others = [good[..., None]] if name == "tokens to extract of" else [good[None], good[..., None]]
    if good.ndim:
        others += [good[0], good[..., 0]]
        others += [] if name in OWN_ROWS else [good[:1], np.concatenate([good, good])]
    if good.ndim > 1 and name not in OWN_LENGTH:
        others += [good[:, :1], np.concatenate([good, good], axis=1)]
    return draw(st.sampled_from(others)), None


@on_all
@on_both
def test_what_names_nothing_is_refused_wherever_it_is_given(backend: Torch, name: str) -> None:
    argument = ARGUMENTS[name]
    argument.call(backend, backend.array(argument.good))

    @hypothesis.settings(max_examples=12, deadline=None, database=None)
    @hypothesis.given(without_meaning(name))
    def holds(drawn: tuple[np.ndarray, int | None]) -> None:
        bad, value = drawn
        with pytest.raises(ValueError, match=argument.field) as caught:
            argument.call(backend, backend.array(bad))
        message = str(caught.value)
        assert re.search(r"must (be|have)|are in|are integers", message), message
        assert value is None or re.search(rf"(?<!\d){value}(?!\d)", message), message

    holds()


@on_both
@pytest.mark.parametrize("name", [name for name, argument in ARGUMENTS.items() if argument.hidden])
def test_what_names_nothing_is_nan_where_values_cannot_be_seen(backend: Torch, name: str) -> None:
    argument = ARGUMENTS[name]

    @hypothesis.settings(max_examples=10, deadline=None, database=None)
    @hypothesis.given(st.integers(0, argument.good.size - 1), bad_ids(argument))
    def holds(place: int, value: int) -> None:
        bad = np.array(argument.good, np.int64)
        bad.ravel()[place] = value
        try:
            found = hidden(backend, name)(backend.array(bad))
        except (IndexError, RuntimeError):  # torch's own bounds check, on a GPU an assertion of the device
            assert backend.name == "torch"
            return
        assert np.isnan(backend.numpy(found)).any()

    assert np.isfinite(backend.numpy(hidden(backend, name)(backend.array(argument.good.astype(np.int64))))).all()
    holds()


@functools.cache
def hidden(backend: Torch, name: str) -> Callable[[Any], Any]:
    """The call, where it may not look at values."""
    call = functools.partial(ARGUMENTS[name].call, backend)
    call(backend.array(ARGUMENTS[name].good))  # the model that is kept must not be built in a trace
    if backend.name == "jax":
        return jax.jit(call)

    def blind(given: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.compiler.is_compiling", lambda: True)
            return call(given).detach()

    return blind


NARROW = ModelConfig(dim=8, n_layers=1, n_heads=2, vocab_size=300, ffn_hidden_dim=8, max_seq_len=8)
INTEGERS = ("int8", "uint8", "int16", "int32", "int64", "uint16", "uint32", "uint64")


@on_both
@pytest.mark.parametrize("traced", [False, True], ids=["seen", "traced"])
def test_the_type_of_integers_makes_no_difference(backend: Torch, traced: bool) -> None:
    """A vocabulary that the narrow types can't count to; a label that looks like -100 in eight bits."""
    if traced and backend.name == "torch":
        pytest.skip("torch runs eagerly here")
    model, loss = transformer(backend, NARROW), backend.module("training.loss")

    def both(tokens: Any, labels: Any) -> Any:
        logits = model.run(tokens, doc_ids=labels).logits
        return logits, *loss.cross_entropy(logits, labels)

    call = jax.jit(both) if traced else both

    @hypothesis.settings(max_examples=15, deadline=None, database=None)
    @hypothesis.given(st.data(), st.sampled_from(INTEGERS))
    def holds(data: st.DataObject, dtype: str) -> None:
        highest = min(NARROW.vocab_size - 1, int(np.iinfo(dtype).max))
        ids = st.integers(0, highest) | st.sampled_from([min(156, highest), highest])
        tokens, labels = (np.array(data.draw(st.lists(ids, min_size=4, max_size=4))).reshape(1, 4) for _ in range(2))
        truth = backend.numpy(both(backend.array(tokens), backend.array(labels)))
        found = backend.numpy(call(backend.array(tokens.astype(dtype)), backend.array(labels.astype(dtype))))
        assert found[2] == truth[2] == 4
        for other, expected in zip(found[:2], truth[:2], strict=True):
            np.testing.assert_allclose(other, expected, rtol=1e-10)

    holds()


@on_both
@pytest.mark.parametrize("layer", [-1, 1, 0, 0.5, "layers.-1", "layers.1", "layers.0.5", "layers", "layers.00"])
def test_layers_that_do_not_exist_are_refused(backend: Torch, layer: Any) -> None:
    hooks, model = backend.module("model.hooks"), transformer(backend, DENSE)
    with pytest.raises(ValueError, match=rf"name = {re.escape(repr(layer))}: no such module.* Modules: .*layers\.0"):
        hooks.ActivationStore(model, [layer])
    with pytest.raises(ValueError, match="no such module"):
        hooks.extract_representations(model, list(TOKENS), [layer])


@on_both
@pytest.mark.parametrize("pad", [-(2**31) - 1, 2**31, 0.5, True, None, "0"])
def test_a_padding_id_that_no_row_can_hold_is_refused(backend: Torch, pad: Any) -> None:
    with pytest.raises(ValueError, match=r"pad_token_id = .* must be"):
        run_generate("pad_token_id")(backend, pad)
    for allowed in (-1, 2**31 - 1, -(2**31)):
        run_generate("pad_token_id")(backend, allowed)


def test_ids_of_wide_arrays_are_not_cut_to_int32() -> None:
    with jax.enable_x64(False):
        model = Jax().model(DENSE, draw({n: spec.shape for n, spec in parameter_table(DENSE).items()}, 3), "float32")
        with pytest.raises(ValueError, match=f"tokens = {2**32 + 1}"):
            model.run(np.array([[2**32 + 1]]))
