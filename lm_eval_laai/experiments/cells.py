"""Cells and fits, their identities, and the folder that stores finished ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from laai_core import files
from laai_core.errors import LaaiError
from lm_eval_laai.methods import METHODS


@dataclass(frozen=True)
class Fit:
    """One training: a method on one draw of a task's examples."""

    task: str  # the harness's name; laai_pairs:FILE and laai_opinionqa_group:ATTRIBUTE=GROUP select the data
    method: str
    seed: int
    n_train: int
    layer: int | None = None  # 0-based; None is the method's own choice
    steps: int | None = None  # of a method that takes them; None is the method's own number, or chosen by it
    l1: float | None = None  # this field and those below are LAAI's
    group: float | None = None
    penalty_scale: str | None = None
    start: str | None = None


@dataclass(frozen=True)
class Cell:
    """One score: the harness runs one task, with `shots` solved examples of `seed`, under the sum of `fits`.

    Without shots nothing is drawn and `seed` is None, so that zero-shot is one cell for all seeds.
    """

    task: str
    shots: int = 0
    seed: int | None = None
    fits: tuple[Fit, ...] = ()


class Store:
    """Finished work in a folder: a small JSON for each cell, a vector or an adapter for each fit and its CPU seconds.

    A name ends in the hash of the identity: everything the result depends on. Another model, data set or release of a
    library is another identity, never an old result.
    """

    def __init__(self, folder: Path) -> None:
        self._cells, self._fits, self._locks = folder / "cells", folder / "fits", folder / "locks"
        self._seconds = folder / "seconds"  # not with the fits, whose bytes are the same every time

    def get(self, cell: Cell, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """The cell's result, None when it has not been computed. LaaiError for a file of another kind."""
        path = self._path(cell, identity)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["identity"] != identity:
                raise ValueError
            return found["result"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            raise LaaiError(f"{path} is no finished cell: delete it, and it is computed again") from None

    def put(self, cell: Cell, identity: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Store a result, whole or not at all."""
        text = json.dumps({"identity": identity, "result": result}, indent=1, sort_keys=True, ensure_ascii=False)
        files.write(self._path(cell, identity), text.encode())

    def seconds(self, fit: Fit, identity: Mapping[str, Any]) -> float | None:
        """The CPU seconds that the fit took, choosing included; None where its process ended before they were put."""
        try:
            return float(self._seconds_path(fit, identity).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def put_seconds(self, fit: Fit, identity: Mapping[str, Any], seconds: float) -> None:
        """Store what the fit took."""
        files.write(self._seconds_path(fit, identity), f"{seconds:.3f}\n".encode())

    @contextmanager
    def claimed(self, piece: Cell | Fit, identity: Mapping[str, Any]) -> Iterator[bool]:
        """Within the block, whether this process alone may compute the piece. False where another process is at it.

        The operating system frees the lock of a process that dies.
        """
        path = self._locks / f"{key({'of': type(piece).__name__, **identity})}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path, timeout=0).acquire()
        except Timeout:
            yield False
        except OSError as error:
            raise files.unwritable(path, error) from None
        else:
            with lock:
                yield True

    def fit_path(self, fit: Fit, identity: Mapping[str, Any]) -> Path:
        """The path of a fit, whether or not it is stored."""
        name = f"{fit.task.partition(':')[0]}-{fit.method}-{key(identity)}"
        return self._fits / f"{name}{METHODS[fit.method].suffix}"

    def _seconds_path(self, fit: Fit, identity: Mapping[str, Any]) -> Path:
        return self._seconds / f"{self.fit_path(fit, identity).stem}.txt"

    def _path(self, cell: Cell, identity: Mapping[str, Any]) -> Path:
        return self._cells / f"{cell.task.partition(':')[0]}-{key(identity)}.json"


def named(piece: Cell | Fit) -> str:
    """A cell or a fit in words."""
    if isinstance(piece, Cell):
        shots = [f"{piece.shots}-shot seed {piece.seed}"] if piece.shots else []
        return " + ".join([piece.task, *shots, *map(named, piece.fits)])
    words = [piece.method, "of", piece.task, f"seed {piece.seed}", f"N {piece.n_train}"]
    if piece.layer is not None:
        words.append(f"layer {piece.layer}")
    if piece.start is not None:
        words.append(f"start {piece.start}")
    if piece.l1 is not None:
        words.append(f"l1 {piece.l1:g} group {piece.group:g}")
    return " ".join(words)


def key(identity: Mapping[str, Any]) -> str:
    """64 bits of the identity's hash, in hex."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
