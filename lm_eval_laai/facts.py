"""Nested metadata as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flat(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(name, value) sorted by name; names of nested keys are joined by dots, as in `training.versions.torch`."""
    rows: list[tuple[str, Any]] = []
    for key, value in sorted(facts.items()):
        if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
            value = {str(number): one for number, one in enumerate(value)}
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{key}.")
        else:
            # Strings as literals where they would break the line: a stop string is a line break.
            rows.append((prefix + key, repr(value) if isinstance(value, str) and not value.isprintable() else value))
    return rows
