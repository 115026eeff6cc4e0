"""Checks of paths that a command will write; `laai check` has them without torch."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from laai_core.errors import LaaiError


def check_writable(folder: Path) -> None:
    """LaaiError unless files can be made in `folder`, or it can be made itself. Leaves nothing behind."""
    existing = next(f for f in (folder.absolute(), *folder.absolute().parents) if f.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise LaaiError(f"cannot write to {folder}: {error.strerror}; expected a writable folder") from error


def check_no_input(output: Path, *inputs: str | Path | None) -> None:
    """LaaiError for an output that would replace a file which the command reads."""
    for one in inputs:
        path = None if one is None else Path(os.path.expanduser(one))
        if path is not None and path.exists() and os.path.exists(output) and output.samefile(path):
            raise LaaiError(f"{output} is what this command reads: expected another file to write")
