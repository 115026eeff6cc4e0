"""How everything here is measured, and how it is kept.

Cases that are compared run in one process, in turn, the order reversed from round to round, after one round that does
not count. A ratio is the median over the rounds of the ratios within a round, so that what slows the machine for a
while slows both sides of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"
DOCS = Path(__file__).resolve().parent.parent / "docs"
ROUNDS = 5

Timings = dict[str, list[float]]  # case: seconds per call, one for each round


def parser(about: str | None) -> argparse.ArgumentParser:
    """The flags every script takes."""
    flags = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--quick", action="store_true", help="sizes that only show that the script runs; saves nothing")
    flags.add_argument("--rounds", type=int, default=ROUNDS, help="that count (default: %(default)s)")
    return flags


def interleaved(
    cases: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1, at_least: float = 0.2
) -> Timings:
    """Seconds per call of each case in each round.

    A case that takes less than `at_least` seconds is called several times a round: the clock and a passing interrupt
    then weigh little.
    """
    calls = dict.fromkeys(cases, 1)
    timings: Timings = {name: [] for name in cases}
    for number in range(-warmup, rounds):
        for name in list(cases)[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            for _ in range(calls[name]):
                cases[name]()
            seconds = (time.perf_counter() - start) / calls[name]
            if number >= 0:
                timings[name].append(seconds)
            else:
                calls[name] = max(1, round(at_least / seconds))
            print(f"round {number + 1}/{rounds} {name}: {1e3 * seconds:.1f} ms", file=sys.stderr, flush=True)
    return timings


def median(timings: Timings, case: str) -> float:
    """Median seconds of a case."""
    return statistics.median(timings[case])


def ratio(timings: Timings, slow: str, fast: str) -> float:
    """How many times longer `slow` takes: the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(timings[slow], timings[fast], strict=True))


class Record:
    """One benchmark's figures: tables for people, every timing for who wants to check them.

    Args:
        name: of the script, and of `results/<name>.json`.
        about: what was measured and how, for the documentation.
        settings: everything that was chosen.
    """

    def __init__(self, name: str, about: str, settings: Mapping[str, Any]) -> None:
        self._tables: list[dict[str, Any]] = []
        self._facts = {
            "name": name,
            "about": about.strip(),
            "command": shlex.join(["python", f"benchmarks/{name}.py", *sys.argv[1:]]),
            "machine": machine(),
            "settings": dict(settings),
            "figures": [],
            "tables": self._tables,
            "measured": {},
        }

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> None:
        """Add a table, and print it."""
        rows = [[str(cell) for cell in row] for row in rows]
        self._tables.append({"title": title, "columns": list(columns), "rows": rows, "note": note})
        print(f"\n{title}\n{markdown(columns, rows)}\n{note}", flush=True)

    def keep(self, key: str, value: Any) -> None:
        """Raw figures: every timing, every curve."""
        self._facts["measured"][key] = value

    def figure(self, path: Path) -> None:
        """A picture in docs/ to show with the tables."""
        self._facts["figures"].append(path.name)

    def save(self, quick: bool) -> None:
        """Write the JSON, unless the figures are only those of a trial."""
        if quick:
            print("\n--quick: nothing saved")
            return
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{self._facts['name']}.json"
        text = json.dumps(self._facts, indent=1, ensure_ascii=False)
        # A list of numbers on one line, not each on its own.
        text = re.sub(r"\[[-\d.e+,\s]+\]", lambda numbers: " ".join(numbers[0].split()), text)
        path.write_text(text + "\n", encoding="utf-8")
        print(f"\nsaved {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    packages = ["torch", "transformers", "lm-eval", "peft", "accelerate"]
    packages += [name for name in ("pyreft", "pyvene") if find_spec(name)]
    return {
        "processor": _processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns aligned; all but the first to the right."""
    widths = [max(3, *(len(row[i]) for row in [columns, *rows])) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(columns), rule, *map(line, rows)])


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.1f}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
