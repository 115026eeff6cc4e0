"""Two runs of the harness on the same items, both with --log_samples: what got worse, by paired tests."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from laai_core.errors import LaaiError
from lm_eval_laai.gate.check import FAILED, NOTE, OK, Finding
from lm_eval_laai.gate.paired import Paired, compare_items, holm
from lm_eval_laai.gate.results_file import Metric, Results
from lm_eval_laai.gate.samples import Items, read_samples, samples_file

WORSE, BETTER, CHANGED, SAME = "worse", "better", "changed", "no difference found"
# The harness sums in another order, and rounds some of its metrics' items.
_MEAN = 1e-6  # relative


@dataclass(frozen=True)
class Comparison:
    """One test: a task's metric, the paired values of its items, the corrected p-value and the verdict."""

    task: str
    metric: str  # the harness's `name,filter`
    paired: Paired
    p_holm: float
    verdict: str  # WORSE, BETTER, SAME; CHANGED where the harness does not say which way is better


def compare_runs(
    results: Results, before: Results, alpha: float = 0.05, metrics: Iterable[str] = ()
) -> tuple[list[Comparison], list[Finding]]:
    """Test every metric of every task that both runs logged samples of; Holm's correction over all these tests.

    Args:
        results, before: what `read_results` gave.
        alpha: what the corrected p-value must stay below for a verdict; of runs that do not differ, at most this
            share is told apart.
        metrics: test these alone: `name` or `name,filter`.

    Returns:
        The tests, and the findings of `laai check`: one per test, and one per task for untested metrics.

    Raises:
        LaaiError: samples are missing, damaged, or of other items; no such metric; or nothing could be tested.
    """
    wanted = set(metrics)
    tests: list[tuple[str, str, Paired, bool | None]] = []
    findings: list[Finding] = []
    for task in [*before.tasks, *(name for name in results.tasks if name not in before.tasks)]:
        absent = [run.path for run in (before, results) if task not in run.tasks]
        if absent:
            state, reason = (FAILED, "not in the results") if task in before.tasks else (NOTE, f"not in {absent[0]}")
            findings.append(Finding(task, "task", "there", "missing", state, reason))
            continue
        findings += _settings(task, results, before)
        files = [samples_file(run.path, task) for run in (before, results)]
        if files[0] is None and files[1] is None:
            findings.append(Finding(task, "samples", "-", "-", NOTE, "neither run logged samples of it: not tested"))
            continue
        for path, run in zip(files, (before, results), strict=True):
            if path is None:
                raise LaaiError(f"no samples of {task} beside {run.path}: evaluate both runs with --log_samples")
        old, new = (read_samples(path) for path in files if path is not None)
        pairs, told = _values(task, old, new, results, before, wanted)
        findings += told
        for metric, values in pairs.items():
            tests.append((task, metric, compare_items(*values), _direction(results, before, task, metric)))
    if not tests:
        reason = (
            f"no metric {' or '.join(sorted(wanted))} with a number for each item" if wanted else "no samples of both"
        )
        raise LaaiError(
            f"nothing to test between {before.path} and {results.path}: {reason}; evaluate both with --log_samples"
        )
    adjusted = holm([test[2].p for test in tests])
    comparisons = [
        Comparison(task, metric, paired, p, _verdict(paired, p, alpha, better))
        for (task, metric, paired, better), p in zip(tests, adjusted, strict=True)
    ]
    return comparisons, [*map(_finding, comparisons), *findings]


def _settings(task: str, results: Results, before: Results) -> list[Finding]:
    """Findings on settings: another task version fails; other shots are a note, since they may be compared."""
    findings = []
    old, new = before.tasks[task].setting, results.tasks[task].setting
    if old.get("version") != new.get("version"):
        reason = "version changed: the numbers cannot be compared"
        findings.append(Finding(task, "version", str(old.get("version")), str(new.get("version")), FAILED, reason))
    if old.get("shots") != new.get("shots"):
        findings.append(Finding(task, "shots", str(old.get("shots")), str(new.get("shots")), NOTE, "other shots"))
    return findings


