"""What an installation brings: entry points, task files, pins, and an `import torch` that always works."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from lm_eval_laai.register import TARGETS
from lm_eval_laai.tasks import NO_GROUP, include_path, list_tasks

ROOT = Path(__file__).resolve().parent.parent
CONFIG = configparser.ConfigParser()
CONFIG.read(ROOT / "setup.cfg", encoding="utf-8")


def lines(value: str) -> list[str]:
    return [line.strip() for line in value.splitlines() if line.strip()]


def declared_entry_points() -> dict[tuple[str, str], str]:
    section = CONFIG["options.entry_points"]
    pairs = [(group, line.split("=")) for group in section for line in lines(section[group])]
    return {(group, name.strip()): value.strip() for group, (name, value) in pairs}


@pytest.fixture
def installed() -> metadata.Distribution:
    try:
        return metadata.distribution("lm-eval-laai")
    except metadata.PackageNotFoundError:
        pytest.skip("lm-eval-laai is not installed in this environment")


def run(code: str, *first_on_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(map(str, [*first_on_path, ROOT]))
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


# What is declared


def test_every_package_is_listed() -> None:
    roots = ["laai_core", "lm_eval_laai"]
    found = {path.parent.relative_to(ROOT) for root in roots for path in (ROOT / root).rglob("*.py")}
    expected = {".".join(folder.parts) for folder in found} | {"lm_eval_laai.task_yamls"}
    assert set(lines(CONFIG["options"]["packages"])) == expected


# With any options between, quoted or not, with an extra or a version; `lm-eval-laai` and `./laai` are no such name.
INSTALLS_A_STRANGER = re.compile(
    r"""install\s+(?:-\S+\s+(?:constraints\S*\s+)?)*(?:[\w\[\]=-]+\s+)*["'`]?laai(?![\w-])"""
)


@pytest.mark.parametrize("said", ["X", '"X[plot]"', "X==0.1", "-U X", "-c constraints.txt X", "torch X", "'X'"])
def test_the_pattern_finds_a_stranger(said: str) -> None:
    """The name `laai` on the package index is another project's."""
    assert INSTALLS_A_STRANGER.search("pip install " + said.replace("X", "laai"))
    assert not INSTALLS_A_STRANGER.search("pip install " + said.replace("X", "lm-eval-laai"))


