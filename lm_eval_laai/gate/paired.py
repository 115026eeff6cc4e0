"""Paired tests of two runs on the same items: exact McNemar for 0/1 metrics, a studentised bootstrap for others; Holm.

Paired, since both runs saw the same items: an item that is hard for both says nothing about their difference, and two
unpaired standard errors count it all the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 9_999
FEWEST = 10  # items: below, a bootstrap has too few different resamples
_SEED = 0  # the same two runs get the same p-value
_BLOCK = 4 << 20  # drawn indices at a time


@dataclass(frozen=True)
class Paired:
    """A metric of two runs over the same items."""

    test: str  # McNemar or bootstrap
    items: int
    before: float  # mean over the items
    after: float
    stderr: float | None  # of the difference of the means, paired; one item has none
    fell: int  # items whose value is lower than before
    rose: int
    effect: (
        float | None
    )  # Cohen's g for McNemar, d_z for the bootstrap (none without spread), signed as the difference
    p: float  # two-sided, not corrected

    @property
    def difference(self) -> float:
        """After less before, in the metric's own units."""
        return self.after - self.before


def compare_items(before: Sequence[float], after: Sequence[float]) -> Paired:
    """Test whether the mean changed. Both runs' values, in the same order of items; at least one item.

    0/1 values get McNemar's exact test: of the items that changed, as many should have risen as fallen. Others get
    a bootstrap of the differences' t statistic under the null hypothesis, or p = 1 below `FEWEST` items.
    """
    import numpy as np

    old, new = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    change = new - old
    fell, rose = int((change < 0).sum()), int((change > 0).sum())
    stderr = _stderr(change)
    if bool(np.isin(old, (0, 1)).all() and np.isin(new, (0, 1)).all()):
        test, p = "McNemar", mcnemar(fell, rose)
        effect: float | None = rose / (fell + rose) - 0.5 if fell + rose else 0.0
    else:
        test, p = "bootstrap", bootstrap(change)
        spread = (stderr or 0.0) * math.sqrt(len(change))
        effect = float(change.mean()) / spread if spread else None
    return Paired(test, len(change), float(old.mean()), float(new.mean()), stderr, fell, rose, effect, p)


def mcnemar(fell: int, rose: int) -> float:
    """Two-sided p-value of McNemar's exact test: a binomial test of the discordant items against one half."""
    from scipy.stats import binomtest  # a second to import

    return float(binomtest(fell, fell + rose).pvalue) if fell + rose else 1.0


def bootstrap(change: np.ndarray) -> float:
    """Two-sided p-value that the mean of the differences [n] is zero.

    The studentised bootstrap (Efron & Tibshirani 1993, section 16.4): the share of resamples of the centred
    differences whose t statistic is at least as far from zero. The smallest possible is 1 / (RESAMPLES + 1).
    """
    import numpy as np

    count = len(change)
    if count < FEWEST or not change.any():
        return 1.0
    observed = _t(change[None])[0]
    centred = change - change.mean()
    centred[np.abs(centred) < 1e-12 * np.abs(change).max()] = 0.0  # rounding must not be taken for a spread
    generator = np.random.default_rng(_SEED)
    rows = max(1, _BLOCK // count)
    extreme, drawn = 0, 0
    while drawn < RESAMPLES:
        size = min(rows, RESAMPLES - drawn)
        resamples = centred[generator.integers(0, count, (size, count))]
        extreme += int((_t(resamples) >= observed * (1 - 1e-12)).sum())
        drawn += size
    return (1 + extreme) / (1 + RESAMPLES)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction (1979): adjusted p-values, in the order given; the family's error rate stays below alpha."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _stderr(change: np.ndarray) -> float | None:
    return float(change.std(ddof=1) / math.sqrt(len(change))) if len(change) > 1 else None


def _t(samples: np.ndarray) -> np.ndarray:
    """|t| of each row [B, n]: infinite where all entries of a row are one number other than zero, zero for zero."""
    import numpy as np

    means, spreads = np.abs(samples.mean(axis=1)), samples.std(axis=1, ddof=1)
    constant = spreads <= 1e-12 * np.maximum(means, np.finfo(float).tiny)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = means / (spreads / math.sqrt(samples.shape[1]))
    return np.where(constant, np.where(means > 0, np.inf, 0.0), ratio)
