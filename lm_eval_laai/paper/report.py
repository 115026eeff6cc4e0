"""One report of all requested tables and figures: report.md for people, report.json for machines, PNGs.

The report has scores and the facts they depend on, never a time or a date: the same cells give the same report,
however often their run was interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from laai_core import files
from laai_core.errors import LaaiError
from laai_core.intervention import Intervention
from lm_eval_laai.experiments.cells import Fit, Store, named
from lm_eval_laai.experiments.curves import draw
from lm_eval_laai.experiments.scores import Entry, entry, result_of
from lm_eval_laai.experiments.setting import Setting, software
from lm_eval_laai.inspection.plot import heat_map, largest
from lm_eval_laai.paper import markdown
from lm_eval_laai.paper.content import FIGURE_1, JUDGED, NOT_RUN, Content, map_name
from lm_eval_laai.paper.tables import Recipe, Table


def write(content: Content, store: Store, folder: Path) -> dict[str, Any]:
    """Write the report into `folder`; returns the content of report.json."""
    facts: dict[str, Any] = {
        "command": content.command,
        "seeds": content.seeds,
        "versions": software(),
        "models": [_model_facts(recipe) for recipe in content.recipes],
        "judge": content.judge,
        "tables": {table.name: _table_facts(table, content, store) for table in content.tables},
        "data": _data_facts(content),
        "missing": _missing(content, store),
    }
    if content.sweep is not None:
        facts["figure_1"] = content.sweep.facts(store)
        draw(facts["figure_1"], folder / FIGURE_1)
    if content.maps:
        setting = content.recipes[0].setting
        facts["figure_2"] = _draw_maps(content.maps, setting, store, folder)
    files.write(folder / "report.json", (json.dumps(facts, indent=1, ensure_ascii=False) + "\n").encode())
    files.write(folder / "report.md", markdown.render(content, facts).encode())
    return facts


def _missing(content: Content, store: Store) -> list[str]:
    """The cells and maps that could not be computed."""
    wanted = {pair for table in content.tables for pair in table.cells(content.seeds)}
    if content.sweep is not None:
        wanted |= {(content.sweep.setting, cell) for cell in content.sweep.cells()}
    setting = content.recipes[0].setting
    maps = [f"figure 2, {title}" for title, fit in content.maps.items() if _trained(setting, fit, store) is None]
    return sorted(named(cell) for setting, cell in wanted if result_of(setting, cell, store) is None) + maps


def _model_facts(recipe: Recipe) -> dict[str, Any]:
    source = recipe.setting.source
    return {
        "model": source.name,
        "revision": source.revision,
        "identity": recipe.setting.model,
        "dtype": source.dtype,
        "device": source.checked_device().type,
        "layer": recipe.layer,
        "l1": recipe.l1,
        "group": recipe.group,
        "penalty_scale": recipe.penalty_scale,
        "limit": recipe.setting.limit,
    }


def _data_facts(content: Content) -> dict[str, Any]:
    """Files and test items of every task in the report."""
    tasks = {task: content.recipes[0].setting for table in content.tables for task in table.columns}
    if content.sweep is not None:
        tasks |= dict.fromkeys(content.sweep.tasks, content.sweep.setting)
    return {
        task: {"files": setting.split(task).sources, "test_items_sha256": setting.test_sha256(task)}
        for task, setting in tasks.items()
    }


def _table_facts(table: Table, content: Content, store: Store) -> list[dict[str, Any]]:
    rows = []
    for row in table.rows:
        published = content.published(table, row)
        columns: dict[str, Any] = {}
        for number, task in enumerate(table.columns):
            cells = [row.cell(task, seed) for seed in content.seeds]
            found = entry(row.setting, cells, table.metric, store)
            judged = content.gpt_eval.get((table.name, row.title, task))
            columns[task] = {
                table.metric: _entry_facts(found),
                "paper": None if published is None else published[number]._asdict(),
            }
            if table.name in JUDGED:
                columns[task]["gpt_eval"] = NOT_RUN if content.judge is None else _entry_facts(judged)
        rows.append({"method": row.title, "columns": columns})
    return rows


def _entry_facts(found: Entry | None) -> dict[str, Any] | None:
    return None if found is None else {"mean": found.mean, "spread": found.spread, "values": found.values}


def _draw_maps(maps: Mapping[str, Fit], setting: Setting, store: Store, folder: Path) -> dict[str, Any]:
    """Draw Figure 2's panels on one colour scale; their facts by title, None for a panel that was not trained."""
    found = {title: _trained(setting, fit, store) for title, fit in maps.items()}
    limit = max((largest(one) for one in found.values() if one is not None), default=None)
    for title, one in found.items():
        (folder / map_name(title)).unlink(missing_ok=True)  # an earlier report's
        if one is not None:
            heat_map(one, folder / map_name(title), limit)
    return {title: one and _map_facts(maps[title], one) for title, one in found.items()}


def _trained(setting: Setting, fit: Fit, store: Store) -> Intervention | None:
    try:
        return Intervention.load(store.fit_path(fit, setting.fit_identity(fit)))
    except LaaiError:
        return None


def _map_facts(fit: Fit, intervention: Intervention) -> dict[str, Any]:
    vector = intervention.vector(intervention.layers[0])
    return {
        "task": fit.task,
        "seed": fit.seed,
        "sha256": intervention.sha256,
        "zero_share": float((vector == 0).float().mean()),
        "active_heads": int(vector.any(1).sum()),
        "heads": len(vector),
    }
