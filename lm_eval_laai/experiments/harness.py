"""One harness evaluation of a model that is loaded already: the scores of `lm_eval --model hf-laai`, sooner."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

from lm_eval import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel

from laai_core.intervention import Intervention
from lm_eval_laai.experiments.cells import Cell
from lm_eval_laai.experiments.setting import Setting, task_info
from lm_eval_laai.model import HFLaai
from lm_eval_laai.tasks import include_path, task_metadata

_FEWSHOT_SEED = 1234  # the harness's default; the tasks' sampler takes the first n and draws nothing


def score(model: Any, tokenizer: Any, setting: Setting, cell: Cell, paths: Sequence[Path]) -> dict[str, Any]:
    """The cell's result: {"metrics": {name: mean}, "n": test items, "answers": [[prompt, generated text], ...]}.

    Args:
        paths: the cell's fits: intervention files, whose sum is applied, or one folder in PEFT's format.
    """
    metadata: dict[str, Any] = {} if cell.seed is None else {"seed": cell.seed, "n_train": cell.shots}
    if setting.data is not None:
        metadata["data"] = setting.data
    metadata.update(task_metadata(cell.task))
    task = task_info(cell.task)
    manager = TaskManager(include_path=str(include_path()), include_defaults=False, metadata=metadata)
    with _quiet(), _language_model(model, tokenizer, setting.batch_size, paths) as lm:
        tasks = manager.load([task.name])
        tasks["tasks"][task.name].set_config(key="num_fewshot", value=cell.shots)
        tasks["tasks"][task.name].set_fewshot_seed(seed=_FEWSHOT_SEED)
        # `evaluate` and not `simple_evaluate`, which under torchrun returns the results on one process only.
        found = evaluate(lm, tasks, limit=setting.limit, bootstrap_iters=0)
    metrics = {
        name.removesuffix(",none"): value
        for name, value in found["results"][task.name].items()
        if name.endswith(",none") and isinstance(value, float)
    }
    samples = found["samples"][task.name]
    result: dict[str, Any] = {"metrics": metrics, "n": len(samples)}
    if task.metric == "exact_match":
        result["answers"] = [[sample["doc"]["prompt"], sample["filtered_resps"][0]] for sample in samples]
    return result


@contextmanager
def _language_model(model: Any, tokenizer: Any, batch_size: int, paths: Sequence[Path]) -> Iterator[HFLM]:
    """`hf`, `hf,peft=` or `hf-laai` around the loaded model, which is left as it was."""
    if any(path.is_dir() for path in paths):
        (folder,) = paths
        adapted = PeftModel.from_pretrained(model, str(folder)).eval()
        # Behind a soft prompt `hf`'s answers depend on the padding, so on who shares the batch: one at a time.
        soft_prompt = adapted.active_peft_config.is_prompt_learning
        try:
            yield HFLM(adapted, tokenizer=tokenizer, batch_size=1 if soft_prompt else batch_size)
        finally:
            if not soft_prompt:  # which changes nothing in the model
                adapted.unload()
    elif paths:
        total = reduce(add, map(Intervention.load, paths)) if len(paths) > 1 else Intervention.load(paths[0])
        yield HFLaai(model, total, tokenizer=tokenizer, batch_size=batch_size)
    else:
        yield HFLM(model, tokenizer=tokenizer, batch_size=batch_size)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's warnings and bars, one or two for each of hundreds of cells; errors are raised anyway."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
