"""Files written whole or not at all, and names of interventions' files. Every command imports it: no torch."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

from laai_core.errors import DiskFailed, LaaiError

SUFFIX = ".safetensors"
PARTIAL = f".partial{SUFFIX}"  # of an interrupted training's file
_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def vectors_in(folder: Path) -> list[Path]:
    """The files of interventions in a folder, sorted by name; no hidden ones, none of an interrupted training."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise LaaiError(f"cannot read the folder {folder}: {error.strerror}") from None
    return [folder / name for name in names if name.endswith(SUFFIX) and not name.endswith(PARTIAL) and name[0] != "."]


def write(path: Path, content: bytes) -> None:
    """Put `content` at `path` whole or not at all: temporary file, fsync, rename. Pipes and devices get it."""
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            path.write_bytes(content)
            return
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # not mkstemp, whose files have mode 0600
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # ValueError: an empty name, or a zero byte in the name
        raise unwritable(path, error) from None


def unwritable(path: Path, error: OSError | ValueError) -> LaaiError:
    """The exception for a failed write: DiskFailed for a full or broken disk, else LaaiError."""
    kind = DiskFailed if isinstance(error, OSError) and error.errno in _FAULTS else LaaiError
    return kind(f"cannot write {path}: {getattr(error, 'strerror', None) or error}")
