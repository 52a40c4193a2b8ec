"""Which tensors a trace is asked for: layers, patterns, and what is said where they stand for nothing."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from shared_config.errors import UserError
from shared_config.parity.selection import Selection, parse_layers

NAMES = [
    "forward/token_embedding",
    "forward/layers.0.attention.q_proj",
    "forward/layers.0.attention",
    "forward/layers.0",
    "forward/layers.1.mlp.router",
    "forward/layers.10.mlp",
    "forward/vision_encoder.layers.1.attention",
    "forward/transformer.layers.1.attention",
    "forward/transformer.cross_attention_layers.1.attn",
    "forward/norm",
    "routing/layers.1.mlp.router.indices",
    "loss",
    "gradient/layers.1.attention_norm.weight",
    "gradient/norm.weight",
    "decode/single",
]


def chosen(**fields: tuple) -> list[str]:
    return [name for name in NAMES if Selection(**fields).wants(name) and name != "loss"]


def test_all_is_kept_unless_asked_otherwise() -> None:
    assert [name for name in NAMES if Selection().wants(name)] == NAMES


def test_layers_are_those_of_the_language_model() -> None:
    assert chosen(layers=(1,)) == [
        "forward/layers.1.mlp.router",
        "forward/transformer.layers.1.attention",
        "routing/layers.1.mlp.router.indices",
        "gradient/layers.1.attention_norm.weight",
    ]
    assert chosen(layers=()) == []


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("norm*", ["forward/norm", "gradient/norm.weight"]),
        ("gradient/norm*", ["gradient/norm.weight"]),
        ("layers.?.attention", ["forward/layers.0.attention"]),
        ("decode/*", ["decode/single"]),
        ("forward/layers.[01]*", [NAMES[i] for i in (1, 2, 3, 4, 5)]),
    ],
)
def test_patterns_are_held_to_names_with_and_without_group(pattern: str, found: list[str]) -> None:
    assert chosen(only=(pattern,)) == found
    assert chosen(only=(pattern, "nothing")) == found


def test_both_must_agree_and_the_loss_stays() -> None:
    assert chosen(layers=(1,), only=("gradient/*",)) == ["gradient/layers.1.attention_norm.weight"]
    assert Selection((1,), ("gradient/*",)).wants("loss")


@given(layers=st.sets(st.integers(0, 40), min_size=1))
def test_lists_of_layers_are_read_back(layers: set[int]) -> None:
    assert parse_layers(",".join(map(str, layers)), 41) == tuple(sorted(layers))
    assert parse_layers(f"{min(layers)}-{max(layers)}", 41) == tuple(range(min(layers), max(layers) + 1))


@pytest.mark.parametrize("text", ["", "a", "1,", "-1", "3-1", "1-", "1-2-3", "0.5"])
def test_what_is_no_list_of_layers_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"layers = .*: must be numbers and ranges of layers, as in 0,3-5"):
        parse_layers(text, 11)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection(layers=(0, 12)), r"layers = 12: must be in 0-10, as model\.n_layers = 11"),
        (
            Selection(only=("layers.0.atention",)),
            r"'layers\.0\.atention': .*did you mean 'layers\.0\.attention'\?",
        ),
        (Selection(only=("norm", "*.atention.q_prj")), r"did you mean '\*\.attention\.q_proj'\?"),
        (Selection(only=("gradients/norm.weight",)), r"did you mean 'gradient/norm\.weight'\?"),
        (Selection(only=("layers.3.attention",)), r"did you mean 'layers\.0\.attention'"),
        (Selection(only=("zzz",)), r"matches no tensor; names are as forward/token_embedding and gradient/layers\.1"),
    ],
)
def test_what_stands_for_nothing_is_refused_with_what_would_be_right(selection: Selection, message: str) -> None:
    with pytest.raises(UserError, match=message):
        selection.check(NAMES, n_layers=11)
