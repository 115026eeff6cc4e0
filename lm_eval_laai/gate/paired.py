"""Paired tests of two runs on the same items: exact McNemar for 0/1 metrics, sign flips for others; Holm.

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
_SEED = 0  # the same two runs get the same p-value
_BLOCK = 1 << 20  # drawn signs at a time


@dataclass(frozen=True)
class Paired:
    """A metric of two runs over the same items."""

    test: str  # McNemar or sign flips
    items: int
    before: float  # mean over the items
    after: float
    stderr: float | None  # of the difference of the means, paired; one item has none
    fell: int  # items whose value is lower than before
    rose: int
    effect: float | None  # Cohen's g for McNemar, d_z for others (none without spread), signed as the difference
    p: float  # two-sided, not corrected

    @property
    def difference(self) -> float:
        """After less before, in the metric's own units."""
        return self.after - self.before


def compare_items(before: Sequence[float], after: Sequence[float]) -> Paired:
    """Test whether the mean changed. Both runs' values, in the same order of items; at least one item.

    Of two runs that are alike, an item's difference is as likely with either sign. 0/1 values get McNemar's exact
    test: of the items that changed, as many should have risen as fallen. Others get a test by sign flips.
    """
    import numpy as np

    old, new = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    change = new - old
    fell, rose = int((change < 0).sum()), int((change > 0).sum())
    stderr = float(change.std(ddof=1) / math.sqrt(len(change))) if len(change) > 1 else None
    if bool(np.isin(old, (0, 1)).all() and np.isin(new, (0, 1)).all()):
        test, p = "McNemar", mcnemar(fell, rose)
        effect: float | None = rose / (fell + rose) - 0.5 if fell + rose else 0.0
    else:
        test, p = "sign flips", sign_flips(change)
        spread = (stderr or 0.0) * math.sqrt(len(change))
        effect = float(change.mean()) / spread if spread else None
    return Paired(test, len(change), float(old.mean()), float(new.mean()), stderr, fell, rose, effect, p)


def mcnemar(fell: int, rose: int) -> float:
    """Two-sided p-value of McNemar's exact test: a binomial test of the discordant items against one half."""
    from scipy.stats import binomtest  # a second to import

    return float(binomtest(fell, fell + rose).pvalue) if fell + rose else 1.0


def sign_flips(change: np.ndarray) -> float:
    """Two-sided p-value that two runs with the differences [n] are alike, so that each could have either sign.

    A permutation test of the sum, exact where all signings are at most `RESAMPLES`, else of that many random ones,
    where the smallest p-value is 2 / (RESAMPLES + 1). Of 0/1 values it is McNemar's test.
    """
    import numpy as np
    from scipy.stats import permutation_test

    changed = change[change != 0]  # zero has no sign
    if not len(changed):
        return 1.0
    batch = max(1, _BLOCK // len(changed))
    options = {"permutation_type": "samples", "vectorized": True, "n_resamples": RESAMPLES, "batch": batch}
    return float(permutation_test((changed,), np.sum, rng=_SEED, **options).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction (1979): adjusted p-values, in the order given; the family's error rate stays below alpha."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
