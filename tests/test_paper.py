"""`laai paper`: cells, their identity, the report; that scoring in process is scoring by the harness's own command."""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import math
import re
import shlex
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from judge_server import JudgeServer, Request
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from tiny import REFERENCE, small_model_folder

import laai_core as laai
from laai_core import start
from laai_core.data import in_training_pool
from laai_core.errors import LaaiError, WorkFailed
from laai_core.files import unwritable
from lm_eval_laai import methods
from lm_eval_laai.commands import cli
from lm_eval_laai.commands import paper as command
from lm_eval_laai.experiments import harness, setting
from lm_eval_laai.experiments.cells import Cell, Fit, Store
from lm_eval_laai.experiments.load import ModelSource
from lm_eval_laai.experiments.run import Plan, Process, run
from lm_eval_laai.experiments.scores import seconds_of
from lm_eval_laai.experiments.setting import Setting
from lm_eval_laai.inspection.plot import heat_map, largest
from lm_eval_laai.judge import Cache, Judge
from lm_eval_laai.methods import pseudo_labels, select
from lm_eval_laai.paper import gpt_eval, report
from lm_eval_laai.paper.by_hand import by_hand
from lm_eval_laai.paper.content import Content, map_name
from lm_eval_laai.paper.tables import Recipe, Row, Table, examples_table, paper_table
from lm_eval_laai.tasks import include_path

TASK = "laai_lexicon_antonym"
RULES = ["laai_lexicon_en_fr", "laai_lexicon_en_de", "laai_lexicon_antonym", "laai_lexicon_synonym"]


@pytest.fixture(scope="module")
def bundled() -> Setting:
    return Setting(ModelSource(str(REFERENCE)), limit=12)


@pytest.fixture(scope="module")
def recipe(bundled: Setting) -> Recipe:
    return Recipe(bundled, lexicon=True, layer=3, l1=0.1, group=0.2, penalty_scale="relative")


# cells


def test_what_is_stored_is_found_under_its_whole_identity(bundled: Setting, tmp_path: Path) -> None:
    store, cell = Store(tmp_path), Cell(TASK, fits=(Fit(TASK, "laai", 0, 10, 3, l1=0.0, group=0.0),))
    identity = bundled.cell_identity(cell)
    assert store.get(cell, identity) is None
    store.put(cell, identity, {"metrics": {"exact_match": 0.5}})
    assert store.get(cell, identity) == {"metrics": {"exact_match": 0.5}}
    (fit,) = cell.fits
    others = [
        bundled.cell_identity(replace(cell, shots=10, seed=0)),
        *(
            bundled.cell_identity(replace(cell, fits=(changed,)))
            for changed in (replace(fit, seed=1), replace(fit, l1=1.0))
        ),
        replace(bundled, limit=13).cell_identity(cell),
        replace(bundled, source=replace(bundled.source, dtype="bfloat16")).cell_identity(cell),
        {**identity, "software": {**identity["software"], "torch": "0.1"}},
    ]
    assert [store.get(cell, other) for other in others] == [None] * len(others)
    assert len({json.dumps(i, sort_keys=True) for i in [identity, *others]}) == 1 + len(others)


def test_identity_follows_the_data(public_data: Path, tmp_path: Path) -> None:
    """One word of the test items more, and every cell of the task is another."""
    source = public_data / "function_vectors" / "antonym.json"
    folder = tmp_path / "function_vectors"
    folder.mkdir()
    (folder / "antonym.json").write_bytes(source.read_bytes())
    first = Setting(ModelSource(str(REFERENCE)), str(tmp_path)).cell_identity(Cell("laai_antonym"))
    setting._split.cache_clear()
    setting._test_sha256.cache_clear()
    rows = json.loads(source.read_text())
    word = next(w for w in (f"zz{n}" for n in range(99)) if not in_training_pool(w))
    (folder / "antonym.json").write_text(json.dumps([*rows, {"input": word, "output": "x"}]))
    second = Setting(ModelSource(str(REFERENCE)), str(tmp_path)).cell_identity(Cell("laai_antonym"))
    assert {name for name in first if first[name] != second[name]} == {"test_sha256"}
    setting._split.cache_clear()
    setting._test_sha256.cache_clear()


