"""How far a mean over cases can be trusted: 95% bootstrap confidence intervals.

Cases are drawn with replacement, as many as there are, and the mean is taken anew; the interval holds the middle 95% of
many such means (the percentile method). It stays within the range of what a score can be, follows the skew that Dice
has near 1, and needs no more than two cases. The usual refinement (BCa) is undefined where a site has one case or where
all cases score alike, and both are common here. With few cases every bootstrap interval is too narrow: read those of
small sites with care.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import bootstrap

Floats = np.ndarray[Any, np.dtype[np.float64]]

RESAMPLES = 9999
LEVEL = 0.95
_BATCH = 1000  # resamples at once: bounds the memory


def mean_of_means(scores: Floats) -> Floats:
    """Mean over classes of the means over cases. A nan is left out, and so is a class of which nothing is left.

    Args:
        scores: float64 [..., cases, classes].

    Returns:
        float64 [...]; nan where there is no score at all.
    """
    return _known_mean(_known_mean(scores, axis=-2), axis=-1)


def mean_interval(groups: Sequence[Floats], seed: int) -> tuple[float, float] | None:
    """95% confidence interval of the mean over groups of `mean_of_means`.

    One group gives the interval of a pooled mean, one group a site that of the macro mean: cases are then drawn within
    each site, as many as it has, and every site keeps its weight.

    Args:
        groups: float64 [cases, classes] each. Cases and groups without any score are left out, as they are of the mean.
        seed: equal seeds give equal intervals, bit for bit.

    Returns:
        (low, high); equal where all scores are. None if no group has two cases: nothing can be said then. A group of
        one case beside larger ones is held as it is.
    """
    tables = [table[~np.isnan(table).all(axis=1)] for table in groups]
    tables = [table for table in tables if len(table)]
    drawn = [table for table in tables if len(table) > 1]
    if not drawn:
        return None
    held = float(sum(mean_of_means(table) for table in tables if len(table) == 1))

    def mean(*cases: np.ndarray[Any, Any], axis: int) -> Floats:
        chosen = (table[index.astype(np.intp)] for table, index in zip(drawn, cases, strict=True))
        return np.asarray((held + sum(mean_of_means(scores) for scores in chosen)) / len(tables))

    found = bootstrap(
        [np.arange(len(table)) for table in drawn],  # whole cases are drawn: their classes belong together
        mean,
        n_resamples=RESAMPLES,
        batch=_BATCH,
        vectorized=True,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = found.confidence_interval
    return float(low), float(high)


def _known_mean(values: Floats, axis: int) -> Floats:
    """Mean of what is not nan, without numpy's warning where nothing is."""
    known = ~np.isnan(values)
    count = known.sum(axis=axis)
    total = np.where(known, values, 0.0).sum(axis=axis)
    result: Floats = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return result
