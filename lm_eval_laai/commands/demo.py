"""`laai demo`: train a Δ for each of a few word rules, and compare it with zero-shot and ten-shot in the harness."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laai_core import files
from laai_core.data import load_task
from laai_core.data.split import Split
from laai_core.data.tasks import PAIRS
from laai_core.errors import LaaiError
from laai_core.files import SUFFIX
from lm_eval_laai.commands.options import (
    add_layer_argument,
    add_model_arguments,
    checked_layer,
    model_source,
)
from lm_eval_laai.commands.outputs import check_writable
from lm_eval_laai.commands.report import Report, table
from lm_eval_laai.commands.train import summary
from lm_eval_laai.inspection.plot import can_plot, heat_map
from lm_eval_laai.known_models.table import REFERENCE
from lm_eval_laai.methods.select import train_chosen
from lm_eval_laai.metrics import first_line
from lm_eval_laai.tasks import TaskInfo, harness_metadata, list_tasks

if TYPE_CHECKING:  # importing transformers takes a second
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHOTS = 10  # solved examples in the prompt, and training examples: the same ones
MODEL = "smollm2-135m"
# By default two rules within English, the model's language, which take minutes on two cores. Behind ten shots it
# follows the second one only.
TASKS = ["laai_lexicon_antonym", "pairs:past_tense"]
LIMIT = 100
REFERENCE_TASKS = ["laai_lexicon"]  # with --model reference, all items: the model is small
BOOTSTRAPS = 100_000  # the harness's default, for metrics whose standard error has no formula
SHOWN = 5  # test words per task, with the model's answers
SETTINGS = {"zero_shot": "zero-shot", "ten_shot": "ten-shot", "delta": "Δ"}  # file name: title

Score = tuple[float, float]  # mean, standard error


def add(parser: argparse.ArgumentParser) -> None:
    """The flags of `demo`."""
    parser.set_defaults(command=_command)
    add_model_arguments(parser, required=False)
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help=f"tasks or groups of `laai tasks`, or pairs:FILE.json (default: {', '.join(TASKS)}; for the reference "
        f"model {', '.join(REFERENCE_TASKS)})",
    )
    parser.add_argument("--data", metavar="DIR", help="folder of the public data sets, for tasks that need one")
    parser.add_argument("--seed", type=int, default=0, help="which examples are drawn (default: %(default)s)")
    add_layer_argument(parser, "chosen by cross-validation on the training examples")
    parser.add_argument(
        "--limit",
        type=int,
        help=f"test items a task (default: {LIMIT}; all with --tasks or the reference model)",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="prompts at once (default: %(default)s)")
    parser.add_argument("--output", metavar="DIR", help="default: runs/demo/ and the model's name")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _command(arguments: argparse.Namespace) -> Report:
    arguments.model = arguments.model or MODEL
    reference = arguments.model == REFERENCE
    if arguments.tasks is None:
        arguments.tasks = REFERENCE_TASKS if reference else TASKS
        if arguments.limit is None and not reference:
            arguments.limit = LIMIT
    if arguments.limit is not None and arguments.limit < 2:
        raise LaaiError(f"limit is {arguments.limit}: expected at least 2, which a standard error needs")
    if arguments.batch_size < 1:
        raise LaaiError(f"batch_size is {arguments.batch_size}: expected at least one")
    tasks = _chosen(arguments.tasks)
    splits = {t.name: load_task(t.data_set, arguments.seed, SHOTS, arguments.data) for t in tasks}
    output = Path(arguments.output or Path("runs/demo", Path(arguments.model).name)).expanduser()
    check_writable(output)
    if others := sorted(path.name for path in output.glob(f"*{SUFFIX}") if path.stem not in splits):
        raise LaaiError(f"--output {output} has {others[0]}: expected a folder without vectors of other tasks")
    source = model_source(arguments)
    source.checked_device()
    layer = checked_layer(arguments.layer, source.config())
    model, tokenizer = source.load()
    trained = _train_all(model, tokenizer, splits, layer, arguments.seed, output)
    scores: dict[str, dict[str, Score]] = {}
    answers: dict[str, dict[str, list[tuple[str, str]]]] = {}  # setting: task: (prompt, answer) of some items
    for setting in SETTINGS:
        results = _evaluated(setting, model, tokenizer, arguments, output)
        answers[setting] = {task: _answers(rows) for task, rows in results["samples"].items()}
        scores[setting] = {task.name: _score(results["results"][task.name], task.metric) for task in tasks}
    facts = {
        "model": source.name,
        "answers": answers,
        "seed": arguments.seed,
        "output": str(output),
        "trained": trained,
        "scores": scores,
        "average": {name: _average([scores[name][t.name] for t in tasks]) for name in SETTINGS},
    }
    return Report(facts, _text(facts, tasks))


def _chosen(names: Sequence[str]) -> list[TaskInfo]:
    """The tasks with these names, and those of the groups with these names."""
    known = list_tasks()
    files = [name for name in names if name.startswith(f"{PAIRS}:")]
    if len(files) > 1:
        raise LaaiError(f"{len(files)} files of word pairs: expected one, which the harness's one metadata can name")
    if files:
        rest = [name for name in names if name not in files]
        (pairs,) = (task for task in known if task.data_set == PAIRS)
        return [*(_chosen(rest) if rest else ()), pairs._replace(data_set=files[0])]
    for name in names:
        if not any(name in (task.name, task.group) for task in known):
            raise LaaiError(f"no task or group named {name!r}: `laai tasks` lists them")
    return [task for task in known if task.name in names or task.group in names]


def _train_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    splits: dict[str, Split],
    layer: int | None,
    seed: int,
    output: Path,
) -> dict[str, dict[str, Any]]:
    """A file for each task, named as intervention=FOLDER looks it up, and its heat map. Returns the summaries."""
    trained = {}
    for number, (task, split) in enumerate(splits.items(), start=1):
        _say(f"[{number}/{len(splits)}] training on {len(split.train)} examples of {task}")
        result, _ = train_chosen(model, tokenizer, split.train, layer, seed=seed, task=task, progress=True)
        path = output / f"{task}{SUFFIX}"
        result.intervention.save(path)
        if can_plot():
            heat_map(result.intervention, path.with_suffix(".png"))
        trained[task] = {"file": str(path), **summary(result)}
    if not can_plot():
        _say('no heat maps: they need matplotlib, pip install "lm-eval-laai[plot]"')
    return trained


def _evaluated(
    setting: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arguments: argparse.Namespace,
    output: Path,
) -> dict[str, Any]:
    """The harness's results in one of SETTINGS; all but the samples is written to `<output>/<setting>.json`."""
    # Here and not above: the harness takes seconds to import, and only this command needs it.
    from lm_eval.utils import handle_non_serializable

    from lm_eval_laai.experiments.harness import evaluated, warnings_off
    from lm_eval_laai.model import HFLaai

    _say(f"evaluating {SETTINGS[setting]}")
    folder = str(output) if setting == "delta" else None
    with warnings_off():
        lm = HFLaai(model, folder, tokenizer=tokenizer, batch_size=arguments.batch_size)
    tasks = [f"laai_{name}" if ":" in name else name for name in arguments.tasks]
    results = evaluated(
        lm,
        tasks,
        SHOTS if setting == "ten_shot" else 0,
        harness_metadata(tasks, arguments.seed, SHOTS, arguments.data),
        arguments.limit,
        BOOTSTRAPS,
    )
    model_args = {
        "pretrained": arguments.model,
        "revision": arguments.revision,
        "gguf_file": arguments.gguf_file,
        "dtype": arguments.dtype,
        "intervention": folder,
    }
    results["config"] = {
        "model": "hf-laai",
        "model_args": {name: value for name, value in model_args.items() if value is not None},
        **lm.get_model_info(),
        "batch_size": arguments.batch_size,
        "limit": arguments.limit,
        "bootstrap_iters": BOOTSTRAPS,
    }
    kept = {name: value for name, value in results.items() if name != "samples"}
    text = json.dumps(kept, indent=2, default=handle_non_serializable, ensure_ascii=False)
    files.write(output / f"{setting}.json", text.encode())
    return results


