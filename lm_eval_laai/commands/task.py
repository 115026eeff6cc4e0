"""`laai task`: a harness task of one's own examples."""

from __future__ import annotations

import argparse
from pathlib import Path

from laai_core.data.examples import STDIN
from laai_core.data.split import in_training_pool
from lm_eval_laai.commands.examples import add_template_argument, read_rows
from lm_eval_laai.commands.options import check_no_input, check_writable
from lm_eval_laai.commands.report import Report, table


def add(parser: argparse.ArgumentParser) -> None:
    """The flags of `task`."""
    parser.set_defaults(command=_command)
    parser.add_argument("file", metavar="FILE", help=f"rows as for train's --examples, or {STDIN}")
    parser.add_argument("--output", required=True, metavar="DIR", help="gets a folder of the task's name")
    parser.add_argument("--name", help="the task's name (default: the file's)")
    add_template_argument(parser)
    parser.add_argument("--max-gen-toks", type=int, help="tokens to generate at most (default: any target fits)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _command(arguments: argparse.Namespace) -> Report:
    data = read_rows(arguments.file, arguments.prompt_template)
    folder = Path(arguments.output).expanduser()
    check_writable(folder)
    from lm_eval_laai.own_task import ROWS, write  # here: imports the harness, which takes seconds

    check_no_input(folder / (arguments.name or data.name) / ROWS, arguments.file)
    path = write(data, folder, arguments.name, arguments.max_gen_toks)
    pool = sum(in_training_pool(item.key) for item in data.items)
    facts = {
        "task": path.stem,
        "yaml": str(path),
        "include_path": str(folder),
        "training_pool": pool,
        "test_items": len(data.items) - pool,
    }
    return Report(facts, table([(name.replace("_", " "), value) for name, value in facts.items()]))
