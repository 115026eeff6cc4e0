"""The `laai` console script: the core's commands, and the harness side's."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from laai_core.cli import make_parser, run
from laai_core.commands.report import Report, table
from lm_eval_laai import check, demo, sweep
from lm_eval_laai.judge import command as judge
from lm_eval_laai.paper import command as paper
from lm_eval_laai.tasks import include_path, list_tasks


def main(argv: Sequence[str] | None = None) -> int:
    """Run `laai ...`; returns the exit code."""
    parser, commands = make_parser("laai")
    _add_tasks(commands)
    demo.add(commands)
    check.add(commands)
    judge.add(commands)
    sweep.add(commands)
    paper.add(commands)
    return run(parser, argv)


def _add_tasks(commands: Any) -> None:
    parser = commands.add_parser("tasks", help="list the harness tasks, and the --include_path to give")
    parser.set_defaults(command=_tasks)
    parser.add_argument("--include-path", action="store_true", help="print that path and nothing else")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _tasks(arguments: argparse.Namespace) -> Report:
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
