"""Products of a replay's few rows with the model's frozen weights, on a CPU.

torch hands a float32 product to a library that rearranges the weight in every call, and for tens of rows that takes
longer than the product. Here the weights are packed once for oneDNN: W for the forward, its transpose for the
backward, the head first and then the blocks from the last down, as far as the memory goes. Rows of padding are left
out of every product, and rows whose loss is only watched out of every backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from laai_core.hooks import shadowed
from laai_core.locate import Layout

LIBRARIES = 256 << 20  # bytes that a process has taken for Python, torch and transformers alone
SMALLEST = 1 << 17  # a weight of at most so many elements is multiplied by torch: calling anything else costs as much


@dataclass(frozen=True)
class Rows:
    """Which tokens of a batch [R, T] matter: indices into R * T; None: all of them."""

    shape: tuple[int, ...]  # of the tokens
    real: torch.Tensor | None  # not padding
    learnt: torch.Tensor | None  # with a gradient


def packed_bytes(layout: Layout, lowest: int) -> int:
    """Memory that `Products(layout, lowest)` takes."""
    return sum(2 * weight.nbytes for _, weight, fits in _planned(layout, lowest) if fits)


def _planned(layout: Layout, lowest: int) -> Iterator[tuple[nn.Module, torch.Tensor, bool]]:
    """The modules, their W [n, k], and whether its packed copies fit: they take as much as the process held before."""
    left = LIBRARIES + sum(weight.nbytes for weight in layout.model.parameters())
    blocks = (module for block in layout.blocks[lowest:][::-1] for module in block.modules())
    for module in [layout.model.get_output_embeddings(), *blocks]:
        # Exact types: quantised, adapted and offloaded modules have other weights, or a forward of their own.
        if type(module) not in (nn.Linear, Conv1D) or "forward" in vars(module):
            continue
        weight: Any = module.weight
        if type(weight) is nn.Parameter and weight.numel() > SMALLEST and weight.device.type == "cpu":
            fits = _packable(weight.dtype) and 2 * weight.nbytes <= left
            left -= 2 * weight.nbytes * fits
            yield module, weight.detach().T if isinstance(module, Conv1D) else weight.detach(), fits


class Products:
    """The large linear modules of the blocks from `lowest` on and of the head, each with W [n, k] and W^T [k, n]."""

    def __init__(self, layout: Layout, lowest: int) -> None:
        self._head = layout.model.get_output_embeddings()
        self.weights: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {
            module: (_packed(weight), _packed(weight.T)) if fits else (weight, weight.T)
            for module, weight, fits in _planned(layout, lowest)
        }

    @contextmanager
    def used(self, rows: Rows, read: Rows) -> Iterator[None]:
        """Within the block, the modules compute these products; `rows` of the tokens, `read` of the head's input."""
        with ExitStack() as stack:
            for module, weights in self.weights.items():
                here = read if module is self._head else rows
                stack.enter_context(shadowed(module, "forward", partial(_linear, module.bias, weights, here)))
            yield


def _linear(bias: torch.Tensor | None, weights: tuple[Any, Any], rows: Rows, x: torch.Tensor) -> torch.Tensor:
    """The forward of a linear module; only inputs of the batch's own shape [R, T, k] have rows to leave out."""
    chosen = (rows.real, rows.learnt) if x.shape[:-1] == rows.shape else (None, None)
    result: torch.Tensor = _Product.apply(x.flatten(0, -2), bias, *weights, *chosen)
    return result.view(*x.shape[:-1], -1)  # here: what a Function returns as a view cannot be modified in place


class _Product(torch.autograd.Function):
    """x W^T + bias for some rows of x [n, k], and g W for some; 0 in the others."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: Any, there: Any, back: Any, real: Any, learnt: Any) -> torch.Tensor:
        ctx.back, ctx.learnt = back, learnt
        return _product(x, bias, there, real)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _product(gradient, None, ctx.back, ctx.learnt), None, None, None, None, None


def _product(x: torch.Tensor, bias: Any, weight: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    chosen = x if rows is None else x[rows]
    if weight.is_mkldnn:
        found = torch.ops.mkldnn._linear_pointwise(chosen, weight, bias, "none", [], "")
    else:
        found = nn.functional.linear(chosen, weight, bias)
    if rows is not None:
        found = found.new_zeros(len(x), found.shape[1]).index_copy_(0, rows, found)
    return found


def _packable(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _packed(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