@pytest.mark.parametrize("module, name", [(start, "MOST_SHOTS"), (select, "PENALTIES"), (pseudo_labels, "INPUTS")])
def test_the_codes_constants_identify_its_trainings(
    module: Any, name: str, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = recipe.chosen(TASK, 0), recipe.laai(TASK, 0), recipe.baseline("icv", TASK, 0)
    before = [recipe.setting.fit_identity(fit) for fit in fits]
    monkeypatch.setattr(module, name, 3)
    after = [recipe.setting.fit_identity(fit) for fit in fits]
    assert [one == two for one, two in zip(before, after, strict=True)] == [False, False, True]


def test_what_fails_in_a_batch_leaves_its_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One seed draws an example that is longer than the model's window; both seeds are rows of one batch."""
    longest = next(word for word in (f"w{n}" for n in range(40)) if in_training_pool(word))
    rows = [{"input": f"w{n}", "output": "x" * (200 if f"w{n}" == longest else 1)} for n in range(40)]
    path = tmp_path / "words.json"
    path.write_text(json.dumps(rows))
    narrow = Setting(ModelSource(str(small_model_folder(tmp_path / "model", positions=48))), limit=2)
    task = f"laai_pairs:{path}"
    long = [any(len(one.target) > 99 for one in narrow.split(task, seed, 4).train) for seed in range(20)]
    seeds = long.index(False), long.index(True)
    fits = [Fit(task, "laai", seed, 4, 1, 2, 0.0, 0.0, "relative", "zero") for seed in seeds]
    store, plan = Store(tmp_path / "store"), Plan(narrow, tuple(Cell(task, fits=(fit,)) for fit in fits))
    assert plan.batches() == [fits]
    run([plan], store, Process())
    assert [plan.path(fit, store).exists() for fit in fits] == [True, False]
    assert [cell.fits for cell in plan.left(store)[1]] == [(fits[1],)]
    assert f"seed {seeds[1]}" in caplog.text


def test_targets_that_do_not_fit_what_is_generated_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"input": f"w{n}", "output": "x" * (100 if n % 2 else 1)} for n in range(40)]
    path = tmp_path / "words.json"
    path.write_text(json.dumps(rows))
    cell = Cell(f"laai_pairs:{path}")
    here = Setting(ModelSource(str(small_model_folder(tmp_path / "model"))))
    run([Plan(here, (cell,))], Store(tmp_path / "store"), Process())
    test = [one.target for one in here.split(cell.task).test]
    long = sum(len(target) > 99 for target in test)
    assert f"{long} of {len(test)} targets have more than the 16 tokens that are generated" in caplog.text


def test_data_that_changes_during_a_run_is_not_scored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "words.json"
    rows = [{"input": f"w{n}", "output": "x"} for n in range(40)]
    path.write_text(json.dumps(rows))
    cell = Cell(f"laai_pairs:{path}")
    here = Setting(ModelSource(str(small_model_folder(tmp_path / "model"))))
    plan, store = Plan(here, (cell,)), Store(tmp_path / "store")
    here.cell_identity(cell)
    path.write_text(json.dumps([{**row, "output": "y"} for row in rows]))
    run([plan], store, Process())
    assert "its data changed while this ran" in caplog.text
    assert plan.left(store)[1] == {cell}


def test_zero_shot_is_one_cell_for_all_seeds(recipe: Recipe) -> None:
    table = paper_table(1, [recipe])
    (row,) = (row for row in table.rows if row.title == "0-shot")
    assert {row.cell(TASK, seed) for seed in range(5)} == {Cell(TASK)}
    shots = next(row for row in table.rows if row.title == "10-shot")
    assert [shots.cell(TASK, seed).seed for seed in range(3)] == [0, 1, 2]


