"""`laai check`: the harness's results against a baseline, a regression gate for CI."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from laai_core import files
from laai_core.errors import LaaiError
from lm_eval_laai.commands.report import Report, table
from lm_eval_laai.gate.baseline import Baseline, load_baseline
from lm_eval_laai.gate.check import FAILED, OK, Finding, compare, github, inert, junit, printable
from lm_eval_laai.gate.results_file import Results, read_results

WIDEST = 100  # characters of a cell


def add(parser: argparse.ArgumentParser) -> None:
    """The flags of `check`."""
    parser.set_defaults(command=_command)
    parser.add_argument("results", metavar="RESULTS", help="a results file, or a folder: its newest results_*.json")
    parser.add_argument("--against", required=True, metavar="FILE.yaml", help="the baseline")
    parser.add_argument("--update", action="store_true", help="write the baseline from the results")
    parser.add_argument("--junit", metavar="FILE.xml", help="also write the findings as JUnit XML")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--github", action="store_true", help="also print what failed as GitHub annotations")
    output.add_argument("--json", action="store_true", help="print the findings as JSON")


def _command(arguments: argparse.Namespace) -> Report:
    results = read_results(arguments.results)
    path = Path(arguments.against).expanduser()
    if arguments.update:
        if arguments.junit or arguments.github:
            raise LaaiError("--update checks nothing: expected no --junit and no --github with it")
        return _update(results, path)
    findings = compare(results, load_baseline(path))
    if arguments.junit:
        files.write(Path(arguments.junit).expanduser(), junit(findings))
    failed = any(finding.state == FAILED for finding in findings)
    facts = {
        "results": str(results.path),
        "baseline": str(path),
        "passed": not failed,
        "findings": [dict(vars(finding)) for finding in findings],
    }
    text = inert(_text(findings, results.path, path))
    if arguments.github:
        text = "\n".join([text, *github(findings)])
    return Report(facts, text, failed)


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


def _text(findings: Sequence[Finding], results: Path, baseline: Path) -> str:
    metrics = [f for f in findings if "," in f.item or f.state == FAILED]
    rows = [[_cell(cell) for cell in (f.task, f.item, f.expected, f.found, f.state)] for f in metrics]
    failed = sum(finding.state == FAILED for finding in findings)
    told = [finding for finding in findings if finding.reason]
    verdict = f"{failed} of {len(findings)} checks failed" if failed else f"all {len(findings)} checks passed"
    return "\n".join(
        [
            table([("task", "metric", "expected", "found", ""), *rows]),
            "",
            printable(f"{verdict}: {results} against {baseline}"),
            *_reasons(told),
        ]
    )


def _cell(text: str) -> str:
    text = printable(text)
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."


def _reasons(findings: Iterable[Finding]) -> list[str]:
    return [printable(f"{finding.state}: {finding.task} {finding.item}: {finding.reason}") for finding in findings]
