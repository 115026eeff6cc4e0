"""Names on the Hugging Face Hub, told from paths. Needs no network and none of its libraries."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from laai_core.files import SUFFIX

_NAME = r"[A-Za-z0-9][\w.-]*"
_REPOSITORY = re.compile(rf"{_NAME}/{_NAME}")
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


def is_repository(name: str) -> bool:
    """Whether `name` can name a repository: org/repo, and nothing of that name lies on this machine."""
    return bool(_REPOSITORY.fullmatch(name)) and not name.endswith(SUFFIX) and not os.path.exists(name)


def hub_path(source: str | Path) -> HubPath | None:
    """`org/repo[:file][@revision]` as a HubPath, or None for a path on this machine.

    What exists here wins, a Path is always a path, and `folder/name.safetensors` is a path too, so that a misspelt
    one never reaches for the network.
    """
    match = _SPEC.fullmatch(source) if isinstance(source, str) else None
    if match is None or os.path.exists(source) or match["repo"].endswith(SUFFIX):
        return None
    return HubPath(match["repo"], match["file"], match["revision"])
