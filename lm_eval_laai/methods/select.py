"""Choose penalties, or the layer, by cross-validation on the training examples alone: no test item is ever looked at.

Every fold leaves some of the N examples out, trains on the others and is scored on those left out. The folds of one
setting are rows of one batch. Penalties go from strong to weak, each fold starting from its own last vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from laai_core.errors import LaaiError
from laai_core.example import Example
from laai_core.hooks import frozen
from laai_core.locate import Layout, locate, verify_causal
from laai_core.penalty import Penalty, critical_penalty
from laai_core.problem import Problem
from laai_core.settings import Job, Settings, check

# Shares of the smallest penalty under which zero is the answer.
SHARES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005)
STEPS = 40  # evaluations a fold and setting; warm starts make them few
MAX_FOLDS = 10


@dataclass(frozen=True)
class Tried:
    """One setting, and the mean task loss of examples left out of the training."""

    layer: int
    l1: float
    group: float
    validation_loss: float


@dataclass(frozen=True)
class Choice:
    """The setting with the smallest validation loss, and all that were tried."""

    layer: int
    l1: float
    group: float
    tried: list[Tried]


def choose_penalty(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    layer: int,
    l1: float | None = None,
    group: float | None = None,
    **settings: Any,
) -> Choice:
    """Choose l1 and group, or the one that is None, at one layer.

    Args:
        l1, group: fixed where given.
        settings: fields of `laai_core.settings.Settings`: penalty_scale, projection, stop, site, forward, ...

    Raises:
        LaaiError: with fewer than two examples, and as `train` does.
    """
    check(Job, l1=l1, group=group)
    shared = Settings(**settings)
    layout = locate(model, shared.projection)
    layer = layout.layer(layer)
    folds = _CrossValidation(layout, tokenizer, examples, [layer], shared)
    tried = []
    with folds.ready():
        critical = folds.critical_penalty(layer)
        x = folds.zeros(layer)
        for share in SHARES:
            setting = (share * critical if l1 is None else l1, share * critical if group is None else group)
            x, loss = folds.validated(layer, x, *setting)
            tried.append(Tried(layer, *setting, loss))
    return _best(tried)


def choose_layer(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    l1: float = Job.l1,
    group: float = Job.group,
    layers: Sequence[int] | None = None,
    **settings: Any,
) -> Choice:
    """Choose among `layers` (default: all) under one penalty, by default relative to each layer's activation.

    Arguments and errors as for `choose_penalty`.
    """
    check(Job, l1=l1, group=group)
    shared = Settings(**settings)
    layout = locate(model, shared.projection)
    candidates = [layout.layer(layer) for layer in (range(len(layout.blocks)) if layers is None else layers)]
    folds = _CrossValidation(layout, tokenizer, examples, candidates, shared)
    with folds.ready():
        tried = [
            Tried(layer, l1, group, folds.validated(layer, folds.zeros(layer), l1, group)[1]) for layer in candidates
        ]
    return _best(tried)


class _CrossValidation:
    """One problem with every fold twice, its training examples and what it leaves out, and then all examples."""

    def __init__(
        self,
        layout: Layout,
        tokenizer: Any,
        examples: Sequence[Example],
        layers: Sequence[int],
        settings: Settings,
    ) -> None:
        left_out = _folds(examples)
        trained_on = [[e for n, e in enumerate(examples) if n not in fold] for fold in left_out]
        sets = [*trained_on, *([examples[n] for n in fold] for fold in left_out), examples]
        self._layout, self._count = layout, len(left_out)
        self._problem = Problem(layout, tokenizer, sets, layers, settings)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """The model as everything else needs it."""
        with frozen(self._layout.model):
            verify_causal(self._layout)
            yield

    def critical_penalty(self, layer: int) -> float:
        """With all examples, by one evaluation at zero: where the path begins."""
        start, everything = self.zeros(layer)[:1], [2 * self._count]
        (solution,) = self._problem.minimise(layer, start, Penalty(0.0, 0.0), 1, everything)
        return float(critical_penalty(solution.first_gradient))

    def zeros(self, layer: int) -> torch.Tensor:
        """x of all folds [K, H, d] to start from."""
        return torch.zeros(self._count, *self._problem.shape(layer))

    def validated(self, layer: int, x: torch.Tensor, l1: float, group: float) -> tuple[torch.Tensor, float]:
        """Each fold's x after training on from `x`, and the mean loss of the examples left out."""
        runs = range(self._count)
        solutions = self._problem.minimise(layer, x, Penalty(l1, group), STEPS, runs)
        x = torch.stack([solution.x for solution in solutions])
        vectors = self._problem.unit(layer)[: self._count] * x
        losses = self._problem.losses(layer, vectors, range(self._count, 2 * self._count))
        return x, float(losses.mean())


def _folds(examples: Sequence[Example]) -> list[list[int]]:
    """Numbers of the examples each fold leaves out: one each up to ten examples, then ten folds."""
    if len(examples) < 2:
        raise LaaiError(f"cross-validation needs at least two examples, got {len(examples)}: give the setting itself")
    count = min(len(examples), MAX_FOLDS)
    return [list(range(start, len(examples), count)) for start in range(count)]


def _best(tried: list[Tried]) -> Choice:
    best = min(tried, key=lambda one: one.validation_loss)
    return Choice(best.layer, best.l1, best.group, tried)
