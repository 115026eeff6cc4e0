"""LaaiError for bad input, WorkFailed for valid input whose work failed, and two errors that carry partial results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LONGEST = 1000  # characters of a message


class LaaiError(Exception):
    """Bad input, in one line: what was wrong, where, and what was expected."""

    def __init__(self, message: object) -> None:
        # File names and contents may be long, and hold line breaks, terminal escapes or unpaired surrogates.
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(message)[: LONGEST + 1])
        super().__init__(text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}...")


class WorkFailed(LaaiError):
    """The input was fine and the work still failed: a server, the memory, a loss that is not finite."""


class DiskFailed(WorkFailed):
    """A write that failed for a full or a broken disk, as the next one would."""


class Unfinished(BaseException):
    """A training that ended early: an exception, so that a caller who does not catch it stores nothing.

    `results`: the best point so far of every run, in order; `finished` of each says whether the run reached its end.
    """

    # Pickle calls the class with the message alone, and sets the attributes afterwards.
    def __init__(self, message: object, results: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.results = list(results)


class NotFinite(Unfinished, WorkFailed):
    """A loss or a gradient that is not finite ended a training run; the other runs of the batch went to their ends."""


class Interrupted(Unfinished, KeyboardInterrupt):
    """Ctrl-C ended training runs that had begun."""
