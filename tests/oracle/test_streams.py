"""Written in stone: what a seed draws, and which rows a step reads. Runs resume and machines agree by these numbers.

Values are stated as numbers, and as the integer arithmetic of `tests.oracle.streams` where that gives them.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_config.contract import noise
from shared_config.contract.decoding import draw_uniforms
from shared_config.contract.initialise import initial_value, initial_values, state_hash, stream
from shared_config.contract.parameters import parameter_table
from shared_config.contract.specs import Constant, Normal, ParameterSpec
from shared_config.data.batches import TextData, permute
from shared_config.data.conversations import Conversation, ConversationData
from shared_config.data.corpus import Corpus, TokenStream, is_held_out
from shared_config.data.image_sources import Folder, PictureRow
from shared_config.data.images import ImageTextData, with_noise_seeds
from shared_config.data.shapes import shape_clip, shape_image
from shared_config.data.tokenizer import ByteTokenizer
from shared_config.interchange.preprocessor import PixelRange
from shared_config.loader import load_config
from shared_config.parity.validation import (
    MOMENT_STEPS,
    chunkings,
    validation_labels,
    validation_moments,
    validation_pixels,
    validation_tokens,
    validation_weights,
)
from tests.oracle import streams

SEEDS = st.integers(0, 2**63 - 1)
SMALL = ParameterSpec((2, 3), Normal(0.02), (None, None))
QUERY = "layers.0.attention.q_proj.weight"


# What a seed draws


@given(seed=SEEDS, name=st.text(max_size=20))
def test_a_stream_is_philox_keyed_by_seed_and_name(seed: int, name: str) -> None:
    assert stream(seed, name).random(6).tolist() == streams.uniforms(seed, name, 6)


def test_philox_draws_these_numbers() -> None:
    expected = [0.9050066441858127, 0.5413322126445937, 0.10251400261689037]
    assert streams.uniforms(42, "sampling 0", 3) == pytest.approx(expected, rel=1e-15)


def test_initial_weights_are_these_numbers() -> None:
    expected = [0.023106007, -0.02053448, -0.0047412328, -0.019807357, 0.030760273, 0.013343075]
    np.testing.assert_allclose(initial_value(QUERY, SMALL, 42).ravel(), expected, rtol=1e-7)
    ones = initial_value("norm.weight", ParameterSpec((3,), Constant(1.0), (None,)), 42)
    assert (ones.dtype, ones.tolist()) == (np.float32, [1.0, 1.0, 1.0])
    state = dict(initial_values(parameter_table(load_config("debug").model), 42))
    assert state_hash(state) == "a560523049643cd550f9fb7dac9cb32f4b3865b502942987f0c98a51110d1aef"


def test_a_state_s_hash_is_sha256_of_names_dtypes_shapes_and_bytes() -> None:
    state = {"b": np.arange(3, dtype=np.int32), "a": np.ones((2, 1), np.float32), "c": np.zeros(0, np.float32)}
    told = b"a float32 (2, 1)\n" + state["a"].tobytes() + b"b int32 (3,)\n" + state["b"].tobytes() + b"c float32 (0,)\n"
    assert state_hash(state) == hashlib.sha256(told).hexdigest()


def test_sampling_draws_other_numbers_for_each_row_seed_and_step() -> None:
    drawn = draw_uniforms(42, 3, 4)
    assert drawn.tolist() == [streams.uniforms(42, f"sampling {row}", 4) for row in range(3)]
    assert len(np.unique([drawn, draw_uniforms(43, 3, 4)])) == 2 * 3 * 4
    assert len(np.unique([draw_uniforms(None, 3, 4), draw_uniforms(None, 3, 4)])) == 2 * 3 * 4


def test_validation_feeds_these_numbers() -> None:
    tokens = validation_tokens(260, 2, 5, 42)
    assert tokens.tolist() == [[254, 54, 19, 14, 131], [101, 119, 252, 109, 72]]
    assert validation_labels(tokens).tolist() == [[54, 19, 14, 131, -100], [-100, -100, 109, 72, -100]]
    pixels = [-0.5450981, -0.73333335, -0.19215687, -0.003921569, -0.3254902, 0.98431373]
    np.testing.assert_allclose(validation_pixels((1, 3, 1, 2), 42).ravel(), pixels, rtol=1e-7)
    cuts = {"single": (1,) * 24, "prefill": (21, 1, 1, 1), "drawn": (7, 7, 7, 1, 1, 1)}
    assert chunkings(24, 42) == cuts
    table = parameter_table(load_config("debug").model)
    for state, expected in (
        (validation_weights(table, 42), "dbd7175475391e7c1ff68a2db64843e6b599ef8f8d661f946449729659f45b7f"),
        (validation_moments(table, 42), "7a1580bc9196e64965cb1cae01173cec225e9e40014d8024f2026ad9adf53cc0"),
    ):
        assert state_hash(state) == expected


def test_validation_s_edges() -> None:
    """Every other row loses its first two labels; the lowest byte is -1; the shortest sequences have a prefill."""
    labels = validation_labels(np.arange(20).reshape(4, 5))
    assert np.argwhere(labels == -100).tolist() == [[0, 4], [1, 0], [1, 1], [1, 4], [2, 4], [3, 0], [3, 1], [3, 4]]
    pixels = validation_pixels((1, 3, 40, 40), 1)
    assert (pixels.min(), pixels.max()) == (-1.0, 1.0)
    assert [chunkings(length, 1)["prefill"] for length in (1, 2, 5)] == [(1,), (1, 1), (2, 1, 1, 1)]
    assert MOMENT_STEPS == 7


def test_validation_weights_hide_nothing() -> None:
    """Fan-in matrices, norms from 0.5 to 1.5, biases from -0.2 to 0.2, equal shares of experts."""
    config = load_config("debug_moe", ["--model.attention_bias=true", "--model.norm_type=layernorm"]).model
    packed, plain = (parameter_table(config.replace(moe_packed_experts=packed)) for packed in (True, False))
    weights = validation_weights(packed, 3)
    assert (weights["layers.1.mlp.router.expert_ema"] == np.float32(1 / 8)).all()
    for name, spec in packed.items():
        values = weights[name]
        if len(spec.shape) > 1:
            fan_in = spec.shape[1 if len(spec.shape) == 3 else -1]
            assert values.std() * math.sqrt(fan_in) == pytest.approx(1, abs=0.1), name
        elif name.endswith("weight"):
            assert 0.5 <= values.min() < 0.6 < 1.4 < values.max() <= 1.5, name
        elif not name.endswith(("expert_bias", "expert_ema")):
            assert -0.2 <= values.min() < -0.15 < 0.15 < values.max() <= 0.2, name
    assert np.abs(weights["layers.1.mlp.router.expert_bias"]).max() <= 0.2
    assert validation_weights(plain, 3)[QUERY].tolist() == weights[QUERY].tolist()


def test_validation_moments_are_those_of_a_gradient_of_norm_one() -> None:
    table = parameter_table(load_config("debug").model)
    moments = validation_moments(table, 3)
    assert list(moments) == [f"{kind}.{name}" for kind in "mv" for name in table]
    squares = sum(float(np.square(moments[f"m.{name}"], dtype=np.float64).sum()) for name in table)
    assert squares == pytest.approx(1, rel=0.01)
    size = sum(spec.size for spec in table.values())
    largest = max(float(moments[f"v.{name}"].max()) for name in table)
    assert 1.49 < largest * size <= 1.5000001
    assert 0.5 <= min(float(moments[f"v.{name}"].min()) for name in table) * size * 1.0000001 < 0.51


# Noise

MIXED = [0, 2261973619, 2578835075]
ROUTING = [0.05573052167892456, 0.5303468108177185, 0.685953676700592]
FEATURES = [1.0390625, -0.7890625, 1.4921875, 1.0546875]


@given(st.integers(0, 2**31 - 1), st.integers(0, 99), st.integers(0, 2), st.integers(0, 99), st.integers(0, 9))
def test_routing_noise_is_named_by_seed_layer_router_token_and_expert(
    seed: int, layer: int, router: int, token: int, expert: int
) -> None:
    expected = streams.routing_uniform(seed, layer, router, token, expert)
    bits = noise.routing_bits(seed, layer, router, token + 1, expert + 1)
    assert noise.uniforms(bits)[token, expert] == expected
    gumbel = noise.gumbel_noise(seed, layer, router, token + 1, expert + 1)
    assert gumbel[token, expert] == pytest.approx(-math.log(-math.log(expected)), rel=1e-14)


def test_noise_is_these_numbers() -> None:
    assert [streams.mixed(x) for x in (0, 1, 2**32 - 1)] == noise.mix([0, 1, 2**32 - 1]).tolist() == MIXED
    assert [streams.routing_uniform(3, 1, 2, 2, expert) for expert in range(3)] == pytest.approx(ROUTING, rel=1e-9)
    np.testing.assert_allclose(noise.uniforms(noise.routing_bits(3, 1, 2, 3, 3))[2], ROUTING, rtol=1e-7)
    assert [streams.image_feature([63, 2**32 - 128, 31], cell) for cell in range(4)] == FEATURES
    assert noise.image_noise(np.array([[0.5, -1.0, 0.25]]), 1, 4).ravel().tolist() == FEATURES


@given(st.lists(st.integers(-128, 127), min_size=3, max_size=12), st.integers(1, 3), st.integers(1, 5))
def test_image_noise_follows_from_levels_and_places(levels: list[int], tokens: int, width: int) -> None:
    pixels = np.array([levels, levels[::-1]]) / 127.5 + 0.5 / 127.5
    found = noise.image_noise(pixels, tokens, width)
    expected = [[streams.image_feature(row, cell) for cell in range(tokens * width)] for row in (levels, levels[::-1])]
    assert found.reshape(2, -1).tolist() == expected


def test_the_noise_of_a_step_has_a_seed_for_each_micro_batch() -> None:
    config = load_config("debug_vlm_moma")
    seeds = [int(batch["noise_seed"]) for batch in with_noise_seeds(config, [{}] * 3, 7)]
    assert seeds == [42 * 1_000_003 + 7 * 3 + index for index in range(3)]
    late = config.replace(train=config.train.replace(seed=2**40))
    assert [int(b["noise_seed"]) for b in with_noise_seeds(late, [{}], 9)] == [(2**40 * 1_000_003 + 9) % 2**31]


# Which rows a step reads

PICTURES = (
    (0, "train", "a large purple circle at the bottom right", "64bc7ef1be181128"),
    (0, "heldout", "a large blue square at the bottom left", "1d21b04d7d77a04d"),
    ((42 << 32) + 1, "train", "a small white triangle at the bottom left", "294980c4fa5cfa30"),
)
CLIP = ("a large blue square moving up", "89e9812d22bb7e08")


@given(size=st.integers(1, 300), key=st.text(max_size=12))
def test_an_order_is_a_feistel_network_with_cycle_walking(size: int, key: str) -> None:
    assert permute(np.arange(size), size, key).tolist() == streams.permutation(size, key)


def numbered(count: int) -> TokenStream:
    return TokenStream([("numbers", np.arange(count, dtype=np.uint32))])


def test_rows_of_text_come_in_the_order_of_seed_and_epoch() -> None:
    """Rank r of w reads rows (k w + r) B to (k w + r + 1) B of one sequence of epochs."""
    data = [
        TextData(
            Corpus("numbers", numbered(1001), numbered(301)), batch_size=3, seq_len=100, seed=5, rank=rank,
            world_size=2, vocab_size=2000,
        )
        for rank in range(2)
    ]  # fmt: skip
    sequence = [row for epoch in range(3) for row in streams.permutation(10, f"train 5 {epoch}")]
    read = [first // 100 for k in range(4) for each in data for first in each.batch(k)["tokens"][:, 0].tolist()]
    assert read == sequence[:24]
    held = [first // 100 for each in data for batch in each.heldout() for first in batch["tokens"][:, 0].tolist()]
    assert held == [*streams.permutation(3, "heldout"), 0, 0, 0]


def test_rows_of_conversations_come_in_the_order_of_seed_and_epoch() -> None:
    rows = [Conversation(np.array([1, 9 + row, 2]), np.array([False, True, True])) for row in range(5)]
    data = ConversationData(rows, rows[:2], name="talk", batch_size=4, seq_len=4, seed=3)
    read = [int(row[1]) - 9 for k in range(3) for row in data.batch(k)["tokens"]]
    assert read == [row for epoch in range(3) for row in streams.permutation(5, f"conversations 3 {epoch}")][:12]


def test_rows_of_pictures_come_in_the_order_of_seed_and_epoch() -> None:
    pixels = PixelRange(2, (0, 0, 0), (1, 1, 1))
    rows: list[PictureRow] = [{"text": chr(ord("a") + row)} for row in range(5)]
    folder = Folder(Path(), pixels, None, {"train": rows, "heldout": rows[:2]})
    data = ImageTextData(
        folder, tokenizer=ByteTokenizer(), pixels=pixels, batch_size=4, text_len=2, vocab_size=260, seed=3
    )
    read = [int(row[1]) - ord("a") for k in range(3) for row in data.batch(k)["input_ids"]]
    assert read == [row for epoch in range(3) for row in streams.permutation(5, f"images 3 {epoch}")][:12]


def test_what_is_held_out_follows_from_the_name_alone() -> None:
    for name in ("a.txt", "notes/b.md", "ü"):
        share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
        assert (is_held_out(name, share * 0.999), is_held_out(name, share * 1.001)) == (False, True)
    assert [n for n in range(40) if is_held_out(f"file {n}", 0.05)] == [4, 6]


def test_pictures_drawn_by_code_are_these() -> None:
    for index, split, caption, digest in PICTURES:
        image, found = shape_image(index, 16, split)
        assert (found, hashlib.sha256(image.tobytes()).hexdigest()[:16]) == (caption, digest)
    clip, caption = shape_clip(7, 16, 3, draw_times=True)
    assert (caption, hashlib.sha256(clip.tobytes()).hexdigest()[:16]) == CLIP


def test_every_size_colour_form_place_and_motion_is_drawn_like_this() -> None:
    digest, words = hashlib.sha256(), set()
    for index in range(80):
        for pixels, caption in (shape_image(index, 12), shape_clip(index, 12, 2)):
            digest.update(pixels.tobytes() + caption.encode())
            words |= set(caption.split())
    assert len(words) == 21
    assert digest.hexdigest()[:16] == "c85d6cdafc22f8c0"
