"""Every answer that was paid for, in one SQLite file: whole after a kill at any moment, open to several processes."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from laai_core.errors import LaaiError, WorkFailed
from lm_eval_laai.judge.endpoint import Judge

# The key is everything that defines a query. Answers are stored raw: parsing them again costs nothing.
_TABLE = """
CREATE TABLE IF NOT EXISTS answers (
    base_url TEXT NOT NULL,
    model TEXT NOT NULL,
    request TEXT NOT NULL,
    question TEXT NOT NULL,
    query INTEGER NOT NULL,
    answer TEXT NOT NULL,
    PRIMARY KEY (base_url, model, request, question, query)
) WITHOUT ROWID
"""
_PATIENCE = 60.0  # seconds for another process's write


class Cache:
    """The answers at `path`, made if absent. For use in a `with`, from any thread.

    Raises:
        LaaiError: for a file that is no such cache, or cannot be opened.
        WorkFailed: later, for a disk that is full and the like.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            if path != ":memory:":
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            # Autocommit: an answer is on the disk when `put` returns.
            self._connection = sqlite3.connect(path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)
            try:
                tables = {name for (name,) in self._connection.execute("SELECT name FROM sqlite_master")}
                if tables and "answers" not in tables:
                    raise LaaiError(f"{path} is another program's database; expected the judge's cache, or no file")
                self._connection.execute(_TABLE)
            except BaseException:
                self._connection.close()
                raise
        except (OSError, ValueError, sqlite3.Error) as error:  # ValueError: a zero byte in the name
            raise LaaiError(f"{path}: cannot be opened ({error}); expected the judge's cache, or no file") from None

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()

    def get(self, judge: Judge, question: str) -> dict[int, str]:
        """The answers to a question by the number of the query."""
        with self._locked() as connection:
            rows = connection.execute(
                "SELECT query, answer FROM answers WHERE base_url = ? AND model = ? AND request = ? AND question = ?",
                (*judge.identity, question),
            )
            return dict(rows)

    def put(self, judge: Judge, question: str, query: int, answer: str) -> None:
        """Store an answer, unless another process has stored one."""
        with self._locked() as connection:
            connection.execute(
                "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?)", (*judge.identity, question, query, answer)
            )

    @contextmanager
    def _locked(self) -> Iterator[Any]:
        try:
            with self._lock:
                yield self._connection
        except sqlite3.Error as error:
            raise WorkFailed(f"{self._path}: {error}; expected a cache that can be read and written") from None
