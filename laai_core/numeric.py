"""Numbers as callers give them: Python's, NumPy's, or a tensor of one element."""

from __future__ import annotations

import math
import operator
from typing import Any

from laai_core.errors import LaaiError


def whole(value: Any) -> int | None:
    """The value as an int; None for a truth value and for anything that is no whole number."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def layer_number(value: Any, count: int | None = None) -> int:
    """A layer as an int, counted from the front where the model's `count` of layers is known; LaaiError if none."""
    number = whole(value)
    if number is None:
        raise LaaiError(f"layer is {value!r:.60}: expected an int")
    if count is None:
        return number
    if not -count <= number < count:
        raise LaaiError(f"layer {number} is out of range: this model has layers 0 to {count - 1}")
    return number % count


def real(value: Any) -> float:
    """The value as a float; NaN for a truth value, for text and for anything else that is no number."""
    try:
        return math.nan if isinstance(value, bool | str | bytes | bytearray) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last for a tensor of several elements
        return math.nan
