"""What the task YAMLs call. The harness loads this file by its path, so its imports are absolute."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from laai_core.data import load_task
from laai_core.data.examples import check_one_line
from laai_core.data.opinion import Opinion
from laai_core.data.tasks import EXAMPLE_OPTIONS, EXAMPLES, OPINIONQA_GROUP, PAIRS, opinionqa_group, split_opinions
from laai_core.errors import LaaiError
from lm_eval_laai.own_task import document, documents, exact_match, opinion_metrics

__all__ = ["exact_match", "load", "load_opinions", "opinion_metrics"]


def load(
    laai_task: str,
    seed: int = 0,
    n_train: int = 10,
    data: str | None = None,
    file: str | None = None,
    **_: Any,
) -> dict[str, Dataset]:
    """The splits `train` (the few-shot examples: what an intervention is trained on) and `test` of a data set.

    The harness passes a task's metadata, over which it has laid every model argument (`pretrained=...`) and then
    --metadata. Hence `**_`; and hence `laai_task`, since an argument of that name belongs to no model, so that none
    replaces the data set. `file` says which word pairs, where the task leaves that open.
    """
    if laai_task in (PAIRS, EXAMPLES, EXAMPLE_OPTIONS):
        if file is None:
            raise LaaiError(f'laai_{laai_task}: expected a file, for example --metadata \'{{"file":"words.json"}}\'')
        laai_task = f"{laai_task}:{file}"
    split = load_task(laai_task, seed=seed, n_train=n_train, data=None if data is None else str(data))
    if not split.test:
        raise LaaiError(f"{split.name}: all of its rows are for training; expected test items, of more rows")
    for example in (*split.train, *split.test):
        check_one_line(example, split.name)
    return documents(split)


def load_opinions(
    laai_task: str,
    seed: int = 0,
    n_train: int = 10,
    data: str | None = None,
    attribute: str | None = None,
    group: str | None = None,
    file: str | None = None,
    **_: Any,
) -> dict[str, Dataset]:
    """As `load`, for an opinion task; `attribute` and `group` say whose opinions, where the task leaves that open."""
    if laai_task == EXAMPLE_OPTIONS:
        return load(laai_task, seed, n_train, file=file)
    if laai_task == OPINIONQA_GROUP:
        if attribute is None or group is None:
            raise LaaiError(
                f"laai_{OPINIONQA_GROUP}: attribute is {attribute!r}, group {group!r}; "
                f'expected both, for example --metadata \'{{"attribute":"SEX","group":"Female"}}\''
            )
        laai_task = opinionqa_group(str(attribute), str(group))
    train, test, _sources = split_opinions(laai_task, seed, n_train, None if data is None else str(data))
    parts = (("train", train), ("test", test))
    return {name: Dataset.from_list([_document(opinion) for opinion in part]) for name, part in parts}


def _document(opinion: Opinion) -> dict[str, Any]:
    example = opinion.example()
    return {**document(example), "target": example.answer, "positions": list(opinion.question.positions)}
