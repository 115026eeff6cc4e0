"""The `laai` console script. A command's module is imported when the command line names the command."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from laai_core.errors import LaaiError, WorkFailed

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
# Each is a module of this package: `add` gives a parser its flags and the function that runs the command.
COMMANDS = {
    "train": "train an intervention, or a baseline, on a task's training examples",
    "compose": "one intervention from several: their sum, and other mixtures",
    "inspect": "show an intervention: layer, site, norms, sparsity, training",
    "data": "show which data sets are found where; `data fetch` downloads them",
    "models": "list the models --model knows by name; `models fetch` gets one",
    "task": "write a harness task of examples of your own",
    "generate": "answers without and with an intervention, side by side",
    "tasks": "list the harness tasks, and the --include_path to give",
    "demo": "train a Δ for a few word rules; compare with zero-shot and ten-shot",
    "check": "compare a results file of the harness with a baseline, or with another run",
    "judge": "GPT-Eval: ask a language model which logged predictions are right",
    "sweep": "a score for every layer, seed and penalty, through the harness",
    "paper": "the paper's tables and figures: train, evaluate, one report",
    "export": "an intervention for llama.cpp, repeng, steering-vectors or pyvene",
    "push": "put an intervention on the Hugging Face Hub, with a model card",
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are LaaiErrors, so that they end in one line as all others do.

    Args:
        module: whose `add` gives this parser its flags, imported when the parser first parses.
    """

    def __init__(self, *args: Any, module: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.allow_abbrev = False  # `sweep --seed 3` would mean --seeds 3
        self._module = module
        self._negative_number_matcher = re.compile(r"-[\d.]+(,-?[\d.]+)*$")  # argparse's has no commas

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Called by argparse for the command that the command line names."""
        if self._module is not None:
            module, self._module = self._module, None
            importlib.import_module(module).add(self)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Called by argparse for a bad command line."""
        raise LaaiError(f"{message} (see {self.prog} --help)")


def make_parser() -> Parser:
    """A parser with every command."""
    parser = Parser(prog="laai", description="Train, inspect and apply layerwise additive activation interventions.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, module=f"lm_eval_laai.commands.{name}")
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
    except RuntimeError as error:
        from torch import OutOfMemoryError  # here: importing torch takes seconds, and not every command needs it

        if "home directory" in str(error):  # of Path.expanduser
            why, code = f"a path begins with ~ and no user's name: {error}", BAD_INPUT
        elif isinstance(error, OutOfMemoryError):
            why, code = f"out of memory: {error}", FAILED
        else:
            raise
    except OSError as error:
        why, code = f"{error.filename or 'a file'}: {error.strerror or error}", BAD_INPUT
    except KeyboardInterrupt as interrupt:
        why, code = str(interrupt) or "interrupted", INTERRUPTED
    if why is not None:
        # Outside the except clauses: the exception keeps progress bars alive that would be drawn behind the line.
        return _stop(why, code)
    if report is None:  # of several launched processes one reports
        return DONE
    try:
        print(json.dumps(report.facts, indent=2) if arguments.json else report.text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        if not isinstance(error, BrokenPipeError):  # a reader such as `head` may have had enough
            return _stop(f"cannot write to standard output: {error.strerror}", FAILED)
    return FAILED if report.failed else DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run `laai ...`; returns the exit code."""
    return run(make_parser(), argv)


def _check_output(name: str | None) -> None:
    """LaaiError for an --output, of any command, that is empty or has line breaks."""
    if name is not None and (not name.strip() or name.splitlines() != [name]):
        raise LaaiError(f"--output {name!r:.80}: expected a path, not empty and without line breaks")


def _stop(why: str, code: int) -> int:
    print(f"laai: error: {' '.join(why.split())}", file=sys.stderr)
    return code
