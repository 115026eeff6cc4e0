"""The sparse group lasso, gamma * |x|_1 + lambda * sum over heads of |x_h|_2 (paper eq. 2), on x [H, d]."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Penalty:
    """`l1` is the paper's gamma, `group` its lambda. Rows of x are the groups."""

    l1: float
    group: float

    def value(self, x: torch.Tensor) -> torch.Tensor:
        """The penalty, a scalar."""
        return self.l1 * x.abs().sum() + self.group * x.norm(dim=1).sum()

    def prox(self, x: torch.Tensor, step: float) -> torch.Tensor:
        """argmin_z |z - x|^2 / (2 step) + penalty(z): soft threshold, then shrink each row. Gives exact zeros."""
        z = soft_threshold(x, step * self.l1)
        norms = z.norm(dim=1, keepdim=True)
        return z * (1 - step * self.group / norms.clamp_min(torch.finfo(x.dtype).tiny)).clamp_min(0)

    def subgradient(self, x: torch.Tensor) -> torch.Tensor:
        """One subgradient: zero where the penalty has a kink."""
        norms = x.norm(dim=1, keepdim=True)
        return self.l1 * x.sign() + self.group * torch.where(norms > 0, x / norms.clamp_min(1e-30), 0.0)

    def stationarity(self, x: torch.Tensor, gradient: torch.Tensor) -> float:
        """Distance from -gradient (of the smooth loss, at x) to the subdifferential at x: 0 at a minimum.

        In a row that is zero the subdifferential is the box [-l1, l1]^d plus the ball of radius `group`. In any
        other row it is a point, but for the coordinates that are zero, which are free within [-l1, l1].
        """
        norms = x.norm(dim=1, keepdim=True)
        at_kink = soft_threshold(gradient, self.l1)
        dead_rows = (at_kink.norm(dim=1) - self.group).clamp_min(0)
        smooth = gradient + self.l1 * x.sign() + self.group * x / norms.clamp_min(1e-30)
        live_rows = torch.where(x == 0, at_kink, smooth).norm(dim=1)
        return float(torch.where(norms.squeeze(1) == 0, dead_rows, live_rows).norm())


def soft_threshold(x: torch.Tensor, threshold: float) -> torch.Tensor:
    """x moved towards zero by `threshold`, and no further than zero."""
    return x.sign() * (x.abs() - threshold).clamp_min(0)


def critical_penalty(gradient: torch.Tensor) -> float:
    """The smallest p for which x = 0 is stationary under l1 = group = p, given the loss's gradient [H, d] at 0."""
    low, high = 0.0, float(gradient.abs().max())
    for _ in range(60):  # bisection: the condition |soft(g_h, p)| <= p is monotone in p
        middle = (low + high) / 2
        if float(soft_threshold(gradient, middle).norm(dim=1).max()) > middle:
            low = middle
        else:
            high = middle
    return high
