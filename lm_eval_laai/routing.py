"""Interventions by task: one file for all tasks, or a folder with one file per task."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laai_core.errors import LaaiError
from laai_core.files import SUFFIX, vectors_in
from laai_core.hub import local_file
from laai_core.intervention import Intervention, finite

UNROUTED = ("error", "none")
ALL = "intervention"  # name of the one intervention that is for all tasks


@dataclass(frozen=True)
class Route:
    """An intervention and its origin; `file` is None for one given from Python."""

    source: str
    loaded: Intervention
    scaled: Intervention
    file: Path | None


class Routing:
    """Interventions by task name: `routes` by the files' stems, or one alone under ALL, and the factor `scale`.

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
        source = source if isinstance(source, Intervention) else os.path.expanduser(source)
        self._unrouted = unrouted
        self.scale = finite(scale)
        self._by_task = not isinstance(source, Intervention) and os.path.isdir(source)
        if isinstance(source, Intervention):
            self.routes = {ALL: self._route("given from Python", source)}
        elif self._by_task:
            self.routes = {p.stem: self._route(str(p), Intervention.load(p), p) for p in _files(Path(source))}
        else:
            file = local_file(source)
            self.routes = {ALL: self._route(str(source), Intervention.load(file), file)}

    def name(self, task: str | None) -> str | None:
        """The key in `routes` for a task; None leaves its requests untouched."""
        if not self._by_task:
            return ALL
        return task if task in self.routes else None

    def get(self, task: str | None) -> Intervention | None:
        """The scaled intervention of a task; None leaves its requests untouched."""
        name = self.name(task)
        return None if name is None else self.routes[name].scaled

    def require(self, tasks: Iterable[str | None]) -> None:
        """Refuse tasks that have no intervention, all at once and before any request runs."""
        if self._unrouted == "none":
            return
        missing = sorted({str(task) for task in tasks if self.name(task) is None})
        if missing:
            raise LaaiError(
                f"no intervention for {', '.join(missing)}: the folder has {', '.join(sorted(self.routes))}; "
                f"add <task>.safetensors, or pass unrouted=none to run such tasks untouched"
            )

    def report(self) -> list[dict[str, Any]]:
        """Facts on every intervention for the results file: identity, layers, site, position and scale."""
        return [
            {
                "source": route.source.encode(errors="backslashreplace").decode(),  # JSON is Unicode, paths may not be
                "sha256": route.loaded.sha256,
                "layers": route.loaded.layers,
                "site": route.loaded.site,
                "position": route.loaded.position,
                "operation": route.loaded.operation,
                "scale": route.loaded.scale * self.scale,
            }
            for route in self.routes.values()
        ]

    def _route(self, source: str, loaded: Intervention, file: Path | None = None) -> Route:
        loaded.to_bytes()  # LaaiError now, and not when its hash is reported at the run's end
        return Route(source, loaded, loaded.rescaled(self.scale), file)


def _files(folder: Path) -> list[Path]:
    files = vectors_in(folder)
    if not files:
        raise LaaiError(f"folder {folder} has no {SUFFIX} file: expected <harness task name>{SUFFIX}")
    return files
