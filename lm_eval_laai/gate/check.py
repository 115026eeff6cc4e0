"""Compare the harness's results with a baseline; findings as JUnit XML and as GitHub annotations."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval_laai.gate.baseline import Baseline, Expected
from lm_eval_laai.gate.results_file import Metric, Results

OK, NOTE, FAILED = "ok", "note", "FAILED"
# Sums of floats in two orders differ by less; a result at the very edge of its tolerance must not.
_ROUNDING = 1e-9
_DIGITS = 4  # significant ones, or as many as tell a failure from its limit


@dataclass(frozen=True)
class Finding:
    """One comparison of a task's metric or setting: the expected value, the found value, and the verdict."""

    task: str
    item: str
    expected: str
    found: str
    state: str  # OK, NOTE (reported, passes) or FAILED
    reason: str = ""


def compare(results: Results, baseline: Baseline) -> list[Finding]:
    """Findings on everything the baseline expects, in its order, then on results that it does not have."""
    findings = []
    for name, task in baseline.tasks.items():
        if name not in results.tasks:
            findings.append(Finding(name, "task", "there", "missing", FAILED, "not in the results"))
            continue
        found = results.tasks[name]
        for key, value in task.setting.items():
            findings.append(_same(name, key, value, found.setting.get(key)))
        for key, expected in task.metrics.items():
            findings.append(_metric(name, key, expected, found.metrics.get(key)))
    for name, applied in baseline.interventions.items():
        findings += _intervention(name, applied, results.interventions.get(name))
    for name in [n for n in results.tasks if n not in baseline.tasks]:
        findings.append(Finding(name, "task", "-", "there", NOTE, "not in the baseline, so it was not checked"))
    for name in [n for n in results.interventions if n not in baseline.interventions]:
        findings.append(Finding(name, "intervention", "-", "applied", NOTE, "not in the baseline"))
    return findings


def _same(task: str, item: str, expected: object, found: object) -> Finding:
    if found == expected:
        return Finding(task, item, str(expected), str(found), OK)
    if found is None:
        hint = " (evaluate with --log_samples)" if item == "data" else ""
        return Finding(task, item, str(expected), "missing", FAILED, f"the results do not say it{hint}")
    return Finding(task, item, str(expected), str(found), FAILED, f"{item} changed: the numbers cannot be compared")


def _metric(task: str, key: str, expected: Expected, found: Metric | None) -> Finding:
    if found is None:
        return Finding(task, key, _wanted(expected, None, _DIGITS), "missing", FAILED, "not in the results")
    better, rise = found.higher_is_better, found.value - expected.value
    worse = {True: -rise, False: rise, None: abs(rise)}[better]
    slack = _ROUNDING * max(1.0, abs(expected.value))
    failed = not worse <= expected.margin + slack  # so that NaN fails
    limit = expected.value + math.copysign(expected.margin, rise)
    n = _digits((found.value, limit), (worse, expected.margin)) if failed else _DIGITS
    wanted, shown = _wanted(expected, better, n), f"{found.value:.{n}g}"
    if failed:
        kind, size = expected.tolerance
        allowed = f"{expected.margin:.{n}g}" + ("" if kind == "absolute" else f" ({size:g} {kind.replace('_', ' ')})")
        reason = f"{shown} is worse than {expected.value:.{n}g} by {worse:.{n}g}, allowed is {allowed}"
        return Finding(task, key, wanted, shown, FAILED, reason)
    if -worse > expected.margin + slack:
        return Finding(task, key, wanted, shown, NOTE, f"better by {-worse:.{n}g}: --update would hold on to it")
    return Finding(task, key, wanted, shown, OK)


def _wanted(expected: Expected, better: bool | None, n: int) -> str:
    """The baseline's value and its bounds, with `n` significant digits."""
    low, high = expected.value - expected.margin, expected.value + expected.margin
    bounds = {True: f"at least {low:.{n}g}", False: f"at most {high:.{n}g}", None: f"{low:.{n}g} to {high:.{n}g}"}
    return f"{expected.value:.{n}g} ({bounds[better]})"


def _digits(*pairs: tuple[float, float]) -> int:
    """Significant digits that show the two numbers of every pair as different ones."""
    return next((n for n in range(_DIGITS, 17) if all(f"{a:.{n}g}" != f"{b:.{n}g}" for a, b in pairs)), 17)


def _intervention(name: str, expected: dict[str, Any], found: dict[str, Any] | None) -> list[Finding]:
    """All facts but the SHA-256 must be the baseline's; another Δ is a note, because the metrics decide."""
    if found is None:
        return [Finding(name, "intervention", "applied", "missing", FAILED, "it was not applied")]
    findings = [_same(name, key, value, found.get(key)) for key, value in expected.items() if key != "sha256"]
    old, new = expected.get("sha256"), found.get("sha256")
    if "sha256" in expected and old != new:
        findings.append(Finding(name, "sha256", f"{old}", f"{new}", NOTE, "another Δ than the baseline's"))
    return findings


def junit(findings: Sequence[Finding]) -> bytes:
    """One test case a finding, in the form CI servers read."""
    failed = [finding for finding in findings if finding.state == FAILED]
    counts = {"tests": str(len(findings)), "failures": str(len(failed))}
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {"name": "laai check", **counts})
    for finding in findings:
        names = {"classname": printable(finding.task), "name": printable(finding.item)}
        case = ElementTree.SubElement(suite, "testcase", names)
        if finding.state == FAILED:
            ElementTree.SubElement(case, "failure", {"message": printable(finding.reason)})
        elif finding.reason:
            ElementTree.SubElement(case, "system-out").text = printable(finding.reason)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)


def github(findings: Iterable[Finding]) -> list[str]:
    """Workflow commands that show what failed on the pull request."""
    messages = [printable(f"{f.task} {f.item}: {f.reason}") for f in findings if f.state == FAILED]
    return [f"::error title=laai check::{message.replace('%', '%25')}" for message in messages]


def inert(text: str) -> str:
    """The text without commands to a GitHub runner: `::` where a line begins, and `##[` anywhere."""
    return re.sub(r"(?m)^([^\S\n]*)::", r"\1\::", text).replace("##[", r"##\[")


def printable(text: str) -> str:
    """Replace control characters: a line break could begin a GitHub command, and XML cannot hold them."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