def test_nothing_tells_anyone_to_install_a_stranger() -> None:
    kinds = {".py", ".md", ".cfg", ".toml", ".txt", ".yml", ".yaml", ".cff", ""}
    skipped = {".git", ".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".venv", "build", "runs"}
    read = 0
    tops = [path for path in ROOT.iterdir() if path.name not in skipped]
    for path in [*tops, *(path for top in tops for path in top.rglob("*"))]:
        if not path.is_file() or path.suffix not in kinds:
            continue
        read += 1
        found = INSTALLS_A_STRANGER.search(path.read_text(encoding="utf-8", errors="replace"))
        assert found is None, f"{path.relative_to(ROOT)}: {found and found[0]}"
    assert read > 150
    assert CONFIG["metadata"]["name"] == "lm-eval-laai"


def test_licence_and_types_are_installed(installed: metadata.Distribution) -> None:
    assert installed.metadata["Name"] == "lm-eval-laai"
    assert installed.metadata["License"] == "Apache-2.0" and installed.metadata["License-File"] == "LICENSE"
    for package in ("laai_core", "lm_eval_laai"):
        assert (files(package) / "py.typed").is_file()
        assert lines(CONFIG["options.package_data"][package]) == ["py.typed"]


def test_pre_commit_runs_what_ci_runs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    script = lines((ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert [hook["entry"] for hook in hooks] == [line for line in script if line.startswith(("ruff ", "mypy "))]


def test_every_requirement_is_pinned_within_its_range() -> None:
    pins = {}
    for line in lines((ROOT / "constraints.txt").read_text(encoding="utf-8")):
        if not line.startswith("#"):
            name, version = line.split("==")
            pins[name.lower().replace("_", "-")] = version
    extras = CONFIG["options.extras_require"]
    for line in (
        lines(CONFIG["options"]["install_requires"])
        + lines(extras["test"])
        + lines(extras["plot"])
        + lines(extras["gguf"])
    ):
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins[requirement.name.lower().replace("_", "-")]), line


def test_ci_runs_the_commands_of_the_readme() -> None:
    script = lines((ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    readme = lines((ROOT / "README.md").read_text(encoding="utf-8"))
    commands = [line for line in script if re.match(r"python -m (pip install|pytest) ", line)]
    assert len(commands) == 2
    for command in commands:
        assert command in readme


def test_the_lazy_names_are_the_entry_points() -> None:
    declared = declared_entry_points()
    assert {name: target for (group, name), target in declared.items() if group == "lm_eval.models"} == TARGETS


def test_installed_entry_points(installed: metadata.Distribution) -> None:
    found = {(point.group, point.name): point for point in installed.entry_points}
    assert {key: point.value for key, point in found.items()} == declared_entry_points()
    for (_, name), point in found.items():
        if name != "vllm-laai" or find_spec("vllm"):
            point.load()


# The task files


def test_include_path_holds_the_tasks() -> None:
    names = {name for task in list_tasks() for name in (task.name, task.group)}
    assert {path.stem for path in include_path().glob("**/*.yaml")} == names - {NO_GROUP}


def test_include_path_is_the_installed_package(installed: metadata.Distribution) -> None:
    import lm_eval_laai.task_yamls

    assert files("lm_eval_laai.task_yamls") == include_path()
    assert lm_eval_laai.task_yamls.__file__ == str(include_path() / "__init__.py")


@pytest.mark.slow
def test_wheel(tmp_path: Path) -> None:
    # From a copy: building leaves folders behind, and what they hold would get into the next wheel.
    source, target = tmp_path / "source", tmp_path / "target"
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "reference_model", "runs")
    shutil.copytree(ROOT, source, ignore=ignored)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(source)]
    subprocess.run(command, check=True, timeout=300)
    code = "from lm_eval_laai.tasks import *; print(include_path()); print([task.name for task in list_tasks()])"
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert lines(done.stdout) == [
        str(target / "lm_eval_laai" / "task_yamls"),
        str([task.name for task in list_tasks()]),
    ]
    packages = {"laai_core": "laai_core", "lm_eval_laai": "lm_eval_laai", "task_yamls": "lm_eval_laai/task_yamls"}
    for folder, package in packages.items():
        for path in (source / folder).rglob("*"):
            assert (target / package / path.relative_to(source / folder)).exists(), path


def test_what_a_stranger_does(tmp_path: Path) -> None:
    """From the wheel, in a virtual environment of its own and an empty folder: no clone, nothing editable."""
    source, empty, venv = (tmp_path / name for name in ("source", "empty", "venv"))
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "reference_model", "runs", "tests")
    shutil.copytree(ROOT, source, ignore=ignored)
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(source)], check=True, timeout=300)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, timeout=100)
    python = venv / "bin" / "python"
    (wheel,) = tmp_path.glob("*.whl")
    install = ["--python", str(python), "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*pip, *install], check=True, timeout=100)
    shutil.rmtree(source)
    # What it requires is taken from here; an editable installation of ours is not, since its .pth is not read there.
    here = [path for path in sys.path if Path(path).name == "site-packages"]
    (folder,) = (venv / "lib").glob("python*/site-packages")
    (folder / "requirements.pth").write_text("\n".join(here) + "\n")
    empty.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = "import laai_core, lm_eval_laai; print(laai_core.__file__, lm_eval_laai.__file__)"
    found = subprocess.run([python, "-c", where], cwd=empty, env=environment, capture_output=True, text=True)
    assert all(path.startswith(str(folder)) for path in found.stdout.split()) and found.stdout, found.stderr
    script = shutil.copy(ROOT / "tests" / "stranger.py", empty)
    command = [python, script, str(ROOT / "reference_model" / "weights")]
    done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "All tasks found and valid" in done.stdout
    assert re.search(r"^hot .* cold$", done.stdout, re.MULTILINE)


# `import torch`

IMPORT_TORCH = """
import sys, torch
from lm_eval_laai.register import _Watcher
assert sys.meta_path.count(_Watcher) == 1, "PyTorch did not call the entry point"
assert "lm_eval" not in sys.modules
print(torch.ones(2).sum().item())
"""


def test_import_torch_imports_nothing_else(installed: metadata.Distribution) -> None:
    done = run(
        IMPORT_TORCH + "print(sorted(name for name in sys.modules if 'laai' in name and 'editable' not in name))"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "2.0\n['lm_eval_laai', 'lm_eval_laai.register']\n"


# The name, in every order of imports

CHECK = """
from lm_eval.api.registry import get_model, model_registry
get_model("dummy")
assert model_registry._objs["hf-laai"] == "lm_eval_laai.model:HFLaai", model_registry
assert {"hf", "vllm"} <= set(model_registry)
print("known")
"""


@pytest.mark.parametrize(
    "before",
    ["import torch", "import lm_eval, torch", "import lm_eval.models, torch", "import lm_eval.api.registry, torch"],
)
def test_the_harness_knows_the_name(before: str, installed: metadata.Distribution) -> None:
    assert run(before + CHECK).stdout == "known\n"


def test_a_registry_filled_with_the_entry_point(installed: metadata.Distribution) -> None:
    """lm-eval 0.4.13 cannot compare an EntryPoint with a class: importing the class must not register it again."""
    code = """
from importlib.metadata import entry_points
from lm_eval.api.registry import get_model, model_registry
from lm_eval_laai.register import register
(point,) = entry_points(group="lm_eval.models", name="hf-laai")
model_registry.register("hf-laai", target=point)
register()
import lm_eval.models
assert model_registry._objs["hf-laai"] is point
print(get_model("hf-laai").__name__)
"""
    assert run(code).stdout == "HFLaai\n"


def test_every_entry_point_group_has_a_reader() -> None:
    """lm-eval's plugin guide: tasks are no plugins, --include_path leads to them."""
    assert {group for group, _ in declared_entry_points()} == {"console_scripts", "lm_eval.models", "torch.backends"}


def test_registering_twice_is_registering_once() -> None:
    call = "from lm_eval_laai.register import register; register(); register()\n"
    for code in (call + "import lm_eval.models\n", "import lm_eval.models\n" + call):
        assert run(code + CHECK + call).stdout == "known\n"


def test_a_name_that_is_taken_is_left_alone() -> None:
    code = """
from lm_eval.api.registry import model_registry
model_registry.register("hf-laai", target="other:Class")
from lm_eval_laai.register import register
register()
import lm_eval.models
register()
print(model_registry._objs["hf-laai"])
"""
    assert run(code).stdout == "other:Class\n"


def test_a_frozen_or_unknown_registry_is_left_alone(tmp_path: Path) -> None:
    code = "import lm_eval.models, lm_eval.api.registry as r; r.freeze_all()\n"
    call = "from lm_eval_laai.register import register; register(); print('fine')"
    assert run(code + call).stdout == "fine\n"
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval" / "__init__.py").touch()
    (tmp_path / "lm_eval" / "models.py").touch()
    assert run(call + "\nimport lm_eval.models", tmp_path).stdout == "fine\n"
    assert run("import lm_eval.models\n" + call, tmp_path).stdout == "fine\n"