def test_what_the_tables_compare(recipe: Recipe) -> None:
    def fits(number: int, title: str, task: str, seed: int = 1) -> list[tuple[Any, ...]]:
        table = paper_table(number, [recipe])
        assert task in table.columns
        (row,) = (row for row in table.rows if row.title == title)
        return [(f.method, f.task, f.seed, f.n_train, f.layer, f.l1, f.group) for f in row.cell(task, seed).fits]

    composed = "laai_lexicon_en_fr_synonym"
    ours = ("laai", TASK, 1, 10, 3, 0.1, 0.2)
    assert fits(1, "LAAI", TASK) == fits(4, "regularised", TASK) == fits(6, "LAAI", TASK) == [ours]
    assert fits(1, "LAAI, chosen", TASK) == fits(6, "LAAI, chosen", TASK) == [("laai", TASK, 1, 10, None, None, None)]
    assert fits(4, "unregularised", TASK) == [("laai", TASK, 1, 10, 3, 0.0, 0.0)]
    assert fits(2, "Add", composed) == [
        ("laai", "laai_lexicon_synonym", 1, 10, 3, 0.1, 0.2),
        ("laai", "laai_lexicon_en_fr", 1, 10, 3, 0.1, 0.2),
    ]
    assert fits(2, "Add, chosen", composed) == [
        ("laai", "laai_lexicon_synonym", 1, 10, None, None, None),
        ("laai", "laai_lexicon_en_fr", 1, 10, None, None, None),
    ]
    assert fits(2, "Re-optimized", composed) == [("laai", composed, 1, 10, 3, 0.1, 0.2)]
    assert fits(2, "LAAI, chosen", composed) == [("laai", composed, 1, 10, None, None, None)]
    assert fits(1, "10-shot + function vector", TASK) == [("fv", TASK, 1, 10, None, None, None)]
    assert fits(6, "LoRA", TASK) == [("lora", TASK, 1, 10, 3, None, None)]
    assert fits(6, "IA3", TASK) == [("ia3", TASK, 1, 10, None, None, None)]
    assert list(paper_table(3, [recipe]).columns) == [
        f"laai_survey_{g}" for g in ("keen", "wary", "moderate", "divided")
    ]
    few = examples_table([1, 4], recipe).rows
    assert [row.cell(TASK, 0) for row in few[:2]] == [
        Cell(TASK, 1, 0),
        Cell(TASK, fits=(Fit(TASK, "laai", 0, 1, 3, 100, 0.1, 0.2, "relative", "zero"),)),
    ]
    assert [fit.start for row in few for fit in row.cell(TASK, 0).fits] == ["zero", "zero", "zero", "icl"]


def test_a_batch_does_not_depend_on_what_is_finished(recipe: Recipe, tmp_path: Path) -> None:
    cells = tuple(
        Cell(task, fits=(recipe.laai(task, seed, regularised=r),))
        for task in RULES[:2]
        for seed in (0, 1)
        for r in (True, False)
    )
    plan, store = Plan(recipe.setting, cells), Store(tmp_path)
    assert [len(batch) for batch in plan.batches()] == [4, 4]
    store.put(cells[0], recipe.setting.cell_identity(cells[0]), {"metrics": {}})
    path = plan.path(cells[1].fits[0], store)
    path.parent.mkdir(parents=True)
    path.touch()
    fits, left = plan.left(store)
    assert left == set(cells[1:])
    assert fits == {cell.fits[0] for cell in cells[2:]}
    assert [len(batch) for batch in plan.batches()] == [4, 4]


# scoring


def harness_score(model: str, shots: int = 0, seed: int = 0, **arguments: str) -> float:
    """By lm_eval alone, which loads everything from files."""
    metadata = {"seed": seed, "n_train": 10}
    results = simple_evaluate(
        model=model,
        model_args={"pretrained": str(REFERENCE), **arguments},
        tasks=[TASK],
        num_fewshot=shots,
        limit=24,
        batch_size=1 if "soft" in arguments.get("peft", "") else 5,
        device="cpu",
        task_manager=TaskManager(include_path=str(include_path()), include_defaults=False, metadata=metadata),
    )
    return results["results"][TASK]["exact_match,none"]


