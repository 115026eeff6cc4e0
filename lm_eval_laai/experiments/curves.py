"""Figure 1 and `laai sweep`: a score against the layer, for several penalties, with its spread over seeds."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laai_core import files
from lm_eval_laai.experiments.cells import Cell, Fit, Store
from lm_eval_laai.experiments.scores import entry
from lm_eval_laai.experiments.setting import Setting, task_info

COLOURS = ("#b04a2f", "#2f6fb0", "#4c9a52", "#8258a8", "#b08d2f", "#5b6770")


@dataclass(frozen=True)
class Sweep:
    """tasks x layers x seeds x penalties in one setting."""

    setting: Setting
    tasks: tuple[str, ...]  # the harness's names
    layers: tuple[int, ...]  # 0-based
    seeds: tuple[int, ...]
    penalties: tuple[tuple[float, float], ...]  # (l1, group)
    penalty_scale: str
    n_train: int
    steps: int | None = None  # None: chosen by cross-validation for every fit
    start: str = "icl"

    def cell(self, task: str, layer: int, seed: int, penalty: tuple[float, float]) -> Cell:
        """The cell of one score."""
        l1, group = penalty
        fit = Fit(task, "laai", seed, self.n_train, layer, self.steps, l1, group, self.penalty_scale, self.start)
        return Cell(task, fits=(fit,))

    def cells(self) -> list[Cell]:
        """All cells."""
        return [
            self.cell(task, layer, seed, penalty)
            for task in self.tasks
            for layer in self.layers
            for penalty in self.penalties
            for seed in self.seeds
        ]

    def facts(self, store: Store) -> list[dict[str, Any]]:
        """A record for every task, penalty and layer."""
        records = []
        for task in self.tasks:
            metric = task_info(task).metric
            for penalty in self.penalties:
                for layer in self.layers:
                    cells = [self.cell(task, layer, seed, penalty) for seed in self.seeds]
                    found = entry(self.setting, cells, metric, store)
                    records.append(
                        {
                            "task": task,
                            "metric": metric,
                            "l1": penalty[0],
                            "group": penalty[1],
                            "layer": layer,
                            "mean": found and found.mean,
                            "spread": found and found.spread,
                            "values": found and found.values,
                        }
                    )
        return records


def title(l1: float, group: float) -> str:
    """The name of the loss with these penalties."""
    return "unregularised" if l1 == group == 0 else f"γ = {l1:g}, λ = {group:g}"


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """A panel for each task, a line for each penalty, a band of one standard deviation over seeds on both sides."""
    # Figure alone, never pyplot: see lm_eval_laai.inspection.plot.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    tasks = list(dict.fromkeys(record["task"] for record in records))
    penalties = list(dict.fromkeys((record["l1"], record["group"]) for record in records))
    columns = min(len(tasks), 2)  # more would be too small to read on a page
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.9 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for panel, task in zip(panels, tasks, strict=False):
        for number, penalty in enumerate(penalties):
            line = [r for r in records if r["task"] == task and (r["l1"], r["group"]) == penalty]
            points = [(r["layer"], r["mean"], r["spread"] or 0.0) for r in line if r["mean"] is not None]
            if not points:
                continue
            layers, means, spreads = zip(*points, strict=True)
            colour = COLOURS[number % len(COLOURS)]
            panel.plot(layers, means, marker="o", markersize=3, color=colour, label=title(*penalty))
            low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
            high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
            panel.fill_between(layers, low, high, color=colour, alpha=0.2, linewidth=0)
        metric = next(r["metric"] for r in records if r["task"] == task).replace("_", " ")
        panel.set_title(f"{task.removeprefix('laai_')}, {metric}", fontsize="medium")
        panel.set_xlabel("layer, from 0")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].legend(fontsize="small", frameon=False)
    for panel in panels[len(tasks) :]:
        panel.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    files.write(path, buffer.getvalue())
