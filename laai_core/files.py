"""Files written whole or not at all, and the suffix of an intervention's file. Every command uses this: no torch."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

from laai_core.errors import LaaiError, WorkFailed

SUFFIX = ".safetensors"
PARTIAL = f".partial{SUFFIX}"  # what a training that was stopped leaves; a folder of interventions has no use for it
_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def write(path: Path, content: bytes) -> None:
    """Put `content` at `path` whole or not at all: temporary file beside it, fsync, rename."""
    try:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # not mkstemp's: its files are private
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # ValueError: no name, or one with a zero byte
        raise unwritable(path, error) from None


def unwritable(path: Path, error: OSError | ValueError) -> LaaiError:
    """What to raise when writing failed: a full or broken disk is nobody's bad input."""
    kind = WorkFailed if isinstance(error, OSError) and error.errno in _FAULTS else LaaiError
    return kind(f"cannot write {path}: {getattr(error, 'strerror', None) or error}")
