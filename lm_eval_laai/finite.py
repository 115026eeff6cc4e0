"""A NaN or infinite logit under an intervention: an error that names the request, and never an answer.

A vector that overflows in half precision gives such logits, and the harness would compute scores from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.api.instance import Instance
from torch import nn

from laai_core.errors import WorkFailed
from laai_core.hooks import attached

SHOWN = 40  # characters of a prompt's end


def named(request: Instance) -> str:
    """A request in words: task, document, number within the document and the end of the text."""
    where = f"task {request.task_name}, document {request.doc_id}, request {request.idx}"
    return f"{where}, which ends in {str(request.args[0])[-SHOWN:]!r}"


def check(logits: torch.Tensor, names: Sequence[str | None]) -> None:
    """WorkFailed for a NaN or infinite logit [B, ..., V] of a named row; rows without a name have no edit."""
    finite = torch.isfinite(logits).flatten(1).all(1).tolist()
    for name, fine in zip(names, finite, strict=True):
        if name is not None and not fine:
            raise not_finite(name, logits.dtype)


def not_finite(name: str, dtype: torch.dtype) -> WorkFailed:
    """The error for a request whose logits are not finite."""
    return WorkFailed(
        f"{name}: the model's logits are NaN or infinite under the intervention in {dtype}; "
        f"expected finite ones: lower its scale, or run the model in float32"
    )


@contextmanager
def watched(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """`check` for every token that `model.generate` chooses; one name per prompt, whose beams are adjacent rows."""

    def look(module: nn.Module, arguments: Any, output: Any) -> None:
        beams = len(output.logits) // len(names)
        check(output.logits[:, -1], [name for name in names for _ in range(beams)])

    with attached([model.register_forward_hook(look)]):
        yield
