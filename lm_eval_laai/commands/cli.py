"""The `laai` console script."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch

from laai_core.errors import LaaiError, WorkFailed
from lm_eval_laai.commands import check, compose, data, demo, inspect, judge, models, paper, sweep, tasks, train

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are LaaiErrors, so that they end in one line as all others do."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse for a bad command line."""
        raise LaaiError(f"{message} (see {self.prog} --help)")


def make_parser() -> Parser:
    """A parser with every command."""
    parser = Parser(prog="laai", description="Train, inspect and apply layerwise additive activation interventions.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (train, compose, inspect, data, models, tasks, demo, check, judge, sweep, paper):
        command.add(commands)
    return parser


def run(parser: Parser, argv: Sequence[str] | None = None) -> int:
    """Parse, run the command, print its report on stdout or one line on stderr; returns the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Δ must not cost the result
    try:
        arguments = parser.parse_args(argv)
        _check_output(getattr(arguments, "output", None))
        report = arguments.command(arguments)
        why = None
    except WorkFailed as error:
        why, code = str(error), FAILED
    except LaaiError as error:
        why, code = str(error), BAD_INPUT
    except torch.OutOfMemoryError as error:
        why, code = f"out of memory: {error}", FAILED
    except KeyboardInterrupt as interrupt:
        why, code = str(interrupt) or "interrupted", INTERRUPTED
    if why is not None:
        # Not in the except clauses: bars of the frames that an exception holds would be drawn behind the line.
        return _stop(why, code)
    if report is None:  # where several processes were launched, one of them reports
        return DONE
    print(json.dumps(report.facts, indent=2) if arguments.json else report.text)
    return FAILED if report.failed else DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run `laai ...`; returns the exit code."""
    return run(make_parser(), argv)


def _check_output(name: str | None) -> None:
    """LaaiError for an --output, of any command, that would be the current folder, or a name nobody can type."""
    if name is not None and (not name.strip() or name.splitlines() != [name]):
        raise LaaiError(f"--output {name!r:.80}: expected a path, not empty and without line breaks")


def _stop(why: str, code: int) -> int:
    print(f"laai: error: {' '.join(why.split())}", file=sys.stderr)
    return code
