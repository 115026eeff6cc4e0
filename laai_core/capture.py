"""A function of one tensor, recorded as a flat list of tensor operations, and played again without its Python code.

Only operations on what depends on the argument are recorded; all other tensors are kept as they were. On a CUDA device
the list is captured as one CUDA graph, which starts all of a step's kernels in one call. On a CPU starting operations
costs little, and a recording gains nothing (benchmarks/step.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from laai_core.errors import LaaiError

Function = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
_AUTO = "expected forward auto"


@dataclass(frozen=True)
class _Operation:
    """One operation: its arguments, in which numbers of recorded tensors replace the tensors."""

    function: OpOverload
    arguments: list[Any]  # leaves of (args, kwargs); None where a recorded tensor belongs
    inputs: list[tuple[int, int]]  # index among the leaves, number of the recorded tensor
    structure: TreeSpec
    outputs: list[int | None]  # number of each result; None: not a tensor


class Captured:
    """`function`, recorded at `x`: equal results for every argument of that shape, device and type.

    Args:
        tolerance: largest difference that is rounding, relative to a result's largest element.

    Raises:
        LaaiError: where the operations depend on the values of `x`, reach a second device, or give other results at
            another argument, which is tried.
    """

    def __init__(self, function: Function, x: torch.Tensor, tolerance: float = 1e-3) -> None:
        x = x.clone()
        with _Recorder(x) as recorder:
            results = function(x)
        self._operations = recorder.operations
        self._results = [recorder.number(result) for result in results]
        self._last_use = {n: at for at, one in enumerate(self._operations) for _, n in one.inputs}
        self._last_use |= dict.fromkeys(self._results, len(self._operations))
        self._graph: Any = None
        if x.is_cuda:
            self._capture(x)
        other = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
        for mine, theirs in zip(self(other), function(other), strict=True):
            bounds = {"rtol": tolerance, "atol": tolerance * float(theirs.abs().max())}
            if not torch.allclose(mine, theirs, **bounds, equal_nan=True):
                raise LaaiError(f"forward captured gives other numbers than the model's code: {_AUTO}")

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The function's results at `x`."""
        if self._graph is None:
            return self._play(x)
        self._x.copy_(x)
        self._graph.replay()
        return tuple(result.clone() for result in self._static)

    @torch.no_grad()
    def _play(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        known = {0: x}
        for at, one in enumerate(self._operations):
            leaves = list(one.arguments)
            for index, number in one.inputs:
                leaves[index] = known[number]
            args, kwargs = tree_unflatten(leaves, one.structure)
            found = tree_leaves(one.function(*args, **kwargs))
            known |= {number: value for number, value in zip(one.outputs, found, strict=True) if number is not None}
            for number in {n for _, n in one.inputs} | {n for n in one.outputs if n is not None}:
                if self._last_use.get(number, -1) <= at:
                    del known[number]
        return tuple(known[number] for number in self._results)

    def _capture(self, x: torch.Tensor) -> None:
        """Play once, so that libraries take their memory, and once into a CUDA graph with arguments at `self._x`."""
        self._x = x
        aside = torch.cuda.Stream(x.device)
        aside.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(aside):
            self._play(x)
        torch.cuda.current_stream(x.device).wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(x.device), torch.cuda.graph(self._graph):
            self._static = self._play(x)


class _Recorder(TorchDispatchMode):
    """Keeps the operations whose arguments depend on `x`."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.operations: list[_Operation] = []
        self._device = x.device
        self._numbers = {id(x): 0}
        self._kept = [x]  # so that no other tensor gets the id of one that is recorded

    def number(self, tensor: torch.Tensor) -> int:
        """The number of a result, which must depend on `x`."""
        return self._numbers[id(tensor)]

    def __torch_dispatch__(self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        recorded = list(filter(self._is_recorded, tree_leaves((args, kwargs))))
        if not recorded:
            return func(*args, **kwargs)
        _refuse_if_data_dependent(func, recorded)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes and isinstance(value, torch.Tensor) and not self._is_recorded(value):
                # Every play writes into a copy of what the tensor holds now.
                self._add(torch.ops.aten.clone.default, (value.clone(),), {}, value)
        found = func(*args, **kwargs)
        self._add(func, args, kwargs, found)
        return found

    def _add(self, func: OpOverload, args: Any, kwargs: Any, found: Any) -> None:
        """Record that these arguments gave `found`."""
        leaves, structure = tree_flatten((args, kwargs))
        inputs = [(index, self._numbers[id(leaf)]) for index, leaf in enumerate(leaves) if self._is_recorded(leaf)]
        arguments = [None if self._is_recorded(leaf) else leaf for leaf in leaves]
        outputs = [self._numbered(one) if isinstance(one, torch.Tensor) else None for one in tree_leaves(found)]
        self.operations.append(_Operation(func, arguments, inputs, structure, outputs))

    def _is_recorded(self, leaf: Any) -> bool:
        return isinstance(leaf, torch.Tensor) and id(leaf) in self._numbers

    def _numbered(self, tensor: torch.Tensor) -> int:
        """The tensor's number; a new one, unless an operation in place returns its argument."""
        if id(tensor) not in self._numbers:
            if tensor.device != self._device and tensor.is_floating_point() and tensor.ndim:
                raise LaaiError(f"forward captured: the model is on {self._device} and {tensor.device}: {_AUTO}")
            self._numbers[id(tensor)] = len(self._kept)
            self._kept.append(tensor)
        return self._numbers[id(tensor)]


def _refuse_if_data_dependent(func: OpOverload, recorded: list[torch.Tensor]) -> None:
    """LaaiError for an operation that reads values back, or whose result's shape depends on them."""
    if func is torch.ops.aten.index.Tensor:
        depends = any(tensor.dtype == torch.bool for tensor in recorded)
    else:
        depends = bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*func.tags})
    if depends:
        raise LaaiError(f"forward captured: the model's code depends on values ({func}): {_AUTO}")
