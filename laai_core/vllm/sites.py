"""Modules that add rows of a table to their input or output: a form that survives torch.compile and CUDA graphs.

A compiled graph ignores hooks that come later, and a captured graph replays addresses. So the change is in the
module's own forward, reads two buffers at fixed addresses, and does the same work in every step:

    x [n, D]  ->  x + table[rows[:n]]        table [1 + interventions + 1, D]; row 0 is zero

Row 0 is for tokens that stay untouched, the last one for the probe of `laai_core.vllm.verify`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from laai_core.hooks import hidden_of, with_hidden


def steer(module: nn.Module, site: str, table: torch.Tensor, rows: torch.Tensor) -> None:
    """Make `module` add `table[rows]`: to its input at site `heads`, else to its output.

    Args:
        table: [numbers, D] in the activation's dtype, on its device.
        rows: integer [max tokens of a step], shared by all modules.
    """
    module.register_buffer("laai_table", table, persistent=False)
    module.register_buffer("laai_rows", rows, persistent=False)
    base: Any = type(module)
    module.__class__ = _adding_to_input(base) if site == "heads" else _adding_to_output(base)


def _added(module: Any, x: torch.Tensor) -> torch.Tensor:
    return x + module.laai_table.index_select(0, module.laai_rows[: x.shape[0]])


@cache
def _adding_to_input(base: Any) -> Any:
    def forward(self: Any, input_: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return base.forward(self, _added(self, input_), *args, **kwargs)

    return type(base.__name__, (base,), {"forward": forward, "__module__": __name__})


@cache
def _adding_to_output(base: Any) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = base.forward(self, *args, **kwargs)
        return with_hidden(output, _added(self, hidden_of(output)))

    return type(base.__name__, (base,), {"forward": forward, "__module__": __name__})
