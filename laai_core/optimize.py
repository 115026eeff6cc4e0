"""Minimise smooth loss + penalty over x [H, d]: proximal gradient with spectral steps, or Adam as in the literature.

Work is counted in evaluations of the loss and its gradient: one forward and one backward of the model each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch

from laai_core.errors import WorkFailed
from laai_core.penalty import Penalty

OPTIMIZERS = ("prox", "adam")


@dataclass(frozen=True)
class Step:
    """One evaluation, at the point that was evaluated."""

    evaluation: int
    objective: float
    loss: float
    penalty: float
    nonzero: int
    active_heads: int


@dataclass(frozen=True)
class Point:
    """x with what was measured there; the objective includes the penalty, the gradient does not."""

    x: torch.Tensor
    gradient: torch.Tensor
    loss: float
    objective: float


# An optimiser yields the next x to evaluate, is sent the Point, and returns why it ended.
Optimizer = Generator[torch.Tensor, Point, str]


class Run:
    """One minimisation, driven from outside: evaluate `wants`, then `tell` what was found, until it wants nothing.

    So several runs can be evaluated in one batch. Counts evaluations, keeps their history and the best point seen.

    Args:
        start: x [H, d] to begin with.
        budget: evaluations; spent exactly unless a tolerance ends the run before.
        lr: Adam's learning rate; `prox` finds its own step sizes.
        tolerance: stop once the stationarity residual is below this share of its value at the start.
    """

    def __init__(
        self,
        penalty: Penalty,
        start: torch.Tensor,
        budget: int,
        optimizer: str = "prox",
        lr: float = 0.05,
        tolerance: float | None = None,
        on_step: Callable[[Step], None] = lambda step: None,
    ) -> None:
        self.penalty = penalty
        self.history: list[Step] = []
        self.first: Point | None = None
        self.best: Point | None = None
        self.stopped: str | None = None  # why the run ended before its budget, if it did
        self._budget, self._on_step = budget, on_step
        self._steps = _prox(penalty, start, tolerance) if optimizer == "prox" else _adam(penalty, start, tolerance, lr)
        self.wants: torch.Tensor | None = next(self._steps)

    def tell(self, loss: float, gradient: torch.Tensor, culprit: str = "") -> None:
        """What was measured at `wants`. A value that is not finite ends the run; `culprit` says where it came from."""
        x = self.wants
        assert x is not None
        if not math.isfinite(loss) or not bool(torch.isfinite(gradient).all()):
            self.stop(f"loss or gradient not finite at evaluation {len(self.history) + 1}{culprit}")
            return
        penalty = float(self.penalty.value(x))
        point = Point(x, gradient, loss, loss + penalty)
        active = int(x.ne(0).any(dim=1).sum())
        step = Step(len(self.history) + 1, point.objective, loss, penalty, int(x.count_nonzero()), active)
        self.history.append(step)
        self.first = self.first or point
        if self.best is None or point.objective < self.best.objective:
            self.best = point
        self._on_step(step)
        try:
            self.wants = self._steps.send(point)
        except StopIteration as end:
            self.stop(end.value)
        if len(self.history) >= self._budget:
            self.wants = None

    def stop(self, reason: str) -> None:
        """End the run here."""
        self.stopped, self.wants = reason, None

    def result(self) -> Point:
        """The best point; WorkFailed when not even the start could be evaluated."""
        if self.best is None:
            raise WorkFailed(f"training failed at the start: {self.stopped}")
        return self.best


# points, numbers of their runs -> (loss, gradient, culprit) of each
Evaluate = Callable[[list[torch.Tensor], list[int]], Sequence[tuple[float, torch.Tensor, str]]]


def minimise(evaluate: Evaluate, runs: Sequence[Run]) -> None:
    """Drive all runs to their ends, each round's points evaluated together. Ctrl-C ends them with the best so far."""
    try:
        while active := [number for number, run in enumerate(runs) if run.wants is not None]:
            points = [run.wants for run in runs if run.wants is not None]
            for number, found in zip(active, evaluate(points, active), strict=True):
                runs[number].tell(*found)
    except KeyboardInterrupt:
        if any(run.best is None for run in runs):
            raise
        for run in runs:
            if run.wants is not None:
                run.stop(f"interrupted after {len(run.history)} evaluations")


def _prox(penalty: Penalty, start: torch.Tensor, tolerance: float | None) -> Optimizer:
    """Proximal gradient with Barzilai-Borwein steps and a non-monotone line search (SpaRSA: Wright, Nowak &
    Figueiredo 2009). Every iterate is the output of the proximal operator, so zeros are exact at all times."""
    point = yield start
    count = 1
    first = residual = penalty.stationarity(point.x, point.gradient)
    # The first step moves by length one; after it the curvature along the last step sets the size.
    step = 1.0 / max(float(point.gradient.norm()), 1e-12)
    recent = [point.objective]
    while residual > 0 and (tolerance is None or residual > tolerance * first):
        while True:
            trial = yield penalty.prox(point.x - step * point.gradient, step)
            count += 1
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
            return f"no further progress in float32 after {count} evaluations"
    return f"stationary after {count} evaluations"


def _adam(penalty: Penalty, start: torch.Tensor, tolerance: float | None, lr: float) -> Optimizer:
    """Adam (Kingma & Ba 2015) on one subgradient of the objective. Never gives exact zeros."""
    mean, square = torch.zeros_like(start), torch.zeros_like(start)
    point = yield start
    first = residual = penalty.stationarity(point.x, point.gradient)
    count = 0
    while tolerance is None or residual > tolerance * first:
        count += 1
        gradient = point.gradient + penalty.subgradient(point.x)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient.square()
        point = yield point.x - lr * (mean / (1 - 0.9**count)) / ((square / (1 - 0.999**count)).sqrt() + 1e-8)
        residual = penalty.stationarity(point.x, point.gradient)
    return f"stationary after {count + 1} evaluations"
