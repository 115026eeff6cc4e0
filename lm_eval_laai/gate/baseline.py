"""Baselines: expected results of a run of the harness, with tolerances. A YAML file, edited by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from laai_core.errors import LaaiError
from lm_eval_laai.gate.results_file import LONGEST_NUMBER, Metric, Results, check_facts, check_name, read_text

# Above any baseline (some 2,000 tasks of one metric), and low enough that a hostile file is refused within 2 seconds.
_LARGEST = 512 << 10  # bytes
_MOST_VALUES = 40_000
_DEEPEST = 16
SETTING = ("version", "shots", "samples", "data")
_HEADER = """\
# What `laai check RESULTS --against FILE` expects. --update writes the file anew and keeps the tolerances, which are
# yours to set: {absolute: 0.01}, {relative: 0.02} (a share of the value) or {standard_errors: 2}.
"""


@dataclass(frozen=True)
class Expected:
    """A metric's value, and by how much a result may be worse."""

    value: float
    stderr: float | None
    tolerance: tuple[str, float]  # absolute, relative or standard_errors; how much

    @property
    def margin(self) -> float:
        """The tolerance in the metric's own units."""
        kind, size = self.tolerance
        return size * {"absolute": 1.0, "relative": abs(self.value), "standard_errors": self.stderr or 0.0}[kind]


@dataclass(frozen=True)
class ExpectedTask:
    """A task's expected metrics, and the setting they were measured in."""

    setting: dict[str, str | int]
    metrics: dict[str, Expected]


@dataclass(frozen=True)
class Baseline:
    """All expected tasks, and the interventions that were applied, as hf-laai reports them, by name."""

    tasks: dict[str, ExpectedTask]
    interventions: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, results: Results, before: Baseline | None = None) -> Baseline:
        """The baseline that expects exactly these results.

        Tolerances are those of `before`; so are tasks that are not in these results, the interventions if there are
        such tasks, and a task's `data` where no samples were logged: a partial run must take nothing out of the gate.
        """
        before = before or cls({}, {})
        tasks = dict(before.tasks)
        for name, task in results.tasks.items():
            old = before.tasks.get(name, ExpectedTask({}, {}))
            metrics = {k: _expected(f"{name}, {k}", m, old.metrics.get(k)) for k, m in task.metrics.items()}
            tasks[name] = ExpectedTask(old.setting | task.setting, metrics)
        partial = not before.tasks.keys() <= results.tasks.keys()
        return cls(tasks, (before.interventions if partial else {}) | results.interventions)

    @classmethod
    def parse(cls, text: str, where: str) -> Baseline:
        """The baseline of a YAML text; LaaiError, starting with `where`, names the fault."""
        try:
            if len(text.encode()) > _LARGEST:  # a text of `dump` has not passed `read_text`
                raise _TooLarge(f"has over {_LARGEST} bytes")
            _check_size(text)
            content = yaml.load(text, Loader=_Loader)
        except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            # Not only YAMLError: PyYAML trips over a tag that its text does not fit, such as `!!bool maybe`.
            raise LaaiError(f"{where} is not valid YAML: {' '.join(str(error).split())[:200]}") from None
        except _TooLarge as error:
            raise LaaiError(f"{where} {error}: too large for a baseline") from None
        top = _object(content, where, ("tasks", "interventions"))
        tasks = _object(top.get("tasks"), f"{where}: tasks")
        applied = _object(top.get("interventions", {}), f"{where}: interventions")
        if not tasks:
            raise LaaiError(f"{where}: 'tasks' is empty: a gate that checks nothing always passes")
        return cls(
            {name: _task(task, f"{where}: {name}") for name, task in tasks.items()},
            {name: _applied(one, f"{where}: interventions: {name}") for name, one in applied.items()},
        )

    def dump(self) -> str:
        """The file's text."""
        tasks = {}
        for name, task in self.tasks.items():
            metrics = {}
            for key, one in task.metrics.items():
                stderr = {} if one.stderr is None else {"stderr": one.stderr}
                kind, size = one.tolerance
                metrics[key] = {"value": one.value, **stderr, "tolerance": {kind: size}}
            tasks[name] = {**task.setting, "metrics": metrics}
        content = {"tasks": tasks, "interventions": self.interventions}
        return _HEADER + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None)


def load_baseline(path: Path) -> Baseline:
    """Read a baseline; LaaiError names the fault."""
    try:
        text = read_text(path, _LARGEST)
    except OSError as error:
        raise LaaiError(f"cannot read the baseline {path}: {error.strerror}") from None
    except ValueError as error:
        raise LaaiError(f"{path} is not valid YAML: {error}") from None
    return Baseline.parse(text, str(path))


class _TooLarge(Exception):
    """A YAML text that would become more than a baseline may hold."""


