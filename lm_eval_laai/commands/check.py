"""`laai check`: the harness's results against a baseline, or against another run; a regression gate for CI."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from laai_core import files
from laai_core.errors import LaaiError
from lm_eval_laai.commands.outputs import check_no_input
from lm_eval_laai.commands.report import Report, table
from lm_eval_laai.gate.baseline import Baseline, load_baseline
from lm_eval_laai.gate.check import FAILED, OK, Finding, compare, github, inert, junit, printable
from lm_eval_laai.gate.results_file import Results, read_results
from lm_eval_laai.gate.runs import Comparison, compare_runs, is_run

WIDEST = 100  # characters of a cell


def add(parser: argparse.ArgumentParser) -> None:
    """The flags of `check`."""
    parser.set_defaults(command=_command)
    parser.add_argument("results", metavar="RESULTS", help="a results file, or a folder: its newest results_*.json")
    text = "a baseline (.yaml), or another run, both with --log_samples: a results file (.json) or its folder"
    parser.add_argument("--against", required=True, metavar="PATH", help=text)
    parser.add_argument("--update", action="store_true", help="write the baseline from the results")
    text = "of a run: how small a p-value, corrected over all tests, must be for a verdict (default: 0.05)"
    parser.add_argument("--alpha", type=float, metavar="P", help=text)
    text = "of a run: test this metric alone, such as acc_norm or exact_match,strict-match; may be repeated"
    parser.add_argument("--metric", action="append", metavar="NAME", help=text)
    parser.add_argument("--junit", metavar="FILE.xml", help="also write the findings as JUnit XML")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--github", action="store_true", help="also print what failed as GitHub annotations")
    output.add_argument("--json", action="store_true", help="print the findings as JSON")


def _command(arguments: argparse.Namespace) -> Report:
    results = read_results(arguments.results)
    path = Path(arguments.against).expanduser()
    if arguments.update:
        for flag in ("junit", "github", "alpha", "metric"):
            if getattr(arguments, flag) not in (None, False):
                raise LaaiError(f"--update checks nothing: expected no --{flag} with it")
        if is_run(path):
            raise LaaiError(f"--update writes a baseline: expected --against FILE.yaml, got {path}")
        return _update(results, path)
    if is_run(path):
        return _against_run(results, path, arguments)
    if arguments.alpha is not None or arguments.metric:
        raise LaaiError(
            "--alpha and --metric are for tests between two runs: expected --against a run, not a baseline"
        )
    findings = compare(results, load_baseline(path))
    facts = {"results": str(results.path), "baseline": str(path)}
    return _report(facts, findings, _text(_metric_rows(findings), (), findings, results.path, path), arguments)


def _report(facts: dict[str, Any], findings: Sequence[Finding], text: str, arguments: argparse.Namespace) -> Report:
    """The report, and the JUnit file and the GitHub annotations that were asked for."""
    if arguments.junit:
        output = Path(arguments.junit).expanduser()
        check_no_input(output, arguments.against, *(facts.get(name) for name in ("results", "against")))
        files.write(output, junit(findings))
    failed = any(finding.state == FAILED for finding in findings)
    facts |= {"passed": not failed, "findings": [dict(vars(finding)) for finding in findings]}
    text = inert(text)
    if arguments.github:
        text = "\n".join([text, *github(findings)])
    return Report(facts, text, failed)


def _against_run(results: Results, path: Path, arguments: argparse.Namespace) -> Report:
    before = read_results(path)
    alpha = 0.05 if arguments.alpha is None else arguments.alpha
    if not 0 < alpha < 1:
        raise LaaiError(f"--alpha is {alpha}: expected a probability between 0 and 1")
    if before.path.resolve() == results.path.resolve():
        raise LaaiError(f"{results.path} against itself: expected another run")
    tests, findings = compare_runs(results, before, alpha, arguments.metric or ())
    facts = {
        "results": str(results.path),
        "against": str(before.path),
        "alpha": alpha,
        "tests": [{**asdict(one), "difference": one.paired.difference} for one in tests],
    }
    note = "difference ± its paired standard error; effect: Cohen's g (0.5 at most) of 0/1 metrics, else d_z"
    text = _text(_test_rows(tests), [note], findings, results.path, before.path)
    return _report(facts, findings, text, arguments)


def _test_rows(tests: Sequence[Comparison]) -> list[Sequence[str]]:
    head = ("task", "metric", "before", "now", "difference", "fell", "rose", "items", "effect", "p (Holm)", "verdict")
    return [head, *([_cell(one.task), _cell(one.metric), *_numbers(one), one.verdict] for one in tests)]


def _numbers(one: Comparison) -> list[str]:
    paired = one.paired
    error = "" if paired.stderr is None else f" ± {paired.stderr:.4f}"
    effect = "-" if paired.effect is None else f"{'g' if paired.test == 'McNemar' else 'd'} {paired.effect:+.2f}"
    change = f"{paired.difference:+.4f}{error}"
    counts = (paired.fell, paired.rose, paired.items)
    return [f"{paired.before:.4f}", f"{paired.after:.4f}", change, *map(str, counts), effect, f"{one.p_holm:.2g}"]


def _update(results: Results, path: Path) -> Report:
    before = load_baseline(path) if path.exists() else None
    after = Baseline.of(results, before)
    if not any(task.metrics for task in after.tasks.values()):
        raise LaaiError(f"{results.path} holds no metric: nothing could be expected of later results")
    text = after.dump()
    Baseline.parse(text, f"{results.path}: as a baseline it")  # nothing is written that could not be read
    files.write(path, text.encode())
    changes = compare(results, before) if before else []
    told = [finding for finding in changes if finding.state != OK]
    facts = {"results": str(results.path), "baseline": str(path), "changes": [dict(vars(finding)) for finding in told]}
    lines = [printable(f"{path}: {len(after.tasks)} tasks, written from {results.path}")]
    absent = [name for name in after.tasks if name not in results.tasks]
    if absent:
        lines.append(printable(f"kept as they were, not in these results: {', '.join(absent)}"))
    return Report(facts, inert("\n".join([*lines, *_reasons(told)])))


def _metric_rows(findings: Sequence[Finding]) -> list[Sequence[str]]:
    metrics = [f for f in findings if "," in f.item or f.state == FAILED]
    rows = ([_cell(cell) for cell in (f.task, f.item, f.expected, f.found, f.state)] for f in metrics)
    return [("task", "metric", "expected", "found", ""), *rows]


def _text(
    rows: Sequence[Sequence[str]], notes: Sequence[str], findings: Sequence[Finding], results: Path, against: Path
) -> str:
    failed = sum(finding.state == FAILED for finding in findings)
    verdict = f"{failed} of {len(findings)} checks failed" if failed else f"all {len(findings)} checks passed"
    told = [finding for finding in findings if finding.reason]
    return "\n".join([table(rows), "", *notes, printable(f"{verdict}: {results} against {against}"), *_reasons(told)])


def _cell(text: str) -> str:
    text = printable(text)
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."


def _reasons(findings: Iterable[Finding]) -> list[str]:
    return [printable(f"{finding.state}: {finding.task} {finding.item}: {finding.reason}") for finding in findings]
