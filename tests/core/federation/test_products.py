"""Products of factors: sketches are linear, factorisations are the best there are, probes tell norms without bias."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_limits

from fedsam_core.federation import products
from fedsam_core.federation.products import (
    Factors,
    Matrix,
    dense,
    estimate_norm,
    from_dense,
    from_sketch,
    orthonormal,
    probe,
    sketch_left,
    sketch_right,
    split,
)


def drawn(rng: np.random.Generator, out: int, inner: int, rank: int) -> Factors:
    return Factors(rng.standard_normal((out, rank)), rng.standard_normal((rank, inner)))


def decaying(rng: np.random.Generator, out: int, inner: int, power: float) -> Matrix:
    """A dense matrix of full rank with singular values k^-power."""
    n = min(out, inner)
    u, v = (np.linalg.qr(rng.standard_normal((size, n))).Q for size in (out, inner))
    return (u * np.arange(1, n + 1) ** -power) @ v.T


def best(p: Matrix, rank: int) -> Matrix:
    u, s, vt = np.linalg.svd(p, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def off(found: Factors, p: Matrix) -> float:
    return float(np.linalg.norm(found.b @ found.a - p) / np.linalg.norm(p))


def sketched(sites: list[Factors], rank: int, width: int, power: int, seed: int) -> tuple[Factors, float]:
    """The mean product's factors by sums of sketches alone."""
    out, inner = sites[0].b.shape[0], sites[0].a.shape[1]
    right = products.test_matrix(inner, min(width, out, inner), seed)
    q = orthonormal(np.mean([sketch_right(b, a, right) for b, a in sites], axis=0))
    for _ in range(power):
        w = orthonormal(np.mean([sketch_left(q, b, a) for b, a in sites], axis=0).T)
        q = orthonormal(np.mean([sketch_right(b, a, w) for b, a in sites], axis=0))
    return from_sketch(q, np.mean([sketch_left(q, b, a) for b, a in sites], axis=0), rank)


shapes = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 8))


@settings(max_examples=60, deadline=None)
@given(shape=shapes, width=st.integers(1, 12), seed=st.integers(0, 2**32))
def test_sums_of_sketches_are_the_sketch_of_the_sum(shape: tuple[int, int, int], width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sites = [drawn(rng, *shape) for _ in range(4)]
    p = sum(dense(b, a) for b, a in sites)
    np.testing.assert_allclose(p, sum(b @ a for b, a in sites), atol=1e-10)
    right, left = products.test_matrix(shape[1], width, seed), rng.standard_normal((shape[0], width))
    np.testing.assert_allclose(sum(sketch_right(b, a, right) for b, a in sites), p @ right, atol=1e-10)
    np.testing.assert_allclose(sum(sketch_left(left, b, a) for b, a in sites), left.T @ p, atol=1e-10)


def test_test_matrices_are_signs_that_depend_on_the_seed_and_grow_to_the_right() -> None:
    right = products.test_matrix(768, 40, 7, "round", 3, "layer.q")
    assert right.shape == (768, 40)
    assert set(right.reshape(-1)) == {1.0, -1.0}
    np.testing.assert_array_equal(right, products.test_matrix(768, 40, 7, "round", 3, "layer.q"))
    np.testing.assert_array_equal(right[:, :32], products.test_matrix(768, 32, 7, "round", 3, "layer.q"))
    assert abs(np.mean(right * products.test_matrix(768, 40, 7, "round", 3, "layer.v"))) < 5 / np.sqrt(right.size)
    gram = right.T @ right / 768
    assert np.abs(gram - np.eye(40)).max() < 5 / np.sqrt(768)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, rank=st.integers(1, 12), seed=st.integers(0, 2**32))
