"""The scores of finished cells, and their spread over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lm_eval_laai.experiments.cells import Cell, Fit, Store
from lm_eval_laai.experiments.setting import Setting

MISSING = "missing"


def result_of(setting: Setting, cell: Cell, store: Store) -> dict[str, Any] | None:
    """A cell's result, if there is one."""
    return store.get(cell, setting.cell_identity(cell))


def seconds_of(setting: Setting, fit: Fit, store: Store) -> float | None:
    """The CPU seconds that a fit took, if they are known."""
    return store.seconds(fit, setting.fit_identity(fit))


@dataclass(frozen=True)
class Entry:
    """A figure of a table: the scores by seed, all equal where nothing is drawn."""

    values: list[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """The sample's standard deviation over seeds; None for one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


def shown(mean: float | None, spread: float | None) -> str:
    """A figure as tables have it; None where its cells are missing."""
    if mean is None:
        return MISSING
    return f"{mean:.3f}" if spread is None else f"{mean:.3f} ± {spread:.3f}"


def entry(setting: Setting, cells: Iterable[Cell], metric: str, store: Store) -> Entry | None:
    """The scores of one cell a seed; None where one is missing."""
    found = [result_of(setting, cell, store) for cell in cells]
    values = [result["metrics"][metric] for result in found if result is not None]
    return Entry(values) if len(values) == len(found) else None
