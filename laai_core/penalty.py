"""The sparse group lasso, gamma * |x|_1 + lambda * sum over heads of |x_h|_2 (paper eq. 2), on x [H, d]."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Penalty:
    """`l1` is the paper's gamma, `group` its lambda. Rows of x are the groups.

    Both may be tensors [R, 1, 1], one for each run of x [R, H, d]; values that are scalars for one x are then [R].
    """

    l1: float | torch.Tensor
    group: float | torch.Tensor

    def value(self, x: torch.Tensor) -> torch.Tensor:
        """The penalty, a scalar."""
        return (self.l1 * x.abs()).sum((-2, -1)) + (self.group * _norms(x)).sum((-2, -1))

    def prox(self, x: torch.Tensor, step: float | torch.Tensor) -> torch.Tensor:
        """argmin_z |z - x|^2 / (2 step) + penalty(z): soft threshold, then shrink each row. Gives exact zeros."""
        z = soft_threshold(x, step * self.l1)
        return z * (1 - step * self.group / _norms(z).clamp_min(torch.finfo(x.dtype).tiny)).clamp_min(0)

    def subgradient(self, x: torch.Tensor) -> torch.Tensor:
        """One subgradient: zero where the penalty has a kink."""
        return self.l1 * x.sign() + self.group * x / _norms(x).clamp_min(1e-30)

    def stationarity(self, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Distance from -gradient (of the smooth loss, at x) to the subdifferential at x: 0 at a minimum, a scalar.

        In a row that is zero the subdifferential is the box [-l1, l1]^d plus the ball of radius `group`. In any
        other row it is a point, but for the coordinates that are zero, which are free within [-l1, l1].
        """
        at_kink = soft_threshold(gradient, self.l1)
        dead_rows = (_norms(at_kink) - self.group).clamp_min(0)
        live_rows = _norms(torch.where(x == 0, at_kink, gradient + self.subgradient(x)))
        return torch.where(_norms(x) == 0, dead_rows, live_rows).norm(dim=(-2, -1))


def _norms(x: torch.Tensor) -> torch.Tensor:
    """Norms [..., H, 1] of the rows of x [..., H, d]."""
    return x.norm(dim=-1, keepdim=True)


def soft_threshold(x: torch.Tensor, threshold: float | torch.Tensor) -> torch.Tensor:
    """x moved towards zero by `threshold`, and no further than zero."""
    return x.sign() * (x.abs() - threshold).clamp_min(0)


def critical_penalty(gradient: torch.Tensor) -> torch.Tensor:
    """The smallest p for which x = 0 is stationary under l1 = group = p, given the loss's gradient at 0: a scalar for
    [H, d], [R] for [R, H, d]."""
    high = gradient.abs().amax((-2, -1), keepdim=True)
    low = torch.zeros_like(high)
    for _ in range(60):  # bisection: the condition |soft(g_h, p)| <= p is monotone in p
        middle = (low + high) / 2
        too_low = _norms(soft_threshold(gradient, middle)).amax(-2, keepdim=True) > middle
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    return high[..., 0, 0]
