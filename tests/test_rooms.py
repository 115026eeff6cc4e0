"""Which file may import which: no circles, and downward only, from the command line to the core.

Imports inside functions count: they are as real as those at the top.
"""

from __future__ import annotations

import ast
import graphlib
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("laai_core", "lm_eval_laai")
# Each room may import those before it, and its own files. `laai_core` and `lm_eval_laai` are their flat files.
ROOMS = (
    "laai_core",
    "laai_core.hub",
    "laai_core.data",
    "laai_core.vllm",
    "lm_eval_laai.known_models",
    "lm_eval_laai",
    "lm_eval_laai.hub",
    "lm_eval_laai.exports",
    "lm_eval_laai.inspection",
    "lm_eval_laai.methods",
    "lm_eval_laai.gate",
    "lm_eval_laai.judge",
    "lm_eval_laai.experiments",
    "lm_eval_laai.paper",
    "lm_eval_laai.commands",
)
# The flat core meets each of its wings in one place: load_task is a public name, and Intervention.load reads the Hub.
ALLOWED_UPWARD = {("laai_core", "laai_core.data"), ("laai_core.intervention", "laai_core.hub")}
NOT_IN_THE_CORE = {"lm_eval", "lm_eval_laai", "peft", "matplotlib", "argparse"}


def modules(root: Path) -> dict[str, Path]:
    """Dotted name of every file of the two packages; a package's name is its __init__.py."""
    paths = [path.relative_to(root) for package in PACKAGES for path in (root / package).rglob("*.py")]
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): root / path for path in paths}


def imports(known: dict[str, Path]) -> dict[str, set[str]]:
    """What every file imports: another of these files by its name, anything else by its dotted name."""
    graph: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.module is not None and not node.level, f"{path}: a relative import"
                members = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[name] |= {member if member in known else node.module for member in members}
    return graph


def rooms(root: Path) -> dict[str, str]:
    """The folder that every file is in, as a dotted name."""
    return {name: ".".join(path.relative_to(root).parent.parts) for name, path in modules(root).items()}


def faults(root: Path) -> list[str]:
    """Every import that goes where it must not, and every circle."""
    graph, rooms_of = imports(modules(root)), rooms(root)
    found = []
    for name, targets in graph.items():
        here = rooms_of[name]
        if here.startswith("laai_core"):
            outside = {target for target in targets if target.partition(".")[0] in NOT_IN_THE_CORE}
            found += [f"{name} imports {target}" for target in sorted(outside)]
        for target in sorted(targets & graph.keys()):
            there = rooms_of[target]
            if ROOMS.index(there) > ROOMS.index(here) and (name, there) not in ALLOWED_UPWARD:
                found.append(f"{name} imports {target}")
    try:
        graphlib.TopologicalSorter({name: targets & graph.keys() for name, targets in graph.items()}).prepare()
    except graphlib.CycleError as error:
        found.append(f"circle: {' -> '.join(error.args[1])}")
    return found


def test_imports_go_downward_only() -> None:
    assert set(rooms(ROOT).values()) == set(ROOMS)
    assert faults(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line", "fault"),
    [
        ("laai_core/encode.py", "from laai_core.data import load_task", "laai_core.encode imports laai_core.data"),
        ("laai_core/storage.py", "from laai_core.hub import HubPath", "laai_core.storage imports laai_core.hub"),
        ("laai_core/train.py", "import lm_eval.tasks", "laai_core.train imports lm_eval.tasks"),
        ("laai_core/forward.py", "from peft import PeftModel", "laai_core.forward imports peft"),
        ("laai_core/storage.py", "import matplotlib.figure", "laai_core.storage imports matplotlib.figure"),
        ("laai_core/apply.py", "def f():\n    import argparse", "laai_core.apply imports argparse"),
        (
            "laai_core/data/tasks.py",
            "from lm_eval_laai import tasks",
            "laai_core.data.tasks imports lm_eval_laai.tasks",
        ),
        (
            "lm_eval_laai/model.py",
            "from lm_eval_laai.methods import fit",
            "lm_eval_laai.model imports lm_eval_laai.methods",
        ),
        (
            "lm_eval_laai/paper/tables.py",
            "import lm_eval_laai.commands.cli",
            "lm_eval_laai.paper.tables imports lm_eval_laai.commands.cli",
        ),
        ("laai_core/errors.py", "from laai_core import penalty, storage", "circle: laai_core."),
    ],
)
def test_an_import_that_goes_elsewhere_is_found(file: str, line: str, fault: str, tmp_path: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / file).open("a", encoding="utf-8") as target:
        target.write(f"\n{line}\n")
    assert any(fault in found for found in faults(tmp_path)), faults(tmp_path)
