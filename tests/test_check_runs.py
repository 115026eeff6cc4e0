"""`laai check` between two runs: real samples files of the harness, planted drops, simulated nulls, bad input."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
from lm_eval.api.model import LM
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from test_start_up import CODE, HEAVY, modules_of

from lm_eval_laai.commands import cli
from lm_eval_laai.gate import paired
from lm_eval_laai.gate.results_file import read_results
from lm_eval_laai.gate.runs import BETTER, SAME, WORSE, compare_runs

ITEMS = 400
ALPHA = 0.05


class Answers(LM):
    """Right on every item but those in `wrong`, by the number in its prompt: real requests, planted answers."""

    def __init__(self, wrong: set[int], length: dict[int, int] | None = None) -> None:
        super().__init__()
        self.wrong, self.length = wrong, length or {}

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        numbers = [int(request.args[0].split()[1]) for request in requests]
        return [f"{'no' if n in self.wrong else n}{' x' * self.length.get(n, 0)}" for n in numbers]

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        found = []
        for request in requests:
            number, right = int(request.args[0].split()[1]), request.args[1].strip() == "yes"
            found.append((-1.0 if right != (number in self.wrong) else -2.0, False))
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        return [-3.0 for _ in requests]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks over local data, none of this project: generation, multiple choice, and a perplexity; and a group."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [json.dumps({"number": number}) for number in range(ITEMS)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}
test_split: test
"""
    (folder / "copy.yaml").write_text(
        f"""task: copy
{common}output_type: generate_until
doc_to_text: "number {{{{number}}}} is"
doc_to_target: "{{{{number}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
  - {{metric: bleu, aggregation: bleu, higher_is_better: true}}
"""
    )
    (folder / "choose.yaml").write_text(
        f"""task: choose
{common}output_type: multiple_choice
doc_to_text: "number {{{{number}}}} is it"
doc_to_choice: ["yes", "no"]
doc_to_target: 0
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
    )
    (folder / "both.yaml").write_text(
        "group: both\ntask: [copy, choose]\naggregate_metric_list: [{metric: acc, weight_by_size: false}]\n"
    )
    return folder


def evaluate(folder: Path, output: Path, tasks: list[str], model: LM, **arguments: Any) -> Path:
    """What `lm_eval run --log_samples --output_path` writes; the results file."""
    tracker = EvaluationTracker(output_path=str(output))
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=tasks,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=True,
        evaluation_tracker=tracker,
        bootstrap_iters=10,
        **arguments,
    )
    samples = found.pop("samples")
    tracker.save_results_aggregated(results=found, samples=samples)
    for task in found["configs"]:
        tracker.save_results_samples(task_name=task, samples=samples[task])
    (path,) = output.rglob("results_*.json")
    return path


# 40 of 400 are wrong before; of the others nine turn wrong, and one of the 40 turns right.
WRONG = set(range(40))
PLANTED = (WRONG - {0}) | set(range(100, 109))


@pytest.fixture(scope="module")
def before(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evaluate(tasks, tmp_path_factory.mktemp("before"), ["both"], Answers(WRONG))


@pytest.fixture(scope="module")
def dropped(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evaluate(tasks, tmp_path_factory.mktemp("dropped"), ["both"], Answers(PLANTED))


@pytest.fixture
def copied(dropped: Path, tmp_path: Path) -> Callable[[str], Path]:
    """The run with the planted drop, and one of its samples files to write anew."""

    def copy(task: str) -> Path:
        for path in dropped.parent.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        (samples,) = tmp_path.glob(f"samples_{task}_*.jsonl")
        return samples

    return copy


def check(*arguments: object) -> int:
    return cli.main(["check", *map(str, arguments)])


def rewrite(path: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("\n".join(json.dumps(row) for row in rows))


# The planted drop


def test_the_paired_test_catches_what_two_standard_errors_miss(before: Path, dropped: Path) -> None:
    tests, findings = compare_runs(read_results(dropped), read_results(before), metrics=["exact_match"])
    (one,) = tests
    assert (one.task, one.paired.items, one.paired.fell, one.paired.rose) == ("copy", ITEMS, 9, 1)
    # The exact test by hand: twice the chance of at most one of ten fair coins.
    assert one.p_holm == one.paired.p == pytest.approx(2 * (1 + 10) / 2**10) and one.verdict == WORSE
    assert [f.item for f in findings if f.state == "FAILED"] == ["exact_match,none"]
    scores = [read_results(path).tasks["copy"].metrics["exact_match,none"] for path in (before, dropped)]
    drop = scores[0].value - scores[1].value
    assert drop == pytest.approx(8 / ITEMS)
    assert drop < 2 * math.hypot(*(score.stderr for score in scores))  # unpaired
    assert drop > 2 * one.paired.stderr


def test_the_baseline_of_the_same_run_misses_it(before: Path, dropped: Path, tmp_path: Path) -> None:
    baseline = tmp_path / "base.yaml"
    assert check(before, "--against", baseline, "--update") == 0
    assert check(dropped, "--against", baseline) == 0


def test_the_command_says_so_and_exits_with_one(
    before: Path, dropped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    junit = tmp_path / "junit.xml"
    arguments = (dropped.parent, "--against", before.parent, "--metric", "exact_match", "--junit", junit, "--github")
    assert check(*arguments) == 1
    text = capsys.readouterr().out
    assert "-0.0200 ± 0.0079" in text and "g -0.40" in text and "0.021" in text and "worse" in text
    assert "::error title=laai check::copy exact_match,none: worse: -0.02, 9 of 400 items fell and 1 rose" in text
    assert junit.read_text().count("<failure") == 1
    assert check(dropped, "--against", before, "--metric", "exact_match", "--alpha", 0.01) == 0


def test_the_other_way_round_it_is_better(before: Path, dropped: Path) -> None:
    tests, findings = compare_runs(read_results(before), read_results(dropped), metrics=["exact_match,none"])
    assert [one.verdict for one in tests] == [BETTER] and not any(f.state == "FAILED" for f in findings)


def test_every_metric_of_every_task_is_in_the_family(
    before: Path, dropped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Holm over two tests doubles the smallest p-value: .043. What cannot be paired is told, and never silently."""
    assert check(dropped, "--against", before, "--json") == 1
    facts = json.loads(capsys.readouterr().out)
    assert [(t["task"], t["metric"], t["verdict"]) for t in facts["tests"]] == [
        ("copy", "exact_match,none", WORSE),
        ("choose", "acc,none", WORSE),
    ]
    assert all(t["p_holm"] == pytest.approx(2 * 22 / 2**10) for t in facts["tests"])
    told = {(f["task"], f["item"]): f["reason"] for f in facts["findings"] if f["state"] == "note"}
    assert told["copy", "bleu,none"] == "its items have no number each: it is computed over all of them: not tested"
    assert told["both", "samples"] == "neither run logged samples of it: not tested"


def test_equal_runs_differ_in_nothing(tasks: Path, before: Path, tmp_path: Path) -> None:
    again = evaluate(tasks, tmp_path, ["both"], Answers(WRONG))
    tests, findings = compare_runs(read_results(again), read_results(before))
    assert {one.verdict for one in tests} == {SAME} and {one.p_holm for one in tests} == {1.0}
    assert all(f.state != "FAILED" for f in findings)


def test_another_number_of_shots_is_told_and_compared(tasks: Path, before: Path, tmp_path: Path) -> None:
    found = evaluate(tasks, tmp_path, ["choose"], Answers(WRONG))
    content = json.loads(found.read_text())
    content["n-shot"]["choose"] = 10
    found.write_text(json.dumps(content))
    tests, findings = compare_runs(read_results(found), read_results(before))
    assert len(tests) == 1 and ("choose", "shots") in [(f.task, f.item) for f in findings if f.state == "note"]
    assert ("copy", "task") in [(f.task, f.item) for f in findings if f.state == "FAILED"]  # it was not run again


def test_it_imports_nothing_heavy(before: Path, dropped: Path) -> None:
    """Two runs need scipy for the tests; a baseline does not (test_start_up.py)."""
    code, modules = modules_of(CODE, "check", str(dropped), "--against", str(before))
    assert code == 1
    assert modules.isdisjoint(HEAVY), modules & set(HEAVY)


# The tests themselves


def test_false_alarms_of_0_1_metrics() -> None:
    """1,000 pairs of runs that do not differ, over four tasks each: at most 5 % raise any alarm, after Holm."""
    generator = np.random.default_rng(1)
    alarms = 0
    for _ in range(1000):
        p_values = []
        for rate in (0.3, 0.7, 0.9, 0.97):
            ability = generator.beta(8 * rate, 8 * (1 - rate), 200)  # of each item: both runs find the same ones hard
            old, new = generator.random(200) < ability, generator.random(200) < ability
            p_values.append(paired.compare_items(old, new).p)
        alarms += min(paired.holm(p_values)) <= ALPHA
    assert 0 < alarms <= 50


@pytest.mark.parametrize("kind", ["normal", "skewed", "sparse"])
def test_false_alarms_of_other_metrics(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 nulls; an estimated 5 % has a standard error of .7 points, hence the room for two."""
    monkeypatch.setattr(paired, "RESAMPLES", 499)
    generator = np.random.default_rng(2)
    alarms = 0
    for _ in range(1000):
        base = generator.random(60)
        if kind == "normal":
            old, new = base + generator.normal(0, 0.2, 60), base + generator.normal(0, 0.2, 60)
        elif kind == "skewed":
            old, new = base + generator.exponential(0.3, 60), base + generator.exponential(0.3, 60)
        else:  # an F1 that differs at few items
            old, new = (np.where(generator.random(60) < 0.1, generator.random(60), base) for _ in range(2))
        result = paired.compare_items(old, new)
        assert result.test == "sign flips"
        alarms += result.p <= ALPHA
    assert 0 < alarms <= 50 + 14


def test_mcnemar_is_the_binomial_test_by_hand() -> None:
    for fell, rose in ((9, 1), (5, 5), (0, 6), (30, 12)):
        tail = sum(math.comb(fell + rose, k) for k in range(min(fell, rose) + 1)) / 2 ** (fell + rose)
        assert paired.mcnemar(fell, rose) == pytest.approx(min(1.0, 2 * tail))
    assert paired.mcnemar(0, 0) == 1.0


def test_sign_flips_by_hand() -> None:
    change = np.array([0.3, -0.1, 0.25, 0.0, 0.4, 0.05, -0.2, 0.15])
    sums = [abs(np.dot(signs, change)) for signs in itertools.product((-1, 1), repeat=len(change))]
    expected = np.mean([one >= abs(change.sum()) - 1e-12 for one in sums])
    assert paired.sign_flips(change) == pytest.approx(expected)


def test_sign_flips_of_0_1_values_are_mcnemar() -> None:
    for fell, rose in ((9, 1), (5, 5), (0, 6), (3, 10)):
        change = np.array([-1.0] * fell + [1.0] * rose + [0.0] * 50)
        assert paired.sign_flips(change) == pytest.approx(paired.mcnemar(fell, rose))


def test_sign_flips_agree_with_the_t_test_where_that_holds() -> None:
    from scipy.stats import ttest_1samp

    generator = np.random.default_rng(3)
    for shift in (0.0, 0.02, 0.05):
        change = generator.normal(shift, 0.2, 300)
        assert paired.sign_flips(change) == pytest.approx(ttest_1samp(change, 0).pvalue, abs=0.02)


def test_a_shift_of_every_item_is_found_and_none_is_not() -> None:
    values = np.linspace(0.1, 0.8, 30)
    assert paired.compare_items(values, values + 0.1).p == pytest.approx(2 / 10_000)
    same = paired.compare_items(values, values)
    assert (same.p, same.effect, same.fell, same.rose) == (1.0, None, 0, 0)


def test_holm_by_hand() -> None:
    assert paired.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert paired.holm([]) == [] and paired.holm([0.9, 0.8]) == [1.0, 1.0]


# Bad input


def first(**changes: object) -> Callable[[list[dict[str, Any]]], object]:
    return lambda rows: rows[7].update(changes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (first(doc_hash="0" * 64), "item 7 is another document in"),
        (first(target_hash="0" * 64), "item 7 is another target in"),
        (lambda rows: rows.pop(7), "copy: item 7 in"),
        (lambda rows: [rows.pop(7), rows.pop(7)], "item 7 and 1 more in"),
        (lambda rows: rows.append(rows[7]), "item 7 is there twice"),
        (first(exact_match=math.nan), "'exact_match' of item 7 is nan: expected a finite number"),
        (first(exact_match=10**400), "'exact_match' of item 7 is inf: expected a finite number"),
        (first(doc_id="seven"), "doc_id is 'seven'"),
        (first(doc_hash=None), "doc_hash is None"),
        (first(metrics="all"), "metrics is 'all'"),
        (lambda rows: rows.clear(), "has no items"),
        (lambda rows: [row.update(filter="other") for row in rows], "has no samples of filter 'none'"),
    ],
)
def test_samples_of_other_items_are_refused(
    change: Any, said: str, before: Path, copied: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    samples = copied("copy")
    rewrite(samples, change)
    assert check(samples.parent, "--against", before) == 2
    out, error = capsys.readouterr()
    assert said in error and error.count("\n") == 1 and not out


def test_samples_of_another_task_are_refused(
    before: Path, copied: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    samples = copied("copy")
    (other,) = samples.parent.glob("samples_choose_*.jsonl")
    samples.write_bytes(other.read_bytes())
    assert check(samples.parent, "--against", before) == 2
    assert "item 0 has other metrics in" in capsys.readouterr().err


def test_no_samples_and_no_json(
    before: Path, copied: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    samples = copied("copy")
    samples.write_text("{")
    assert check(samples.parent, "--against", before) == 2
    assert "line 1 is not valid JSON" in capsys.readouterr().err
    samples.unlink()
    assert check(samples.parent, "--against", before) == 2
    assert "no samples of copy beside" in capsys.readouterr().err
    for path in samples.parent.glob("samples_*"):
        path.unlink()
    assert check(samples.parent, "--against", samples.parent) == 2
    assert "against itself" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--alpha", "1"], "--alpha is 1.0"),
        (["--metric", "f1"], "nothing to test"),
        (["--update"], "--update writes a baseline"),
    ],
)
def test_bad_arguments(
    arguments: list[str], said: str, before: Path, dropped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(dropped, "--against", before, *arguments) == 2
    assert said in capsys.readouterr().err


def test_alpha_and_metric_need_a_run(before: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(before, "--against", tmp_path / "base.yaml", "--update") == 0
    assert check(before, "--against", tmp_path / "base.yaml", "--alpha", "0.1") == 2
    assert "expected --against a run" in capsys.readouterr().err


def test_a_metric_is_tested_on_the_items_that_have_it(before: Path, dropped: Path, tmp_path: Path) -> None:
    """As OpinionQA's wasserstein, which questions have whose options have an order: here all but the first."""
    runs = []
    for run in (before, dropped):
        shutil.copytree(run.parent, tmp_path / run.name)
        (samples,) = (tmp_path / run.name).glob("samples_choose_*.jsonl")
        rewrite(samples, lambda rows: rows[0].update(metrics=[]))
        values = [json.loads(line)["acc"] for line in samples.read_text().splitlines()]
        path = tmp_path / run.name / run.name
        content = json.loads(path.read_text())
        content["results"]["choose"]["acc,none"] = sum(values[1:]) / len(values[1:])
        path.write_text(json.dumps(content))
        runs.append(read_results(path))
    ((one,), _) = compare_runs(runs[1], runs[0], metrics=["acc"])
    assert (one.task, one.paired.items, one.paired.fell) == ("choose", ITEMS - 1, 9)


def test_a_value_that_is_not_the_mean_of_its_items_is_not_tested(
    before: Path, copied: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    samples = copied("copy")
    rewrite(samples, lambda rows: [row.update(exact_match=0.0) for row in rows[50:60]])
    assert check(samples.parent, "--against", before, "--metric", "exact_match", "--metric", "acc") == 1
    assert (
        "note: copy exact_match,none: its value is not the mean of its items': not tested" in capsys.readouterr().out
    )