def _values(
    task: str, old: dict[str, Items], new: dict[str, Items], results: Results, before: Results, wanted: set[str]
) -> tuple[dict[str, tuple[list[float], list[float]]], list[Finding]]:
    """Values of both runs by `metric,filter`, in the same order of items, and findings on untestable metrics."""
    pairs: dict[str, tuple[list[float], list[float]]] = {}
    findings = []
    for name in old:
        if name not in new:
            raise LaaiError(f"{task}: {results.path} has no samples of filter {name!r:.60}, {before.path} has")
        ids = _same_items(f"{task}, filter {name}" if name != "none" else task, old[name], new[name], results, before)
        for metric in dict.fromkeys(metric for i in ids for metric in old[name][i].values):
            key = f"{metric},{name}"
            if wanted and not wanted & {metric, key}:
                continue
            # Items without it are no part of its mean: OpinionQA's questions whose options have no order.
            having = [i for i in ids if metric in old[name][i].values]
            values = [[items[i].values[metric] for i in having] for items in (old[name], new[name])]
            numbers = [[value for value in column if value is not None] for column in values]
            reason = None
            if any(len(column) != len(having) for column in numbers):
                reason = "its items have no number each: it is computed over all of them"
            elif not all(
                _is_mean(c, run.tasks[task].metrics.get(key))
                for c, run in zip(numbers, (before, results), strict=True)
            ):
                reason = "its value is not the mean of its items'"
            if reason is None:
                pairs[key] = (numbers[0], numbers[1])
            else:
                findings.append(Finding(task, key, "-", "-", NOTE, f"{reason}: not tested"))
    return pairs, findings


def _same_items(where: str, old: Items, new: Items, results: Results, before: Results) -> list[int]:
    """The doc_ids of both, in ascending order; LaaiError unless they are the same documents with the same targets."""
    for items, others, has, lacks in ((old, new, before, results), (new, old, results, before)):
        missing = sorted(set(items) - set(others))
        if missing:
            raise LaaiError(
                f"{where}: item {missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''} in {has.path} "
                f"missing in {lacks.path}: expected both runs on the same items, with the same --limit"
            )
    for doc_id in sorted(old):
        for what in ("doc_hash", "target_hash"):
            if getattr(old[doc_id], what) != getattr(new[doc_id], what):
                raise LaaiError(
                    f"{where}: item {doc_id} is another {'document' if what == 'doc_hash' else 'target'} in "
                    f"{results.path} than in {before.path} ({what}): expected the same data"
                )
        if old[doc_id].values.keys() != new[doc_id].values.keys():
            raise LaaiError(f"{where}: item {doc_id} has other metrics in {results.path} than in {before.path}")
    return sorted(old)


def _is_mean(values: list[float], metric: Metric | None) -> bool:
    """Whether the run's own value is the mean of its items'; a sum over ranks differs in its last bits."""
    if metric is None:
        return False
    mean = sum(values) / len(values)
    return abs(mean - metric.value) <= _MEAN * max(1.0, abs(mean))


def _direction(results: Results, before: Results, task: str, metric: str) -> bool | None:
    found = [run.tasks[task].metrics[metric].higher_is_better for run in (results, before)]
    return found[0] if found[0] is not None else found[1]


def _verdict(paired: Paired, p: float, alpha: float, higher_is_better: bool | None) -> str:
    if p > alpha or not paired.difference:
        return SAME
    if higher_is_better is None:
        return CHANGED
    return BETTER if (paired.difference > 0) == higher_is_better else WORSE


def _finding(one: Comparison) -> Finding:
    """WORSE fails, and so does CHANGED, since the change may be for the worse."""
    paired = one.paired
    state = {WORSE: FAILED, CHANGED: FAILED, BETTER: NOTE, SAME: OK}[one.verdict]
    moved = f"{paired.difference:+.4g}, {paired.fell} of {paired.items} items fell and {paired.rose} rose"
    reason = "" if state == OK else f"{one.verdict}: {moved}, p = {one.p_holm:.2g} ({paired.test}, Holm)"
    return Finding(one.task, one.metric, f"{paired.before:.4g}", f"{paired.after:.4g}", state, reason)


def is_run(path: Path) -> bool:
    """Whether --against names another run, a folder or a results file, rather than a baseline."""
    return path.is_dir() or path.suffix == ".json"
