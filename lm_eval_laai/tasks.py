"""The folder and the content of the task definitions, read without the harness."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from laai_core.data.tasks import EXAMPLE_OPTIONS, EXAMPLES, OPINIONQA_GROUP, PAIRS

NO_GROUP = "-"
# `harness:NAME`: a task of the harness's own.
HARNESS = "harness"


class TaskInfo(NamedTuple):
    """One task as its YAML defines it."""

    name: str  # as given to the harness's --tasks
    group: str  # NO_GROUP when it is in none
    data_set: str  # as given to laai_core.load_task
    source: str
    metric: str

    @property
    def generates(self) -> bool:
        """Whether answers are generated; else the options' log-likelihoods are computed."""
        return self.metric == "exact_match"


def include_path() -> Path:
    """The folder to give to the harness's --include_path."""
    spec = find_spec("lm_eval_laai.task_yamls")
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    # Not installed, run from a clone: there the folder has its own name.
    return Path(__file__).resolve().parent.parent / "task_yamls"


def list_tasks() -> list[TaskInfo]:
    """Every task: group after group, in the groups' order, then those in no group."""
    configs = [read_yaml(path) for path in sorted(include_path().glob("**/*.yaml"))]
    by_name = {config["task"]: config for config in configs if "group" not in config}
    groups = {name: group["group"] for group in configs if "group" in group for name in group["task"]}
    return [_info(by_name[name], groups.get(name, NO_GROUP)) for name in {**groups, **by_name}]


def harness_task(task: str) -> str:
    """The harness's name of a task, by which an intervention folder names its files.

    The text behind a colon selects word pairs or a group's opinions, which the harness gets as metadata. Behind
    `harness:` is a name of the harness's own.
    """
    kind, _, rest = task.partition(":")
    return rest if kind == HARNESS else f"laai_{kind}"


def recorded_task(task: str) -> str:
    """The task name that a trained file records."""
    return harness_task(task) if task.startswith(f"{HARNESS}:") else f"laai_{task}"


def harness_metadata(
    tasks: Iterable[str], seed: int | None = None, n_train: int | None = None, data: str | None = None
) -> dict[str, Any]:
    """The harness's --metadata for tasks, with or without laai_: the data behind a task's colon, and what is given.

    Args:
        seed, n_train: the draw of examples.
        data: folder of the public data sets; None is $LAAI_DATA.
    """
    draw = {"seed": seed, "n_train": n_train, "data": data}
    metadata = {name: value for name, value in draw.items() if value is not None}
    for task in tasks:
        name, _, rest = task.removeprefix("laai_").partition(":")
        if name in (PAIRS, EXAMPLES, EXAMPLE_OPTIONS):
            metadata["file"] = rest
        elif name == OPINIONQA_GROUP:
            metadata["attribute"], _, metadata["group"] = rest.partition("=")
    return metadata


def _info(config: dict[str, Any], group: str) -> TaskInfo:
    return TaskInfo(
        name=config["task"],
        group=group,
        data_set=config["metadata"]["laai_task"],
        source=config["metadata"]["source"],
        metric=config["metric_list"][0]["metric"],
    )


class _Loader(yaml.SafeLoader):
    """Reads the harness's `!function module.name` as text: nothing is imported to list tasks."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML merged with its includes as the harness merges: shallowly, the YAML's own keys win."""
    config: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    included = config.pop("include", None)
    return {**read_yaml(path.parent / included), **config} if included else config
