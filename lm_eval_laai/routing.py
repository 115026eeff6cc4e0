"""Interventions by task: one file for all tasks, or a folder with one file per task."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from laai_core.errors import LaaiError
from laai_core.files import PARTIAL, SUFFIX
from laai_core.hub import local_file
from laai_core.intervention import Intervention, finite

UNROUTED = ("error", "none")
ALL = "intervention"  # name of the one intervention that is for all tasks


class Routing:
    """Interventions by task name.

    Args:
        source: an Intervention, a file, `org/repo[:file][@revision]` on the Hugging Face Hub, or a folder of
            `<harness task name>.safetensors`.
        scale: factor on every intervention's own scale.
        unrouted: a task without a file in the folder is refused (`error`) or run untouched (`none`).

    Raises:
        LaaiError: bad words, a bad file, a folder without files.
    """

    def __init__(self, source: str | Path | Intervention, scale: float = 1.0, unrouted: str | None = "error") -> None:
        unrouted = "none" if unrouted is None else unrouted  # the harness parses `unrouted=none` as None
        if unrouted not in UNROUTED:
            raise LaaiError(f"unrouted is {unrouted!r:.60}: expected one of {', '.join(UNROUTED)}")
        if not isinstance(source, str | Path | Intervention) or not str(source).strip():
            # The harness parses `intervention=7` as a number and `intervention=true` as a truth value.
            raise LaaiError(f"intervention is {source!r:.60}: expected a path (of a file called 7: ./7) or a name")
        self._unrouted = unrouted
        self._for_all: Intervention | None = None
        self._by_task: dict[str, Intervention] = {}
        self._sources: dict[str, Intervention] = {}  # as loaded, for the results file
        self._files: dict[int, Path] = {}  # by identity of the scaled intervention
        self._scale = finite(scale)
        if isinstance(source, Intervention):
            self._for_all = self._kept("given from Python", source)
        elif os.path.isdir(source):
            self._by_task = {p.stem: self._kept(str(p), Intervention.load(p), p) for p in _files(Path(source))}
        else:
            file = local_file(source)
            self._for_all = self._kept(str(source), Intervention.load(file), file)

    def all(self) -> Iterable[Intervention]:
        """Every intervention that may be applied, scaled."""
        return [self._for_all] if self._for_all is not None else self._by_task.values()

    def get(self, task: str | None) -> Intervention | None:
        """The scaled intervention of a task; None leaves its requests untouched."""
        return self._for_all if self._for_all is not None else self._by_task.get(task or "")

    def files(self) -> dict[str, tuple[Intervention, Path | None]]:
        """Every intervention, scaled, and its file (None if given from Python), by the name that `name` gives it."""
        named = {ALL: self._for_all} if self._for_all is not None else self._by_task
        return {name: (intervention, self._files.get(id(intervention))) for name, intervention in named.items()}

    def name(self, task: str | None) -> str | None:
        """The name in `files` of a task's intervention; None leaves its requests untouched."""
        if self._for_all is not None:
            return ALL
        return task if (task or "") in self._by_task else None

    @property
    def scale(self) -> float:
        """The factor on every intervention's own scale."""
        return self._scale

    def require(self, tasks: Iterable[str | None]) -> None:
        """Refuse tasks that have no intervention, all at once and before any request runs."""
        if self._for_all is not None or self._unrouted == "none":
            return
        missing = sorted({str(task) for task in tasks if (task or "") not in self._by_task})
        if missing:
            raise LaaiError(
                f"no intervention for {', '.join(missing)}: the folder has {', '.join(sorted(self._by_task))}; "
                f"add <task>.safetensors, or pass unrouted=none to run such tasks untouched"
            )

    def report(self) -> list[dict[str, Any]]:
        """Facts on every intervention for the results file: identity, layers, site, position and scale."""
        return [
            {
                "source": source.encode(errors="backslashreplace").decode(),  # a path need not be Unicode, JSON must
                "sha256": intervention.sha256,
                "layers": intervention.layers,
                "site": intervention.site,
                "position": intervention.position,
                "operation": intervention.operation,
                "scale": intervention.scale * self._scale,
            }
            for source, intervention in self._sources.items()
        ]

    def _kept(self, source: str, intervention: Intervention, file: Path | None = None) -> Intervention:
        self._sources[source] = intervention
        scaled = intervention.rescaled(self._scale)
        if file is not None:
            self._files[id(scaled)] = file
        return scaled


def _files(folder: Path) -> list[Path]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise LaaiError(f"cannot read the folder {folder}: {error.strerror}") from None
    files = [folder / name for name in names if name.endswith(SUFFIX) and not name.endswith(PARTIAL)]
    if not files:
        raise LaaiError(f"folder {folder} has no {SUFFIX} file: expected <harness task name>{SUFFIX}")
    return files
