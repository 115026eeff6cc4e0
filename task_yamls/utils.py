"""What the task YAMLs call. The harness loads this file by its path, so its imports are absolute."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from laai_core.data import load_task


def load(laai_task: str, seed: int = 0, n_train: int = 10, data: str | None = None, **_: Any) -> dict[str, Dataset]:
    """The splits `train` (the few-shot examples: what an intervention is trained on) and `test` of a data set.

    The harness passes a task's metadata, over which it has laid every model argument (`pretrained=...`) and then
    --metadata. Hence `**_`; and hence `laai_task`, since an argument of that name belongs to no model, so that none
    replaces the data set.
    """
    split = load_task(laai_task, seed=seed, n_train=n_train, data=None if data is None else str(data))
    return {
        name: Dataset.from_dict(
            {"prompt": [example.prompt for example in part], "target": [example.target for example in part]}
        )
        for name, part in (("train", split.train), ("test", split.test))
    }


def exact_match(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """Whether the first line generated is the target: stripped, case-sensitive."""
    answer = results[0].split("\n", 1)[0].strip()
    return {"exact_match": float(answer == doc["target"].strip())}
