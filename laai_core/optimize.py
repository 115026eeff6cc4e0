"""Minimise smooth loss + penalty over x [H, d]: proximal gradient with spectral steps, or Adam as in the literature.

Several runs go side by side as rows of x [R, H, d], each with its own penalty, step size, best point and end. Work is
counted in evaluations of the loss and its gradient: one forward and one backward of the model each.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from laai_core.errors import Interrupted, NotFinite, WorkFailed
from laai_core.penalty import Penalty

OptimizerName = Literal["prox", "adam"]
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)
RECENT = 5  # `prox` accepts a trial below the largest of this many accepted objectives
GROWTH = 4.0  # factor of a step of `prox` along which the loss was not convex
FIRST_SHARE = 0.1  # length of the first step of `prox`, as a share of the start's


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
class Points:
    """One point per run with its measurements; objectives include the penalty, gradients do not."""

    x: torch.Tensor  # [R, H, d]
    gradient: torch.Tensor  # [R, H, d]
    loss: torch.Tensor  # [R], float64
    objective: torch.Tensor  # [R], float64

    def where(self, chosen: torch.Tensor, others: Points) -> Points:
        """Self for the runs `chosen` [R], `others` for the rest."""
        wide = chosen.view(-1, 1, 1)
        return Points(
            torch.where(wide, self.x, others.x),
            torch.where(wide, self.gradient, others.gradient),
            torch.where(chosen, self.loss, others.loss),
            torch.where(chosen, self.objective, others.objective),
        )


@dataclass(frozen=True)
class Solution:
    """The best point of a run, and its history."""

    x: torch.Tensor  # [H, d]
    gradient: torch.Tensor  # [H, d], of the loss at x
    objective: float
    loss: float
    first_gradient: torch.Tensor  # [H, d], of the loss at the start
    history: list[Step]
    stopped: str | None  # why the run ended before its budget, or None
    finished: bool  # not interrupted, and everything finite


# x [A, H, d] and the numbers of their runs -> losses [A], gradients [A, H, d], and a function that gives the end of
# the message on a run whose values are not finite.
Evaluate = Callable[[torch.Tensor, list[int]], tuple[torch.Tensor, torch.Tensor, Callable[[int], str]]]

# An optimiser yields x to evaluate [R, H, d] and the runs without further progress [R]; it is sent the Points at x.
Optimizer = Generator[tuple[torch.Tensor, torch.Tensor], Points, None]


def minimise(
    evaluate: Evaluate,
    start: torch.Tensor,
    penalty: Penalty,
    budget: int,
    optimizer: OptimizerName = "prox",
    lr: float | torch.Tensor = 0.05,
    tolerance: float | None = None,
    on_steps: Callable[[dict[int, Step]], bool | None] = lambda steps: None,
) -> list[Solution]:
    """Run all rows of `start` [R, H, d] to their ends, each round's points evaluated together.

    Args:
        budget: evaluations of each run; spent exactly, unless a tolerance or a lack of precision ends it before.
        lr: Adam's learning rate, a number or [R, 1, 1]; `prox` finds its own step sizes.
        tolerance: a run ends when the stationarity residual at its best point is at most this share of the first.
        on_steps: called after each round with {run: its step}; True ends all runs, which are then finished.

    Raises:
        NotFinite: when a value was not finite, which ends its run and no other. Has the solutions of all runs.
        Interrupted: on Ctrl-C after the first evaluation. Has the solutions so far of all runs.
        WorkFailed: when the start of a run could not be evaluated.
    """
    history: list[list[Step]] = [[] for _ in start]
    stopped: dict[int, str] = {}
    unfinished: dict[int, str] = {}
    interrupted = False
    active = list(range(len(start)))
    nothing = torch.full((len(start),), math.inf, dtype=torch.float64)
    best = Points(start, torch.zeros_like(start), nothing, nothing)
    first = best
    x, steps, residual = start, None, None
    try:
        for count in range(1, budget + 1):
            losses, gradients, culprit = evaluate(x[active], active)
            finite = torch.isfinite(losses) & torch.isfinite(gradients).flatten(1).all(1)
            for run, fine in zip(active, finite.tolist(), strict=True):
                if not fine:
                    unfinished[run] = f"loss or gradient not finite at evaluation {count}{culprit(run)}"
            if count == 1 and unfinished:
                raise WorkFailed(f"training failed at the start: {next(iter(unfinished.values()))}")
            kept = [run for run in active if run not in unfinished]
            # The rows of runs that have ended stay in the tensors, unread.
            loss, gradient = nothing.clone(), torch.zeros_like(start)
            loss[kept], gradient[kept] = losses[finite].double(), gradients[finite]
            penalties = penalty.value(x).double()
            point = Points(x, gradient, loss, loss + penalties)
            best = point.where(point.objective < best.objective, best)
            facts = _facts(point, penalties, kept)
            done = {run: Step(count, *values) for run, values in zip(kept, facts, strict=True)}
            for run, step in done.items():
                history[run].append(step)
            if count == 1:
                first = point
            if on_steps(done):
                stopped |= dict.fromkeys(kept, f"ended by its caller after {count} evaluations")
                break
            if steps is None:
                steps = _prox(penalty, point) if optimizer == "prox" else _adam(penalty, point, lr)
                x, stuck = next(steps)
            else:
                x, stuck = steps.send(point)
            ended = {"no further progress in float32": stuck}
            if tolerance is not None:
                found = penalty.stationarity(point.x, point.gradient)
                residual = found if residual is None else residual
                ended["stationary"] = (found <= tolerance * residual) & (point.objective == best.objective)
            for why, which in ended.items():
                stopped |= {run: f"{why} after {count} evaluations" for run in kept if which[run]}
            active = [run for run in kept if run not in stopped]
            if not active:
                break
    except KeyboardInterrupt:
        if steps is None:
            raise
        interrupted = True
        ends = stopped | unfinished
        unfinished |= {run: f"interrupted after {len(history[run])} evaluations" for run in active if run not in ends}
    solutions = [
        Solution(
            best.x[run],
            best.gradient[run],
            float(best.objective[run]),
            float(best.loss[run]),
            first.gradient[run],
            taken,
            (stopped | unfinished).get(run),
            run not in unfinished,
        )
        for run, taken in enumerate(history)
    ]
    if interrupted:
        raise Interrupted(f"interrupted after {max(map(len, history))} evaluations", solutions)
    if unfinished:
        raise NotFinite(next(iter(unfinished.values())), solutions)
    return solutions


def _facts(points: Points, penalties: torch.Tensor, runs: list[int]) -> list[tuple[float, float, float, int, int]]:
    """The measurements that a Step records of a point, for some runs."""
    nonzero = points.x.ne(0)
    columns = points.objective, points.loss, penalties, nonzero.sum((1, 2)), nonzero.any(2).sum(1)
    return list(zip(*(column[runs].tolist() for column in columns), strict=True))


def _prox(penalty: Penalty, point: Points) -> Optimizer:
    """Proximal gradient with long Barzilai-Borwein steps and a line search over the last RECENT objectives (SpaRSA:
    Wright, Nowak & Figueiredo 2009). Every iterate is the output of the proximal operator, so zeros are exact.

    On real models the long step <s, s> / <s, y> (Barzilai & Borwein 1988, eq. 5) goes lower in the objective, and in
    the loss of other words, than the short one <s, y> / <y, y>: `benchmarks/real_optimisers.py`.
    """
    # The first step has length one, or a share of the start's length. After it the curvature sets the size.
    length = (FIRST_SHARE * point.x.norm(dim=(1, 2)).double()).clamp_min(1)
    step = length / point.gradient.norm(dim=(1, 2)).double().clamp_min(1e-12)
    recent = point.objective.unsqueeze(1).repeat(1, RECENT)
    while True:
        wide = step.to(point.x.dtype).view(-1, 1, 1)
        x = penalty.prox(point.x - wide * point.gradient, wide)
        trial = yield x, (x == point.x).flatten(1).all(1)
        moved, change = trial.x - point.x, trial.gradient - point.gradient
        square, curvature = moved.square().sum((1, 2)).double(), (moved * change).sum((1, 2)).double()
        accepted = trial.objective <= recent.amax(1) - 1e-4 / (2 * step) * square
        long = torch.where(curvature > 1e-12 * square, square / curvature.clamp_min(1e-30), GROWTH * step)
        step = torch.where(accepted, long.clamp(1e-8, 1e8), step / 2)
        later = torch.cat([recent[:, 1:], trial.objective.unsqueeze(1)], 1)
        recent = torch.where(accepted.unsqueeze(1), later, recent)
        point = trial.where(accepted, point)


def _adam(penalty: Penalty, point: Points, lr: float | torch.Tensor) -> Optimizer:
    """Adam (Kingma & Ba 2015) on one subgradient of the objective. Never gives exact zeros."""
    mean, square = torch.zeros_like(point.x), torch.zeros_like(point.x)
    nobody = torch.zeros(len(point.x), dtype=torch.bool)
    for count in itertools.count(1):
        gradient = point.gradient + penalty.subgradient(point.x)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient.square()
        update = (mean / (1 - 0.9**count)) / ((square / (1 - 0.999**count)).sqrt() + 1e-8)
        point = yield point.x - lr * update, nobody
