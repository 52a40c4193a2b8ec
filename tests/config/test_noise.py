"""The hash noise that both backends share: even, sensitive to every pixel and place, the same in every float dtype."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from shared_config.contract.noise import (
    MASK,
    MULTIPLIERS,
    gumbel_noise,
    image_digests,
    image_noise,
    mix,
    pixel_levels,
    routing_bits,
    uniforms,
)

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (3, 3, 6, 8))
PIXELS = BYTES / 127.5 - 1


def mix_in_python(x: int) -> int:
    """`mix` in integers without a width."""
    x = ((x ^ (x >> 16)) * MULTIPLIERS[0]) % 2**32
    x = ((x ^ (x >> 15)) * MULTIPLIERS[1]) % 2**32
    return x ^ (x >> 15)


def test_mix_is_a_bijection_that_avalanches() -> None:
    values = RNG.integers(0, 2**32, 4000, dtype=np.uint32)
    mixed = mix(values)
    assert [int(value) for value in mixed[:50]] == [mix_in_python(int(value)) for value in values[:50]]
    assert len(np.unique(mixed)) == len(np.unique(values))
    for bit in range(0, 32, 5):
        flips = mixed ^ mix(values ^ np.uint32(1 << bit))
        shares = [float(np.mean((flips >> np.uint32(out)) & np.uint32(1))) for out in range(32)]
        assert 0.4 < min(shares) <= max(shares) < 0.6


def test_products_fit_signed_64_bits() -> None:
    assert all(multiplier * MASK < 2**63 for multiplier in MULTIPLIERS)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_float_dtype_gives_the_same_noise(dtype: type) -> None:
    truth = image_noise(PIXELS, 5, 7)
    found = image_noise(PIXELS.astype(dtype), 5, 7)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.astype(np.float64), truth)


def test_eight_bit_values_have_levels_of_their_own() -> None:
    all_bytes = np.arange(256) / 127.5 - 1
    for dtype in (np.float64, np.float32, ml_dtypes.bfloat16):
        levels = pixel_levels(all_bytes.astype(dtype)).view(np.int32)
        np.testing.assert_array_equal(levels, np.arange(256) - 128)


def test_large_and_non_finite_pixels() -> None:
    values = np.array([1e30, -1e30, np.nan, np.inf, 300.0])
    np.testing.assert_array_equal(pixel_levels(values).view(np.int32), [32767, -32767, 0, 0, 32767])
    pixels = PIXELS.copy()
    pixels[1, 2, 3, 4] = np.nan
    found = image_noise(pixels, 2, 3)
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(found[[0, 2]], image_noise(PIXELS[[0, 2]], 2, 3))


def test_every_pixel_and_every_place_matters() -> None:
    truth = image_noise(PIXELS, 4, 6)
    moved = PIXELS.copy()
    moved[0, 1, 2, 3] += 1 / 127.5
    swapped = PIXELS.copy()
    swapped[1, :, 0, 0], swapped[1, :, 5, 7] = PIXELS[1, :, 5, 7], PIXELS[1, :, 0, 0]
    assert np.mean(image_noise(moved, 4, 6)[0] != truth[0]) > 0.9
    assert np.mean(image_noise(swapped, 4, 6)[1] != truth[1]) > 0.9
    np.testing.assert_array_equal(image_noise(moved, 4, 6)[1:], truth[1:])
    np.testing.assert_array_equal(image_noise(PIXELS[::-1], 4, 6), truth[::-1])


def test_digests_by_hand() -> None:
    pixels = np.array([[0.5, -1.0]])
    levels = [63, -128]
    for salt, digest in zip((0x3C6EF372, 0x1F83D9AB), image_digests(pixels), strict=True):
        total = sum(mix_in_python((mix_in_python(place ^ salt) + level) % 2**32) for place, level in enumerate(levels))
        assert int(digest[0]) == mix_in_python(total % 2**32)


def test_features_are_even_and_centred() -> None:
    noise = image_noise(RNG.standard_normal((2, 3, 4, 4)), 100, 100)
    assert abs(noise.mean()) < 0.02
    assert noise.std() == pytest.approx(2 / np.sqrt(3), rel=0.02)
    assert set(np.unique(np.abs(noise * 128))) == set(range(1, 256, 2))
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.05


def test_gumbel_noise_has_its_distribution_and_names_every_number() -> None:
    noise = gumbel_noise(3, 1, 0, 20_000, 4)
    assert noise.mean() == pytest.approx(0.5772, abs=0.02)
    assert noise.var() == pytest.approx(np.pi**2 / 6, rel=0.03)
    base = routing_bits(3, 1, 0, 9, 4)
    assert len(np.unique(base)) == base.size
    for other in (routing_bits(4, 1, 0, 9, 4), routing_bits(3, 2, 0, 9, 4), routing_bits(3, 1, 1, 9, 4)):
        assert not np.isin(other, base).any()
    np.testing.assert_array_equal(routing_bits(3, 1, 0, 5, 2), base[:5, :2])


def test_uniforms_never_reach_their_ends() -> None:
    ends = uniforms(np.array([0, MASK], np.uint32))
    assert 0 < ends[0] < ends[1] < 1
    assert np.isfinite(-np.log(-np.log(ends.astype(np.float64)))).all()
