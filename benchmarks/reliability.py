"""Hostile files, kills, Ctrl-C, full disks, determinism and long runs, in the numbers that docs/reliability.md has.

What is done is in tests/ (fuzzing, crashing, repeating, endurance), where the test suite does a few of each. A part
writes benchmarks/results/reliability/PART.json; the document is made of those there are. A part that finds a fault
prints it, with the numbers that make it again, and the command ends with 1.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "reliability"
DOCUMENT = ROOT / "docs" / "reliability.md"
# Part: its title, and the module whose function of the part's name does it.
PARTS = {
    "files": ("Hostile files and arguments", "reliability_files"),
    "check": ("Hostile baselines and results files", "reliability_files"),
    "kills": ("Kills", "reliability_crashes"),
    "interrupts": ("Ctrl-C", "reliability_crashes"),
    "disks": ("Full disks and several writers", "reliability_crashes"),
    "same": ("Determinism", "reliability_runs"),
    "long": ("Long runs and threads", "reliability_runs"),
}
HEAD = """# Reliability

Made by `python benchmarks/reliability.py`, or a part of it by `python benchmarks/reliability.py PART`. The test suite
does a few of each at every change (`tests/test_fuzz.py`, `test_crash.py`, `test_determinism.py`, `test_long_runs.py`).

Planted regressions, and which of them the gate `laai check` catches, are counted by `python benchmarks/regressions.py`
in [benchmarks.md](benchmarks.md).
"""

Table = dict[str, Any]


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> Table:
    texts = [[str(cell) for cell in row] for row in rows]
    return {"title": title, "columns": list(columns), "rows": texts, "note": note}


@dataclass
class Part:
    """What a part found: tables for people, and every fault."""

    tables: list[Table] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def render() -> str:
    """The document of all parts there are."""
    from measure import markdown
    from report import machine

    blocks = [HEAD.strip()]
    for name, (title, _) in PARTS.items():
        if not (RESULTS / f"{name}.json").is_file():
            continue
        facts = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        command = f"```bash\npython benchmarks/reliability.py {name}\n```"
        blocks += [f"## {title}", facts["about"], command, machine(facts["machine"])]
        for one in facts["tables"]:
            blocks += [f"**{one['title']}**", markdown(one["columns"], one["rows"]), one["note"]]
        if facts["faults"]:
            blocks += ["Faults:", "\n".join(f"- `{fault}`" for fault in facts["faults"])]
    return "\n\n".join(block for block in blocks if block) + "\n"


def do(name: str, quick: bool) -> bool:
    """Run a part and print what it found; keep that, unless it is a trial. Whether there was no fault."""
    from measure import machine, markdown

    function = getattr(importlib.import_module(PARTS[name][1]), name)
    with tempfile.TemporaryDirectory(prefix="laai-reliability.") as folder:
        part = function(quick, Path(folder))
    for one in part.tables:
        print(f"\n{one['title']}\n{markdown(one['columns'], one['rows'])}", flush=True)
    for fault in part.faults:
        print(f"FAULT {fault}", file=sys.stderr, flush=True)
    if not quick:
        RESULTS.mkdir(parents=True, exist_ok=True)
        facts = {"about": inspect.getdoc(function), "machine": machine(), "tables": part.tables, "faults": part.faults}
        text = json.dumps(facts, indent=1, ensure_ascii=False)
        (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        DOCUMENT.write_text(render(), encoding="utf-8")
    return not part.faults


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)} (default: all)")
    flags.add_argument("--quick", action="store_true", help="a few of each, which show that it runs; saves nothing")
    arguments = flags.parse_args()
    unknown = sorted(set(arguments.parts) - set(PARTS))
    if unknown:
        flags.error(f"no part {unknown[0]}: expected some of {', '.join(PARTS)}")
    # Before torch is imported: models this small are slower in several threads. And nothing here is on the Hub.
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    return 0 if all([do(name, arguments.quick) for name in arguments.parts or PARTS]) else 1


if __name__ == "__main__":
    sys.exit(main())
