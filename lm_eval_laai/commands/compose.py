"""`laai compose`: one intervention from several, into one file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from laai_core.data.split import Split
from laai_core.encode import WHITESPACE
from laai_core.errors import LaaiError
from laai_core.intervention import Intervention
from laai_core.settings import Settings
from lm_eval_laai.chats import common_rendering
from lm_eval_laai.commands.examples import add_own_data_arguments, fitting_split
from lm_eval_laai.commands.options import (
    DATA_HELP,
    add_model_arguments,
    check_unused,
    decimals,
    model_source,
    output_path,
    task_name,
)
from lm_eval_laai.commands.outputs import check_no_input
from lm_eval_laai.commands.report import Report, table
from lm_eval_laai.methods.compose import METHODS, compose
from lm_eval_laai.tasks import harness_task


def add(parser: argparse.ArgumentParser) -> None:
    """The flags of `compose`."""
    parser.set_defaults(command=_command)
    parser.add_argument("files", nargs="+", metavar="FILE", help="interventions: files, or org/repo[:file][@revision]")
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE or DIR/", help="a folder gets laai_<task>.safetensors"
    )
    parser.add_argument(
        "--method",
        choices=list(METHODS),
        default="sum",
        help="fit finds the weights of a sum on the task's training examples (default: %(default)s)",
    )
    parser.add_argument("--weights", type=decimals, metavar="W1,W2,...", help="one a file (default: all 1)")
    parser.add_argument(
        "--task",
        type=task_name,
        help="name of the composed task, recorded in the file; --method fit takes its examples, or --examples",
    )
    _add_fit_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _add_fit_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the method `fit` alone."""
    fitting = parser.add_argument_group("for --method fit")
    add_model_arguments(fitting, required=False)
    fitting.add_argument("--data", metavar="DIR", help=DATA_HELP)
    fitting.add_argument("--n-train", type=int, default=10, help="training examples (default: %(default)s)")
    fitting.add_argument("--seed", type=int, default=0, help="which examples are drawn (default: %(default)s)")
    fitting.add_argument("--batch-size", type=int, help="rows per forward (default: all)")
    fitting.add_argument("--projection", help="module path of the attention output projection, as for train")
    fitting.add_argument("--whitespace", choices=WHITESPACE, help=f"as for train (default: {Settings.whitespace})")
    add_own_data_arguments(parser)


def _command(arguments: argparse.Namespace) -> Report:
    _check_method(arguments)
    parents = [Intervention.load(file) for file in arguments.files]
    # Fitted on prompts like those that the parents were trained on.
    split = fitting_split(arguments, common_rendering(parents) or {}) if arguments.method == "fit" else None
    path = _path(arguments)
    check_no_input(path, *arguments.files)
    task = None if arguments.task is None else harness_task(arguments.task)
    composed = compose(parents, arguments.method, arguments.weights, task, **_fit_arguments(arguments, split))
    composed.save(path)
    composition = composed.metadata["composition"]
    facts = {
        "file": str(path),
        "sha256": composed.sha256,
        "method": arguments.method,
        "layers": composed.layers,
        "parents": [{"file": file, **p} for file, p in zip(arguments.files, composition["parents"], strict=True)],
        "training": composed.metadata.get("training"),
    }
    return Report(facts, _text(facts))


def _path(arguments: argparse.Namespace) -> Path:
    is_folder = arguments.output.endswith(("/", "\\")) or Path(arguments.output).expanduser().is_dir()
    if is_folder and arguments.task is None:
        raise LaaiError(f"--output {arguments.output} is a folder: --task is needed, which names the file in it")
    return output_path(arguments.output, arguments.task)


def _check_method(arguments: argparse.Namespace) -> None:
    """LaaiError for what the method `fit` lacks, or for its model or examples with another method."""
    if arguments.method != "fit":
        why = f"--method {arguments.method} uses no model and no examples, only fit does"
        check_unused(arguments, _add_fit_arguments, why)
    elif arguments.model is None:
        raise LaaiError("--method fit needs --model")
    elif (arguments.task is None) == (arguments.examples is None):
        raise LaaiError("--method fit needs --task or --examples, one of the two")


def _fit_arguments(arguments: argparse.Namespace, split: Split | None) -> dict[str, Any]:
    """Arguments of `compose` for the method `fit`; none for the other methods."""
    if split is None:
        return {}
    model, tokenizer = model_source(arguments).load()
    return {
        "model": model,
        "tokenizer": tokenizer,
        "examples": split.train,
        "whitespace": arguments.whitespace or Settings.whitespace,
        **{name: getattr(arguments, name) for name in ("seed", "batch_size", "projection", "stop")},
        "progress": True,
    }


def _text(facts: dict[str, Any]) -> str:
    rows = [
        ("file", facts["file"]),
        ("sha256", facts["sha256"]),
        ("layers", ", ".join(map(str, facts["layers"]))),
        ("method", facts["method"]),
    ]
    if facts["training"]:
        fitted = facts["training"]
        rows.append(("task loss", f"{fitted['task_loss']:.4f} (of the sum: {fitted['task_loss_before']:.4f})"))
        rows.append(("evaluations", str(fitted["steps"])))
    parents = [(f"{p['weight']:.4g}", p["task"] or "-", p["sha256"][:16], p["file"]) for p in facts["parents"]]
    return f"{table(rows)}\n\n{table([('weight', 'task', 'sha256', 'parent'), *parents])}"
