"""`laai demo`: train a Δ for each of a few word rules, and compare it with zero-shot and ten-shot in the harness."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from laai_core import files
from laai_core.data import load_task
from laai_core.data.tasks import PAIRS
from laai_core.errors import LaaiError
from laai_core.example import Split
from laai_core.files import SUFFIX
from lm_eval_laai.commands.options import (
    add_layer_argument,
    add_model_arguments,
    check_writable,
    checked_layer,
    model_source,
)
from lm_eval_laai.commands.report import Report, table
from lm_eval_laai.commands.train import summary
from lm_eval_laai.experiments.load import ModelSource
from lm_eval_laai.inspection.plot import can_plot, heat_map
from lm_eval_laai.known_models.table import REFERENCE
from lm_eval_laai.methods.select import train_chosen
from lm_eval_laai.metrics import first_line
from lm_eval_laai.register import register
from lm_eval_laai.tasks import TaskInfo, harness_task, include_path, list_tasks, task_metadata

SHOTS = 10  # solved examples in the prompt, and training examples: the same ones
MODEL = "smollm2-135m"
# By default two English rules, which the model's language is, and so many items that it takes minutes on two cores.
TASKS = ["laai_lexicon_antonym", "laai_lexicon_synonym"]
LIMIT = 100
REFERENCE_TASKS = ["laai_lexicon"]  # with --model reference, all items: it is small
SHOWN = 5  # test words a task with the model's answers
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
        help=f"or groups, or pairs:FILE.json (default: {', '.join(TASKS)}; for the reference model "
        f"{', '.join(REFERENCE_TASKS)})",
    )
    parser.add_argument("--data", metavar="DIR", help="folder of the public data sets, for tasks that need one")
    parser.add_argument("--seed", type=int, default=0, help="which examples are drawn (default: %(default)s)")
    add_layer_argument(parser)
    parser.add_argument(
        "--limit", type=int, help=f"test items a task (default: {LIMIT}; all with the reference model)"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="prompts at once (default: %(default)s)")
    parser.add_argument("--output", default="runs/demo", metavar="DIR", help="default: %(default)s")
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
    output = Path(arguments.output).expanduser()
    check_writable(output)
    source = model_source(arguments)
    source.checked_device()
    layer = checked_layer(arguments.layer, source.config())
    trained = _train_all(source, splits, layer, arguments.seed, output)
    harness = _Harness(source, arguments)
    scores = {
        "zero_shot": harness.evaluate("zero_shot", 0, output),
        "ten_shot": harness.evaluate("ten_shot", SHOTS, output),
        "delta": harness.evaluate("delta", 0, output, intervention=str(output)),
    }
    facts = {
        "model": source.name,
        "answers": harness.answers,
        "seed": arguments.seed,
        "output": str(output),
        "trained": trained,
        "scores": {name: {t.name: scores[name][t.name] for t in tasks} for name in SETTINGS},
        "average": {name: _average([scores[name][t.name] for t in tasks]) for name in SETTINGS},
    }
    return Report(facts, _text(facts, tasks))


def _chosen(names: Sequence[str]) -> list[TaskInfo]:
    """The tasks that go by these names, or whose group does."""
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
    source: ModelSource, splits: dict[str, Split], layer: int | None, seed: int, output: Path
) -> dict[str, dict[str, Any]]:
    """A file for each task, named as intervention=FOLDER looks it up, and its heat map. Returns the summaries."""
    model, tokenizer = source.load()
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


class _Harness:
    """The same tasks, evaluated under several settings, each as one `lm_eval --model hf-laai` would."""

    def __init__(self, source: ModelSource, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self.answers: dict[str, dict[str, list[tuple[str, str]]]] = {}  # setting: task: (prompt, answer) of some items
        self._device = str(source.checked_device())
        self._model_args: dict[str, Any] = {"pretrained": source.pretrained, "dtype": source.dtype}
        if source.revision:
            self._model_args["revision"] = source.revision
        if source.gguf_file:
            self._model_args["gguf_file"] = source.gguf_file
        if source.trust_remote_code:
            self._model_args["trust_remote_code"] = True

    def evaluate(self, setting: str, shots: int, output: Path, **model_args: Any) -> dict[str, Score]:
        """Scores by task; the harness's results go to `<output>/<setting>.json`."""
        # Here and not above: the harness takes seconds to import, and only this command needs it.
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import handle_non_serializable

        register()  # run from a clone that is not installed, nobody else has
        _say(f"evaluating {SETTINGS[setting]}")
        metadata = {"seed": self._arguments.seed, "n_train": SHOTS}
        if self._arguments.data is not None:
            metadata["data"] = self._arguments.data
        for name in self._arguments.tasks:
            metadata.update(task_metadata(name))
        with quiet_harness():
            results = simple_evaluate(
                model="hf-laai",
                model_args={**self._model_args, **model_args},
                tasks=[harness_task(name) if ":" in name else name for name in self._arguments.tasks],
                num_fewshot=shots,
                batch_size=self._arguments.batch_size,
                device=self._device,
                limit=self._arguments.limit,
                log_samples=True,
                task_manager=TaskManager(include_path=str(include_path()), include_defaults=False, metadata=metadata),
            )
        self.answers[setting] = {task: _answers(rows) for task, rows in results.pop("samples").items()}
        text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
        files.write(output / f"{setting}.json", text.encode())
        return {
            task.name: (
                results["results"][task.name][f"{task.metric},none"],
                results["results"][task.name][f"{task.metric}_stderr,none"],
            )
            for task in _chosen(self._arguments.tasks)
        }


def _answers(samples: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """(prompt, first line of the answer) of the first items of a task that generates; none of another."""
    found = []
    for sample in sorted(samples, key=lambda one: one["doc_id"])[:SHOWN]:
        answer = sample["filtered_resps"][0]
        if isinstance(answer, str):
            found.append((sample["doc"]["prompt"], first_line(answer)))
    return found


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Errors only: the harness warns once a task and setting that --num_fewshot was given, which was on purpose."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _average(scores: Sequence[Score]) -> Score:
    """Unweighted, as the harness's groups: the tasks' errors are independent."""
    means, errors = zip(*scores, strict=True)
    return sum(means) / len(means), math.hypot(*errors) / len(errors)


def _text(facts: dict[str, Any], tasks: Sequence[TaskInfo]) -> str:
    rows = [("rule", *SETTINGS.values())]
    for task in tasks:
        rows.append((task.name, *(_plus_minus(facts["scores"][name][task.name]) for name in SETTINGS)))
    rows.append(("average", *(_plus_minus(facts["average"][name]) for name in SETTINGS)))
    return (
        f"{table(rows)}\n\n"
        f"{_shown(facts['answers'], tasks)}"
        f"{tasks[0].metric} ± standard error, {facts['model']}, {SHOTS} examples of seed {facts['seed']}\n"
        f"Δ, results and heat maps: {facts['output']}"
    )


def _shown(answers: dict[str, dict[str, list[tuple[str, str]]]], tasks: Sequence[TaskInfo]) -> str:
    """The first test words, with the model's answers without and with Δ."""
    rows = [
        (task.name, prompt.partition("\n")[0].removeprefix("Q: "), without or "(nothing)", steered or "(nothing)")
        for task in tasks
        for (prompt, without), (_, steered) in zip(
            answers["zero_shot"].get(task.name, []), answers["delta"].get(task.name, []), strict=True
        )
    ]
    return f"{table([('rule', 'word', 'answer without Δ', 'with Δ'), *rows])}\n\n" if rows else ""


def _plus_minus(score: Score) -> str:
    return f"{score[0]:.3f} ± {score[1]:.3f}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
