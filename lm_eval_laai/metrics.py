"""How far a model's answers to one opinion question are from a group's. All four are 0 when they agree."""

from __future__ import annotations

import math
from collections.abc import Sequence

from laai_core.objective import smoothed


def opinion_metrics(
    logprobs: Sequence[float], distribution: Sequence[float], positions: Sequence[float]
) -> dict[str, float]:
    """The distances between p = softmax(logprobs) and pi = distribution, over K options.

    Args:
        logprobs: [K] log-probabilities of the answers, each summed over the answer's tokens.
        distribution: [K] the group's shares.
        positions: [K] where the options lie on their scale, in any unit and order.

    Returns:
        kl: KL(p || pi), the paper's (eq. 4); kl_reverse: KL(pi || p); in nats, both with pi smoothed as in training.
        wasserstein: what it takes to move p to pi along the scale, whose length is 1 (1 - wasserstein is OpinionQA's
            representativeness); absent where all positions are equal: such options have no order.
        tv: half the sum of |p - pi|, total variation.
    """
    largest = max(logprobs)
    log_total = largest + math.log(sum(math.exp(score - largest) for score in logprobs))
    log_p = [score - log_total for score in logprobs]
    p = [math.exp(score) for score in log_p]
    smooth = smoothed(distribution)
    differences = [model - human for model, human in zip(p, distribution, strict=True)]
    metrics = {
        "kl": sum(q * (score - math.log(human)) for q, score, human in zip(p, log_p, smooth, strict=True)),
        "kl_reverse": sum(human * (math.log(human) - score) for score, human in zip(log_p, smooth, strict=True)),
        "tv": sum(map(abs, differences)) / 2,
    }
    span = max(positions) - min(positions)
    if span > 0:
        metrics["wasserstein"] = _moved(differences, positions) / span
    return metrics


def _moved(differences: Sequence[float], positions: Sequence[float]) -> float:
    """The area between two cumulative distributions: in one dimension that is their Wasserstein-1 distance."""
    order = sorted(range(len(positions)), key=lambda option: positions[option])
    area = excess = 0.0
    for here, after in zip(order, order[1:], strict=False):
        excess += differences[here]
        area += abs(excess) * (positions[after] - positions[here])
    return area
