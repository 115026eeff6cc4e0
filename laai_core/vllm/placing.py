"""Which rows of an engine's step a vector goes to, whatever the batch: prefills whole or in chunks, decodes, resumed
requests. Rows are found from absolute token numbers, so that none of these has a state of its own here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Placed:
    """A request's intervention: its number in the tables, the index of its last prompt token, its position word."""

    number: int
    index: int
    position: str


def place(rows: Any, start: int, computed: int, scheduled: int, placed: Placed) -> bool:
    """Write `placed.number` into the rows of one request in one step; whether there were any.

    Args:
        rows: int [max tokens of a step], changed in place.
        start: the request's first row in this step.
        computed: tokens of the request that earlier steps computed, so the number of the token at `start`.
        scheduled: the request's tokens in this step.
    """
    first = placed.index - computed  # of the last prompt token, counted from `start`
    if placed.position == "last":
        begin, end = first, first + 1
        if not 0 <= begin < scheduled:
            return False
    else:
        begin, end = (0 if placed.position == "all" else max(first, 0)), scheduled
        if begin >= end:
            return False
    rows[start + begin : start + end] = placed.number
    return True
