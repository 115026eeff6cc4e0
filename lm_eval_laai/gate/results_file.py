"""The harness's results files, `results_<date>.json`, as far as a regression gate reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laai_core.errors import LaaiError
from laai_core.files import SUFFIX

# Above any run of the harness; together they hold the reading of a hostile file below 200 MiB.
_LARGEST = 8 << 20  # bytes
_MOST_VALUES = 300_000
_MOST_TASKS = 10_000
_MOST_ENTRIES = 1000  # of a list in an intervention's description, such as its layers
_MOST_METRICS = 1000  # of a task, including its other entries
LONGEST_NUMBER = 32  # characters: a longer one is no metric, and Python may refuse to print it
_LONGEST_NAME = 300  # characters of a task's or a metric's name, which are printed many times


@dataclass(frozen=True)
class Metric:
    """One number, possibly NaN."""

    value: float
    stderr: float | None
    higher_is_better: bool | None  # None: the harness does not say


@dataclass(frozen=True)
class TaskResult:
    """A task's or a group's numbers, by `metric,filter`, and the setting that comparable results share."""

    setting: dict[str, str | int]  # version, shots, samples, data: those the file has
    metrics: dict[str, Metric]


@dataclass(frozen=True)
class Results:
    """Results of one run of the harness, and its interventions by name, as hf-laai reports them."""

    path: Path
    tasks: dict[str, TaskResult]
    interventions: dict[str, dict[str, Any]]


def read_results(source: str | Path) -> Results:
    """Read a results file, or the newest one in a folder given to the harness as --output_path.

    Raises:
        LaaiError: no such file, one too large, or none that the harness wrote.
    """
    path = _newest(Path(source).expanduser())
    try:
        text = read_text(path, _LARGEST)
        if sum(map(text.count, "[{,")) > _MOST_VALUES:
            raise LaaiError(f"{path} holds over {_MOST_VALUES} values: expected a results file of the harness")
        document = json.loads(text, parse_int=_whole_number)
    except OSError as error:
        raise LaaiError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise LaaiError(f"{path} is no results file: not valid JSON ({error})") from None
    sections = _section(document, "results", path)
    if not sections:
        raise LaaiError(f"{path} is no results file of the harness: it has no 'results'")
    if len(sections) > _MOST_TASKS:
        raise LaaiError(f"{path} holds {len(sections)} tasks: expected at most {_MOST_TASKS}")
    for task in sections:
        if len(_section(sections, task, path)) > _MOST_METRICS:
            raise LaaiError(f"{path}: {task!r:.60} holds over {_MOST_METRICS} values: expected a task's metrics")
    interventions = _section(document, "config", path).get("interventions") or []
    if not isinstance(interventions, list) or not all(isinstance(one, dict) for one in interventions):
        raise LaaiError(f"{path}: 'interventions' is not a list of objects")
    return Results(
        path,
        {task: _task(document, task, path) for task in sections},
        dict(_intervention(one, path) for one in interventions),
    )


def read_text(path: Path, largest: int) -> str:
    """A UTF-8 file's text.

    Raises:
        OSError, ValueError: it cannot be read, or is not UTF-8.
        LaaiError: it has more bytes than `largest`.
    """
    with path.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise LaaiError(f"{path} has over {largest} bytes: too large to be checked")
    return content.decode("utf-8")


def check_name(name: str, where: str) -> None:
    """LaaiError for a name that is too long for a table, or not Unicode."""
    if len(name) > _LONGEST_NAME:
        raise LaaiError(f"{where}: a name has {len(name)} characters: expected at most {_LONGEST_NAME}")
    _check_unicode(name, where)


def check_facts(facts: Mapping[str, Any], where: str) -> None:
    """LaaiError for an intervention's description that holds more than texts, numbers and lists of them."""
    for name, value in facts.items():
        check_name(name, where)
        if isinstance(value, list) and len(value) > _MOST_ENTRIES:
            raise LaaiError(f"{where}: {name!r:.60} is a list of {len(value)}: expected at most {_MOST_ENTRIES}")
        for one in value if isinstance(value, list) else [value]:
            if not isinstance(one, str | int | float | None):
                raise LaaiError(
                    f"{where}: {name!r:.60} holds a {type(one).__name__}: expected a text, a number or a list of them"
                )
            if isinstance(one, str):
                _check_unicode(one, where)


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can escape half of a surrogate pair
        raise LaaiError(f"{where}: {text!a:.60} is no Unicode text") from None


def _whole_number(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _intervention(facts: dict[str, Any], path: Path) -> tuple[str, dict[str, Any]]:
    """Name and description, without the path, which differs from machine to machine."""
    name = _name(facts.get("source"))
    kept = {key: value for key, value in facts.items() if key != "source"}
    check_name(name, f"{path}: 'interventions'")
    check_facts(kept, f"{path}: intervention {name!r:.60}")
    return name, kept


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
    check_name(task, f"{path}: 'results'")
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
            check_name(key, f"{path}: {task!r:.60}")
            stderr = scores.get(f"{metric}_stderr,{filtered}")
            direction = better.get(metric)
            metrics[key] = Metric(
                float(value),
                float(stderr) if _is_number(stderr) else None,
                direction if isinstance(direction, bool) else None,
            )
    known = {name: fact for name, fact in setting.items() if isinstance(fact, str | int)}
    check_facts(known, f"{path}: {task!r:.60}")
    return TaskResult(known, metrics)


def _name(source: Any) -> str:
    """A file's name without folder and ending: the task's, where a folder of files was routed by task."""
    return (
        ("None" if not isinstance(source, str) else source).replace("\\", "/").rpartition("/")[2].removesuffix(SUFFIX)
    )


def _text(value: Any) -> str | None:
    return str(value) if isinstance(value, str | int | float) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
