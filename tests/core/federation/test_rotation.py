"""Public signs and the rotation made of them: exact, norm-keeping, equal everywhere, and it flattens what it is for."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard

from fedsam_core.federation import rotation
from fedsam_core.federation.rotation import LARGEST_BLOCK, Rotation
from fedsam_core.federation.signs import signs
from fedsam_core.secagg.refusals import UnfitValues


def test_signs_are_the_same_on_every_machine() -> None:
    drawn = signs(100_000, 7, "round", 3)
    assert drawn.dtype == np.float64
    assert set(drawn) == {1.0, -1.0}
    # Whoever changes this breaks sites of different versions: they would decode one another's sums to noise.
    assert hashlib.sha256((drawn > 0).tobytes()).hexdigest().startswith("3c7562eafeebd06f")
    np.testing.assert_array_equal(signs(33, 7, "round", 3), drawn[:33])
    assert signs(0, 7).shape == (0,)


def test_signs_look_random_and_depend_on_every_part_of_the_seed() -> None:
    n = 3_000_000  # more than one piece of the stream
    drawn = signs(n, "a", 1)
    for shift in (1, 31, 32, 33, 65536 * 32):
        assert abs(np.mean(drawn[shift:] * drawn[:-shift])) < 5 / np.sqrt(n - shift)
    assert abs(drawn.mean()) < 5 / np.sqrt(n)
    for other in (("a", 2), ("b", 1), ("a1",), ("a", 1, ""), (1, "a")):
        assert abs(np.mean(drawn * signs(n, *other))) < 5 / np.sqrt(n)


@pytest.mark.parametrize(
    ("size", "block"),
    [(1, 1), (3, 1), (64, 64), (100, 4), (1000, 16), (4096, 4096), (171_008, 4096), (649_328, 4096), (1_846_384, 4096)],
)
def test_the_block_is_the_largest_that_wastes_no_more_than_a_hundredth(size: int, block: int) -> None:
    turned = Rotation(size, 0)
    assert turned.block == block
    assert turned.padded % block == 0
    assert size <= turned.padded <= 1.01 * size
    assert turned.largest_error_factor == np.sqrt(block)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(0, 20_000), seed=st.integers(0, 2**63 - 1), exponent=st.integers(-30, 30))
def test_the_inverse_is_exact_and_norms_are_kept(size: int, seed: int, exponent: int) -> None:
    x = np.random.default_rng(seed).standard_t(2, size) * 10.0**exponent
    turned = Rotation(size, seed)
    y = turned.forward(x)
    assert y.shape == (turned.padded,)
    assert y.dtype == np.float64
    back = turned.inverse(y)
    largest = np.abs(x).max(initial=0.0)
    assert np.abs(back - x).max(initial=0.0) <= 1e-12 * largest
    np.testing.assert_allclose(np.linalg.norm(y), np.linalg.norm(x), rtol=1e-12)


def test_it_is_the_signed_hadamard_matrix_on_blocks_dealt_like_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "LARGEST_BLOCK", 16)
    size, blocks = 16 * 37 - 3, 37
    turned = Rotation(size, "seed")
    x = np.random.default_rng(0).standard_normal(size)
    dealt = (np.append(x, np.zeros(3)) * signs(turned.padded, "rotation", "seed")).reshape(16, blocks)
    np.testing.assert_allclose(turned.forward(x).reshape(16, blocks), hadamard(16) @ dealt / 4, atol=1e-14)


def test_equal_seeds_rotate_alike_bit_for_bit_and_other_seeds_otherwise() -> None:
    x = np.random.default_rng(1).standard_normal(10_000).astype(np.float32)
    y = Rotation(x.size, 5, "round", 1).forward(x)
    assert y.tobytes() == Rotation(x.size, 5, "round", 1).forward(x.astype(np.float64)).tobytes()
    assert np.abs(y - Rotation(x.size, 5, "round", 2).forward(x)).max() > 1


def test_arguments_are_left_as_they_were() -> None:
    turned, x = Rotation(128, 0), np.arange(128.0)
    y = turned.forward(x)
    kept = y.copy()
    turned.inverse(y)
    np.testing.assert_array_equal(x, np.arange(128.0))
    np.testing.assert_array_equal(y, kept)


def test_the_sum_of_rotated_vectors_is_the_rotated_sum() -> None:
    turned, sites = Rotation(9000, 1), np.random.default_rng(2).standard_normal((6, 9000))
    back = turned.inverse(np.sum([turned.forward(x) for x in sites], axis=0))
    np.testing.assert_allclose(back, sites.sum(axis=0), atol=1e-12)


def test_a_few_loud_values_and_a_loud_layer_are_flattened() -> None:
    """What it is for: the clip that holds all values falls to a few root mean squares, whatever the vector."""
    n = 40 * LARGEST_BLOCK
    spike, layer = np.zeros(n), np.full(n, 1e-4)
    spike[12_345] = 1.0
    layer[1000:5000] = 1.0
    heavy = np.random.default_rng(3).standard_t(2, n)
    for x, most in ((layer, 6.5), (heavy, 60)):
        y = Rotation(n, 0).forward(x)
        assert np.abs(y).max() < most * y.std()
    assert np.abs(heavy).max() > 250 * np.abs(np.median(heavy) + np.median(np.abs(heavy)))
    y = Rotation(n, 0).forward(spike)
    np.testing.assert_allclose(np.abs(y[y != 0]), 1 / np.sqrt(LARGEST_BLOCK))


def test_independent_rounding_errors_come_back_no_larger_in_mean_square_and_within_the_factor() -> None:
    turned, generator = Rotation(8192, 0), np.random.default_rng(4)
    errors = generator.uniform(-0.5, 0.5, 8192)
    back = turned.inverse(errors)
    np.testing.assert_allclose(np.mean(back**2), np.mean(errors**2), rtol=1e-12)
    worst = (
        signs(8192, "rotation", 0)[0] * np.ones(8192) / 2
    )  # all in one direction: the first value of a block gets all
    assert np.abs(turned.inverse(worst)).max() == pytest.approx(turned.largest_error_factor / 2)


def test_nan_and_infinity_stay_visible_and_other_sizes_are_refused() -> None:
    turned = Rotation(512, 0)
    for bad in (np.nan, np.inf, 1e308):
        y = turned.forward(np.full(512, bad))
        assert not np.isfinite(y).all() or np.abs(y).max() > 1e300
    with pytest.raises(UnfitValues, match="512 values"):
        turned.forward(np.zeros(511))
    with pytest.raises(UnfitValues, match="rotate back"):
        turned.inverse(np.zeros((2, 256)))
