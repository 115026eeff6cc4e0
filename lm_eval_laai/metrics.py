"""The tasks' metrics: exact match of word tasks, and how far answers are from a group's on opinion tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence


def first_line(generated: str) -> str:
    """The first line of a generated text, stripped: the answer for exact match and for a judge."""
    return generated.split("\n", 1)[0].strip()


def exact_match(generated: str, target: str) -> float:
    """1.0 if the first line generated is the target, stripped and case-sensitive, else 0.0."""
    return float(first_line(generated) == target.strip())


def opinion_metrics(
    logprobs: Sequence[float], distribution: Sequence[float], positions: Sequence[float]
) -> dict[str, float]:
    """Distances of a model's answers to one question from a group's; all four are 0 when they agree.

    They compare p = softmax(logprobs) with pi = distribution, over K options.

    Args:
        logprobs: [K] log-probabilities of the answers, each summed over the answer's tokens.
        distribution: [K] the group's shares.
        positions: [K] the options' positions on their scale, in any unit and order.

    Returns:
        kl: KL(p || pi), the paper's (eq. 4); kl_reverse: KL(pi || p); in nats, both with pi smoothed as in training.
        wasserstein: distance of p and pi along the scale, whose length is 1 (1 - wasserstein is OpinionQA's
            representativeness); absent where all positions are equal: such options have no order.
        tv: half the sum of |p - pi|, total variation.
    """
    # These take seconds to import, and exact match needs none of them.
    import numpy as np
    from scipy.special import log_softmax, rel_entr
    from scipy.stats import wasserstein_distance

    from laai_core.objective import smoothed

    log_p, smooth = log_softmax(logprobs), np.array(smoothed(distribution))
    p = np.exp(log_p)
    metrics = {
        "kl": float(rel_entr(p, smooth).sum()),
        "kl_reverse": float((smooth * (np.log(smooth) - log_p)).sum()),
        "tv": float(np.abs(p - distribution).sum()) / 2,
    }
    span = max(positions) - min(positions)
    if span > 0:
        # A model that answers NaN has a NaN distance; scipy takes no such weights.
        moved = math.nan if np.isnan(p).any() else float(wasserstein_distance(positions, positions, p, distribution))
        metrics["wasserstein"] = moved / span
    return metrics