def test_scores_in_process_are_those_of_the_command(bundled: Setting, tmp_path: Path) -> None:
    """Untouched, ten-shot, a vector, a sum, LoRA, a soft prompt; and the model is left as it was."""
    model, tokenizer = bundled.source.load()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [type(module) for module in model.modules()]
    generator = torch.Generator().manual_seed(0)
    paths = []
    for number in range(2):
        vector = laai.Intervention({3: torch.randn(8, 32, generator=generator)})
        vector.save(tmp_path / f"{number}.safetensors")
        paths.append(tmp_path / f"{number}.safetensors")
    (laai.Intervention.load(paths[0]) + laai.Intervention.load(paths[1])).save(tmp_path / "sum.safetensors")
    adapters = {
        "lora": peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
        "soft": peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    }
    for name, config in adapters.items():
        fresh, _ = bundled.source.load()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            peft.get_peft_model(fresh, config).save_pretrained(tmp_path / name)

    def ours(*given: Path, shots: int = 0) -> float:
        cell = Cell(TASK, shots, 3 if shots else None)
        return harness.score(model, tokenizer, replace(bundled, limit=24), cell, given)["metrics"]["exact_match"]

    found = {
        "plain": (ours(), harness_score("hf")),
        "shots": (ours(shots=10), harness_score("hf", 10, 3)),
        "vector": (ours(paths[0]), harness_score("hf-laai", intervention=str(paths[0]))),
        "sum": (ours(*paths), harness_score("hf-laai", intervention=str(tmp_path / "sum.safetensors"))),
        "lora": (ours(tmp_path / "lora"), harness_score("hf", peft=str(tmp_path / "lora"))),
        "soft": (ours(tmp_path / "soft"), harness_score("hf", peft=str(tmp_path / "soft"))),
    }
    assert ours() == found["plain"][0]
    assert {name: mine for name, (mine, _) in found.items()} == {name: theirs for name, (_, theirs) in found.items()}
    assert len({mine for mine, _ in found.values()}) > 2  # they are not all zero
    assert [type(module) for module in model.modules()] == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_answers_are_what_the_score_counts(bundled: Setting) -> None:
    model, tokenizer = bundled.source.load()
    result = harness.score(model, tokenizer, bundled, Cell(TASK, 10, 0), [])
    targets = {example.prompt: example.target for example in bundled.split(TASK).test}
    right = [answer.split("\n")[0].strip() == targets[prompt].strip() for prompt, answer in result["answers"]]
    assert len(right) == result["n"] == 12
    assert result["metrics"]["exact_match"] == pytest.approx(sum(right) / 12)
    assert sum(right) > 6


# the command


@pytest.fixture(scope="module")
def line(small: Path) -> list[str]:
    """A command that is quick: Table 3 and Figure 2 on a random model."""
    words = ["--tables", "3", "--figures", "2", "--seeds", "2", "--limit", "2", "--quick"]
    return ["paper", "--model", str(small), "--data", "lexicon", *words]


