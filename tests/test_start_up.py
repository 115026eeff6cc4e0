"""What a command imports before it does anything: the modules are counted in a process of its own, never the time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import laai_core as laai

HEAVY = ("torch", "torch._dynamo", "torch._inductor", "transformers", "peft", "lm_eval", "datasets", "matplotlib")
CODE = """
import json, sys
from lm_eval_laai.commands.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as stopped:  # --help
    code = stopped.code
print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)
"""


def modules_of(code: str, *argv: str) -> tuple[int, set[str]]:
    """Exit code and imported modules of a process."""
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=True)
    found, modules = json.loads(done.stderr.splitlines()[-1])
    return found, set(modules)


@pytest.fixture(scope="module")
def usual() -> int:
    """How many modules a program has that parses arguments and reads YAML."""
    code = "import argparse, json, sys, yaml; print(json.dumps([0, sorted(sys.modules)]), file=sys.stderr)"
    return len(modules_of(code)[1])


@pytest.fixture
def results(tmp_path: Path) -> list[str]:
    """Arguments for `laai check`: a results file and a baseline that it passes."""
    scores = {"alias": "t", "exact_match,none": 0.5, "exact_match_stderr,none": 0.1, "sample_len": 10}
    (tmp_path / "results_2026.json").write_text(json.dumps({"results": {"t": scores}}))
    (tmp_path / "base.yaml").write_text(
        "tasks: {t: {metrics: {'exact_match,none': {value: 0.5, tolerance: {absolute: 0.1}}}}}"
    )
    return ["check", str(tmp_path), "--against", str(tmp_path / "base.yaml")]


@pytest.mark.parametrize("argv", [["--help"], ["tasks"], ["tasks", "--help"], ["check", "--help"], ["data", "--help"]])
def test_nothing_heavy_is_imported(argv: list[str], usual: int) -> None:
    code, modules = modules_of(CODE, *argv)
    assert code == 0
    assert modules.isdisjoint(HEAVY), modules & set(HEAVY)
    assert len(modules) <= 3 * usual


def test_check_imports_nothing_heavy(results: list[str], tmp_path: Path, usual: int) -> None:
    """Comparing, writing JUnit XML and writing a baseline."""
    for more in ([], ["--junit", str(tmp_path / "junit.xml")], ["--update"]):
        code, modules = modules_of(CODE, *results, *more)
        assert code == 0
        assert modules.isdisjoint(HEAVY), modules & set(HEAVY)
        assert len(modules) <= 3 * usual


def test_inspecting_a_file_needs_torch_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    laai.Intervention({0: torch.ones(2, 4)}, "heads", "last").save(path)
    code, modules = modules_of(CODE, "inspect", str(path))
    assert code == 0
    assert modules & set(HEAVY) == {"torch"}


def test_the_help_of_a_command_needs_no_peft() -> None:
    """One process for all commands: what any of them imports is there at the end."""
    program = """
import json, sys
from lm_eval_laai.commands.cli import main
codes = []
for command in sys.argv[1:]:
    try:
        codes.append(main([command, "--help"]))
    except SystemExit as stopped:
        codes.append(stopped.code)
print(json.dumps([sum(codes), sorted(sys.modules)]), file=sys.stderr)
"""
    code, modules = modules_of(program, "train", "compose", "inspect", "demo", "judge", "sweep", "paper")
    assert code == 0
    assert modules.isdisjoint({"peft", "lm_eval", "datasets", "matplotlib", "torch._inductor"})
    assert {f"lm_eval_laai.commands.{name}" for name in ("train", "compose", "judge", "sweep", "paper")} <= modules


def test_public_names_are_those_of_their_files_whatever_is_imported_first() -> None:
    """`train` and `apply` are functions and the files they are in: importing the file must not hide the function."""
    code = """
import json, sys
import laai_core
assert "torch" not in sys.modules, "imported too early"
import laai_core.train, laai_core.apply
from laai_core.train import Job
from laai_core import storage
assert all(callable(getattr(laai_core, name)) for name in laai_core.__all__ if name != "__version__")
assert laai_core.__version__ == laai_core.version.__version__
assert laai_core.train is sys.modules["laai_core.train"].train and laai_core.Job is Job
assert set(laai_core.__all__) <= set(dir(laai_core)) and not hasattr(laai_core, "nothing")
print(json.dumps([0, []]), file=sys.stderr)
"""
    assert modules_of(code) == (0, set())
