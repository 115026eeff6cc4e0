"""Tensors on the CPU unless a device is named, whatever `torch.set_default_device` says."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def cpu_by_default(function: Callable[P, T]) -> Callable[P, T]:
    """The function with the CPU as its calls' default device, on which tokens, vectors and losses are kept.

    Where the CPU is the default already nothing is done: PyTorch would intercept every operation.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
            return function(*args, **kwargs)

    return call
