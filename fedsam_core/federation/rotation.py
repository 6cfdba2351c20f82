"""A public random rotation that spreads a vector's energy evenly, so that a narrow ring or a clip fits all values.

Adapter updates have a few values far larger than the rest. Where one clip holds for all, the large ones set the step
and the small ones drown in rounding. After the rotation y = H D x (D: random signs; H: the orthonormal Walsh-Hadamard
transform) every value is a signed mean over a block and nearly Gaussian with the block's root mean square as deviation,
whatever x was. The rotation is linear: sites rotate before they sum, the sum is rotated back.

Sources: Suresh et al. 2017, arXiv 1611.00429, section 3 (the rotation before quantising); Ailon and Chazelle 2009, The
Fast Johnson-Lindenstrauss Transform (why the signs are needed).
"""

import math

import numpy as np
from numpy.typing import NDArray

from fedsam_core.federation.signs import signs
from fedsam_core.secagg.refusals import UnfitValues

LARGEST_BLOCK = 4096
"""Values that are mixed with one another, at most: enough for the values to look Gaussian."""

_PADDING = 0.01  # of the size: what a larger block may cost in bytes
_COLUMNS = 16  # blocks worked on at a time: two buffers of 512 KiB stay in the processor's cache


class Rotation:
    """The rotation of vectors of one size. Equal seeds rotate alike, bit for bit, on every machine.

    Blocks of 2^k values are rotated each for itself. Values are dealt to the blocks in turn, like cards, so that each
    block holds a share of every layer. The block is the largest for which zeros that fill up the last one cost no more
    than 1 % of the size; a block of one value is only a change of signs.

    Attributes:
        size: values of a vector.
        padded: values of a rotated vector.
        block: values that are mixed with one another.
    """

    def __init__(self, size: int, *seed: str | int) -> None:
        self.size = size
        self.block = block_of(size)
        self.padded = padded_size(size)
        # The transform's norm is sqrt(block): taken back here, where a multiplication is due anyway.
        self._signs = signs(self.padded, "rotation", *seed)
        self._signs /= math.sqrt(self.block)

    @property
    def largest_error_factor(self) -> float:
        """How much larger than a rotated value's largest error a value's error may be after `inverse`, at worst.

        Root mean squares of errors are kept: independent errors of equal variance come back with that variance.
        """
        return math.sqrt(self.block)

    def forward(self, x: NDArray[np.floating]) -> NDArray[np.float64]:
        """Rotate x (real numbers [size]) to float64 [padded] of the same L2 norm. NaN or infinity spreads in its block.

        Raises UnfitValues for another shape.
        """
        _check(x, self.size, "a vector to rotate")
        y = np.zeros(self.padded)
        y[: self.size] = x
        y *= self._signs
        return self._transform(y)

    def inverse(self, y: NDArray[np.float64]) -> NDArray[np.float64]:
        """Rotate y (float64 [padded]) back to float64 [size]. Raises UnfitValues for another shape."""
        _check(y, self.padded, "a vector to rotate back")
        x = self._transform(y.astype(np.float64))
        x *= self._signs
        return x[: self.size]

    def _transform(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Multiply each block by the Hadamard matrix of +1 and -1, in place. Block j is x[j], x[j + blocks], ..."""
        cards = x.reshape(self.block, self.padded // self.block)
        with np.errstate(invalid="ignore", over="ignore"):  # the quantiser refuses what comes of it, by lane
            for start in range(0, cards.shape[1], _COLUMNS):
                columns = cards[:, start : start + _COLUMNS]
                columns[:] = _hadamard(columns)
        return x


def padded_size(size: int) -> int:
    """Values of a rotated vector of `size` values."""
    return -(-size // (block := block_of(size))) * block


def block_of(size: int) -> int:
    """Values that are mixed with one another in a vector of `size` values."""
    block = LARGEST_BLOCK
    while -size % block > _PADDING * size:
        block //= 2
    return block


def _hadamard(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """The columns of x ([2^k, n]) times the Hadamard matrix in its natural (Sylvester) order: log2 passes of sums and
    differences between two buffers, which no library and no number of threads computes differently."""
    rows = x.shape[0]
    here, there = x.copy(), np.empty(x.shape)
    half = 1
    while half < rows:
        a, b = (here.reshape(rows // (2 * half), 2, -1)[:, side] for side in (0, 1))
        plus, minus = (there.reshape(rows // (2 * half), 2, -1)[:, side] for side in (0, 1))
        np.add(a, b, out=plus)
        np.subtract(a, b, out=minus)
        here, there = there, here
        half *= 2
    return here


def _check(x: NDArray[np.floating], size: int, what: str) -> None:
    if x.shape != (size,):
        raise UnfitValues(f"{what} must have {size} values, not shape {x.shape}: it was made for another layout")
