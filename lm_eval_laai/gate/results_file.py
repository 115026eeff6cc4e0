"""The harness's results files, `results_<date>.json`, as far as a regression gate reads them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laai_core.errors import LaaiError
from laai_core.files import SUFFIX


@dataclass(frozen=True)
class Metric:
    """One number. It may be NaN: that is a result too, if a bad one."""

    value: float
    stderr: float | None
    higher_is_better: bool | None  # None: the harness does not say


@dataclass(frozen=True)
class TaskResult:
    """A task's or a group's numbers, by `metric,filter`, and what they can only be compared under."""

    setting: dict[str, str | int]  # version, shots, samples, data: those the file has
    metrics: dict[str, Metric]


@dataclass(frozen=True)
class Results:
    """What one run of the harness found, and the interventions it applied, by name, as hf-laai reports them."""

    path: Path
    tasks: dict[str, TaskResult]
    interventions: dict[str, dict[str, Any]]


def read_results(source: str | Path) -> Results:
    """Read a results file, or the newest one in a folder given to the harness as --output_path.

    Raises:
        LaaiError: no such file, or none that the harness wrote.
    """
    path = _newest(Path(source).expanduser())
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LaaiError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise LaaiError(f"{path} is no results file: not valid JSON ({error})") from None
    sections = _section(document, "results", path)
    if not sections:
        raise LaaiError(f"{path} is no results file of the harness: it has no 'results'")
    for task in sections:
        _section(sections, task, path)
    interventions = _section(document, "config", path).get("interventions") or []
    if not isinstance(interventions, list) or not all(isinstance(one, dict) for one in interventions):
        raise LaaiError(f"{path}: 'interventions' is not a list of objects")
    return Results(
        path,
        {task: _task(document, task, path) for task in sections},
        {_name(one.get("source")): {k: v for k, v in one.items() if k != "source"} for one in interventions},
    )


def _newest(path: Path) -> Path:
    if not path.is_dir():
        return path
    # By name, which holds the date: a copied or cached folder has lost its files' own.
    found = sorted(path.rglob("results_*.json"), key=lambda file: file.name)
    if not found:
        raise LaaiError(f"no results_*.json in {path}: give the file, or the folder of the harness's --output_path")
    return found[-1]


def _section(document: Any, name: str, path: Path) -> dict[str, Any]:
    """The object of that name, empty where there is none."""
    section = document.get(name, {}) if isinstance(document, dict) else None
    if not isinstance(section, dict):
        raise LaaiError(f"{path} is no results file of the harness: {name!r:.60} is not a JSON object")
    return section


def _task(document: dict[str, Any], task: str, path: Path) -> TaskResult:
    scores = document["results"][task]
    better = _section(_section(document, "higher_is_better", path), task, path)
    setting = {
        # 1.0 for a task and '1.0' for its group, in lm-eval 0.4.13.
        "version": _text(_section(document, "versions", path).get(task)),
        "shots": _section(document, "n-shot", path).get(task),
        "samples": scores.get("sample_len"),
        # Over documents, prompts and targets; only there after --log_samples, and never for a group.
        "data": _text(_section(document, "task_hashes", path).get(task)),
    }
    metrics = {}
    for key, value in scores.items():
        metric, comma, filtered = key.partition(",")
        if comma and not metric.endswith("_stderr") and _is_number(value):
            stderr = scores.get(f"{metric}_stderr,{filtered}")
            direction = better.get(metric)
            metrics[key] = Metric(
                float(value),
                float(stderr) if _is_number(stderr) else None,
                direction if isinstance(direction, bool) else None,
            )
    return TaskResult({name: fact for name, fact in setting.items() if isinstance(fact, str | int)}, metrics)


def _name(source: Any) -> str:
    """A file's name without folder and ending: the task's, where a folder of files was routed by task."""
    return str(source).replace("\\", "/").rpartition("/")[2].removesuffix(SUFFIX)


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
