"""`laai sweep`: the harness's score over layers, seeds and penalties; a stopped sweep goes on where it was."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from laai_core import files
from laai_core.data import task_names
from laai_core.data.examples import OwnData, as_lines, check_one_line
from laai_core.data.tasks import examples_task
from laai_core.errors import LaaiError
from laai_core.settings import PENALTY_SCALES, Job, check
from lm_eval_laai.commands.examples import add_own_data_arguments, own_data
from lm_eval_laai.commands.options import (
    DATA_HELP,
    add_model_arguments,
    check_counts,
    checked_layer,
    decimals,
    layer_count,
    model_source,
    numbers,
    task_name,
)
from lm_eval_laai.commands.outputs import check_no_input, check_writable
from lm_eval_laai.commands.report import Report, table
from lm_eval_laai.experiments.cells import Store
from lm_eval_laai.experiments.curves import Sweep, draw, title
from lm_eval_laai.experiments.run import Plan, Process, run
from lm_eval_laai.experiments.scores import shown
from lm_eval_laai.experiments.setting import Setting, software
from lm_eval_laai.inspection.plot import check_plot

ALL = "all"


def add(parser: argparse.ArgumentParser) -> None:
    """The flags of `sweep`."""
    parser.set_defaults(command=_command)
    add_model_arguments(parser, required=True)
    parser.add_argument("--task", type=_words, metavar="T[,T]", help="as for train")
    add_own_data_arguments(parser)
    parser.add_argument("--data", metavar="DIR", help=DATA_HELP)
    parser.add_argument("--n-train", type=int, default=10, help="training examples (default: %(default)s)")
    parser.add_argument("--layers", type=_layers, default=ALL, metavar="N[,N]", help="0-based (default: all)")
    parser.add_argument("--seeds", type=int, default=5, help="draws of examples: 0, 1, ... (default: %(default)s)")
    for name in ("l1", "group"):
        parser.add_argument(
            f"--{name}",
            type=decimals,
            default=[0.0, getattr(Job, name)],
            metavar="X[,X]",
            help="the n-th of --l1 goes with the n-th of --group; one alone goes with all "
            f"(default: 0,{getattr(Job, name):g})",
        )
    parser.add_argument("--penalty-scale", choices=PENALTY_SCALES, default="relative", help="default: %(default)s")
    parser.add_argument("--limit", type=int, help="test items a task (default: all)")
    parser.add_argument("--batch-size", type=int, default=64, help="prompts at once (default: %(default)s)")
    parser.add_argument("--output", default="runs/sweep", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--plot", action="store_true", help="draw sweep.png there")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _words(text: str) -> list[str]:
    return [task_name(part.strip()) for part in text.split(",") if part.strip()]


def _layers(text: str) -> list[int] | str:
    return text if text == ALL else numbers(text)


def _command(arguments: argparse.Namespace) -> Report | None:
    # Cheap checks first.
    check_counts(arguments)
    penalties = _penalties(arguments)
    own = own_data(arguments)
    if (own is None) == (arguments.task is None):
        raise LaaiError("expected --task or --examples, one of the two")
    for item in own.items if own else []:
        check_one_line(item.example, item.where)
    unknown = [task for task in arguments.task or () if task.partition(":")[0] not in task_names()]
    if unknown or arguments.task == []:
        raise LaaiError(f"no task named {', '.join(unknown)!r}: `laai tasks` lists them")
    folder = Path(arguments.output).expanduser()
    check_writable(folder)
    check_no_input(folder / "sweep.json", arguments.examples)
    if arguments.plot:
        check_plot(folder / "sweep.png")
    process = Process()
    tasks = arguments.task or [_own_task(own, folder)]
    source = replace(model_source(arguments), device=process.device(arguments.device))
    source.checked_device()
    sweep = Sweep(
        Setting(source, arguments.data, arguments.limit, arguments.batch_size),
        tuple(dict.fromkeys(f"laai_{task}" for task in tasks)),
        _chosen_layers(arguments.layers, source.config()),
        tuple(range(arguments.seeds)),
        penalties,
        arguments.penalty_scale,
        arguments.n_train,
        start="icl" if arguments.n_train > 1 else "zero",
    )
    store = Store(folder)
    run([Plan(sweep.setting, tuple(sweep.cells()))], store, process)
    if not process.first:
        return None
    return _reported(sweep, store, folder, arguments.plot)


def _own_task(own: OwnData | None, folder: Path) -> str:
    """The name of the task of own rows, which are kept with their prompts beside the sweep's results.

    They lie under their hash, so that neither a file of the user's nor the rows of another sweep are replaced.
    """
    assert own is not None
    rows = as_lines(own)
    path = folder / "rows" / hashlib.sha256(rows).hexdigest()[:16] / f"{own.name}.jsonl"
    files.write(path, rows)
    return examples_task(own, path)


def _penalties(arguments: argparse.Namespace) -> tuple[tuple[float, float], ...]:
    """Pairs of l1 and group."""
    l1, group = arguments.l1, arguments.group
    if 1 not in (len(l1), len(group)) and len(l1) != len(group):
        raise LaaiError(f"{len(l1)} values of --l1 and {len(group)} of --group: expected equally many, or one of them")
    count = max(len(l1), len(group))
    pairs = list(zip(l1 * count if len(l1) == 1 else l1, group * count if len(group) == 1 else group, strict=True))
    for pair in pairs:
        check(Job, l1=pair[0], group=pair[1])
    return tuple(dict.fromkeys(pairs))


def _chosen_layers(layers: Sequence[int] | str, config: Any) -> tuple[int, ...]:
    if isinstance(layers, str):
        layers = range(layer_count(config))
    if not layers:
        raise LaaiError("--layers is empty: expected at least one")
    return tuple(sorted({layer for each in layers if (layer := checked_layer(each, config)) is not None}))


def _reported(sweep: Sweep, store: Store, folder: Path, plot: bool) -> Report:
    records = sweep.facts(store)
    facts: dict[str, Any] = {
        "model": sweep.setting.source.name,
        "identity": sweep.setting.model,
        "seeds": list(sweep.seeds),
        "n_train": sweep.n_train,
        "penalty_scale": sweep.penalty_scale,
        "limit": sweep.setting.limit,
        "versions": software(),
        "scores": records,
    }
    files.write(folder / "sweep.json", (json.dumps(facts, indent=1, ensure_ascii=False) + "\n").encode())
    if plot:
        draw(records, folder / "sweep.png")
    missing = any(record["mean"] is None for record in records)
    return Report(facts, _text(sweep, records, folder), failed=missing)


def _text(sweep: Sweep, records: Sequence[dict[str, Any]], folder: Path) -> str:
    """A table for each task: layers by penalties."""
    blocks = []
    for task in sweep.tasks:
        mine = {(r["layer"], r["l1"], r["group"]): r for r in records if r["task"] == task}
        metric = next(r["metric"] for r in records if r["task"] == task).replace("_", " ")
        rows: list[list[object]] = [[f"{task}, {metric}; layer", *(title(*penalty) for penalty in sweep.penalties)]]
        for layer in sweep.layers:
            found = [mine[(layer, *penalty)] for penalty in sweep.penalties]
            rows.append([layer, *(shown(record["mean"], record["spread"]) for record in found)])
        blocks.append(table(rows))
    seeds = f"{len(sweep.seeds)} seed{'s' if len(sweep.seeds) > 1 else ''}"
    return "\n\n".join([*blocks, f"Mean ± standard deviation over {seeds}; {folder / 'sweep.json'}"])
