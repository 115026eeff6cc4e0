"""Figures that take long to measure, kept so that a command that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


class Known:
    """Figures by key, in a file that every new one is added to at once.

    Args:
        path: the file.
        files: what every figure depends on; where their bytes were others, nothing is known.
    """

    def __init__(self, path: Path, files: Iterable[Path]) -> None:
        self._path = path
        self._of = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._known: dict[str, Any] = dict(json.loads(line) for line in lines)

    def _text(self, key: Sequence[Any]) -> str:
        return json.dumps([self._of, *key])

    def __contains__(self, key: Sequence[Any]) -> bool:
        return self._text(key) in self._known

    def __getitem__(self, key: Sequence[Any]) -> Any:
        return self._known[self._text(key)]

    def __setitem__(self, key: Sequence[Any], value: Any) -> None:
        text = self._text(key)
        self._known[text] = value
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([text, value]) + "\n")
