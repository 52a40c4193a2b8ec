"""Scans over layers happen: one program for all layers of a structure, in every architecture, and in the training step
of every preset that asks for it. A model that has nothing to scan says so.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax._src.ad_checkpoint import saved_residuals
from jax.ad_checkpoint import checkpoint_name, print_saved_residuals
from jax.extend.core import jaxprs_in_params

from kempnerforge_jax.model.module import named_variables
from kempnerforge_jax.model.scan import PREPARED, _periodic, layer_stacks, preparing
from kempnerforge_jax.model.stack import Stack, stack_layers, unstack_layers
from kempnerforge_jax.model.state import get_state, merge, split
from kempnerforge_jax.model.transformer import Transformer
from kempnerforge_jax.training import train
from shared_config.data import open_data
from shared_config.loader import load_config, preset_names
from shared_config.parity.shrink import shrink
from shared_config.schema import CrossAttentionConfig, JointDecoderConfig, ModelConfig, MoMaConfig, MoTConfig, VLMConfig

MODEL = ModelConfig(dim=8, n_layers=6, n_heads=2, vocab_size=13, ffn_hidden_dim=10, max_seq_len=16)
EXPERTS = MODEL.replace(num_experts=3, moe_frequency=2)
PAIRS = [range(0, 6, 2), range(1, 6, 2)]
JOINT, MOT, MOMA = (kind(max_text_len=8) for kind in (JointDecoderConfig, MoTConfig, MoMaConfig))
CROSS = CrossAttentionConfig(max_text_len=8, cross_attention_every_n_layers=3)

CASES: dict[str, tuple[ModelConfig, VLMConfig | None, list[range], list[int]]] = {
    "dense": (MODEL, None, [range(6)], [6]),
    "alternating": (EXPERTS, None, PAIRS, [3]),
    "a period of three, two dense layers left": (
        EXPERTS.replace(moe_frequency=3, n_layers=8),
        None,
        [range(0, 6, 3), range(1, 6, 3), range(2, 6, 3), range(6, 8)],
        [2, 2],
    ),
    "one layer of experts": (EXPERTS.replace(moe_frequency=5), None, [range(4), range(4, 5), range(5, 6)], [4]),
    "a window in every second layer": (
        MODEL.replace(sliding_window=3, attention_pattern=("window", "full")),
        None,
        PAIRS,
        [3],
    ),
    "two without rotary positions, of which the second has the window": (
        MODEL.replace(n_layers=7, sliding_window=3, attention_pattern=("full_nope", "full", "window_nope")),
        None,
        [range(0, 6, 3), range(1, 6, 3), range(2, 6, 3), range(6, 7)],
        [2],
    ),
    "joint_decoder": (EXPERTS, JOINT, PAIRS, [3]),
    "cross_attention": (MODEL.replace(n_layers=7), CROSS, [range(3), range(3, 6), range(6, 7)], [3, 3]),
    "mot": (EXPERTS, MOT, PAIRS, [3]),
    "moma": (MODEL, MOMA, [range(6)], [6]),
}
"""Model, architecture, the stacks, and how many steps each scan has."""


def abstract(config: ModelConfig, vlm: VLMConfig | None) -> Transformer:
    return nnx.eval_shape(lambda: Transformer(config, vlm_config=vlm, rngs=None))


def equations(jaxpr: Any) -> Iterator[Any]:
    """Of a program, and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def scans(jaxpr: Any) -> list[int]:
    """Steps of each scan of a program, of those inside others too."""
    return [equation.params["length"] for equation in equations(jaxpr) if equation.primitive.name == "scan"]


@pytest.mark.parametrize("name", CASES)
def test_layers_of_one_structure_share_a_program(name: str) -> None:
    config, vlm, groups, steps = CASES[name]
    assert layer_stacks(abstract(config, vlm)) == [Stack(group) for group in groups]
    model, tokens = Transformer(config, vlm_config=vlm, rngs=None), jnp.zeros((2, 8), jnp.int32)
    program = jax.make_jaxpr(lambda: model.run(tokens, scan_layers=True).logits)()
    assert [e.params["length"] for e in program.jaxpr.eqns if e.primitive.name == "scan"] == steps


@pytest.mark.parametrize("preset", [name for name in preset_names() if load_config(name).train.scan_layers])
def test_presets_that_ask_for_scans_get_them(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the step that they train with: of 9 layers none is left out."""
    config = shrink(load_config(preset))
    config = config.replace(model=config.model.replace(n_layers=9), train=config.train.replace(batch_size=1))
    compiled_step, programs = train.compiled_step, []

    def traced_step(*about: Any) -> Any:
        def step(*arguments: Any) -> Any:
            programs.append(jax.make_jaxpr(compiled_step(*about))(*arguments))
            return *arguments[:3], {}

        return step

    monkeypatch.setattr(train, "compiled_step", traced_step)
    train.Trainer(config).step([open_data(config).batch(0)])
    every = getattr(config.vlm, "cross_attention_every_n_layers", 9)
    found = scans(programs[0].jaxpr)
    assert found.count(every) == 2 * (9 // every), found  # forward and backward


@pytest.mark.parametrize("scanned", [False, True])
def test_what_is_computed_again_is_not_merged_with_what_was(scanned: bool) -> None:
    """Outside a scan XLA would find the first computation again, and keep its result; in a scan it can't."""
    model, tokens = Transformer(MODEL, rngs=None), jnp.zeros((2, 8), jnp.int32)
    program = jax.make_jaxpr(lambda: model.run(tokens, remat=True, scan_layers=scanned).logits)()
    found = [e.params["prevent_cse"] for e in equations(program.jaxpr) if "prevent_cse" in e.params]
    assert found == [not scanned] * (1 if scanned else MODEL.n_layers)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=14))
