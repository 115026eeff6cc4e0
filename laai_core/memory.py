"""Fewer rows per forward where memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from accelerate.utils.memory import should_reduce_batch_size

logger = logging.getLogger(__name__)
T = TypeVar("T")


def until_it_fits(call: Callable[[int], T], rows: int) -> T:
    """The result of `call(rows)`, repeated with half the rows per forward each time memory runs out."""
    while True:
        try:
            return call(rows)
        except Exception as error:
            if rows < 2 or not should_reduce_batch_size(error):
                raise
        rows = (rows + 1) // 2
        logger.warning("memory ran out: going on with %d rows a forward", rows)
