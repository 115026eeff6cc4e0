"""The sparse group lasso: its proximal operator and its certificate, against numerical minimisers and projections."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize

from laai_core.penalty import Penalty, critical_penalty

CASES = [(0.0, 0.0), (0.3, 0.0), (0.0, 0.4), (0.3, 0.4), (0.02, 1.5), (5.0, 5.0)]


def value(x: np.ndarray, l1: float, group: float) -> float:
    """The definition, row by row."""
    return sum(l1 * sum(abs(v) for v in row) + group * math.sqrt(sum(v * v for v in row)) for row in x)


def project_on_box_plus_ball(point: np.ndarray, box: float, ball: float, rounds: int = 20_000) -> np.ndarray:
    """The nearest point of {u + v: |u|_inf <= box, |v|_2 <= ball}, by minimising over u and v in turn."""
    v = np.zeros_like(point)
    for _ in range(rounds):
        u = np.clip(point - v, -box, box)
        rest = point - u
        norm = np.linalg.norm(rest)
        after = rest if norm <= ball else rest * (ball / norm)
        if np.array_equal(after, v):
            break
        v = after
    return u + v


def distance_to_subdifferential(x: np.ndarray, gradient: np.ndarray, l1: float, group: float) -> float:
    """|-gradient - nearest subgradient|, each row by itself."""
    total = 0.0
    for row, g in zip(x, gradient, strict=True):
        if not row.any():
            nearest = project_on_box_plus_ball(-g, l1, group)
        else:
            centre = group * row / np.linalg.norm(row)
            low = centre + np.where(row == 0, -l1, l1 * np.sign(row))
            high = centre + np.where(row == 0, l1, l1 * np.sign(row))
            nearest = np.clip(-g, low, high)
        total += float(((-g - nearest) ** 2).sum())
    return math.sqrt(total)


def draw(seed: int, shape=(4, 3), sparse: bool = False) -> np.ndarray:
    generator = np.random.default_rng(seed)
    x = generator.normal(size=shape)
    if sparse:
        x *= generator.random(shape) < 0.6
        x[1] = 0
    return x


@pytest.mark.parametrize(("l1", "group"), CASES)
@pytest.mark.parametrize("sparse", [False, True])
def test_value_by_definition(l1, group, sparse):
    x = draw(0, sparse=sparse)
    assert float(Penalty(l1, group).value(torch.tensor(x))) == pytest.approx(value(x, l1, group), abs=1e-12)


# --- the proximal operator


@pytest.mark.parametrize(("l1", "group"), CASES)
@pytest.mark.parametrize("step", [0.1, 1.0, 3.0])
def test_prox_against_a_numerical_minimiser(l1, group, step):
    for seed in range(3):
        x = draw(seed, (2, 2))

        def goal(z, x=x):
            z = z.reshape(x.shape)
            return ((z - x) ** 2).sum() / (2 * step) + value(z, l1, group)

        z = Penalty(l1, group).prox(torch.tensor(x), step).numpy()
        starts = [x, np.zeros_like(x), z + 0.01]
        options = {"xtol": 1e-10, "ftol": 1e-14, "maxiter": 10_000}
        found = [minimize(goal, start.ravel(), method="Powell", options=options) for start in starts]
        best = min(found, key=lambda result: result.fun)
        assert goal(z) <= best.fun + 1e-9
        # The goal is strongly convex, so a low value is a near point.
        assert ((best.x.reshape(x.shape) - z) ** 2).sum() <= 2 * step * (best.fun - goal(z)) + 1e-9


@pytest.mark.parametrize(("l1", "group"), CASES)
def test_prox_against_a_projection(l1, group):
    """Moreau: x - prox(x) is the projection on step * (box + ball)."""
    step = 0.7
    for seed in range(5):
        x = draw(seed, (3, 6))
        expected = np.stack([row - project_on_box_plus_ball(row, step * l1, step * group) for row in x])
        assert Penalty(l1, group).prox(torch.tensor(x), step).numpy() == pytest.approx(expected, abs=1e-9)


def test_prox_by_hand():
    penalty = Penalty(l1=1.0, group=2.5)
    x = torch.tensor([[4.0, -5.0], [3.5, 0.5], [1.0, -0.5], [0.0, 0.0]])
    # Soft thresholds: (3, -4), norm 5, halved; (2.5, 0), norm 2.5, gone; nothing left; nothing there.
    assert penalty.prox(x, 1.0).tolist() == [[1.5, -2.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prox_at_the_extremes(dtype):
    for scale in (0.0, 1e-45, 1e-30, 1e30):
        x = torch.tensor([[scale, -scale], [1.0, 0.0]], dtype=dtype)
        for penalty in (Penalty(0.0, 0.0), Penalty(0.0, 0.5), Penalty(0.5, 0.0), Penalty(0.5, 0.5)):
            z = penalty.prox(x, 1.0)
            assert z.dtype == dtype
            assert torch.isfinite(z).all()
            assert (z.abs() <= x.abs()).all()
    assert torch.equal(Penalty(0.0, 0.0).prox(x, 1.0), x)


@given(st.integers(0, 10_000), st.sampled_from(CASES), st.floats(0.01, 10))
def test_prox_is_nonexpansive_and_odd(seed, case, step):
    x, y = torch.tensor(draw(seed)), torch.tensor(draw(seed + 1))
    penalty = Penalty(*case)
    a, b = penalty.prox(x, step), penalty.prox(y, step)
    assert float((a - b).norm()) <= float((x - y).norm()) + 1e-12
    assert torch.equal(penalty.prox(-x, step), -a)


# --- the subgradient


@pytest.mark.parametrize(("l1", "group"), CASES)
def test_subgradient_inequality(l1, group):
    """value(y) >= value(x) + <s, y - x> for every y is what makes s a subgradient."""
    x = draw(3, sparse=True)
    s = Penalty(l1, group).subgradient(torch.tensor(x)).numpy()
    for seed in range(200):
        y = x + 10.0 ** np.random.default_rng(seed).uniform(-3, 1) * draw(seed + 50)
        assert value(y, l1, group) >= value(x, l1, group) + (s * (y - x)).sum() - 1e-12


# --- stationarity


@pytest.mark.parametrize(("l1", "group"), CASES)
@pytest.mark.parametrize("size", [0.1, 1.0, 4.0])
def test_stationarity_is_the_distance_to_the_subdifferential(l1, group, size):
    for seed in range(5):
        x, gradient = draw(seed, (5, 3), sparse=True), size * draw(seed + 100, (5, 3))
        expected = distance_to_subdifferential(x, gradient, l1, group)
        found = Penalty(l1, group).stationarity(torch.tensor(x), torch.tensor(gradient))
        assert found == pytest.approx(expected, abs=1e-6)


def test_stationarity_without_penalty_is_the_gradient():
    x, gradient = torch.tensor(draw(0, sparse=True)), torch.tensor(draw(1))
    assert Penalty(0.0, 0.0).stationarity(x, gradient) == pytest.approx(float(gradient.norm()))


@pytest.mark.parametrize(
    ("x", "gradient"),
    [
        # l1 = 1, group = 2.5: at (1.5, -2) the subdifferential is the point (1, -1) + 2.5 (0.6, -0.8) = (2.5, -3).
        ([1.5, -2.0], [-2.5, 3.0]),
        # At (2, 0): 1 + 2.5 in the first coordinate, anything within 1 in the second.
        ([2.0, 0.0], [-3.5, 1.0]),
        ([2.0, 0.0], [-3.5, -0.3]),
        # At 0: the box of 1 plus the ball of 2.5; (1 + 1.5, 1 + 2) is on its edge, (3.5, 0) too.
        ([0.0, 0.0], [-2.5, 3.0]),
        ([0.0, 0.0], [3.5, 0.0]),
        ([0.0, 0.0], [0.2, 0.9]),
    ],
)
def test_stationarity_is_zero_at_known_optima(x, gradient):
    assert Penalty(1.0, 2.5).stationarity(torch.tensor([x]), torch.tensor([gradient])) == 0.0
    moved = torch.tensor([gradient]) * 1.5 + torch.tensor([[0.0, 4.0]]) * torch.tensor([gradient]).sign()
    assert Penalty(1.0, 2.5).stationarity(torch.tensor([x]), moved) > 0.5


@pytest.mark.parametrize(("l1", "group"), CASES)
def test_stationarity_is_zero_at_the_minimum_of_a_quadratic(l1, group):
    """The minimum of |x - a|^2 / 2 + penalty, found here by projection, has gradient x - a."""
    a = draw(7, (6, 4))
    x = np.stack([row - project_on_box_plus_ball(row, l1, group) for row in a])
    x[np.abs(x) < 1e-12] = 0
    assert Penalty(l1, group).stationarity(torch.tensor(x), torch.tensor(x - a)) < 1e-6


# --- the critical penalty


@pytest.mark.parametrize("seed", range(5))
def test_critical_penalty_by_definition(seed):
    gradient = draw(seed, (4, 6))
    p = float(critical_penalty(torch.tensor(gradient)))
    zero = np.zeros_like(gradient)
    assert distance_to_subdifferential(zero, gradient, p * 1.001, p * 1.001) < 1e-9
    assert distance_to_subdifferential(zero, gradient, p * 0.999, p * 0.999) > 1e-5

    def excess(row, q):
        return np.linalg.norm(np.maximum(np.abs(row) - q, 0)) - q

    roots = [brentq(lambda q, row=row: excess(row, q), 0, np.abs(row).max(), xtol=1e-14) for row in gradient]
    assert p == pytest.approx(max(roots), rel=1e-9)


def test_several_penalties_at_once():
    """[R, 1, 1] of them for [R, H, d]: what one at a time gives."""
    x, gradient = (
        torch.stack([torch.tensor(draw(seed, sparse=True)) for seed in seeds]) for seeds in (range(3), (3, 4, 5))
    )
    l1, group, step = torch.tensor([(0.0, 0.3, 0.7), (0.5, 0.0, 0.2), (0.1, 1.0, 2.0)], dtype=x.dtype).view(3, 3, 1, 1)
    many = Penalty(l1, group)
    for row in range(3):
        one = Penalty(float(l1[row]), float(group[row]))
        assert torch.allclose(many.value(x)[row], one.value(x[row]))
        assert torch.allclose(many.prox(x, step)[row], one.prox(x[row], float(step[row])))
        assert torch.allclose(many.subgradient(x)[row], one.subgradient(x[row]))
        assert torch.allclose(many.stationarity(x, gradient)[row], one.stationarity(x[row], gradient[row]))
        assert torch.allclose(critical_penalty(gradient)[row], critical_penalty(gradient[row]))


def test_critical_penalty_of_one_coordinate_and_of_nothing():
    # |g| - p = p: half the gradient.
    assert critical_penalty(torch.tensor([[0.0, -3.0, 0.0]])) == pytest.approx(1.5, rel=1e-6)
    assert critical_penalty(torch.zeros(2, 3)) == 0.0


def test_at_the_critical_penalty_zero_is_stationary_in_float32():
    gradient = torch.tensor(draw(11, (8, 16)), dtype=torch.float32)
    p = critical_penalty(gradient)
    assert Penalty(p, p).stationarity(torch.zeros(8, 16), gradient) == 0.0
    assert Penalty(0.99 * p, 0.99 * p).stationarity(torch.zeros(8, 16), gradient) > 0.0
