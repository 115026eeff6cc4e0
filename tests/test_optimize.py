"""The optimisers on convex problems whose minimum is known from twenty thousand plain proximal steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from laai_core import LaaiError
from laai_core.errors import Interrupted, NotFinite, WorkFailed
from laai_core.optimize import OPTIMIZERS, minimise
from laai_core.penalty import Penalty

SHAPE = (4, 3)
PENALTIES = [(0.0, 0.0), (0.3, 0.0), (0.0, 1.5), (0.2, 0.3)]


class Quadratic:
    """(x - a)' Q (x - a) / 2 with condition number 100; counts how often it is asked."""

    def __init__(self, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        basis, _ = np.linalg.qr(generator.normal(size=(12, 12)))
        self.q = basis @ np.diag(np.geomspace(0.05, 5, 12)) @ basis.T
        self.a = generator.normal(size=12) * 2
        self.calls = 0

    def loss(self, x: np.ndarray) -> float:
        return float((x.ravel() - self.a) @ self.q @ (x.ravel() - self.a) / 2)

    def gradient(self, x: np.ndarray) -> np.ndarray:
        return (self.q @ (x.ravel() - self.a)).reshape(SHAPE)

    def __call__(self, x: torch.Tensor) -> tuple[float, torch.Tensor]:
        self.calls += 1
        point = x.double().numpy()
        return self.loss(point), torch.tensor(self.gradient(point), dtype=x.dtype)

    def objective(self, x: np.ndarray, l1: float, group: float) -> float:
        return self.loss(x) + l1 * np.abs(x).sum() + group * np.linalg.norm(x, axis=1).sum()

    def minimum(self, l1: float, group: float) -> np.ndarray:
        """Plain ISTA in float64, as slow as it is simple."""
        step, x = 1 / 5, np.zeros(SHAPE)
        for _ in range(20_000):
            z = x - step * self.gradient(x)
            z = np.sign(z) * np.maximum(np.abs(z) - step * l1, 0)
            for h in range(len(z)):
                norm = math.sqrt((z[h] ** 2).sum())
                z[h] = 0 if norm <= step * group else z[h] * (1 - step * group / norm)
            x = z
        return x


@pytest.fixture(scope="module")
def minima() -> dict[tuple[float, float], np.ndarray]:
    return {case: Quadratic().minimum(*case) for case in PENALTIES}


def one(evaluate):
    """A function of one x as `minimise` wants it."""

    def evaluation(x, active):
        loss, gradient = evaluate(x[0])
        return torch.tensor([loss], dtype=torch.float64), gradient.unsqueeze(0), lambda run: ""

    return evaluation


def solve(evaluate, case=(0.2, 0.3), budget=200, *options, start=None, **more):
    start = torch.zeros(SHAPE) if start is None else start
    (solution,) = minimise(one(evaluate), start.unsqueeze(0), Penalty(*case), budget, *options, **more)
    return solution


@pytest.mark.parametrize("case", PENALTIES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_prox_reaches_the_minimum_at_any_scale(case, scale, minima):
    """The problem in other units: x' = scale * x. Neither a step size nor a tolerance is given."""
    quadratic = Quadratic()

    def evaluate(x):
        loss, gradient = quadratic(x / scale)
        return loss, gradient / scale

    best = solve(evaluate, (case[0] / scale, case[1] / scale), 300)
    x = best.x.double().numpy() / scale
    reference = quadratic.objective(minima[case], *case)
    assert best.objective == pytest.approx(quadratic.objective(x, *case), rel=1e-5)
    assert reference - 1e-6 <= best.objective <= reference + 1e-4 * abs(reference) + 1e-6
    assert x == pytest.approx(minima[case], abs=0.02)


@pytest.mark.parametrize("case", PENALTIES[1:])
def test_prox_has_exactly_the_zeros_of_the_minimum(case, minima):
    best = solve(Quadratic(), case, 400)
    zeros = minima[case] == 0
    assert zeros.any()  # or the test shows nothing
    assert np.array_equal(best.x.numpy() == 0, zeros)
    last = best.history[-1]
    assert last.nonzero == (~zeros).sum()
    assert last.active_heads == (~zeros).any(axis=1).sum()


def test_prox_certifies_its_minimum():
    best = solve(Quadratic(), (0.2, 0.3), 400)
    at_zero = Penalty(0.2, 0.3).stationarity(torch.zeros(SHAPE), Quadratic()(torch.zeros(SHAPE))[1])
    assert Penalty(0.2, 0.3).stationarity(best.x, best.gradient) < at_zero / 1000


@pytest.mark.parametrize("case", PENALTIES)
def test_adam_comes_close_to_the_minimum(case, minima):
    best = solve(Quadratic(), case, 1000, "adam", lr=0.03)
    reference = Quadratic().objective(minima[case], *case)
    assert reference - 1e-6 <= best.objective <= reference + 0.02 * abs(reference) + 1e-3


def test_adam_against_pytorch():
    """Without penalty it is torch.optim.Adam, step by step."""
    quadratic = Quadratic()
    seen = []

    def evaluate(x):
        seen.append(x.clone())
        return quadratic(x)

    solve(evaluate, (0.0, 0.0), 50, "adam", lr=0.1)
    x = torch.zeros(SHAPE, requires_grad=True)
    peer = torch.optim.Adam([x], lr=0.1)
    for point in seen:
        assert torch.allclose(point, x.detach(), atol=1e-4)
        x.grad = quadratic(x.detach())[1]
        peer.step()


@pytest.mark.parametrize("budget", [20, 60])
def test_prox_is_no_worse_than_adam_at_equal_work(budget):
    for seed in range(3):
        prox = solve(Quadratic(seed), budget=budget)
        for lr in (0.01, 0.05, 0.2):
            adam = solve(Quadratic(seed), budget=budget, optimizer="adam", lr=lr)
            assert prox.objective <= adam.objective + 1e-5


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("budget", [1, 2, 7, 40])
def test_the_budget_is_spent_exactly(optimizer, budget):
    quadratic = Quadratic()
    best = solve(quadratic, budget=budget, optimizer=optimizer)
    assert quadratic.calls == len(best.history) == budget
    assert [step.evaluation for step in best.history] == list(range(1, budget + 1))
    assert best.stopped is None


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_history_is_what_was_evaluated(optimizer):
    points = []
    quadratic = Quadratic()

    def evaluate(x):
        points.append(x.double().numpy())
        return quadratic(x)

    reported = []
    best = solve(evaluate, (0.2, 0.3), 30, optimizer, on_steps=reported.append)
    assert reported == [{0: step} for step in best.history]
    assert not points[0].any()  # the start is evaluated too
    for x, step in zip(points, best.history, strict=True):
        assert step.loss == pytest.approx(quadratic.loss(x))
        assert step.penalty == pytest.approx(quadratic.objective(x, 0.2, 0.3) - quadratic.loss(x), abs=1e-5)
        assert step.objective == pytest.approx(step.loss + step.penalty)
        assert step.nonzero == np.count_nonzero(x)
        assert step.active_heads == sum(row.any() for row in x)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_best_point_is_returned_not_the_last(optimizer):
    """Adam with a large step overshoots; a loss that lies after the fifth evaluation misleads either."""
    quadratic = Quadratic()

    def evaluate(x):
        loss, gradient = quadratic(x)
        return (loss, gradient) if quadratic.calls <= 5 else (loss + 1000, gradient)

    best = solve(evaluate, budget=12, optimizer=optimizer, lr=0.3)
    objectives = [step.objective for step in best.history]
    assert objectives[-1] > min(objectives)
    assert best.objective == min(objectives)
    assert best.objective == pytest.approx(quadratic.objective(best.x.double().numpy(), 0.2, 0.3), rel=1e-5)
    assert best.gradient.double().numpy() == pytest.approx(quadratic.gradient(best.x.double().numpy()), abs=1e-4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_tolerance_stops_early_and_is_kept(optimizer):
    quadratic = Quadratic()
    points = []

    def evaluate(x):
        points.append(x)
        return quadratic(x)

    best = solve(evaluate, budget=5000, optimizer=optimizer, tolerance=0.2)
    assert len(best.history) < 1000
    assert best.stopped is not None
    residuals = [Penalty(0.2, 0.3).stationarity(x, quadratic(x)[1]) for x in (points[0], points[-1])]
    assert residuals[1] <= 0.2 * residuals[0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("bad", ["loss nan", "loss inf", "gradient nan", "gradient inf"])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_best(optimizer, bad):
    quadratic = Quadratic()
    where, number = bad.split()

    def evaluate(x):
        loss, gradient = quadratic(x)
        if quadratic.calls == 4:
            if where == "loss":
                return float(number), gradient
            gradient[1, 2] = float(number)
        return loss, gradient

    with pytest.raises(NotFinite, match="not finite at evaluation 4") as stopped:
        solve(evaluate, budget=50, optimizer=optimizer)
    (best,) = stopped.value.results
    assert not best.finished
    assert quadratic.calls == 4
    assert len(best.history) == 3
    assert "evaluation 4" in best.stopped
    assert best.objective == min(step.objective for step in best.history)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_finite_at_all_is_an_error(optimizer):
    with pytest.raises(LaaiError, match="not finite at evaluation 1"):
        solve(lambda x: (math.nan, torch.zeros(SHAPE)), optimizer=optimizer)


def test_prox_stays_at_zero_where_zero_is_the_minimum():
    best = solve(Quadratic(), (50.0, 50.0), 20)
    assert not best.x.any()
    assert all(step.nonzero == 0 for step in best.history)


def test_prox_survives_a_loss_that_is_not_convex():
    """cos has many minima and negative curvature; the result must be stationary."""

    def evaluate(x):
        return float((torch.cos(3 * x) + 0.05 * x.square()).sum()), -3 * torch.sin(3 * x) + 0.1 * x

    start = torch.linspace(-2, 2, 12).view(SHAPE)
    best = solve(evaluate, (0.05, 0.05), 200, start=start)
    assert best.objective < best.history[0].objective
    assert Penalty(0.05, 0.05).stationarity(best.x, best.gradient) < 1e-3


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_runs_of_one_batch_are_those_of_separate_ones(optimizer):
    """Other problems, penalties, rates and starts side by side; a run that ends is no longer asked about."""
    cases = [(0.2, 0.3), (0.05, 0.0), (50.0, 50.0)]
    rates = [0.05, 0.2, 0.01]
    start = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    rounds = []

    def evaluate(x, active):
        rounds.append(list(active))
        losses, gradients = zip(*(Quadratic(run)(one) for run, one in zip(active, x, strict=True)), strict=True)
        return torch.tensor(losses, dtype=torch.float64), torch.stack(gradients), lambda run: ""

    l1, group = torch.tensor(cases).T.reshape(2, 3, 1, 1)
    together = minimise(evaluate, start, Penalty(l1, group), 60, optimizer, torch.tensor(rates).view(3, 1, 1), 0.02)
    for run, found in enumerate(together):
        alone = solve(Quadratic(run), cases[run], 60, optimizer, rates[run], 0.02, start=start[run])
        assert len(found.history) == len(alone.history) and found.stopped == alone.stopped
        assert found.objective == pytest.approx(alone.objective, rel=1e-5)
        assert torch.allclose(found.x, alone.x, atol=1e-4)
    assert rounds[0] == [0, 1, 2]
    assert sum(map(len, rounds)) == sum(len(found.history) for found in together)
    assert len(rounds) == max(len(found.history) for found in together)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_interrupt_keeps_the_best_so_far(optimizer):
    quadratic = Quadratic()

    def evaluate(x):
        if quadratic.calls == 6:
            raise KeyboardInterrupt
        return quadratic(x)

    with pytest.raises(Interrupted, match="^interrupted after 6 evaluations$") as stopped:
        solve(evaluate, budget=50, optimizer=optimizer)
    (best,) = stopped.value.results
    assert best.stopped == "interrupted after 6 evaluations" and not best.finished
    assert best.objective == min(step.objective for step in best.history)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_caller_may_end_all_runs(optimizer):
    """They are finished, and what they came to is what a budget of as many evaluations gives."""
    quadratic = Quadratic()
    best = solve(quadratic, budget=50, optimizer=optimizer, on_steps=lambda steps: steps[0].evaluation == 7)
    assert quadratic.calls == len(best.history) == 7
    assert best.finished and best.stopped == "ended by its caller after 7 evaluations"
    same = solve(Quadratic(), budget=7, optimizer=optimizer)
    assert (best.history, best.objective) == (same.history, same.objective)


def test_an_interrupt_before_anything_was_evaluated_has_nothing_to_keep():
    def evaluate(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        solve(evaluate)
    assert not isinstance(stopped.value, Interrupted)


def test_a_start_that_is_not_finite_costs_one_evaluation():
    """Whatever the other runs would find, there is no result to return for this one."""
    evaluated = []

    def evaluate(x, active):
        evaluated.append(active)
        return torch.tensor([1.0, math.nan], dtype=torch.float64), torch.zeros(2, *SHAPE), lambda run: ""

    with pytest.raises(WorkFailed, match="failed at the start: .*not finite at evaluation 1"):
        minimise(evaluate, torch.zeros(2, *SHAPE), Penalty(0.05, 0.05), 20)
    assert evaluated == [[0, 1]]


def test_a_run_that_is_not_finite_leaves_the_others_as_they_are_alone():
    """And those that ended by themselves are told from those that did not."""
    start = torch.zeros(2, *SHAPE)

    def evaluate(x, active):
        losses, gradients = zip(*(Quadratic(run)(one) for run, one in zip(active, x, strict=True)), strict=True)
        losses = [
            math.nan if run == 0 and one.any() else loss for run, one, loss in zip(active, x, losses, strict=True)
        ]
        return torch.tensor(losses, dtype=torch.float64), torch.stack(gradients), lambda run: f" (run {run})"

    with pytest.raises(NotFinite, match=r"not finite at evaluation 2 \(run 0\)") as stopped:
        minimise(evaluate, start, Penalty(0.05, 0.05), 300, "prox", 0.05, 1e-3)
    failed, fine = stopped.value.results
    assert (failed.finished, len(failed.history)) == (False, 1)
    assert fine.finished and "stationary" in fine.stopped
    alone = solve(Quadratic(1), (0.05, 0.05), 300, "prox", 0.05, 1e-3)
    assert fine.objective == pytest.approx(alone.objective, rel=1e-6)
