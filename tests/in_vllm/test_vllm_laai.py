"""vllm-laai against hf-laai on the reference model: every request type, every site and position, mixed batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from alike import KINDS, TASKS, TOLERANCE, assert_scores_alike, assert_texts_alike, hf, vectors
from launched import TASKS as CHOICE_TEXT_AND_ROLLING
from lm_eval import simple_evaluate
from lm_eval.api.model import CachingLM
from lm_eval.tasks import TaskManager
from test_hf_laai import requests
from tiny import REFERENCE

import laai_core as laai
from laai_core.errors import LaaiError, WorkFailed
from lm_eval_laai.tasks import include_path

pytest_plugins = ["engines"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return vectors(hf(REFERENCE, None).model, tmp_path_factory.mktemp("vectors"))


@pytest.fixture(scope="module")
def lm(engine: Any, folder: str) -> Any:
    return engine(REFERENCE, folder, unrouted="none")


@pytest.fixture(scope="module")
def reference(folder: str) -> Any:
    return hf(REFERENCE, folder, unrouted="none")


def test_loglikelihoods(lm: Any, reference: Any) -> None:
    assert_scores_alike(lm, reference)


def test_generation(lm: Any, reference: Any) -> None:
    assert_texts_alike(lm, reference)


def test_rolling(lm: Any, reference: Any, folder: str) -> None:
    """A text of several windows: position last acts once. VLLM's windows have two tokens less than HFLM's."""
    text = " ".join(f"Q: {n} hot A: cold" for n in range(80))
    shorter = hf(REFERENCE, folder, unrouted="none", max_length=lm.max_length - 2)
    asked = requests("loglikelihood_rolling", [(text,)] * len(TASKS) + [("Q: hot",)] * len(TASKS), 2 * TASKS)
    assert len(lm.tok_encode(text)) > 2 * lm.max_length
    got = lm.loglikelihood_rolling(asked, disable_tqdm=True)
    want = shorter.loglikelihood_rolling(asked, disable_tqdm=True)
    assert got == pytest.approx(want, abs=20 * TOLERANCE)  # sums over hundreds of tokens
    assert len({round(score, 2) for score in got[: len(TASKS)]}) == len(TASKS)


def test_an_untouched_request_after_one_with_the_same_text(lm: Any, reference: Any) -> None:
    """Nothing that a vector wrote into the cache of keys and values is read without it."""
    pair = ("Q: hot\nA: cold\n\n" * 8 + "Q: big\nA:", " small")  # longer than a block
    for task in ("untouched", "heads", "untouched", "residual", "untouched"):
        ((got, _),) = lm.loglikelihood(requests("loglikelihood", [pair], [task]), disable_tqdm=True)
        ((want, _),) = reference.loglikelihood(requests("loglikelihood", [pair], [task]), disable_tqdm=True)
        assert got == pytest.approx(want, abs=TOLERANCE)


def test_a_long_context_is_cut_as_vllm_cuts_it(lm: Any, folder: str) -> None:
    shorter = hf(REFERENCE, folder, unrouted="none", max_length=lm.max_length - 2)
    asked = requests("loglikelihood", [("Q: hot\nA: cold\n\n" * 60 + "Q: big\nA:", " small")] * 2, ["heads", "mlp"])
    got, want = lm.loglikelihood(asked, disable_tqdm=True), shorter.loglikelihood(asked, disable_tqdm=True)
    assert [a for a, _ in got] == pytest.approx([b for b, _ in want], abs=TOLERANCE)


def test_faults_are_one_line(lm: Any, folder: str) -> None:
    with pytest.raises(LaaiError, match="no tokens of its own"):
        lm.loglikelihood(requests("loglikelihood", [("Q: hot\nA:", "")], ["heads"]), disable_tqdm=True)
    with pytest.raises(LaaiError, match="does not fit"):
        lm.loglikelihood(requests("loglikelihood", [("Q", " cold" * 300)], ["heads"]), disable_tqdm=True)
    with pytest.raises(LaaiError, match="--use_cache is refused"):
        CachingLM(lm, str(Path(folder) / "cache.db"))


def test_the_report_names_every_file(lm: Any) -> None:
    found = lm.get_model_info()["interventions"]
    assert {(Path(one["source"]).stem, one["site"], one["position"]) for one in found} == {
        (name, site, position) for name, (site, position, _) in KINDS.items()
    }


def test_untouched_requests_are_vllms_own(lm: Any, engine: Any) -> None:
    """Bit for bit, among requests that are touched and alone."""
    pair, text = ("Q: hot\nA:", " cold water"), ("Q: hot\nA: cold",)
    how = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
    asked = {"loglikelihood": pair, "loglikelihood_rolling": text, "generate_until": (pair[0], how)}

    def answers(model: Any) -> list[Any]:
        return [
            getattr(model, kind)(requests(kind, [one] * len(tasks), tasks), disable_tqdm=True)[-1]
            for kind, one in asked.items()
            for tasks in (TASKS, ["untouched"])
        ]

    mine = answers(lm)
    assert mine == answers(engine(REFERENCE, None, enable_prefix_caching=False))


def table(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        name: {k: v for k, v in found.items() if "," in k and isinstance(v, float)}
        for name, found in results["results"].items()
    }


def test_tables_of_the_harness(engine: Any, tmp_path: Path) -> None:
    """The whole of laai_lexicon, a multiple-choice group, and tasks of three request types: the same numbers."""
    manager = TaskManager(include_path=str(include_path()), include_defaults=False)
    model = hf(REFERENCE, None, dtype="float32")
    for seed, rule in enumerate(("antonym", "synonym", "en_fr", "en_de")):
        examples = laai.load_task(f"lexicon_{rule}", seed=0).train
        trained = laai.train(model.model, model.tokenizer, examples, 3, steps=20, seed=seed).intervention
        trained.save(tmp_path / f"laai_lexicon_{rule}.safetensors")
    for name in ("choice", "laai_survey_keen", "laai_survey_wary"):
        laai.Intervention.load(tmp_path / "laai_lexicon_antonym.safetensors").save(tmp_path / f"{name}.safetensors")
    names = ["laai_lexicon", "laai_survey"]
    tables = []
    routed: dict[str, Any] = {"intervention": str(tmp_path), "unrouted": "none"}
    for lm in (engine(REFERENCE, **routed), hf(REFERENCE, dtype="float32", **routed)):
        tasks = [*names, *(dict(task) for task in CHOICE_TEXT_AND_ROLLING)]
        found = simple_evaluate(model=lm, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=False)
        tables.append(table(found))
    mine, theirs = tables
    assert mine.keys() == theirs.keys() and len(mine) >= 11
    for name, metrics in theirs.items():
        assert mine[name] == pytest.approx(metrics, abs=TOLERANCE, rel=1e-5), name


def test_a_vector_from_python_and_its_scale(engine: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    given = laai.Intervention({1: 4 * torch.randn(8, 32, generator=generator)}, scale=0.5)
    asked = requests("loglikelihood", [("Q: hot\nA:", " cold")])
    lm, reference = engine(REFERENCE, given, scale=0.5), hf(REFERENCE, given, scale=0.5)
    got, want = lm.loglikelihood(asked, disable_tqdm=True), reference.loglikelihood(asked, disable_tqdm=True)
    assert got[0][0] == pytest.approx(want[0][0], abs=TOLERANCE)


def test_logits_that_are_not_finite(engine: Any) -> None:
    lm = engine(REFERENCE, laai.Intervention({3: torch.full((8, 32), 3e38)}))
    with pytest.raises(WorkFailed, match="task task, document 0.*NaN or infinite"):
        lm.loglikelihood(requests("loglikelihood", [("Q: hot\nA:", " cold")]), disable_tqdm=True)
    with pytest.raises(WorkFailed, match="under 'intervention'.*NaN or infinite"):
        how = {"until": ["\n"], "max_gen_toks": 2}
        lm.generate_until(requests("generate_until", [("Q: hot\nA:", how)]), disable_tqdm=True)
