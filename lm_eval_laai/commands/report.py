"""The result of a command: facts for machines and text for people. Only the command line prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Report:
    """`facts` is what --json prints, `text` is what people read.

    `failed` gives exit code 1: the command ran, and reports a failure, as `laai check` does.
    """

    facts: dict[str, Any]
    text: str
    failed: bool = False


def table(rows: Sequence[Sequence[object]]) -> str:
    """Rows of equally many cells as left-aligned columns."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells)
