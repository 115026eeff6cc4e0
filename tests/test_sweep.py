"""`laai sweep`: its scores are those of training and evaluating one by one, and finished work is never done again."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from tiny import REFERENCE, small_model_folder

from laai_core.data import load_task
from lm_eval_laai.commands import cli
from lm_eval_laai.experiments.load import ModelSource
from lm_eval_laai.methods.select import train_chosen
from lm_eval_laai.tasks import include_path

ROOT = Path(__file__).resolve().parent.parent


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Name to inode and time of writing: a file that is written again changes one of them."""
    return {str(p.relative_to(folder)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.rglob("*.*")}


def test_scores_are_those_of_one_by_one(tmp_path: Path, facts_of: Callable[..., dict[str, Any]]) -> None:
    """Against train(), a file, and lm_eval's own loading of model and file."""
    line = ["sweep", "--model", REFERENCE, "--task", "lexicon_antonym", "--layers", "-5", "--seeds", 2]
    line += ["--l1", "0,0.02", "--group", "0.001", "--limit", 20, "--output", tmp_path / "sweep"]
    facts = facts_of(*line, "--plot")
    found = {(r["layer"], r["l1"], r["group"]): r for r in facts["scores"]}
    assert list(found) == [(1, 0.0, 0.001), (1, 0.02, 0.001)]
    for record in found.values():
        assert record["mean"] == pytest.approx(statistics.fmean(record["values"]))
        assert record["spread"] == pytest.approx(statistics.stdev(record["values"]))

    model, tokenizer = ModelSource(str(REFERENCE)).load()
    examples = load_task("lexicon_antonym", 1).train
    result, _ = train_chosen(model, tokenizer, examples, 1, l1=0.02, group=0.001, task="laai_lexicon_antonym")
    result.intervention.save(tmp_path / "one.safetensors")
    harness = simple_evaluate(
        model="hf-laai",
        model_args={"pretrained": str(REFERENCE), "intervention": str(tmp_path / "one.safetensors")},
        tasks=["laai_lexicon_antonym"],
        limit=20,
        batch_size=7,
        device="cpu",
        task_manager=TaskManager(include_path=str(include_path()), include_defaults=False),
    )
    assert found[1, 0.02, 0.001]["values"][1] == harness["results"]["laai_lexicon_antonym"]["exact_match,none"] > 0

    assert (tmp_path / "sweep" / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text()) == facts


def test_of_one_example(small: Path, tmp_path: Path, facts_of: Callable[..., dict[str, Any]]) -> None:
    line = ["sweep", "--model", small, "--task", "lexicon_antonym", "--limit", 2, "--output", tmp_path]
    facts = facts_of(*line, "--layers", "0", "--seeds", 1, "--n-train", 1)
    assert [len(record["values"]) for record in facts["scores"]] == [1, 1]


def test_a_larger_sweep_computes_only_what_is_new(
    small: Path, tmp_path: Path, facts_of: Callable[..., dict[str, Any]]
) -> None:
    line = ["sweep", "--model", small, "--task", "lexicon_antonym", "--limit", 2, "--output", tmp_path]
    facts_of(*line, "--layers", "0", "--seeds", 1)
    before = files_of(tmp_path)
    assert len([name for name in before if name.startswith("cells")]) == 2  # without and with penalties
    facts = facts_of(*line, "--layers", "0", "--seeds", 2)
    after = files_of(tmp_path)
    assert sum(len(record["values"]) for record in facts["scores"]) == 4
    assert len([name for name in after if name.startswith("cells")]) == 4
    assert {name: after[name] for name in before if name != "sweep.json"} == {
        name: stamp for name, stamp in before.items() if name != "sweep.json"
    }


def test_another_model_under_the_same_name_is_another_cell(
    tmp_path: Path, facts_of: Callable[..., dict[str, Any]]
) -> None:
    folder = small_model_folder(tmp_path / "model")
    line = [
        "sweep",
        "--model",
        folder,
        "--task",
        "survey_keen",
        "--layers",
        "1",
        "--seeds",
        1,
        "--l1",
        0,
        "--group",
        0,
    ]
    line += ["--limit", 2, "--output", tmp_path]
    first = facts_of(*line)
    assert first["scores"][0]["metric"] == "kl"
    content = (folder / "model.safetensors").read_bytes()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight *= 2
    model.save_pretrained(folder)
    second = facts_of(*line)
    assert first["scores"][0]["values"] != second["scores"][0]["values"]
    (folder / "model.safetensors").write_bytes(content)
    assert facts_of(*line) == first
    assert len(list((tmp_path / "cells").iterdir())) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--task", "lexicon_antonim"], "lexicon_antonim"),
        (["--task", "lexicon_antonym", "--layers", "7"], "layer 7 is out of range"),
        (["--task", "lexicon_antonym", "--layers", "first"], "--layers"),
        (["--task", "lexicon_antonym", "--seeds", "0"], "--seeds is 0"),
        (["--task", "lexicon_antonym", "--l1", "0,1,2", "--group", "0,1"], "3 values of --l1 and 2 of --group"),
        (["--task", "lexicon_antonym", "--l1", "-1"], "l1 is -1"),
        (["--task", "lexicon_antonym", "--l1", "0,,1"], "'0,,1': expected numbers with commas between"),
        (["--task", "lexicon_antonym", "--l1", ""], "expected numbers with commas between"),
        (["--task", "lexicon_antonym", "--n-train", "100000"], "n_train is 100000"),
    ],
)
def test_bad_input(words: list[str], said: str, small: Path, tmp_path: Path, capfd: Any) -> None:
    assert cli.main(["sweep", "--model", str(small), *words, "--output", str(tmp_path / "out")]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err
    assert not (tmp_path / "out").exists()


def test_a_damaged_cell_is_named(
    small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], facts_of: Callable[..., dict[str, Any]]
) -> None:
    line = ["sweep", "--model", str(small), "--task", "lexicon_antonym", "--layers", "0", "--seeds", "1"]
    line += ["--l1", "0", "--group", "0", "--limit", "2", "--output", str(tmp_path)]
    facts_of(*line)
    (cell,) = (tmp_path / "cells").iterdir()
    cell.write_text(cell.read_text()[:-20])
    assert cli.main(line) == 2
    assert f"{cell} is no finished cell" in capfd.readouterr().err


