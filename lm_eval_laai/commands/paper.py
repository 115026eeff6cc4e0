"""`laai paper`: the paper's six tables and two figures, and one report of them."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from laai_core.errors import LaaiError
from laai_core.settings import Job
from lm_eval_laai.commands.judge import add_judge_arguments, judge_from
from lm_eval_laai.commands.options import (
    DATA_HELP,
    add_layer_argument,
    add_model_arguments,
    check_counts,
    check_unused,
    checked_layer,
    layer_count,
    model_source,
    numbers,
)
from lm_eval_laai.commands.outputs import check_writable
from lm_eval_laai.commands.report import Report
from lm_eval_laai.experiments.cells import Cell, Fit, Store, named
from lm_eval_laai.experiments.curves import Sweep
from lm_eval_laai.experiments.run import Plan, Process, run
from lm_eval_laai.experiments.setting import Setting
from lm_eval_laai.inspection.plot import check_plot
from lm_eval_laai.judge import Cache, Judge
from lm_eval_laai.judge.endpoint import OPENAI_URL, package_and_key
from lm_eval_laai.judge.judgement import check_concurrency
from lm_eval_laai.known_models.folder import reference_model
from lm_eval_laai.methods.method import middle_layer
from lm_eval_laai.paper import estimate, gpt_eval, report
from lm_eval_laai.paper.content import FIGURE_1, JUDGED, Content
from lm_eval_laai.paper.tables import EXAMPLES, FOUR_RULES, STEPS, TITLES, Recipe, Table, examples_table, paper_table

LEXICON = "lexicon"
FIGURES = (1, 2)
PAPER_LAYER = 3  # the paper's fourth layer
PAPER_PENALTY = 0.01  # the paper's gamma and lambda
QUICK_LIMIT, QUICK_STEPS, QUICK_LAYERS = 100, 30, 6


def add(parser: argparse.ArgumentParser) -> None:
    """The flags of `paper`."""
    parser.set_defaults(command=_command)
    add_model_arguments(parser, required=False, several=True)
    parser.add_argument("--data", metavar=f"{LEXICON} or DIR", help=f"{LEXICON} is all bundled; else the {DATA_HELP}")
    parser.add_argument(
        "--tables", type=numbers, default=list(TITLES), metavar="N[,N]", help='default: all six; "" for none'
    )
    parser.add_argument(
        "--figures", type=numbers, default=list(FIGURES), metavar="N[,N]", help='default: both; "" for none'
    )
    parser.add_argument(
        "--rules",
        type=lambda text: text.split(","),
        default=list(FOUR_RULES),
        metavar="R[,R]",
        help=f"of Figure 1 (default: the paper's, {','.join(FOUR_RULES)})",
    )
    parser.add_argument(
        "--examples",
        type=numbers,
        default=[],
        metavar="N[,N]",
        help="also a table of scores by number of training examples, as 1,2,5,10",
    )
    parser.add_argument(
        "--group",
        action="append",
        dest="groups",
        metavar="ATTRIBUTE=GROUP",
        help="a group of people in OpinionQA, for Table 3, as in SEX=Female; may be repeated (default: the paper's)",
    )
    parser.add_argument("--seeds", type=int, default=5, help="draws of examples: 0, 1, ... (default: %(default)s)")
    add_layer_argument(parser, f"{PAPER_LAYER}, the paper's; on the lexicon the middle")
    parser.add_argument("--limit", type=int, help="test items a task (default: all)")
    parser.add_argument("--batch-size", type=int, default=64, help="prompts at once (default: %(default)s)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK_LIMIT} test items, adapters of {QUICK_STEPS} steps: shows that it runs, compares nothing",
    )
    parser.add_argument("--dry-run", action="store_true", help="list what is to be computed, and estimate its time")
    parser.add_argument("--output", default="runs/paper", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    add_judge_arguments(parser.add_argument_group("GPT-Eval"), required=False)


def _command(arguments: argparse.Namespace) -> Report | None:
    # Cheap checks first.
    check_counts(arguments)
    _check_choices(arguments)
    folder = Path(arguments.output).expanduser()
    check_writable(folder)
    if arguments.figures:
        check_plot(folder / FIGURE_1)
    judge = None if arguments.judge_model is None else judge_from(arguments)
    process = Process()
    content = _content(arguments, process, judge)
    plans = _plans(content)
    store = Store(folder)
    if arguments.dry_run:
        return _listed(plans, store) if process.first else None
    if judge is not None and _judged(content) and any(plan.left(store)[1] for plan in plans):
        # Now, and not after the cells whose answers it will be asked about.
        package_and_key(judge)
        check_concurrency(arguments.concurrency)
        with Cache(Path(arguments.cache).expanduser()):
            pass
    run(plans, store, process)
    if not process.first:
        return None
    return _reported(content, store, folder, judge, arguments)


def _check_choices(arguments: argparse.Namespace) -> None:
    for name, known in (("tables", tuple(TITLES)), ("figures", FIGURES)):
        unknown = sorted(set(getattr(arguments, name)) - set(known))
        if unknown:
            raise LaaiError(f"--{name} {unknown[0]}: expected some of {', '.join(map(str, known))}")
    for rule in arguments.rules:
        if rule not in FOUR_RULES:
            raise LaaiError(f"--rules {rule}: expected some of {', '.join(FOUR_RULES)}")
    if not (arguments.tables or arguments.figures or arguments.examples):
        raise LaaiError("nothing to do: expected --tables, --figures or --examples")
    if arguments.groups and arguments.data == LEXICON:
        raise LaaiError(f"--group: --data {LEXICON} has groups of its own; expected public sets")
    if arguments.groups and 3 not in arguments.tables:
        raise LaaiError("--group is for Table 3: expected 3 among --tables")
    if arguments.rules != list(FOUR_RULES) and 1 not in arguments.figures:
        raise LaaiError("--rules is for Figure 1: expected 1 among --figures")
    if arguments.judge_model is None:
        check_unused(arguments, partial(add_judge_arguments, required=False), "expected --judge-model with it")
    elif not set(JUDGED) & set(map(str, arguments.tables)):
        raise LaaiError(f"--judge-model is for the tables {' and '.join(JUDGED)}: expected one of them among --tables")


def _content(arguments: argparse.Namespace, process: Process, judge: Judge | None) -> Content:
    """The tables and figures of the report, with their settings."""
    recipes = [_recipe(arguments, model, process) for model in _models(arguments)]
    first, seeds = recipes[0], list(range(arguments.seeds))
    tables = [paper_table(number, recipes) for number in sorted(set(arguments.tables))]
    if arguments.examples:
        tables.append(examples_table(sorted(set(arguments.examples)), first))
    maps = {}
    if 2 in arguments.figures:
        task = first.task(FOUR_RULES[0])
        maps = {"unregularised": first.laai(task, 0, regularised=False), "regularised": first.laai(task, 0)}
    return Content(
        command=_command_line(arguments),
        recipes=recipes,
        seeds=seeds,
        tables=tables,
        sweep=_figure_1(first, seeds, arguments) if 1 in arguments.figures else None,
        maps=maps,
        judge=None if judge is None else judge.model,
    )


def _models(arguments: argparse.Namespace) -> list[str]:
    if arguments.model:
        return list(dict.fromkeys(arguments.model))
    if arguments.data != LEXICON:
        raise LaaiError(f"which model? expected --model, or --data {LEXICON} for the bundled one")
    return [reference_model()]


def _recipe(arguments: argparse.Namespace, model: str, process: Process) -> Recipe:
    """The paper's settings on public sets; on the lexicon relative penalties, fixed as well, at the middle layer."""
    lexicon = arguments.data == LEXICON
    source = replace(model_source(arguments), name=model, device=process.device(arguments.device))
    source.checked_device()
    usual = middle_layer(layer_count(source.config())) if lexicon else PAPER_LAYER
    layer = checked_layer(usual if arguments.layer is None else arguments.layer, source.config())
    assert layer is not None
    limit = QUICK_LIMIT if arguments.quick and arguments.limit is None else arguments.limit
    setting = Setting(source, None if lexicon else arguments.data, limit, arguments.batch_size)
    steps = QUICK_STEPS if arguments.quick else None
    if lexicon:
        return Recipe(setting, lexicon, layer, Job.l1, Job.group, "relative", steps)
    groups = tuple(dict.fromkeys(arguments.groups or ()))
    return Recipe(setting, lexicon, layer, PAPER_PENALTY, PAPER_PENALTY, "absolute", steps, groups)