def test_dense_factors_are_the_best_and_say_what_is_lost(shape: tuple[int, int, int], rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    b, a = drawn(rng, *shape)
    p = b @ a
    found, truncation = from_dense(p, rank)
    assert found.b.shape == (shape[0], rank)
    assert found.a.shape == (rank, shape[1])
    np.testing.assert_allclose(found.b @ found.a, best(p, rank), atol=1e-7 * np.abs(p).max())
    assert truncation == pytest.approx(off(found, p), abs=1e-7)
    if rank >= shape[2]:
        assert off(found, p) < 1e-12


def test_factors_are_balanced_and_their_signs_are_settled() -> None:
    rng = np.random.default_rng(0)
    p = decaying(rng, 30, 20, 1.0)
    (b, a), truncation = from_dense(p, 6)
    s = np.arange(1, 21) ** -1.0
    np.testing.assert_allclose(b.T @ b, np.diag(s[:6]), atol=1e-12)
    np.testing.assert_allclose(a @ a.T, np.diag(s[:6]), atol=1e-12)
    assert truncation == pytest.approx(np.linalg.norm(s[6:]) / np.linalg.norm(s))
    u, s, vt = np.linalg.svd(p, full_matrices=False)
    flips = np.where(rng.random(20) < 0.5, -1.0, 1.0)
    for one in (split(u, s, vt, 6), split(u * flips, s, vt * flips[:, None], 6)):
        np.testing.assert_array_equal(one.b, b)
        np.testing.assert_array_equal(one.a, a)


@pytest.mark.parametrize("sketch", [False, True])
def test_directions_that_are_lost_can_still_be_trained(sketch: bool) -> None:
    """With zeros in both factors no gradient would reach them: a product of rank 2 asked for with rank 5, and zero."""
    rng = np.random.default_rng(1)
    for p in (np.zeros((24, 30)), drawn_product(rng, 24, 30, 2)):
        q = orthonormal(p @ products.test_matrix(30, 9, 0))
        (b, a), truncation = from_sketch(q, q.T @ p, 5) if sketch else from_dense(p, 5)
        assert truncation < 1e-12
        np.testing.assert_allclose(b @ a, p, atol=1e-12)
        lost = np.linalg.norm(b, axis=0) == 0
        assert lost.sum() == 5 - np.linalg.matrix_rank(p)
        np.testing.assert_allclose(np.linalg.norm(a, axis=1)[lost], 3**-0.5)
        assert np.linalg.matrix_rank(a) == 5


def drawn_product(rng: np.random.Generator, out: int, inner: int, rank: int) -> Matrix:
    b, a = drawn(rng, out, inner, rank)
    return b @ a


def test_ranks_beyond_the_matrix_are_filled_up_with_zeros() -> None:
    p = np.random.default_rng(2).standard_normal((3, 10))
    (b, a), truncation = from_dense(p, 5)
    assert b.shape == (3, 5)
    assert a.shape == (5, 10)
    assert not b[:, 3:].any()
    assert not a[3:].any()
    assert truncation == 0
    np.testing.assert_allclose(b @ a, p, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 30),
    width=st.integers(1, 12),
    rank=st.integers(0, 12),
    exponent=st.integers(-20, 20),
    seed=st.integers(0, 2**32),
)
def test_orthonormal_columns_hold_the_span(n: int, width: int, rank: int, exponent: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    y = drawn_product(rng, n, width, rank) * 10.0**exponent
    q = orthonormal(y)
    assert q.shape == (n, min(n, width))
    np.testing.assert_allclose(q.T @ q, np.eye(q.shape[1]), atol=1e-12)
    np.testing.assert_allclose(q @ (q.T @ y), y, atol=1e-12 * np.abs(y).max(initial=0.0))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(12, 50), st.integers(12, 50), st.integers(1, 3)),
    power=st.integers(0, 2),
    seed=st.integers(0, 2**32),
)
def test_sketches_are_exact_where_the_width_holds_the_mean_products_rank(
    shape: tuple[int, int, int], power: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    sites = [drawn(rng, *shape) for _ in range(3)]
    p = np.mean([b @ a for b, a in sites], axis=0)
    rank = 3 * shape[2]
    # With signs the sketch is of full rank only almost surely: the 3 columns beyond the rank make that 1 - 2^-40.
    found, truncation = sketched(sites, rank, rank + 3, power, seed)
    assert off(found, p) < 1e-9
    assert truncation < 1e-9


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
@pytest.mark.parametrize("power", [0, 1, 2])
def test_sketches_keep_the_bound_and_power_iterations_close_the_gap(shape: tuple[int, int], power: int) -> None:
    """Halko et al., theorem 10.5: E |P - Q Qᵀ P|_F <= sqrt(1 + r / (p - 1)) |P - P_r|_F, for oversampling p."""
    rng = np.random.default_rng(3)
    p = decaying(rng, *shape, power=1.0)
    rank, over = 8, 8
    whole = [Factors(p, np.eye(shape[1]))]  # a product of full rank
    optimum = float(np.linalg.norm(p - best(p, rank)) / np.linalg.norm(p))
    errors, beyond = [], []
    for seed in range(40):
        found, truncation = sketched(whole, rank, rank + over, power, seed)
        errors.append(off(found, p))
        beyond.append(truncation)
    assert min(errors) >= optimum * (1 - 1e-12)
    assert np.mean(errors) <= optimum * np.sqrt(1 + rank / (over - 1)) * (1.0 if power else 1.05)
    assert np.mean(errors) / optimum - 1 < (0.22, 0.02, 0.004)[power]
    # What is told is a lower bound of the loss: nothing outside of the sketch is known.
    assert all(told <= true for told, true in zip(beyond, errors, strict=True))


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 12), noise=st.sampled_from([0.0, 1e-3, 0.1]), seed=st.integers(0, 2**32))
def test_a_basis_that_was_rounded_on_its_way_is_as_good_as_its_span(width: int, noise: float, seed: int) -> None:
    """Whatever q is, from_sketch gives the best factors of P projected onto q's span; doubled columns and zero columns
    add nothing."""
    rng = np.random.default_rng(seed)
    p = decaying(rng, 30, 25, 1.0)
    q = orthonormal(p @ products.test_matrix(25, width, seed))
    q = q + noise * np.abs(q).max() * rng.uniform(-1, 1, q.shape)
    exact = np.linalg.qr(q).Q
    projected = exact @ (exact.T @ p)
    for basis in (q, np.hstack([q, q[:, :1], np.zeros((30, 2))]), 1e-3 * q):
        found, _ = from_sketch(basis, basis.T @ p, 6)
        np.testing.assert_allclose(found.b @ found.a, best(projected, 6), atol=1e-9)


