"""`laai task`: a harness task of one's own examples."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from laai_core.data.examples import STDIN
from lm_eval_laai.commands.examples import add_template_argument, read_rows
from lm_eval_laai.commands.outputs import check_no_input, check_writable
from lm_eval_laai.commands.report import Report, table

logger = logging.getLogger(__name__)

MANY_TOKENS = 256  # the harness's own default


def add(parser: argparse.ArgumentParser) -> None:
    """The flags of `task`."""
    parser.set_defaults(command=_command)
    parser.add_argument("file", metavar="FILE", help=f"rows as for train's --examples, or {STDIN}")
    parser.add_argument("--output", required=True, metavar="DIR", help="gets a folder of the task's name")
    parser.add_argument("--name", help="the task's name (default: the file's)")
    add_template_argument(parser)
    parser.add_argument(
        "--max-gen-toks",
        type=int,
        help="tokens to generate at most (default: the bytes of the longest target, 16 at least)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _command(arguments: argparse.Namespace) -> Report:
    data = read_rows(arguments.file, arguments.prompt_template)
    folder = Path(arguments.output).expanduser()
    check_writable(folder)
    from lm_eval_laai.own_task import ROWS, enough_tokens, write  # here: imports the harness, which takes seconds

    check_no_input(folder / (arguments.name or data.name) / ROWS, arguments.file)
    count = enough_tokens(data) if arguments.max_gen_toks is None else arguments.max_gen_toks
    path = write(data, folder, arguments.name, count)
    if count > MANY_TOKENS and not data.has_options:
        logger.warning(
            "max_gen_toks is %d: the harness cuts prompts to what it leaves of the model's window; "
            "--max-gen-toks N sets another",
            count,
        )
    facts: dict[str, Any] = {
        "task": path.stem,
        "yaml": str(path),
        "include_path": str(folder),
        "training_pool": data.pool_size,
        "test_items": len(data.items) - data.pool_size,
        **({} if data.has_options else {"max_gen_toks": count}),
    }
    return Report(facts, table([(name.replace("_", " "), value) for name, value in facts.items()]))
