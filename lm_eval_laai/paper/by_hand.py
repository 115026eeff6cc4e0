"""The shell commands that compute a cell by hand."""

from __future__ import annotations

import json
import shlex

from laai_core.files import SUFFIX
from lm_eval_laai.experiments.cells import Cell, Fit
from lm_eval_laai.experiments.setting import Setting, task_info
from lm_eval_laai.methods import LAAI, METHODS


def by_hand(setting: Setting, cell: Cell) -> list[str]:
    """The commands for one cell: train, add, evaluate."""
    lines = [_train(setting, fit) for fit in cell.fits]
    arguments = _model_arguments(setting)
    model = "hf"
    if len(cell.fits) > 1:
        parts = " ".join(_output(fit) for fit in cell.fits)
        target = f"vectors/{task_info(cell.task).name}{SUFFIX}"
        lines.append(f"laai compose {parts} --output {target}")
        model, arguments = "hf-laai", [*arguments, f"intervention={target}"]
    elif cell.fits:
        (fit,) = cell.fits
        model, argument = ("hf", "peft") if METHODS[fit.method].writes_adapter else ("hf-laai", "intervention")
        arguments = [*arguments, f"{argument}={_output(fit)}"]
    words = ["lm_eval", "--model", model, "--model_args", ",".join(arguments), "--tasks", task_info(cell.task).name]
    if cell.shots:
        words += ["--num_fewshot", str(cell.shots)]
    if metadata := setting.metadata(cell):
        words += ["--metadata", json.dumps(metadata)]
    if setting.limit is not None:
        words += ["--limit", str(setting.limit)]
    soft_prompt = any(fit.method == "soft_prompt" for fit in cell.fits)
    words += ["--batch_size", "1" if soft_prompt else str(setting.rows(cell))]
    line = shlex.join(words)
    if setting.source.name != setting.source.pretrained:  # a known model, whose name `hf` does not know
        (model_args,) = (word for word in words if word.startswith("pretrained="))
        folder = f"pretrained=$(laai models path {setting.source.name})"
        rest = model_args.removeprefix(f"pretrained={setting.source.name}")
        line = line.replace(shlex.quote(model_args), f'"{folder}{rest}"')
    return [*lines, f'{line} --include_path "$(laai tasks --include-path)"']


def _train(setting: Setting, fit: Fit) -> str:
    words = ["laai", "train", "--model", setting.source.name, "--task", task_info(fit.task).data_set]
    for flag, value in (
        ("--revision", setting.source.revision),
        ("--gguf-file", setting.source.gguf_file),
        ("--dtype", None if setting.source.dtype == "auto" else setting.source.dtype),
        ("--data", setting.data),
        ("--method", None if fit.method == LAAI.name else fit.method),
        ("--seed", fit.seed),
        ("--n-train", fit.n_train),
        ("--layer", fit.layer),
        ("--steps", fit.steps),
        ("--l1", fit.l1),
        ("--group", fit.group),
        ("--penalty-scale", fit.penalty_scale),
        ("--start", fit.start),
        ("--output", _output(fit)),
    ):
        if value is not None:
            words += [flag, str(value)]
    if setting.source.trust_remote_code:
        words.append("--trust-remote-code")
    return shlex.join(words)


def _output(fit: Fit) -> str:
    """The output path in the commands."""
    task = task_info(fit.task).name
    return f"adapters/{task}_{fit.method}" if METHODS[fit.method].writes_adapter else f"vectors/{task}{SUFFIX}"


def _model_arguments(setting: Setting) -> list[str]:
    source = setting.source
    arguments = [f"pretrained={source.name}"]
    if source.revision:
        arguments.append(f"revision={source.revision}")
    if source.gguf_file:
        arguments.append(f"gguf_file={source.gguf_file}")
    if source.dtype != "auto":
        arguments.append(f"dtype={source.dtype}")
    if source.trust_remote_code:
        arguments.append("trust_remote_code=True")
    return arguments