def test_nothing_in_the_sketch_is_a_product_of_zero() -> None:
    found, truncation = from_sketch(np.zeros((7, 4)), np.zeros((4, 9)), 2)
    assert not (found.b @ found.a).any()
    assert found.b.shape == (7, 2)
    assert found.a.shape == (2, 9)
    assert truncation == 0


def test_nothing_depends_on_the_number_of_threads() -> None:
    rng = np.random.default_rng(4)
    b, a = drawn(rng, 300, 280, 60)
    right = products.test_matrix(280, 68, 0)
    results = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            p, y = dense(b, a), sketch_right(b, a, right)
            q = orthonormal(y)
            z = sketch_left(q, b, a)
            probes = probe(b, a, q.T, right.T)
            results.append((p, y, q, z, probes, *from_dense(p, 8)[0], *from_sketch(q, z, 8)[0]))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def test_probes_have_the_stated_mean_and_spread_over_all_signs() -> None:
    """All 2^5 * 2^4 pairs of signs: no chance left."""
    rng = np.random.default_rng(5)
    left, right = (np.array(list(itertools.product((-1.0, 1.0), repeat=n))) for n in (5, 4))
    pairs = [(u, v) for u in left for v in right]
    u, v = (np.array(side) for side in zip(*pairs, strict=True))
    for b, a in (drawn(rng, 5, 4, 1), drawn(rng, 5, 4, 3)):
        m = b @ a
        values = probe(b, a, u, v)
        np.testing.assert_allclose(values, [one @ m @ other for one, other in pairs], atol=1e-12)
        norm = np.linalg.norm(m)
        assert np.mean(values**2) == pytest.approx(norm**2)
        assert estimate_norm(values) == pytest.approx(norm)
        assert np.var(values**2) <= 2 * norm**4 + 6 * np.linalg.norm(m.T @ m) ** 2


@pytest.mark.parametrize(("rank", "spread"), [(1, 2.0), (64, 0.5)])
def test_the_estimate_spreads_as_it_says(rank: int, spread: float) -> None:
    rng = np.random.default_rng(6)
    b, a = drawn(rng, 64, 48, rank)
    k = 32
    estimates = []
    for seed in range(400):
        left, right = products.test_matrix(64, k, seed, "left").T, products.test_matrix(48, k, seed, "right").T
        estimates.append(estimate_norm(probe(b, a, left, right)) / np.linalg.norm(b @ a))
    assert np.mean(estimates) == pytest.approx(1.0, abs=0.04)  # the root of an unbiased estimate is a little low
    assert np.std(estimates) == pytest.approx(np.sqrt(spread / k), rel=0.2)


def test_the_meter_tells_how_inexact_the_mean_of_factors_is_from_sums_alone() -> None:
    rng = np.random.default_rng(7)
    common = drawn(rng, 64, 48, 4)
    sites = [Factors(*(c + 0.3 * o for c, o in zip(common, drawn(rng, 64, 48, 4), strict=True))) for _ in range(6)]
    left, right = products.test_matrix(64, 256, 0).T, products.test_matrix(48, 256, 1).T
    mean_b, mean_a = (np.mean([site[side] for site in sites], axis=0) for side in (0, 1))
    opened = np.mean([probe(b, a, left, right) for b, a in sites], axis=0)
    inexact = np.linalg.norm(np.mean([b @ a for b, a in sites], axis=0) - mean_b @ mean_a)
    assert estimate_norm(opened - probe(mean_b, mean_a, left, right)) == pytest.approx(inexact, rel=0.2)
    # With A the same everywhere (ffa, rolora) the mean of factors is exact, and the meter says zero.
    frozen = [Factors(b, common.a) for b, _ in sites]
    opened = np.mean([probe(b, a, left, right) for b, a in frozen], axis=0)
    assert estimate_norm(opened - probe(mean_b, common.a, left, right)) < 1e-10


def test_estimates_of_nothing_are_zero() -> None:
    assert estimate_norm(np.zeros(8)) == 0.0
