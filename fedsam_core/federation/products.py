"""Low-rank products P = B A of one layer (B [out, r], A [r, in]; all float64): their mean over sites, and its factors.

The mean of the sites' factors is not the factors of their mean: mean(B) mean(A) differs from mean(B A) wherever sites
differ. What is linear in B A, however, can be summed without anyone's factors being seen, and the sum factored after it
is opened (by the singular value decomposition: FlexLoRA, Bai et al. 2024, arXiv 2402.11505, section 3):

dense   P itself: out * in values. The best factors there are.
sketch  Y = P R with R [in, l] drawn from a public seed (`sketch_right` of `test_matrix`); Q = orth(Y); then
        Z = Qᵀ P (`sketch_left`). Two sums of l * out and l * in values, after which P is known to be nearly Q Z.
        A power iteration between the two (W = orth(Zᵀ), Y = P W, Q = orth(Y)) costs two sums more and takes most
        of what is left of the error. Halko, Martinsson and Tropp 2011, arXiv 0909.4061: algorithm 4.1 (the range),
        4.4 (power iterations, orthonormal at each half), 5.1 (factors from Q and Z); theorem 10.5 bounds the error.
probes  uᵀ P v for random signs u and v: a few numbers, that tell the norm of a difference of means (`estimate_norm`).

All three are linear in P: sites send how much theirs changed, which is smaller, and what is known of the product before
is added to the sum. Factors of lower rank are those of higher rank with zeros.

Nothing here depends on how many threads BLAS has, so that a site's node or the in-process engine give equal bits:
products are done without it, and factorisations on one thread (more are slower at these sizes). Other processors'
kernels may still round otherwise: whoever is to have the same bits must be sent them.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from fedsam_core.federation.signs import signs

Matrix = NDArray[np.float64]

_blas = ThreadpoolController()

_LOST = 1e-8  # of the largest singular value: less than a float32 resolves beside it
_DEPENDENT = 1e-6  # of the largest singular value of what should be orthonormal columns: a column that says nothing new
_FRESH = 3**-0.5  # L2 norm of a row of A as PEFT draws it at the start: uniform within 1 / sqrt(in)


class Factors(NamedTuple):
    """A product b @ a: b [out, r], a [r, in]."""

    b: Matrix
    a: Matrix


def test_matrix(inner: int, width: int, *seed: str | int) -> Matrix:
    """The public test matrix R: signs [inner, width], equal for equal seeds.

    A wider one begins with the columns of a narrower one. The bounds of Halko et al. are for Gaussian columns; signs do
    as well (`benchmarks/sketch.py`; only where P reads a handful of inputs may a few sign columns repeat one another)
    and are the same on every machine.
    """
    return np.ascontiguousarray(signs(inner * width, "test matrix", *seed).reshape(width, inner).T)


def dense(b: Matrix, a: Matrix) -> Matrix:
    """B A: [out, in]."""
    return _times(b, a)


def sketch_right(b: Matrix, a: Matrix, right: Matrix) -> Matrix:
    """B (A R): [out, l] for right [in, l]. The product itself is never made."""
    return _times(b, _times(a, right))


def sketch_left(left: Matrix, b: Matrix, a: Matrix) -> Matrix:
    """(Qᵀ B) A: [l, in] for left [out, l]."""
    return _times(_times(left.T, b), a)


def orthonormal(y: Matrix) -> Matrix:
    """Orthonormal columns [n, min(n, l)] whose span holds that of y [n, l].

    Where the columns of y depend on one another, or are zero, others that are orthogonal to the rest fill up.
    """
    with _blas.limit(limits=1, user_api="blas"):
        q, _ = np.linalg.qr(y)
    return q


def split(u: Matrix, s: Matrix, vt: Matrix, rank: int) -> Factors:
    """The `rank` largest of the singular triplets u [out, n], s [n], vt [n, in], as factors.

    Each gets the square root of the singular value, so that neither is trained faster than the other. Signs, which the
    decomposition leaves open, are such that the entry of largest magnitude in each column of B is positive. A direction
    without a singular value has a zero column in B, and in A a row of the norm that PEFT starts from: if both were
    zero, no gradient would ever reach them again. Ranks beyond n are filled up with zeros.
    """
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    sign = np.where(u[np.abs(u).argmax(axis=0), np.arange(s.size)] < 0, -1.0, 1.0)
    alive = s > _LOST * s.max(initial=0.0)
    root = np.sqrt(np.where(alive, s, 0.0))
    spare = ((0, rank - s.size),)
    b = np.pad(u * (sign * root), ((0, 0), *spare))
    a = np.pad(vt * (sign * np.where(alive, root, _FRESH))[:, None], (*spare, (0, 0)))
    return Factors(b, a)


def from_dense(p: Matrix, rank: int) -> tuple[Factors, float]:
    """The best factors of rank `rank` of p [out, in] (Eckart and Young 1936), and the truncation.

    The truncation is the Frobenius norm of what lies beyond the rank, relative to that of p; 0 where p is zero.
    """
    u, s, vt = _svd(p)
    return split(u, s, vt, rank), _beyond(s, rank)


def from_sketch(q: Matrix, z: Matrix, rank: int) -> tuple[Factors, float]:
    """Factors of rank `rank` of the part of P that lies in the span of q [out, l], from z = qᵀ P [l, in].

    q need not be orthonormal: it travels rounded, and what counts is that z was made with the same. P is projected onto
    its span, U Uᵀ P = U (S^-1 Vᵀ) z for q = U S Vᵀ. Columns of q that depend on the others are left out.

    The truncation is that of the projection: what of P lies outside of the span of q was never opened and is not in it.
    """
    u, s, vt = _svd(q)
    known = s > _DEPENDENT * s.max(initial=0.0)
    inverse = np.divide(1.0, s, out=np.zeros_like(s), where=known)
    inner, values, right = _svd(inverse[:, None] * _times(vt, z))
    return split(_times(u, inner), values, right, rank), _beyond(values, rank)


def probe(b: Matrix, a: Matrix, left_signs: Matrix, right_signs: Matrix) -> Matrix:
    """uⱼᵀ B A vⱼ: float64 [k], for left_signs [k, out] and right_signs [k, in], whose rows are uⱼ and vⱼ."""
    values: Matrix = np.einsum("kr,kr->k", _times(left_signs, b), _times(right_signs, a.T))
    return values


def estimate_norm(values: Matrix) -> float:
    """The Frobenius norm of M as the root mean square of its probes uⱼᵀ M vⱼ (float64 [k]).

    For independent signs E (uᵀ M v)² = ||M||_F², so the mean square is unbiased (Hutchinson 1990, who takes the trace
    of M Mᵀ; the root is a little low). Its variance is at most (2 ||M||_F⁴ + 6 ||MᵀM||_F²) / k, as E (uᵀ x)⁴ <= 3 |x|⁴.
    The estimate is hence off by about sqrt(2 / k) of the norm at worst (M of rank 1), and by sqrt(1 / 2k) where many
    singular values are alike: 8 probes say it to 25..50 %, and those of 24 layers together to 5..10 %.
    """
    return float(np.sqrt(np.mean(np.square(values))))


def _times(x: Matrix, y: Matrix) -> Matrix:
    """x @ y by numpy's own loops, in the order of contiguous arrays: a few milliseconds a layer."""
    product: Matrix = np.einsum("ij,jk->ik", np.ascontiguousarray(x), np.ascontiguousarray(y))
    return product


def _svd(x: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """u [m, n], s [n] from the largest down, vt [n, m'], where n is the smaller side of x [m, m']."""
    with _blas.limit(limits=1, user_api="blas"):
        u, s, vt = np.linalg.svd(x, full_matrices=False)
    return u, s, vt


def _beyond(s: Matrix, rank: int) -> float:
    whole = float(np.linalg.norm(s))
    return float(np.linalg.norm(s[rank:])) / whole if whole else 0.0
