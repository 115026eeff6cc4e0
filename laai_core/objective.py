"""Task losses: from log-probabilities of continuations to one number per example (paper eq. 3 and 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from laai_core.data import Example
from laai_core.errors import LaaiError

LOSSES = ("nll", "kl")
SMOOTHING = 1e-4  # epsilon of the human distribution, the same in training and in the metric


def smoothed(distribution: Sequence[float]) -> list[float]:
    """(1 - eps) * pi + eps / K, so that an answer nobody gave costs a finite amount."""
    return [(1 - SMOOTHING) * p + SMOOTHING / len(distribution) for p in distribution]


class Objective:
    """The task loss of a fixed list of examples, given log p(continuation | prompt) of all their continuations.

    `nll`: minus the log-probability of the target, summed over its tokens (eq. 3, extended to several tokens).
    `kl`: KL(p || pi) over the answer options, p = softmax of the options' log-probabilities (eq. 4).
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        kinds = {"nll" if example.target is not None else "kl" for example in examples}
        if len(kinds) != 1:
            raise LaaiError("the examples mix targets with answer options: expected one kind")
        self.name = kinds.pop()
        self._count = len(examples)
        pi = [share for example in examples for share in smoothed(example.distribution or ())]
        self._log_pi = torch.tensor(pi).log()
        self._ends = [len(example.options or ()) for example in examples]

    def per_example(self, logprobs: torch.Tensor) -> torch.Tensor:
        """[C] log-probabilities, continuations in the order of the examples, to [N] losses."""
        if self.name == "nll":
            return -logprobs
        log_pi = self._log_pi.to(logprobs)
        losses = []
        for scores, target in zip(logprobs.split(self._ends), log_pi.split(self._ends), strict=True):
            log_p = scores.log_softmax(0)
            losses.append((log_p.exp() * (log_p - target)).sum())
        return torch.stack(losses)
