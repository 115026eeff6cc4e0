"""Minimise smooth loss + penalty over x [H, d]: proximal gradient with spectral steps, or Adam as in the literature.

Work is counted in evaluations of the loss and its gradient: one forward and one backward of the model each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from laai_core.errors import WorkFailed
from laai_core.penalty import Penalty

OPTIMIZERS = ("prox", "adam")
Evaluate = Callable[[torch.Tensor], tuple[float, torch.Tensor]]  # x [H, d] -> loss, gradient [H, d]


@dataclass(frozen=True)
class Step:
    """One evaluation, at the point that was evaluated."""

    evaluation: int
    objective: float
    loss: float
    penalty: float
    nonzero: int
    active_heads: int


@dataclass
class Run:
    """Counts evaluations, keeps their history and the best point seen."""

    evaluate: Evaluate
    penalty: Penalty
    budget: int
    on_step: Callable[[Step], None] = lambda step: None
    history: list[Step] = field(default_factory=list)
    best: Point | None = None
    stopped: str | None = None  # why the run ended before its budget, if it did

    def at(self, x: torch.Tensor) -> Point:
        """Evaluate x. Raises `BudgetSpent` when no evaluation is left, or when the loss is no longer finite."""
        if len(self.history) >= self.budget:
            raise BudgetSpent
        loss, gradient = self.evaluate(x)
        penalty = float(self.penalty.value(x))
        if not math.isfinite(loss) or not bool(torch.isfinite(gradient).all()):
            self.stopped = f"loss or gradient not finite at evaluation {len(self.history) + 1}"
            raise BudgetSpent
        point = Point(x, gradient, loss, loss + penalty)
        step = Step(
            len(self.history) + 1,
            point.objective,
            loss,
            penalty,
            int(x.count_nonzero()),
            int(x.ne(0).any(dim=1).sum()),
        )
        self.history.append(step)
        if self.best is None or point.objective < self.best.objective:
            self.best = point
        self.on_step(step)
        return point


@dataclass(frozen=True)
class Point:
    """x with what was measured there; the objective includes the penalty, the gradient does not."""

    x: torch.Tensor
    gradient: torch.Tensor
    loss: float
    objective: float


class BudgetSpent(Exception):
    """Ends an optimiser's loop."""


def minimise(run: Run, start: torch.Tensor, optimizer: str, lr: float, tolerance: float | None) -> Point:
    """Run one optimiser from `start` and return the best point seen.

    Args:
        lr: Adam's learning rate; `prox` finds its own step sizes.
        tolerance: stop once the stationarity residual is below this share of its value at the start.
            None: use the whole budget of evaluations.
    """
    method = {"prox": _prox, "adam": _adam}[optimizer]
    try:
        method(run, start, lr, tolerance)
    except BudgetSpent:
        pass
    if run.best is None:
        raise WorkFailed(f"training failed at the start: {run.stopped}")
    return run.best


def _prox(run: Run, x: torch.Tensor, lr: float, tolerance: float | None) -> None:
    """Proximal gradient with Barzilai-Borwein steps and a non-monotone line search (SpaRSA: Wright, Nowak &
    Figueiredo 2009). Every iterate is the output of the proximal operator, so zeros are exact at all times."""
    penalty = run.penalty
    point = run.at(x)
    first = residual = penalty.stationarity(point.x, point.gradient)
    # The first step moves by length one; after it the curvature along the last step sets the size.
    step = 1.0 / max(float(point.gradient.norm()), 1e-12)
    recent = [point.objective]
    while residual > 0 and (tolerance is None or residual > tolerance * first):
        while True:
            trial = run.at(penalty.prox(point.x - step * point.gradient, step))
            moved = trial.x - point.x
            length = float(moved.square().sum())
            if trial.objective <= max(recent) - 1e-4 / (2 * step) * length or length == 0:
                break
            step /= 2
        curvature = float((moved * (trial.gradient - point.gradient)).sum())
        step = length / curvature if curvature > 1e-12 * length else 4 * step
        step = min(max(step, 1e-8), 1e8)
        point = trial
        recent = [*recent[-4:], point.objective]
        residual = penalty.stationarity(point.x, point.gradient)
        if length == 0:
            run.stopped = f"no further progress in float32 after {len(run.history)} evaluations"
            return
    run.stopped = f"stationary after {len(run.history)} evaluations"


def _adam(run: Run, x: torch.Tensor, lr: float, tolerance: float | None) -> None:
    """Adam (Kingma & Ba 2015) on one subgradient of the objective. Never gives exact zeros."""
    mean, square = torch.zeros_like(x), torch.zeros_like(x)
    point = run.at(x)
    first = residual = run.penalty.stationarity(point.x, point.gradient)
    count = 0
    while tolerance is None or residual > tolerance * first:
        count += 1
        gradient = point.gradient + run.penalty.subgradient(point.x)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient.square()
        x = point.x - lr * (mean / (1 - 0.9**count)) / ((square / (1 - 0.999**count)).sqrt() + 1e-8)
        point = run.at(x)
        residual = run.penalty.stationarity(point.x, point.gradient)
    run.stopped = f"stationary after {len(run.history)} evaluations"
