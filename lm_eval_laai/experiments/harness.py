"""The harness's evaluation of a model that is loaded already: the scores of `lm_eval --model hf-laai`, faster.

`laai demo`, `sweep` and `paper` evaluate here.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import cache, reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel

from laai_core.errors import LaaiError
from laai_core.intervention import Intervention
from laai_core.locate import locate
from lm_eval_laai.experiments.cells import Cell
from lm_eval_laai.experiments.setting import Setting, task_info
from lm_eval_laai.model import HFLaai
from lm_eval_laai.own_task import document
from lm_eval_laai.tasks import include_path

if TYPE_CHECKING:  # importing transformers takes a second
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_FEWSHOT_SEED = 1234  # the harness's default; the tasks' sampler takes the first n and draws nothing


def evaluated(
    lm: HFLM,
    tasks: Sequence[str],
    shots: int,
    metadata: dict[str, Any],
    limit: int | None,
    bootstrap_iters: int = 0,
) -> dict[str, Any]:
    """The harness's results, samples and all, of tasks and groups under one model.

    Args:
        tasks: the harness's names, `laai_pairs:FILE` and `laai_opinionqa_group:ATTRIBUTE=GROUP` with their data.
        shots: solved examples in every prompt, whatever a task's YAML says.
        metadata: of `harness_metadata`.
        limit: test items a task; None is all.
        bootstrap_iters: as the harness's; 0 leaves standard errors out.
    """
    manager = TaskManager(include_path=str(include_path()), include_defaults=False, metadata=metadata)
    with warnings_off():
        loaded = manager.load([task.partition(":")[0] for task in tasks])
        for one in loaded["tasks"].values():
            one.set_config(key="num_fewshot", value=shots)
            one.set_fewshot_seed(seed=_FEWSHOT_SEED)
    # `evaluate` and not `simple_evaluate`, which under torchrun returns the results on one process only.
    with warnings_off("lm_eval.evaluator_utils"):  # it tells of metrics that only some questions of a survey have
        results: dict[str, Any] = evaluate(lm, loaded, limit=limit, bootstrap_iters=bootstrap_iters)
    return results


def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, setting: Setting, cell: Cell, paths: Sequence[Path]
) -> dict[str, Any]:
    """The cell's result: {"metrics": {name: mean}, "n": test items, "answers": [[prompt, generated text], ...]}.

    Args:
        paths: the cell's fits: intervention files, whose sum is applied, or one folder in PEFT's format.
    """
    task = task_info(cell.task)
    with _bars_off(), _language_model(model, tokenizer, setting.rows(cell), paths) as lm:
        found = evaluated(lm, [cell.task], cell.shots, setting.metadata(cell), setting.limit)
    metrics = {
        name.removesuffix(",none"): value
        for name, value in found["results"][task.name].items()
        if name.endswith(",none") and isinstance(value, float)
    }
    samples = found["samples"][task.name]
    _check_items(samples, setting, cell)
    result: dict[str, Any] = {"metrics": metrics, "n": len(samples)}
    if task.generates:
        room = found["configs"][task.name]["generation_kwargs"]["max_gen_toks"]
        targets = [sample["doc"]["target"] for sample in samples]
        long = sum(len(ids) > room for ids in tokenizer(targets, add_special_tokens=False).input_ids)
        _tell_long(cell.task, long, len(samples), room)
        result["answers"] = [[sample["doc"]["prompt"], sample["filtered_resps"][0]] for sample in samples]
    return result


def _check_items(samples: Sequence[dict[str, Any]], setting: Setting, cell: Cell) -> None:
    """LaaiError where the test items, which the harness reads for every cell, are not those of the cell's identity."""
    part = "target" if task_info(cell.task).generates else "distribution"
    items = map(document, setting.split(cell.task).test[: setting.limit])
    found = [sample["doc"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
    if [(doc["prompt"], doc[part]) for doc in found] != [(item["prompt"], item[part]) for item in items]:
        raise LaaiError("its data changed while this ran: expected the test items of the start; start again")


@cache
def _tell_long(task: str, long: int, count: int, room: int) -> None:
    """Warn, once, of targets that no answer can equal."""
    if long:
        logger.warning("%s: %d of %d targets have more than the %d tokens that are generated", task, long, count, room)


@contextmanager
def _language_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, paths: Sequence[Path]
) -> Iterator[HFLM]:
    """`hf,peft=` or `hf-laai` around the loaded model, which is left as it was."""
    if any(path.is_dir() for path in paths):
        (folder,) = paths
        adapted = PeftModel.from_pretrained(model, str(folder)).eval()
        # Behind a soft prompt `hf`'s answers depend on the padding, so on the batch's other rows: one at a time.
        soft_prompt = adapted.active_peft_config.is_prompt_learning
        try:
            with warnings_off():
                lm = HFLM(adapted, tokenizer=tokenizer, batch_size=1 if soft_prompt else batch_size)
            yield lm
        finally:
            if not soft_prompt:  # a soft prompt replaces no module of the model
                adapted.unload()
    else:
        total = reduce(add, map(Intervention.load, paths)) if paths else _zero(model)
        with warnings_off():
            lm = HFLaai(model, total, tokenizer=tokenizer, batch_size=batch_size)
        yield lm


def _zero(model: PreTrainedModel) -> Intervention:
    """A vector that adds nothing: `hf` runs the solved examples anew for every request, `hf-laai` once a task."""
    return Intervention({0: torch.zeros(locate(model).hidden_size)}, site="residual")


@contextmanager
def _bars_off() -> Iterator[None]:
    """Nothing on stderr but log lines: the harness's bars would be one or two for each of hundreds of cells."""
    usual = logging.lastResort  # writes to sys.stderr, whatever that is at the time
    logging.lastResort = logging.StreamHandler(sys.stderr)
    logging.lastResort.setLevel(logging.WARNING)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.lastResort = usual


@contextmanager
def warnings_off(name: str = "lm_eval") -> Iterator[None]:
    """Errors only: the harness warns of a model that is loaded already, and of shots that are not the YAML's."""
    harness = logging.getLogger(name)
    level = harness.level
    harness.setLevel(logging.ERROR)
    try:
        yield
    finally:
        harness.setLevel(level)