def test_stacks_are_the_longest_repetitions(kinds: list[int]) -> None:
    """By trial of every period at every place; layers of a stack are alike, and each layer is in one."""
    first, expected = 0, []
    while first < len(kinds):
        reach = {}
        for period in range(1, (len(kinds) - first) // 2 + 1):
            times = 1
            while kinds[first : first + period] == kinds[first + times * period : first + (times + 1) * period]:
                times += 1
            reach[period] = times * period if times > 1 else 0
        longest = max(reach.values(), default=0)
        period = min(p for p, length in reach.items() if length == longest) if longest else 1
        expected += [range(first + place, first + (longest or 1), period) for place in range(period)]
        first += longest or 1
    groups = [stack.layers for stack in _periodic(list(range(len(kinds))), kinds)]
    assert groups == expected
    assert sorted(layer for group in groups for layer in group) == list(range(len(kinds)))
    assert all(len({kinds[layer] for layer in group}) == 1 for group in groups)


def test_stacks_hold_neighbours_only() -> None:
    """A stage of which layers were deleted."""
    model = abstract(MODEL, None)
    del model.layers["2"]
    assert layer_stacks(model) == [Stack(range(2)), Stack(range(3, 6))]


@pytest.mark.parametrize("every", [1, 2])
def test_a_model_that_has_nothing_to_scan_says_so(every: int, caplog: pytest.LogCaptureFixture) -> None:
    model = Transformer(MODEL, vlm_config=CROSS.replace(cross_attention_every_n_layers=every), rngs=None)
    with caplog.at_level(logging.WARNING):
        jax.make_jaxpr(lambda: model.run(jnp.zeros((2, 8), jnp.int32), scan_layers=True).logits)()
    assert ["scan_layers = True changes nothing" in message for message in caplog.messages] == [True] * (every == 1)


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_stacks_of_any_size_are_taken_apart(n_layers: int) -> None:
    model = Transformer(MODEL.replace(n_layers=n_layers), rngs=nnx.Rngs(0))
    state = get_state(model)
    together = stack_layers(state, layer_stacks(model))
    assert (together.keys() == state.keys()) == (n_layers == 1)
    apart = unstack_layers(together)
    assert list(apart) == list(state)
    assert all(np.array_equal(apart[name], value) for name, value in state.items())


@jax.custom_vjp
def rounded(array: jax.Array) -> jax.Array:
    """With a gradient of its own, as what gathers parameters has."""
    return checkpoint_name(array.astype(jnp.bfloat16).astype(jnp.float32), PREPARED)


rounded.defvjp(lambda array: (rounded(array), None), lambda _, gradient: (gradient,))


def test_what_was_prepared_is_made_again_in_the_backward_pass(capsys: pytest.CaptureFixture[str]) -> None:
    """Else the whole parameters of all layers would be kept, of which a device holds parts."""
    graphdef, parameters, buffers = split(Transformer(MODEL.replace(n_layers=2), rngs=nnx.Rngs(0)))
    blocks: list[Any] = []

    def prepared(block: Any) -> Any:
        copy = nnx.merge(*nnx.split(block))
        for _, variable in named_variables(copy):
            variable.set_value(rounded(variable.get_value()))
        blocks.append(copy)
        return copy

    def loss(parameters: Any) -> jax.Array:
        with preparing(prepared):
            return merge(graphdef, parameters, buffers).run(jnp.ones((1, 4), jnp.int32)).logits.sum()

    print_saved_residuals(loss, parameters)
    kept = [line for line in capsys.readouterr().out.splitlines() if "from the argument" not in line]
    assert len(blocks) == 2
    assert any("[1,4,8]" in line for line in kept)
    assert not [line for line in kept if PREPARED in line or re.match(r"\w+\[(8|10),(8|10)\]", line)]


@pytest.mark.parametrize(("case", "turns"), [("dense", 4), ("alternating", 2)])
def test_a_scan_keeps_products_alone(case: str, turns: int) -> None:
    """In bfloat16, no activation is stacked in float32, and nothing for each pair of tokens."""
    batch, length = 3, 11
    model = Transformer(CASES[case][0].replace(n_layers=4), rngs=nnx.Rngs(0)).to(jnp.bfloat16)
    graphdef, parameters, buffers = split(model, scan_layers=True)

    def loss(parameters: Any) -> jax.Array:
        tokens = jnp.ones((batch, length), jnp.int32)
        return merge(graphdef, parameters, buffers).run(tokens).logits.astype(jnp.float32).sum()

    residuals: Any = saved_residuals(loss, parameters)
    kept = [array for array, source in residuals if "argument" not in source]
    stacked = [array for array in kept if array.ndim > 2 and array.shape[0] == turns]
    assert sum(array.dtype == jnp.bfloat16 for array in stacked) > 5
    of_model = turns * batch * length * MODEL.dim
    assert not [array for array in stacked if array.dtype == jnp.float32 and array.size >= of_model]
    assert not [array for array in stacked if array.shape.count(length) > 1]
