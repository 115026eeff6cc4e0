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
    # These take seconds to import, and exact match needs neither.
    from scipy.stats import wasserstein_distance

    from laai_core.objective import smoothed

    largest = max(logprobs)
    log_total = largest + math.log(sum(math.exp(score - largest) for score in logprobs))
    log_p = [score - log_total for score in logprobs]
    p = [math.exp(score) for score in log_p]
    smooth = smoothed(distribution)
    differences = [model - human for model, human in zip(p, distribution, strict=True)]
    metrics = {
        "kl": sum(q * (score - math.log(human)) for q, score, human in zip(p, log_p, smooth, strict=True) if q),
        "kl_reverse": sum(human * (math.log(human) - score) for score, human in zip(log_p, smooth, strict=True)),
        "tv": sum(map(abs, differences)) / 2,
    }
    span = max(positions) - min(positions)
    if span > 0:
        # A model that answers NaN has a NaN distance; scipy takes no such weights.
        moved = math.nan if math.isnan(sum(p)) else float(wasserstein_distance(positions, positions, p, distribution))
        metrics["wasserstein"] = moved / span
    return metrics
