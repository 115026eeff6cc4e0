"""The file of `laai train --log-to`: the evaluations of a training, for who watches or plots it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from laai_core.errors import LaaiError
from laai_core.files import unwritable
from lm_eval_laai.commands.outputs import check_writable

if TYPE_CHECKING:  # torch
    from laai_core.optimize import Step


_BEGIN = b'{"evaluation":'  # of every line


def check_log(path: Path) -> None:
    """LaaiError for a file that could not be written. Nothing is made, or emptied, yet."""
    if path.is_dir():
        raise LaaiError(f"--log-to {path} is a folder: expected a file")
    if path.exists() and path.stat().st_size and _beginning(path) != _BEGIN:
        raise LaaiError(f"--log-to {path} exists and is no such log: expected a new file, or a log to replace")
    check_writable(path.parent)


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(_BEGIN))


def step_log(path: Path) -> Callable[[Step], None]:
    """A function that adds a step as one line of JSON to `path`, which the first evaluation makes or empties; the file
    is closed after every line, so that it can be read at any time."""

    def write(step: Step) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w" if step.evaluation == 1 else "a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(step)) + "\n")
        except OSError as error:
            raise unwritable(path, error) from None

    return write
