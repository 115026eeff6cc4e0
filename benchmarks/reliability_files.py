"""The parts `files` and `check` of reliability.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import fuzzing
from tqdm import tqdm

from reliability import Part, table


def files(quick: bool, folder: Path) -> Part:
    """Mutants of every file that is read, and strange arguments of `hf-laai`, one by one in one process.

    Each must be refused by a `LaaiError` of one printable line that says where, or be read into something that can be
    written, shown and applied; within 5 s of CPU and 64 MiB; executing nothing, writing nothing, warning at most three
    times (an audit hook watches).
    """
    kinds = [kind for kind in fuzzing.KINDS if kind not in fuzzing.CHECKED]
    counts = dict.fromkeys(kinds, 100 if quick else 3000)
    counts["intervention"] = 200 if quick else 20_000
    arguments = 50 if quick else 3000
    part, rows = Part(), []
    with tqdm(total=sum(counts.values()) + arguments, desc="files", file=sys.stderr) as bar:
        for kind, count in counts.items():
            tally = fuzzing.fuzz(kind, count, folder / kind, seed=1, each=bar.update)
            part.faults += tally.faults
            rows.append([f"`{fuzzing.KINDS[kind].file}`", len(tally.mutators), *_counted(tally)])
        tally = fuzzing.fuzz_arguments(arguments, folder / "arguments", seed=1, each=bar.update)
        part.faults += tally.faults
        rows.append(["arguments of `hf-laai`", "-", *_counted(tally)])
    columns = ["file", "mutators", "tried", "refused", "read", "faults", "slowest, CPU s", "largest, MiB"]
    part.tables.append(table("Files tried", columns, rows))
    return part


def check(quick: bool, folder: Path) -> Part:
    """Mutants of the two files that `laai check` compares, one by one in one process; the other file is a good one.

    Each must end in a verdict, with nothing on stderr, or in one printable line on stderr that says where; within 2 s
    of CPU and 200 MiB more than before; executing nothing, writing nothing, and with no line on stdout that a GitHub
    runner would obey. What is passed or failed must also be fit for JUnit, for GitHub annotations and, up to 64 KiB,
    for `--update`, whose baseline must be readable. Both files together count for the 64 KiB.
    """
    count = 100 if quick else 1500
    part, rows = Part(), []
    with tqdm(total=2 * count, desc="check", file=sys.stderr) as bar:
        for kind in fuzzing.CHECKED:
            tally = fuzzing.fuzz(kind, count, folder / kind, seed=1, each=bar.update)
            part.faults += tally.faults
            rows.append([f"`{fuzzing.KINDS[kind].file}`", len(tally.mutators), *_counted(tally)])
    columns = ["file", "mutators", "tried", "one line", "verdict", "faults", "slowest, CPU s", "largest, MiB"]
    part.tables.append(table("Baselines and results files tried", columns, rows))
    return part


def _counted(tally: fuzzing.Tally) -> list[Any]:
    counts = [tally.files, tally.refused, tally.read, len(tally.faults)]
    return [*counts, f"{tally.seconds:.2f}", f"{tally.bytes / 2**20:.0f}"]
