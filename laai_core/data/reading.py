"""Files of data as bytes, text and JSON: every fault is one line with the place and what was expected there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from laai_core.errors import LaaiError


def content(path: Path, expected: str) -> bytes:
    """A file's bytes, or LaaiError."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise LaaiError(f"{path}: cannot be read ({reason}); expected {expected}") from error


def decoded(raw: bytes, where: str, expected: str) -> str:
    """UTF-8 text, with or without a byte order mark, or LaaiError."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LaaiError(f"{where}: not UTF-8 at byte {error.start}; expected {expected}") from error


def parsed(text: str, where: str, expected: str) -> Any:
    """The value of a JSON text, or LaaiError."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        why = f"line {error.lineno}, character {error.colno}: {error.msg}"
    except (ValueError, RecursionError) as error:
        why = "too deeply nested" if isinstance(error, RecursionError) else "a number of thousands of digits"
    raise LaaiError(f"{where}: not valid JSON ({why}); expected {expected}")
