"""The task definitions, through the harness's own TaskManager and evaluator."""

from __future__ import annotations

import csv
import json
import math
import re
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval._cli import HarnessCLI
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.tasks import TaskManager

from laai_core import LaaiError
from laai_core.data import load_task, task_names
from laai_core.data.lexicon import LEXICON as LEXICON_TABLE
from lm_eval_laai.tasks import NO_GROUP, include_path, list_tasks

LEXICON = [task.name for task in list_tasks() if task.group == "laai_lexicon"]
RULE = [task.name for task in list_tasks() if task.group == "laai_rule"]


def manager(**metadata: Any) -> TaskManager:
    return TaskManager(include_path=str(include_path()), include_defaults=False, metadata=metadata)


def lexicon_antonym(**metadata: Any) -> Task:
    return manager(**metadata).load("laai_lexicon_antonym")["tasks"]["laai_lexicon_antonym"]


def pairs(docs: Any) -> list[tuple[str, str]]:
    return [(doc["prompt"], doc["target"]) for doc in docs]


def examples(seed: int = 0, n_train: int = 10) -> list[tuple[str, str]]:
    return [(e.prompt, e.target or "") for e in load_task("lexicon_antonym", seed=seed, n_train=n_train).train]


class Scripted(LM):
    """Answers each request with a function of its document and task."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return [self.answer(request) for request in requests]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError


def test_the_list_is_what_the_harness_finds() -> None:
    found = manager()
    assert {task.name for task in list_tasks()} == set(found.all_subtasks)
    assert {task.group for task in list_tasks()} - {NO_GROUP} == set(found.all_groups)
    assert {task.data_set for task in list_tasks()} <= set(task_names())
    assert {task.metric for task in list_tasks()} == {"exact_match", "kl"}
    for task in list_tasks():
        # Interventions are looked up by the harness's name, which is the data set's with a prefix.
        assert task.name == f"laai_{task.data_set}"


def test_zero_shot_prompt_is_the_prompt() -> None:
    task = lexicon_antonym()
    for doc in list(task.test_docs())[:20]:
        text = task.fewshot_context(doc, 0)
        assert re.fullmatch(r"Q: \S[^\n]*\nA:", text)
        assert text == doc["prompt"]


def test_ten_shot_prompt_is_the_training_examples_in_order_for_every_item() -> None:
    task = lexicon_antonym()
    solved = "".join(f"{prompt}{target}\n\n" for prompt, target in examples())
    assert re.fullmatch(r"(Q: \S[^\n]*\nA: \S[^\n]*\n\n){10}", solved)
    for doc in list(task.test_docs())[:20]:
        assert task.fewshot_context(doc, 10) == solved + doc["prompt"]
    assert task.fewshot_context(doc, 3) == "".join(f"{p}{t}\n\n" for p, t in examples()[:3]) + doc["prompt"]


def test_no_task_fixes_the_number_of_shots() -> None:
    # A 0 in the YAML would make --num_fewshot 10 do nothing, silently.
    for task in manager().load(LEXICON)["tasks"].values():
        assert task.config.num_fewshot is None


def test_seed_and_size_come_from_metadata() -> None:
    assert pairs(lexicon_antonym().fewshot_docs()) == examples(seed=0)
    assert pairs(lexicon_antonym(seed=3).fewshot_docs()) == examples(seed=3) != examples(seed=0)
    assert pairs(lexicon_antonym(n_train=4).fewshot_docs()) == examples(n_train=4)
    assert pairs(lexicon_antonym(seed=3).test_docs()) == pairs(lexicon_antonym().test_docs())


@pytest.mark.parametrize("given", ["seed=3", '{"seed": 3}'])
def test_seed_from_the_harness_command_line(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["lm_eval", "run", "--model", "hf-laai", "--model_args", "pretrained=some/model,scale=0.5"]
    monkeypatch.setattr("sys.argv", [*line, "--tasks", "laai_lexicon_antonym", "--metadata", given])
    config = EvaluatorConfig.from_cli(HarnessCLI().parse_args())
    assert config.metadata["pretrained"] == "some/model"  # the harness lays model arguments over a task's metadata
    assert pairs(lexicon_antonym(**config.metadata).fewshot_docs()) == examples(seed=3)


def test_a_model_argument_never_replaces_the_data_set() -> None:
    task = lexicon_antonym(task="synonym", name="synonym", dataset="synonym", split="x", pretrained="some/model")
    assert pairs(task.test_docs()) == pairs(lexicon_antonym().test_docs())


@pytest.mark.parametrize("metadata", [{"seed": 1.5}, {"seed": "three"}, {"n_train": 0}, {"n_train": 100_000}])
def test_bad_metadata_is_refused(metadata: dict[str, Any]) -> None:
    with pytest.raises(LaaiError, match=r"lexicon_antonym: (seed|n_train) is"):
        lexicon_antonym(**metadata)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (" cold", 1.0),
        ("cold", 1.0),
        (" cold \nQ: up", 1.0),
        (" Cold", 0.0),
        (" cold.", 0.0),
        (" colder", 0.0),
        ("", 0.0),
        ("\n cold", 0.0),
    ],
)
def test_exact_match_of_the_first_line(answer: str, score: float) -> None:
    doc = {"prompt": "Q: hot\nA:", "target": " cold"}
    assert lexicon_antonym().process_results(doc, [answer]) == {"exact_match": score}


def test_generation_settings() -> None:
    for task in manager().load(LEXICON)["tasks"].values():
        assert task.config.generation_kwargs == {"until": ["\n"], "max_gen_toks": 16, "do_sample": False}


def test_scores_stderrs_and_the_unweighted_group() -> None:
    # Different numbers of items. The first task is answered rightly, the others only on the odd items.
    sizes = dict(zip(LEXICON, [4, 8, 16, 40], strict=True))

    def answer(request: Instance) -> str:
        right = request.task_name == LEXICON[0] or request.doc_id % 2
        return request.doc["target"] + "\nQ:" if right else " no"

    result = simple_evaluate(
        model=Scripted(answer),
        tasks=["laai_lexicon"],
        task_manager=manager(),
        samples={name: list(range(size)) for name, size in sizes.items()},
        num_fewshot=10,
        log_samples=False,
    )
    scores = result["results"]
    errors = []
    for name, size in sizes.items():
        p = 1.0 if name == LEXICON[0] else 0.5
        errors.append(math.sqrt(p * (1 - p) / (size - 1)))
        assert scores[name]["exact_match,none"] == pytest.approx(p)
        assert scores[name]["exact_match_stderr,none"] == pytest.approx(errors[-1])
    assert scores["laai_lexicon"]["exact_match,none"] == pytest.approx((1.0 + 3 * 0.5) / 4)
    assert scores["laai_lexicon"]["exact_match_stderr,none"] == pytest.approx(math.hypot(*errors) / 4)
    assert result["higher_is_better"]["laai_lexicon_antonym"] == {"exact_match": True}
    assert set(result["n-shot"].values()) == {10}


def test_missing_data_fails_while_the_tasks_are_built(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAAI_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(LaaiError) as caught:
        manager().load("laai_rule")
    message = str(caught.value)
    assert "\n" not in message
    assert "laai data fetch" in message
    assert "LAAI_DATA" in message
    assert str(tmp_path / "nowhere") in message


def test_public_sets(public_data: Any) -> None:
    tasks = manager(data=str(public_data)).load("laai_rule")["tasks"]
    assert list(tasks) == RULE
    for task in tasks.values():
        assert len(task.fewshot_docs()) == 10
        assert len(task.test_docs()) > 1000
        for prompt, target in pairs(task.test_docs()):
            assert re.fullmatch(r"Q: \S[^\n]*\nA:", prompt)
            assert re.fullmatch(r" \S[^\n]*", target)


COMPOSED = {"antonym": "antonym", "synonym": "synonym", "en_fr": "french", "en_de": "german"}  # the lexicon's columns


def lexicon_rows() -> dict[str, dict[str, str]]:
    with open(LEXICON_TABLE, encoding="utf-8", newline="") as file:
        return {row["english"]: row for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)}


def test_lexicon_compositions_are_one_rule_after_another() -> None:
    rows = lexicon_rows()
    tasks = manager().load("laai_lexicon_composition")["tasks"]
    assert list(tasks) == [f"laai_lexicon_{b}_{a}" for a in ("antonym", "synonym") for b in ("en_fr", "en_de")]
    for name, task in tasks.items():
        second, first = name.removeprefix("laai_lexicon_")[:5], name.rpartition("_")[2]
        both = pairs(task.fewshot_docs()) + pairs(task.test_docs())
        for prompt, target in both:
            word = prompt.removeprefix("Q: ").removesuffix("\nA:")
            assert target == " " + rows[rows[word][first]][COMPOSED[second]]
        # No word drops out, and a composition's test words are those of its rules, whose vectors never saw them.
        for rule in (first, second):
            (alone,) = manager().load(f"laai_lexicon_{rule}")["tasks"].values()
            assert [p for p, _ in pairs(task.test_docs())] == [p for p, _ in pairs(alone.test_docs())]
        assert task.fewshot_context(task.test_docs()[0], 10).count("\n\n") == 10


def test_the_group_of_compositions_is_unweighted() -> None:
    names = list(manager().load("laai_lexicon_composition")["tasks"])
    result = simple_evaluate(
        model=Scripted(lambda request: request.doc["target"] if request.task_name == names[0] else " no"),
        tasks=["laai_lexicon_composition"],
        task_manager=manager(),
        samples={name: list(range(size)) for name, size in zip(names, [2, 4, 8, 16], strict=True)},
        log_samples=False,
    )
    assert result["results"]["laai_lexicon_composition"]["exact_match,none"] == pytest.approx(1 / 4)


def test_public_compositions(public_data: Any) -> None:
    def table(file: str) -> dict[str, str]:
        records = json.loads((public_data / "function_vectors" / file).read_text(encoding="utf-8"))
        # Read backwards, so that of two records of one word the first one stays.
        return {record["input"].strip(): record["output"].strip() for record in reversed(records)}

    tasks = manager(data=str(public_data)).load("laai_composition")["tasks"]
    assert list(tasks) == [f"laai_{b}_{a}" for a in ("antonym", "synonym") for b in ("en_fr", "en_de")]
    for name, task in tasks.items():
        first = table(f"{name.rpartition('_')[2]}.json")
        second = table({"en_fr": "english-french.json", "en_de": "english-german.json"}[name[5:10]])
        joined = {w: second[v] for w, v in first.items() if v in second}
        found = {p.removeprefix("Q: ").removesuffix("\nA:"): t.removeprefix(" ") for p, t in pairs(task.test_docs())}
        assert len(task.fewshot_docs()) == 10
        assert 0.6 * len(joined) < len(found) < 0.8 * len(joined)  # all but the training pool
        assert found == {word: joined[word] for word in found}
