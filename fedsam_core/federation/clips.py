"""Clips from histograms: how large the values of a group are, told by the sum over all sites.

Sites sum how many of their values lie in each half octave. A quantile of all sites' values together is read from the
sum, and with headroom becomes the clip of the group in the next sum.
"""

import numpy as np
from numpy.typing import NDArray

from fedsam_core.federation.config import FederationConfig

MAGNITUDES = 48
"""Bins of a histogram of magnitudes, two an octave: from `update_clip` down to 2^-24 of it."""


def _bin(magnitude: NDArray[np.float32]) -> NDArray[np.int64]:
    """Half octaves: the exponent and the first bit of the mantissa of a float32."""
    return (magnitude.view(np.int32) >> 22).astype(np.int64)


def _top(update_clip: float) -> int:
    return int(_bin(np.array([update_clip], np.float32))[0])


def histogram(values: NDArray[np.float32], update_clip: float) -> NDArray[np.float64]:
    """How many values (float32) lie in each half octave below `update_clip`, the largest first; the last bin holds all
    that is smaller."""
    bins = np.clip(_top(update_clip) - _bin(np.abs(values.astype(np.float32))), 0, MAGNITUDES - 1)
    return np.bincount(bins, minlength=MAGNITUDES).astype(np.float64)


def next_clip(counts: NDArray[np.float64], config: FederationConfig) -> float:
    """The upper edge of the bin that the quantile lies in, with headroom."""
    above = np.cumsum(counts)
    beyond = (1 - config.quantile) * above[-1]
    at = int(np.argmax(above > max(0.5, beyond)))
    edge = np.array([(_top(config.update_clip) - at + 1) << 22], np.int32).view(np.float32)[0]
    return float(min(config.update_clip, config.headroom * float(edge)))
