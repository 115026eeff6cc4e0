"""`laai tasks`: the harness tasks, and the folder of their definitions."""

from __future__ import annotations

import argparse

from lm_eval_laai.commands.report import Report, table
from lm_eval_laai.tasks import include_path, list_tasks


def add(parser: argparse.ArgumentParser) -> None:
    """The flags of `tasks`."""
    parser.set_defaults(command=_command)
    parser.add_argument("--include-path", action="store_true", help="print that path and nothing else")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _command(arguments: argparse.Namespace) -> Report:
    if arguments.include_path:
        return Report({"include_path": str(include_path())}, str(include_path()))
    tasks = list_tasks()
    facts = {"include_path": str(include_path()), "tasks": [task._asdict() for task in tasks]}
    rows = table(
        [
            ("task", "group", "laai train --task", "data", "metric"),
            *((task.name, task.group, task.data_set, task.source, task.metric) for task in tasks),
        ]
    )
    return Report(facts, f"{rows}\n\n--include_path {include_path()}")
