"""The harness's own tasks, one of each output type, through its own evaluator: hf, hf-laai, and hf-laai with zero Δ.

Only the documents are ours: a handful written here, in the layout of the tasks' own data sets.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny import tiny_model, tiny_tokenizer

import laai_core as laai
from lm_eval_laai.model import HFLaai

WORDS = "there in the morning a cold wall and then another story of nothing".split()
CHOICES = {"text": ["cold", "a wall", "another story", "in the morning"], "label": ["A", "B", "C", "D"]}
# harness task: (its split, documents)
DOCUMENTS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "lambada_openai": ("test", [{"text": " ".join(WORDS[n:] + WORDS[:n])} for n in range(6)]),
    "wikitext": ("test", [{"page": " ".join(WORDS[n:]) + " \n = = the end = = \n" * 6} for n in range(4)]),
    "arc_easy": (
        "test",
        [{"question": w + " or else", "choices": CHOICES, "answerKey": "ABCD"[n % 4]} for n, w in enumerate(WORDS)],
    ),
    "nq_open": ("validation", [{"question": f"where is {w}", "answer": ["here"]} for w in WORDS[:6]]),
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The harness's task definitions, pointed at local files; one shot where a task has more than one split."""
    folder: Path = tmp_path_factory.mktemp("documents")
    overridden = []
    for name, (split, documents) in DOCUMENTS.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(d) + "\n" for d in documents))
        overridden.append(
            {
                "task": name,
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {"data_files": {split: str(path)}},
                "training_split": None,
                "validation_split": None,
                "test_split": split,
            }
        )
    # In a group, since only there overrides are laid over a registered task.
    return [{"group": "local", "task": overridden}]


@cache
def task_manager() -> TaskManager:
    """The index of all of the harness's tasks, which takes seconds to make."""
    return TaskManager()


def evaluate(lm: Any, tasks: list[Any]) -> dict[str, Any]:
    return lm_eval.simple_evaluate(
        lm, tasks=tasks, task_manager=task_manager(), bootstrap_iters=0, gen_kwargs={"max_gen_toks": 8}
    )


@pytest.fixture(scope="module")
def hf(tasks: list[Any]) -> dict[str, Any]:
    """What the harness's own model class answers."""
    return evaluate(models(None), tasks)


def models(intervention: laai.Intervention | None) -> Any:
    kind: Any = HFLM if intervention is None else HFLaai
    extra = {} if intervention is None else {"intervention": intervention}
    return kind(pretrained=tiny_model("Llama"), tokenizer=tiny_tokenizer(bos=True), batch_size=4, **extra)


def test_every_output_type_agrees_with_hf(tasks: list[Any], hf: dict[str, Any]) -> None:
    untouched = evaluate(
        HFLaai(pretrained=tiny_model("Llama"), tokenizer=tiny_tokenizer(bos=True), batch_size=4), tasks
    )
    zero = evaluate(models(laai.Intervention({1: torch.zeros(4, 8)})), tasks)
    assert {c["output_type"] for c in hf["configs"].values()} == {
        *("loglikelihood", "loglikelihood_rolling", "multiple_choice", "generate_until")
    }
    for name in DOCUMENTS:
        assert untouched["results"][name] == hf["results"][name]
        metrics = {k: v for k, v in hf["results"][name].items() if isinstance(v, float)}
        assert metrics
        for metric, value in metrics.items():
            # Perplexities are exponentials of log-probabilities that agree to 1e-4.
            assert zero["results"][name][metric] == pytest.approx(value, rel=1e-4 if "perpl" in metric else 1e-6)
        for ours, theirs in zip(zero["samples"][name], hf["samples"][name], strict=True):
            for (mine,), (other,) in zip(ours["resps"], theirs["resps"], strict=True):
                if isinstance(other, str):
                    assert mine == other
                elif isinstance(other, tuple):
                    assert mine[0] == pytest.approx(other[0], abs=1e-4) and mine[1] == other[1]
                else:
                    # A whole document: float32 cannot tell 1e-4 apart at -700.
                    assert mine == pytest.approx(other, abs=1e-4, rel=1e-6)


def test_a_vector_that_is_not_zero_changes_them(tasks: list[Any], hf: dict[str, Any]) -> None:
    """Or the agreement above would show nothing."""
    steered = evaluate(models(laai.Intervention({1: torch.ones(4, 8)})), tasks)
    for name in DOCUMENTS:
        pairs = zip(steered["samples"][name], hf["samples"][name], strict=True)
        assert any(ours["resps"] != theirs["resps"] for ours, theirs in pairs), name