@pytest.mark.slow
def test_two_processes_share_the_cells_of_one(
    small: Path, tmp_path: Path, facts_of: Callable[..., dict[str, Any]]
) -> None:
    line = [
        "sweep",
        "--model",
        str(small),
        "--task",
        "survey_keen,survey_wary",
        "--seeds",
        "2",
        "--limit",
        "3",
        "--json",
    ]
    script = tmp_path / "laai.py"
    script.write_text("import sys\nfrom lm_eval_laai.commands.cli import main\nsys.exit(main())\n")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script), *line]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    shared = subprocess.run(
        [sys.executable, *command, "--output", str(tmp_path / "two")],
        env=environment,
        check=True,
        timeout=600,
        stdout=subprocess.PIPE,
    )
    alone = facts_of(*line[:-1], "--output", tmp_path / "one")
    assert json.loads(shared.stdout) == alone  # one of the two reports, and nothing else is printed
    names = [{p.name for p in (tmp_path / one / "cells").iterdir()} for one in ("one", "two")]
    assert names[0] == names[1] and len(names[0]) == 2 * 3 * 2 * 2
    assert all(record["spread"] > 0 for record in alone["scores"])


# Appends a line to $COUNTS for every fit and cell that its process computes.
COUNTED = """
import os, sys
from lm_eval_laai.commands import cli
from lm_eval_laai.experiments import harness, run
from lm_eval_laai.experiments.cells import named

fit, score = run.methods.fit, harness.score

def count(*words):
    with open(os.environ["COUNTS"], "a") as file:
        print(*words, file=file)

def counted_fit(method, model, tokenizer, split, **options):
    count("fit", split.name, *(options[name] for name in ("layer", "seed", "l1")))
    return fit(method, model, tokenizer, split, **options)

def counted_score(model, tokenizer, setting, cell, paths):
    count(named(cell))
    return score(model, tokenizer, setting, cell, paths)

run.methods.fit, harness.score = counted_fit, counted_score
sys.exit(cli.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["slurm", "ray"])
def test_two_launches_on_one_store_do_everything_once(how: str, small: Path, tmp_path: Path) -> None:
    """The scripts in examples/, two processes that know nothing of each other: store and report of one process."""
    (tmp_path / "laai.py").write_text(COUNTED)
    (tmp_path / "laai").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path}/laai.py" "$@"\n')
    (tmp_path / "laai").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    options = ["--model", str(small), "--task", "survey_keen,survey_wary", "--seeds", "2", "--limit", "3", "--json"]

    def launched(output: str, *command: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": path}
        environment |= {"LAAI_STORE": str(tmp_path / output), "COUNTS": str(tmp_path / f"{output}.counts")}
        return subprocess.Popen([*command, *options], env=environment, text=True, stdout=subprocess.PIPE)

    slurm = ["bash", str(ROOT / "examples" / "slurm_sweep.sh")]
    if how == "slurm":
        processes = [launched("two", *slurm) for _ in range(2)]
    else:
        pytest.importorskip("ray", reason="ray is not installed: pip install ray")
        ray = [sys.executable, str(ROOT / "examples" / "ray_sweep.py"), "--gpus", "0", "--"]
        processes = [launched("two", *ray, "--output", str(tmp_path / "two"))]
    outputs = [process.communicate(timeout=600)[0] for process in [*processes, launched("one", *slurm)]]
    assert [process.returncode for process in processes] == [0] * len(processes)
    if how == "slurm":
        assert json.loads(outputs[0]) == json.loads(outputs[1]) == json.loads(outputs[2])
    alone, together = (sorted((tmp_path / f"{name}.counts").read_text().splitlines()) for name in ("one", "two"))
    assert alone == together
    assert len(alone) == 2 * (2 * 3 * 2 * 2)  # fits and cells: tasks, layers, seeds, penalties
    one, two = (stored(tmp_path / name) for name in ("one", "two"))
    assert one == two and not [name for name in two if Path(name).name.startswith(".")]


def stored(folder: Path) -> dict[str, Any]:
    """Every file of a store; fits and cells without the time they took."""
    found: dict[str, Any] = {}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        timed = path.parent.name == "seconds"
        found[str(path.relative_to(folder))] = None if timed else path.read_bytes()
        if path.parent.name == "cells":
            found[str(path.relative_to(folder))] = json.loads(path.read_text())
    return found


def until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    for _ in range(12000):
        if condition():
            return
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    raise AssertionError("waited two minutes")


def test_killed_and_started_again(small: Path, tmp_path: Path, facts_of: Callable[..., dict[str, Any]]) -> None:
    """kill -9 in the middle of the cells: what was finished stays as it was, the end is that of an unbroken run."""
    line = ["sweep", "--model", str(small), "--task", "survey_keen", "--seeds", "2", "--limit", "3"]
    line += ["--layers", "0,1"]
    code = "import sys; from lm_eval_laai.commands.cli import main; sys.exit(main())"
    cut = tmp_path / "cut"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *line, "--output", str(cut)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: len(list(cut.glob("cells/*.json"))) >= 2, process)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    finished = {name: stamp for name, stamp in files_of(cut).items() if Path(name).suffix in (".json", ".safetensors")}
    assert 2 <= len([name for name in finished if name.startswith("cells")]) < 8
    assert not (cut / "sweep.json").exists()
    resumed = facts_of(*line, "--output", cut)
    unbroken = facts_of(*line, "--output", tmp_path / "whole")
    assert resumed == unbroken
    assert (cut / "sweep.json").read_bytes() == (tmp_path / "whole" / "sweep.json").read_bytes()
    after = files_of(cut)
    assert {name: after[name] for name in finished} == finished
