"""The documentation as a site, and the workflows: what they name exists, and the actions are pinned."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from lm_eval_laai.commands import cli

WORKFLOWS = [*sorted((ROOT / ".github" / "workflows").glob("*.yml")), ROOT / "examples" / "check.yml"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; --strict makes a dead link, a page outside the menu or a missing name an error."""
    for module in ("mkdocs", "material", "mkdocstrings"):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_the_site_has_every_command_and_public_name(site: Path) -> None:
    import laai_core

    commands = (site / "reference" / "cli" / "index.html").read_text(encoding="utf-8")
    for name in [*cli.COMMANDS, "data-fetch", "models-fetch"]:
        assert f'id="laai-{name}"' in commands, name
    assert "--against PATH" in commands  # of `laai check`, whose flags are added late
    api = (site / "reference" / "api" / "index.html").read_text(encoding="utf-8")
    for name in laai_core.__all__:
        assert name.startswith("_") or re.search(rf'id="laai_core\.[\w.]*{name}"', api), name


def test_the_site_has_the_notebooks_with_what_they_wrote(site: Path) -> None:
    for name in ("first_vector", "own_data", "gate"):
        notebook = json.loads((ROOT / "docs" / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
        page = (site / "notebooks" / name / "index.html").read_text(encoding="utf-8")
        shown = html.unescape(re.sub(r"<[^>]+>", "", page))
        outputs = ["".join(output["text"]) for cell in notebook["cells"] for output in cell.get("outputs", [])]
        assert outputs and all(output.rstrip() in shown for output in outputs), name
        assert f'href="../{name}.ipynb"' in page and (site / "notebooks" / f"{name}.ipynb").is_file()


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(
            r"<(?:script|img)[^>]* src=\"?https?:|<link[^>]*rel=\"?stylesheet\"?[^>]*https?:", text
        ), page


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "examples/vectors/README.md", "reference_model/README.md"]
)
def test_links_beside_the_site_lead_somewhere(name: str) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", (ROOT / name).read_text(encoding="utf-8"))
    assert [one for one in targets if "://" not in one and not (ROOT / name).parent.joinpath(one).exists()] == []


def test_the_oldest_python_that_may_install_it_is_tested() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    oldest, *_ = workflow["jobs"]["tests"]["strategy"]["matrix"]["python"]
    assert f"python_requires = >={oldest}\n" in (ROOT / "setup.cfg").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_by_sha(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    document = yaml.safe_load(text)
    used = [step["uses"] for job in document["jobs"].values() for step in job["steps"] if "uses" in step]
    assert used and all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", name) for name in used)
    assert len(re.findall(r"uses: \S+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", text, re.MULTILINE)) == len(used)
    assert document["permissions"] == {"contents": "read"}


def test_one_action_is_one_commit_everywhere() -> None:
    pins = {
        pin for path in WORKFLOWS for pin in re.findall(r"uses: (\S+@\S+ # \S+)", path.read_text(encoding="utf-8"))
    }
    assert len(pins) == len({pin.split("@")[0] for pin in pins})


def test_the_workflow_to_copy_needs_nothing_of_the_clone() -> None:
    document = yaml.safe_load((ROOT / "examples" / "check.yml").read_text(encoding="utf-8"))
    steps = [step["run"] for job in document["jobs"].values() for step in job["steps"] if "run" in step]
    text = "\n".join(steps)
    assert "pip install" in text and "lm-eval-laai" in text
    assert not re.search(r"\.ci/|task_yamls|reference_model|constraints|benchmarks|-e \.", text)
    (line,) = re.findall(r"laai (check .*)", text)
    arguments = cli.make_parser().parse_args(line.split())
    assert (arguments.against, arguments.github, arguments.junit) == ("results/before", True, "gate.xml")
