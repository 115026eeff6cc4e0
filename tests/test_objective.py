"""The task losses against SciPy, and the smoothing of human distributions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import entropy

from laai_core import Example, LaaiError
from laai_core.objective import LOSSES, SMOOTHING, Objective, smoothed


def survey(*distributions) -> list[Example]:
    return [
        Example(prompt=f"Q{i}", options=[f" {k}" for k in range(len(pi))], distribution=pi)
        for i, pi in enumerate(distributions)
    ]


def test_nll_is_minus_the_log_probability():
    objective = Objective([Example(prompt="a", target=" b"), Example(prompt="c", target=" d")])
    assert objective.name == "nll"
    assert objective.per_example(torch.tensor([-1.5, -0.25])).tolist() == [1.5, 0.25]


def test_kl_against_scipy_with_different_numbers_of_options():
    distributions = [[0.5, 0.5], [0.1, 0.2, 0.7], [0.25, 0.25, 0.25, 0.25]]
    scores = np.random.default_rng(0).normal(size=9) * 3 - 5
    objective = Objective(survey(*distributions))
    assert objective.name == "kl"
    expected, start = [], 0
    for pi in distributions:
        mixed = (1 - 1e-4) * np.array(pi) + 1e-4 / len(pi)
        expected.append(entropy(softmax(scores[start : start + len(pi)]), mixed))
        start += len(pi)
    assert objective.per_example(torch.tensor(scores)).numpy() == pytest.approx(expected, rel=1e-5)


def test_kl_does_not_see_the_mass_outside_the_options():
    objective = Objective(survey([0.3, 0.7]))
    scores = torch.tensor([-2.0, -1.0])
    near = objective.per_example(scores)
    assert objective.per_example(scores - 30).tolist() == pytest.approx(near.tolist(), rel=1e-4)


def test_kl_is_zero_only_at_the_smoothed_distribution():
    pi = [0.0, 0.2, 0.8]
    objective = Objective(survey(pi))
    at_pi = torch.tensor([(1 - 1e-4) * p + 1e-4 / 3 for p in pi]).log()
    assert float(objective.per_example(at_pi)) == pytest.approx(0, abs=1e-6)
    assert float(objective.per_example(at_pi + torch.tensor([0.0, 1.0, 0.0]))) > 0.05


def test_kl_of_certainty_where_nobody_answered_is_finite_and_known():
    """p = (1, 0), pi = (0, 1): KL = -log(eps / 2)."""
    loss = Objective(survey([0.0, 1.0])).per_example(torch.tensor([0.0, -1e4]))
    assert float(loss) == pytest.approx(-np.log(1e-4 / 2), rel=1e-5)


def test_kl_gradient_against_finite_differences():
    distributions = [[0.0, 0.4, 0.6], [0.9, 0.1]]
    objective = Objective(survey(*distributions))
    scores = np.random.default_rng(1).normal(size=5)

    def total(values: np.ndarray) -> float:
        parts = []
        for part, pi in ((values[:3], distributions[0]), (values[3:], distributions[1])):
            log_p = log_softmax(part)
            parts.append((np.exp(log_p) * (log_p - np.log((1 - 1e-4) * np.array(pi) + 1e-4 / len(pi)))).sum())
        return sum(parts)

    x = torch.tensor(scores, requires_grad=True)
    objective.per_example(x).sum().backward()
    steps = 1e-5 * np.eye(5)
    expected = [(total(scores + e) - total(scores - e)) / 2e-5 for e in steps]
    assert x.grad.numpy() == pytest.approx(np.array(expected), abs=1e-5)


def test_smoothing():
    assert SMOOTHING == 1e-4
    assert smoothed([0.0, 1.0]) == pytest.approx([0.00005, 0.99995], rel=1e-12)
    assert sum(smoothed([0.2, 0.3, 0.5])) == pytest.approx(1)
    assert smoothed([0.25] * 4) == pytest.approx([0.25] * 4)


def test_names_and_mixtures():
    assert LOSSES == ("nll", "kl")
    with pytest.raises(LaaiError, match="mix"):
        Objective([Example(prompt="a", target=" b"), *survey([0.5, 0.5])])
    with pytest.raises(LaaiError):
        Objective([])
