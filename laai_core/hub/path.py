"""Names on the Hugging Face Hub, distinguished from local paths, without network or huggingface_hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from laai_core.files import SUFFIX

_NAME = r"[A-Za-z0-9][\w.-]*"
_SPEC = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?::(?P<file>[^:@]+))?(?:@(?P<revision>[^:@]+))?")


@dataclass(frozen=True)
class HubPath:
    """`org/repo[:file][@revision]`."""

    repo: str
    file: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        file, revision = f":{self.file}" if self.file else "", f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{file}{revision}"


def hub_path(source: str | Path) -> HubPath | None:
    """`org/repo[:file][@revision]` as a HubPath, or None for a path on this machine.

    An existing path wins, a Path object is always a path, and so is `folder/name.safetensors`, so that a misspelt
    path causes no request.
    """
    match = _SPEC.fullmatch(source) if isinstance(source, str) else None
    if match is None or os.path.exists(source) or match["repo"].endswith(SUFFIX):
        return None
    return HubPath(match["repo"], match["file"], match["revision"])