@pytest.fixture(scope="module")
def made(line: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder."""
    folder = tmp_path_factory.mktemp("paper")
    assert cli.main([*line, "--output", str(folder)]) == 0
    return folder


def test_every_entry_is_the_mean_of_its_cells(made: Path, tmp_path: Path) -> None:
    facts = json.loads((made / "report.json").read_text())
    cells = [json.loads(path.read_text()) for path in (made / "cells").iterdir()]
    assert facts["missing"] == []
    assert facts["seeds"] == [0, 1]
    zero, _, *both = facts["tables"]["3"]
    assert [row["method"] for row in (zero, *both)] == ["0-shot", "LAAI", "LAAI, chosen"]
    columns = [(row["method"], *column) for row in both for column in row["columns"].items()]
    for method, task, column in columns:
        start = "zero" if method == "LAAI" else "icl"
        scores = {
            cell["identity"]["fits"][0]["seed"]: cell["result"]["metrics"]["kl"]
            for cell in cells
            if cell["identity"]["task"] == task and [fit["start"] for fit in cell["identity"]["fits"]] == [start]
        }
        assert scores[0] != scores[1]
        assert column["kl"]["values"] == [scores[0], scores[1]]
        assert column["kl"]["mean"] == pytest.approx(statistics.fmean(scores.values()))
        assert column["kl"]["spread"] == pytest.approx(statistics.stdev(scores.values()))
        untouched = zero["columns"][task]["kl"]
        assert untouched["spread"] == 0 and untouched["values"][0] not in scores.values()
    vectors = {iv.sha256: iv for iv in map(laai.Intervention.load, made.glob("fits/laai_lexicon_en_fr-*"))}
    limit = max(largest(iv) for iv in vectors.values())
    own_scale = []
    for title, weight in (("unregularised", 0.0), ("regularised", 0.0001)):
        shown = facts["figure_2"][title]
        drawn = vectors.pop(shown["sha256"])
        assert drawn.metadata["training"]["l1"] == drawn.metadata["training"]["group"] == weight
        assert shown["zero_share"] == pytest.approx(float((drawn.vector(1) == 0).float().mean()))
        figure = (made / f"paper_figure2_{title}.png").read_bytes()
        heat_map(drawn, tmp_path / "shared.png", limit)
        assert figure == (tmp_path / "shared.png").read_bytes()
        heat_map(drawn, tmp_path / "own.png")
        own_scale.append(figure == (tmp_path / "own.png").read_bytes())
    assert not vectors
    assert sorted(own_scale) == [False, True]  # both panels end where the larger vector does


def test_the_text_shows_every_figure_and_the_papers(made: Path, small: Path) -> None:
    facts = json.loads((made / "report.json").read_text())
    text = (made / "report.md").read_text()
    for row in facts["tables"]["3"]:
        entries = [column["kl"] for column in row["columns"].values()]
        average = statistics.fmean(entry["mean"] for entry in entries)
        cells = [*(f"{e['mean']:.3f} ± {e['spread']:.3f}" for e in entries), f"{average:.3f}"]
        assert f"| {row['method']} | ours | {' | '.join(cells)} |" in text
    assert "| LAAI | 0.283 | 0.260 | 0.260 | 0.288 | 0.273 |" in text  # the paper's groups are not the survey's
    assert "missing" not in text and "by construction" in text and "compares nothing" in text
    assert hashlib.sha256(b"".join(small_files(small))).hexdigest()[:16] in text
    assert facts["data"]["laai_survey_keen"]["test_items_sha256"] in text


def small_files(folder: Path) -> Iterator[bytes]:
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".safetensors"):
            yield path.name.encode() + path.read_bytes()


def test_again_nothing_is_computed(made: Path, line: list[str], facts_of: Callable[..., dict[str, Any]]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (*made.glob("cells/*"), *made.glob("fits/*"))}
    text = (made / "report.md").read_bytes()
    listed = facts_of(*line, "--output", made, "--dry-run")
    (model,) = listed["models"]
    assert len(model["cells"]) == len(list(made.glob("cells/*"))) and all(cell["done"] for cell in model["cells"])
    assert model["trainings"] == 0 and model["seconds"] == 0
    facts = facts_of(*line, "--output", made)
    assert facts == json.loads((made / "report.json").read_text())
    assert (made / "report.md").read_bytes() == text
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_table_3_of_other_groups(small: Path, public_data: Path, tmp_path: Path) -> None:
    flags = ["--model", str(small), "--data", str(public_data), "--tables", "3", "--figures", "", "--layer", "1"]
    words = ["paper", *flags, "--seeds", "1", "--limit", "2", "--quick", "--output", str(tmp_path)]
    assert cli.main([*words, "--group", "SEX=Female", "--group", "SEX=Male"]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "| method |  | SEX=Female | SEX=Male | average |" in text
    assert "| LAAI | 0.283 | 0.260 | 0.260 | 0.288 | 0.273 |" in text and "groups are others" in text
    assert "--group SEX=Female --group SEX=Male" in text and "SEX_data.json" in text
    cells = [json.loads(path.read_text()) for path in tmp_path.glob("cells/*")]
    (women, men) = ([c for c in cells if c["identity"]["test_sha256"] == digest] for digest in digests_of(public_data))
    assert len(women) == len(men) == 4  # 0-shot, 10-shot, the paper's setting, the chosen one
    scores = [cell["result"]["metrics"]["kl"] for cell in cells]
    assert len(set(scores)) == len(scores)


def digests_of(data: Path) -> list[str]:
    """SHA-256 of the test items of women and of men."""
    setting = Setting(ModelSource(str(REFERENCE)), str(data))
    return [setting.test_sha256(f"laai_opinionqa_group:SEX={group}") for group in ("Female", "Male")]


def test_the_lexicon_has_groups_of_its_own(capsys: Any) -> None:
    assert cli.main(["paper", "--data", "lexicon", "--group", "SEX=Female"]) == 2
    assert capsys.readouterr().err == (
        "laai: error: --group: --data lexicon has groups of its own; expected public sets\n"
    )


@pytest.mark.parametrize("number", [1, 2, 4, 5, 6])
def test_the_papers_figures_are_beside_ours(number: int, recipe: Recipe, tmp_path: Path) -> None:
    """The cells here are written by hand, not computed: the n-th seed scores n / 10."""
    table, store = paper_table(number, [recipe]), Store(tmp_path)
    for row in table.rows:
        for task in table.columns:
            for seed in (0, 1):
                cell = row.cell(task, seed)
                identity = row.setting.cell_identity(cell)
                store.put(cell, identity, {"metrics": {"exact_match": seed / 10}})
    facts = report.write(Content("laai paper", [recipe], [0, 1], [table]), store, tmp_path)
    text = (tmp_path / "report.md").read_text()
    not_run = ", not run" if number < 3 else ""
    spread = f"0.050 ± {math.sqrt(0.005):.3f}{not_run}"
    for row in table.rows:
        entry = f"0.100 ± 0.000{not_run}" if row.title == "0-shot" else spread  # one cell, written last
        assert f"| {row.title} | ours | {' | '.join([entry] * len(table.columns))} |" in text
    last = {
        1: "|  | paper | 0.795 ± 0.024, 0.768 | 0.620 ± 0.041, 0.872 | 0.514 ± 0.063, 0.902 | 0.349 ± 0.085, 0.74 |",
        2: "|  | paper | 0.551 ± 0.076, 0.896 | 0.546 ± 0.053, 0.724 | 0.768 ± 0.036, 0.937 | 0.780 ± 0.046, 0.984 |",
        4: "|  | paper | 0.795 | 0.620 | 0.514 | 0.349 |",
        5: "| Llama3-8B | paper | 0.795 | 0.620 | 0.514 |",
        6: "|  | paper | 0.795 | 0.620 | 0.514 |",
    }
    assert last[number] in text
    assert ("figure for figure" in text) == (number == 6)
    assert facts["missing"] == []


def test_commands_by_hand_are_commands(recipe: Recipe) -> None:
    """Every laai line of every table is understood, and says the fit's own settings."""
    parser = cli.make_parser()
    lines = [
        line
        for number in range(1, 7)
        for row in paper_table(number, [recipe]).rows
        for line in by_hand(row.setting, row.cell(next(iter(paper_table(number, [recipe]).columns)), 1))
    ]
    trainings = {line for line in lines if line.startswith("laai train")}
    parsed = [parser.parse_args(shlex.split(line)[1:]) for line in lines if line.startswith("laai ")]
    assert all(isinstance(arguments, argparse.Namespace) for arguments in parsed)
    assert {re.search("--method ([a-z0-9_]+)", line)[1] for line in trainings if "--method" in line} == {
        "fv",
        "icv",
        "ia3",
        "soft_prompt",
        "lora",
    }
    evaluations = [shlex.split(line) for line in lines if line.startswith("lm_eval")]
    assert len(evaluations) == sum(len(paper_table(number, [recipe]).rows) for number in range(1, 7))
    assert sum("peft=" in word for words in evaluations for word in words) == 3
    # 10-shot three times, and under a function vector
    draws = [json.loads(words[words.index("--metadata") + 1]) for words in evaluations if "--metadata" in words]
    assert sum((draw.get("seed"), draw.get("n_train")) == (1, 10) for draw in draws) == 4


def test_dry_run_lists_without_computing(small: Path, tmp_path: Path, facts_of: Callable[..., dict[str, Any]]) -> None:
    line = [
        "paper",
        "--model",
        small,
        "--data",
        "lexicon",
        "--tables",
        "6",
        "--figures",
        "",
        "--seeds",
        3,
        "--dry-run",
    ]
    facts = facts_of(*line, "--output", tmp_path / "out")
    (model,) = facts["models"]
    assert len(model["cells"]) == 6 * 3 * 3 and not any(cell["done"] for cell in model["cells"])
    assert model["trainings"] == 6 * 3 * 3 and model["seconds"] > 0
    assert not (tmp_path / "out").exists()


def test_figure_1_of_one_rule(small: Path, tmp_path: Path, facts_of: Callable[..., dict[str, Any]]) -> None:
    line = ["paper", "--model", small, "--data", "lexicon", "--tables", "", "--figures", "1", "--rules", "synonym"]
    facts = facts_of(*line, "--seeds", 1, "--limit", 2, "--output", tmp_path)
    assert {record["task"] for record in facts["figure_1"]} == {"laai_lexicon_synonym"}
    assert facts["missing"] == [] and "--rules synonym" in facts["command"]
    assert "![figure 1](paper_figure1.png)" in (tmp_path / "report.md").read_text()


def test_shots_that_the_model_has_no_room_for_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    narrow = Setting(ModelSource(str(small_model_folder(tmp_path / "model", positions=48))), limit=2)
    run([Plan(narrow, (Cell(TASK, shots=10),))], Store(tmp_path), Process())
    assert "Left truncation applied" in caplog.text


def test_what_fails_leaves_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Function vectors need prompts of several examples, and this model has no room for them."""
    narrow = Setting(ModelSource(str(small_model_folder(tmp_path / "model", positions=48))), limit=2)
    cells = (Cell(TASK, fits=(Fit(TASK, "fv", 0, 10),)), Cell(TASK))
    rows = [Row(title, narrow, lambda task, seed, cell=cell: cell) for title, cell in zip("ab", cells, strict=True)]
    table = Table("6", "Baselines", {TASK: "Antonym"}, rows)
    store = Store(tmp_path)
    run([Plan(narrow, cells)], store, Process())
    assert [record.levelname for record in caplog.records if record.name == run.__module__] == ["ERROR"] * 2
    assert "a prompt of several examples has" in caplog.text
    recipe = Recipe(narrow, True, 1, 0.1, 0.1, "relative")
    maps = {"regularised": Fit(TASK, "laai", 0, 10, 1, 3, 0.1, 0.1)}
    old = tmp_path / map_name("regularised")
    old.touch()
    facts = report.write(Content("laai paper", [recipe], [0], [table], maps=maps), store, tmp_path)
    assert facts["missing"] == [f"{TASK} + fv of {TASK} seed 0 N 10", "figure 2, regularised"]
    assert facts["figure_2"] == {"regularised": None} and not old.exists()
    assert [row["columns"][TASK]["exact_match"] is None for row in facts["tables"]["6"]] == [True, False]
    assert "| a | ours | missing |" in (tmp_path / "report.md").read_text()


def test_a_full_disk_stops_everything(bundled: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def full(*arguments: Any, **options: Any) -> None:
        tried.append(arguments)
        raise unwritable(tmp_path, OSError(errno.ENOSPC, "No space left on device"))

    monkeypatch.setattr(methods, "fit", full)
    fits = tuple(Fit(TASK, "icv", seed, 4) for seed in range(2))
    with pytest.raises(WorkFailed, match="No space left"):
        run([Plan(bundled, (), fits)], Store(tmp_path), Process())
    assert len(tried) == 1


def test_what_a_training_took_is_kept_beside_it(bundled: Setting, tmp_path: Path) -> None:
    """The rows of one batch share the time."""
    rows = tuple(Fit(TASK, "laai", seed, 4, 3, 2, 0.0, 0.0, "relative") for seed in range(2))
    fits, store, start = (*rows, Fit(TASK, "icv", 0, 4)), Store(tmp_path), time.process_time()
    run([Plan(bundled, (), fits)], store, Process())
    took = [seconds_of(bundled, fit, store) for fit in fits]
    assert all(took) and took[0] == took[1] and sum(took) < time.process_time() - start
    assert seconds_of(bundled, Fit(TASK, "icv", 1, 4), store) is None


def test_what_another_process_is_at_is_left_to_it(
    bundled: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell, result = Cell(TASK), {"metrics": {"exact_match": 0.5}}
    identity, store, other = bundled.cell_identity(cell), Store(tmp_path), ExitStack()
    assert other.enter_context(Store(tmp_path).claimed(cell, identity))
    waits = []

    def finish_meanwhile(seconds: float) -> None:
        waits.append(seconds)
        store.put(cell, identity, result)
        other.close()

    monkeypatch.setattr(f"{run.__module__}.time", SimpleNamespace(sleep=finish_meanwhile))
    run([Plan(bundled, (cell,))], store, Process())
    assert store.get(cell, identity) == result and len(waits) == 1
    with store.claimed(cell, identity) as mine:
        assert mine


@pytest.mark.skipif(find_spec("openai") is None, reason='openai is not installed: pip install "lm-eval-laai[judge]"')
def test_gpt_eval(bundled: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that accepts one word, on the answers of two seeds' cells: half of the first, none of the second."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    cells = [Cell(TASK, 10, seed) for seed in range(2)]
    table = Table("1", "", {TASK: "Antonym"}, [Row("10-shot", bundled, lambda task, seed: cells[seed])])
    store = Store(tmp_path)
    for cell, words in zip(cells, ([" cold\nQ: x", " warm"], [" warm", ""]), strict=True):
        answers = [["Q: hot\nA:", word] for word in words]
        store.put(cell, bundled.cell_identity(cell), {"metrics": {"exact_match": 0.0}, "answers": answers})
    questions: set[str] = set()

    def decide(request: Request, number: int) -> str:
        questions.add(request.question)
        return "1" if '"cold"' in request.question else "0"

    with JudgeServer(decide) as server, Cache(tmp_path / "judge.sqlite") as cache:
        found = gpt_eval.judged([table], [0, 1], store, Judge("m", server.url), cache, concurrency=1)
    assert {name: entry.values for name, entry in found.items()} == {("1", "10-shot", TASK): [0.5, 0.0]}
    assert {question.partition(". ")[2] for question in questions} == {
        '"hot" is an antonym of "cold".',
        '"hot" is an antonym of "warm".',
    }


@pytest.mark.skipif(find_spec("openai") is None, reason='openai is not installed: pip install "lm-eval-laai[judge]"')
def test_a_judge_without_a_key_is_refused_before_the_work(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    line = ["paper", "--model", str(small), "--data", "lexicon", "--tables", "1", "--figures", "", "--seeds", "1"]
    assert cli.main([*line, "--quick", "--judge-model", "m", "--output", str(tmp_path / "out")]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and "OPENAI_API_KEY is not set" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_whole_of_it(small: Path, tmp_path: Path, facts_of: Callable[..., dict[str, Any]]) -> None:
    """Every table and figure, every method."""
    line = ["paper", "--model", small, "--data", "lexicon", "--seeds", 2, "--limit", 2, "--quick", "--examples", "1,3"]
    facts = facts_of(*line, "--output", tmp_path)
    assert facts["missing"] == []
    assert list(facts["tables"]) == ["1", "2", "3", "4", "5", "6", "examples"]
    assert len(facts["figure_1"]) == 4 * 2 * 3 and all(len(record["values"]) == 2 for record in facts["figure_1"])
    assert (tmp_path / "paper_figure1.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "which model?"),
        (["--tables", "7"], "--tables 7"),
        (["--figures", "3"], "--figures 3"),
        (["--rules", "antonym,capital"], "--rules capital: expected some of en_fr, en_de, antonym, synonym"),
        (["--tables", "", "--figures", ""], "nothing to do"),
        (["--tables", "6", "--group", "SEX=Female"], "--group is for Table 3"),
        (["--figures", "2", "--rules", "antonym"], "--rules is for Figure 1"),
        (["--concurrency", "2"], "--concurrency: expected --judge-model with it"),
        (["--tables", "3", "--judge-model", "m"], "--judge-model is for the tables 1 and 2"),
        (["--data", "lexicon", "--seeds", "0"], "--seeds is 0"),
        (["--data", "lexicon", "--layer", "6"], "layer 6 is out of range"),
        (["--data", "lexicon", "--examples", "100000"], "n_train is 100000"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--data", "lexicon", "--judge-model", "m", "--base-url", "nowhere"], "base_url"),
    ],
)
def test_bad_input(words: list[str], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["paper", *words, "--output", str(tmp_path / "out")]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err
    assert not (tmp_path / "out").exists()


def test_the_papers_layer_on_public_sets(public_data: Path, bundled: Setting) -> None:
    parser = cli.make_parser()
    arguments = parser.parse_args(["paper", "--model", str(REFERENCE), "--data", str(public_data)])
    made = command._recipe(arguments, str(REFERENCE), command.Process())
    assert (made.layer, made.l1, made.group, made.penalty_scale) == (3, 0.01, 0.01, "absolute")
    assert made.task("en_fr") == "laai_en_fr"
    with pytest.raises(LaaiError):
        made.setting.split("laai_no_such_task")