def _figure_1(recipe: Recipe, seeds: Sequence[int], arguments: argparse.Namespace) -> Sweep:
    """Every layer; in a quick run a few that are evenly spread."""
    count = layer_count(recipe.setting.source.config())
    step = -(-count // QUICK_LAYERS) if arguments.quick else 1
    return Sweep(
        recipe.setting,
        tuple(map(recipe.task, dict.fromkeys(arguments.rules))),
        tuple(range(0, count, step)),
        tuple(seeds),
        ((0.0, 0.0), (recipe.l1, recipe.group)),
        recipe.penalty_scale,
        EXAMPLES,
        STEPS,
        "zero",
    )


def _plans(content: Content) -> list[Plan]:
    """One for each model, every cell once."""
    cells: dict[Setting, dict[Cell, None]] = {recipe.setting: {} for recipe in content.recipes}
    for table in content.tables:
        for setting, cell in table.cells(content.seeds):
            cells[setting][cell] = None
    first = content.recipes[0].setting
    if content.sweep is not None:
        cells[first].update(dict.fromkeys(content.sweep.cells()))
    fits: dict[Setting, tuple[Fit, ...]] = {first: tuple(content.maps.values())}
    return [Plan(setting, tuple(part), fits.get(setting, ())) for setting, part in cells.items()]


def _listed(plans: Sequence[Plan], store: Store) -> Report:
    """The report of a dry run: work left, and an estimate of its time."""
    facts: dict[str, Any] = {"models": []}
    lines = []
    for plan in plans:
        fits, cells = plan.left(store)
        seconds = estimate.seconds(plan.setting, fits, cells)
        name = plan.setting.source.name
        lines += [f"{'to do' if cell in cells else 'done '}  {named(cell)}" for cell in plan.cells]
        lines.append(
            f"{name}: {len(plan.cells)} cells, {len(cells)} to do, with {len(fits)} trainings; "
            f"very roughly {seconds / 60:.0f} minutes in one process"
        )
        facts["models"].append(
            {
                "model": name,
                "cells": [{"cell": named(cell), "done": cell not in cells} for cell in plan.cells],
                "trainings": len(fits),
                "seconds": seconds,
            }
        )
    return Report(facts, "\n".join(lines))


def _judged(content: Content) -> list[Table]:
    return [table for table in content.tables if table.name in JUDGED]


def _reported(
    content: Content, store: Store, folder: Path, judge: Judge | None, arguments: argparse.Namespace
) -> Report:
    if judge is not None:
        tables = _judged(content)
        with Cache(Path(arguments.cache).expanduser()) as cache:
            verdicts = gpt_eval.judged(tables, content.seeds, store, judge, cache, arguments.concurrency)
        content = replace(content, gpt_eval=verdicts)
    facts = report.write(content, store, folder)
    return Report(facts, (folder / "report.md").read_text(encoding="utf-8"), failed=bool(facts["missing"]))


def _command_line(arguments: argparse.Namespace) -> str:
    """The command line for the same report: the flags that define its content, not its folder or stored results."""
    words = ["laai", "paper"]
    for flag, value in (
        *(("--model", model) for model in arguments.model or []),
        ("--revision", arguments.revision),
        ("--gguf-file", arguments.gguf_file),
        ("--dtype", None if arguments.dtype == "auto" else arguments.dtype),
        ("--data", arguments.data),
        ("--tables", ",".join(map(str, arguments.tables))),
        ("--figures", ",".join(map(str, arguments.figures))),
        ("--rules", None if arguments.rules == list(FOUR_RULES) else ",".join(arguments.rules)),
        ("--examples", ",".join(map(str, arguments.examples)) or None),
        *(("--group", group) for group in arguments.groups or []),
        ("--seeds", arguments.seeds),
        ("--layer", arguments.layer),
        ("--limit", arguments.limit),
        ("--judge-model", arguments.judge_model),
        ("--base-url", None if arguments.base_url == OPENAI_URL else arguments.base_url),
        ("--request", arguments.request),
    ):
        if value is not None:
            words += [flag, str(value)]
    for flag, given in (("--trust-remote-code", arguments.trust_remote_code), ("--quick", arguments.quick)):
        words += [flag] * given
    return shlex.join(words)