def _check_size(text: str) -> None:
    """Count values and depth before anything is built: an alias stands for all values of its anchor.

    Raises:
        _TooLarge: over `_MOST_VALUES` values with every alias written out, or over `_DEEPEST` levels.
        yaml.YAMLError: not YAML, or an alias inside its own anchor.
    """
    sizes: dict[str, int] = {}  # by anchor
    unfinished: list[tuple[str | None, int]] = []  # the anchor of each open collection, and the values before it
    values = 0
    for event in yaml.parse(text, Loader=_FASTEST):
        if isinstance(event, yaml.CollectionStartEvent):
            unfinished.append((event.anchor, values))
            values += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = unfinished.pop()
            if anchor is not None:
                sizes[anchor] = values - before
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise yaml.composer.ComposerError(None, None, "an alias without its anchor", event.start_mark)
            values += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            values += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        if len(unfinished) > _DEEPEST:
            raise _TooLarge(f"nests over {_DEEPEST} levels")
        if values > _MOST_VALUES:
            raise _TooLarge(f"holds over {_MOST_VALUES} values")


# libyaml's loader, where PyYAML was built with it: five times faster, and the same values.
_FASTEST: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_FASTEST):
    """SafeLoader keeps the last of two equal keys: of a task given twice, one would silently go unchecked."""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    pairs = loader.construct_pairs(node, deep=True)
    if len(dict(pairs)) != len(pairs):
        raise yaml.constructor.ConstructorError(None, None, "a key is given twice", node.start_mark)
    return dict(pairs)


def _number_node(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float:
    """As SafeLoader, which takes numbers that Python refuses to convert or to print."""
    text = loader.construct_scalar(node)
    if len(text) > LONGEST_NUMBER:
        raise yaml.constructor.ConstructorError(None, None, f"a number of {len(text)} digits", node.start_mark)
    return loader.construct_yaml_int(node) if node.tag.endswith(":int") else loader.construct_yaml_float(node)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _number_node)
_Loader.add_constructor("tag:yaml.org,2002:float", _number_node)


def _expected(where: str, metric: Metric, before: Expected | None) -> Expected:
    if not math.isfinite(metric.value):
        raise LaaiError(f"{where} is {metric.value}: that cannot be expected of later results")
    if before is not None:
        tolerance = before.tolerance
    elif metric.stderr:
        tolerance = ("standard_errors", 2.0)
    else:
        tolerance = ("relative", 0.02)
    if tolerance[0] == "standard_errors" and metric.stderr is None:
        raise LaaiError(f"{where} has a tolerance in standard errors, and the results give none: change the tolerance")
    return Expected(metric.value, metric.stderr, tolerance)


def _task(content: Any, where: str) -> ExpectedTask:
    task = _object(content, where, (*SETTING, "metrics"))
    metrics = _object(task.get("metrics", {}), f"{where}: metrics")
    setting = {name: task[name] for name in SETTING if name in task}
    for name, value in setting.items():
        if not isinstance(value, str | int):
            raise LaaiError(f"{where}: {name} is a {type(value).__name__}: expected a text or a whole number")
    check_facts(setting, where)
    return ExpectedTask(setting, {key: _metric(one, f"{where}: {key}") for key, one in metrics.items()})


def _applied(content: Any, where: str) -> dict[str, Any]:
    facts = _object(content, where)
    check_facts(facts, where)
    return facts


def _metric(content: Any, where: str) -> Expected:
    metric = _object(content, where, ("value", "stderr", "tolerance"))
    tolerance = _object(metric.get("tolerance"), f"{where}: tolerance", ("absolute", "relative", "standard_errors"))
    if len(tolerance) != 1:
        raise LaaiError(f"{where}: tolerance has {len(tolerance)} entries: expected one")
    ((kind, size),) = tolerance.items()
    value = _number(metric.get("value"), f"{where}: value")
    stderr = None if metric.get("stderr") is None else _number(metric["stderr"], f"{where}: stderr", 0.0)
    if kind == "standard_errors" and stderr is None:
        raise LaaiError(f"{where}: a tolerance in standard errors needs stderr")
    return Expected(value, stderr, (kind, _number(size, f"{where}: tolerance", 0.0)))


def _object(value: Any, where: str, keys: tuple[str, ...] | None = None) -> dict[str, Any]:
    """`value`, if it is a mapping from texts, of none but these `keys`."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise LaaiError(f"{where}: expected names and their content, found {type(value).__name__}")
    for key in value:
        check_name(key, where)
    unknown = sorted(set(value) - set(keys)) if keys else []
    if keys and unknown:
        raise LaaiError(f"{where}: unknown entry {unknown[0]!r:.60}: expected {', '.join(keys)}")
    return dict(value)


def _number(value: Any, where: str, least: float = -math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < least:
        shown = repr(value) if isinstance(value, int | float | str) else type(value).__name__
        raise LaaiError(f"{where} is {shown:.60}: expected a finite number{', 0 or above' if least == 0 else ''}")
    return float(value)