def _score(result: dict[str, Any], metric: str) -> Score:
    """Mean and standard error of a task's metric."""
    return result[f"{metric},none"], result[f"{metric}_stderr,none"]


def _answers(samples: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """(prompt, first line of the answer) of the first items of a task that generates; none of another."""
    found = []
    for sample in sorted(samples, key=lambda one: one["doc_id"])[:SHOWN]:
        answer = sample["filtered_resps"][0]
        if isinstance(answer, str):
            found.append((sample["doc"]["prompt"], first_line(answer)))
    return found


def _average(scores: Sequence[Score]) -> Score:
    """Unweighted, as the harness's groups: the tasks' errors are independent."""
    means, errors = zip(*scores, strict=True)
    return sum(means) / len(means), math.hypot(*errors) / len(errors)


def _text(facts: dict[str, Any], tasks: Sequence[TaskInfo]) -> str:
    rows = [("rule", *SETTINGS.values())]
    for task in tasks:
        rows.append((_title(task), *(_plus_minus(facts["scores"][name][task.name]) for name in SETTINGS)))
    metrics = list(dict.fromkeys(task.metric for task in tasks))
    if len(metrics) == 1:
        rows.append(("average", *(_plus_minus(facts["average"][name]) for name in SETTINGS)))
    return (
        f"{table(rows)}\n\n"
        f"{_shown(facts['answers'], tasks)}"
        f"{' or '.join(metrics)} ± standard error, {facts['model']}, {SHOTS} examples of seed {facts['seed']}\n"
        f"Δ, results and heat maps: {facts['output']}"
    )


def _shown(answers: dict[str, dict[str, list[tuple[str, str]]]], tasks: Sequence[TaskInfo]) -> str:
    """The first test words, with the model's answers without and with Δ."""
    rows = [
        (_title(task), prompt.partition("\n")[0].removeprefix("Q: "), without or "(nothing)", steered or "(nothing)")
        for task in tasks
        for (prompt, without), (_, steered) in zip(
            answers["zero_shot"].get(task.name, []), answers["delta"].get(task.name, []), strict=True
        )
    ]
    return f"{table([('rule', 'word', 'answer without Δ', 'with Δ'), *rows])}\n\n" if rows else ""


def _title(task: TaskInfo) -> str:
    """The task's name, with its file of word pairs."""
    return ":".join([task.name, *task.data_set.split(":")[1:]])


def _plus_minus(score: Score) -> str:
    return f"{score[0]:.3f} ± {score[1]:.3f}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
