"""Task losses: from log-probabilities of continuations to one number per example (paper eq. 3 and 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from laai_core.errors import LaaiError
from laai_core.example import Example

LOSSES = ("nll", "kl")
SMOOTHING = 1e-4  # epsilon of the human distribution, the same in training and in the metric


def smoothed(distribution: Sequence[float]) -> list[float]:
    """(1 - eps) * pi + eps / K, so that an answer with pi = 0 has a finite KL."""
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
        pi = [p for e in examples for p in smoothed(e.distribution or ())]
        self._log_pi = torch.tensor(pi, dtype=torch.float32).log()
        counts = torch.tensor([len(example.options or ()) for example in examples])
        self._owner = torch.arange(len(examples)).repeat_interleave(counts)
        self._count = len(examples)

    def per_example(self, logprobs: torch.Tensor) -> torch.Tensor:
        """[C] log-probabilities, continuations in the order of the examples, to [N] losses."""
        if self.name == "nll":
            return -logprobs
        owner = self._owner.to(logprobs.device)
        none = logprobs.new_zeros(self._count)
        # Log-softmax within each example; its largest score is subtracted first, against overflow.
        largest = none.scatter_reduce(0, owner, logprobs.detach(), "amax", include_self=False)
        shifted = logprobs - largest[owner]
        log_p = shifted - none.index_add(0, owner, shifted.exp()).log()[owner]
        return none.index_add(0, owner, log_p.exp() * (log_p - self._log_pi.to(logprobs)))
