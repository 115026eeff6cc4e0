"""Word pairs of any file as a task: in laai_core, in the harness, in every command; and the bundled English sets."""

from __future__ import annotations

import hashlib
import json
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.tasks import TaskManager

import laai_core as laai
from laai_core.data import load_task, read_pairs
from laai_core.data.pairs import WORD_SETS, word_set_names
from laai_core.data.tasks import load_pairs
from lm_eval_laai.commands import cli
from lm_eval_laai.experiments.cells import Cell, Fit, Store
from lm_eval_laai.experiments.load import ModelSource
from lm_eval_laai.experiments.setting import Setting
from lm_eval_laai.paper.by_hand import by_hand
from lm_eval_laai.tasks import harness_metadata, harness_task, include_path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import word_sets  # noqa: E402

WORDS = {f"word{n}": f"answer {n}" for n in range(60)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of pairs in a folder whose name has a colon."""
    path = tmp_path / "sets:1" / "words.json"
    path.parent.mkdir()
    path.write_text(json.dumps([{"input": a, "output": b} for a, b in WORDS.items()]))
    return path


def slow_pool(text: str) -> bool:
    """The pool rule, written down once more."""
    digest = hashlib.sha256(unicodedata.normalize("NFC", text.strip()).encode("utf-8")).hexdigest()
    return int(digest[:8], 16) % 10 < 3


def harness(**metadata: Any) -> Any:
    manager = TaskManager(include_path=str(include_path()), include_defaults=False, metadata=metadata)
    return manager.load("laai_pairs")["tasks"]["laai_pairs"]


# The task


def test_the_split_is_the_others(file: Path) -> None:
    first, second = (load_task(f"pairs:{file}", seed, n_train=5) for seed in (0, 1))
    assert first.test == second.test and first.train != second.train
    assert [e.prompt for e in first.test] == [f"Q: {word}\nA:" for word in WORDS if not slow_pool(word)]
    for example in first.train + second.train:
        word = example.prompt.removeprefix("Q: ").removesuffix("\nA:")
        assert slow_pool(word) and example.target == f" {WORDS[word]}"
    assert first.name == "pairs:words.json"  # without the folder, so that equal trainings are equal files
    assert first.sources == {"words.json": hashlib.sha256(file.read_bytes()).hexdigest()}
    assert load_pairs(f"pairs:{file}")[1] == first.sources


@pytest.mark.parametrize("shots", [0, 1, 5])
def test_the_harness_shows_the_same_prompts(file: Path, shots: int) -> None:
    split = load_task(f"pairs:{file}", seed=3, n_train=5)
    task = harness(file=str(file), seed=3, n_train=5)
    docs = list(task.test_docs())
    assert [(doc["prompt"], doc["target"]) for doc in docs] == [(e.prompt, e.target) for e in split.test]
    for doc, example in zip(docs, split.test, strict=True):
        assert task.fewshot_context(doc, shots) == example.behind(split.train[:shots])


def test_the_harness_takes_bundled_sets_and_needs_a_name() -> None:
    split = load_task("pairs:capitals", seed=0)
    assert [doc["prompt"] for doc in harness(file="capitals").test_docs()] == [e.prompt for e in split.test]
    with pytest.raises(laai.LaaiError, match=r'laai_pairs: expected a file, for example --metadata .{"file":"words'):
        harness()


def test_a_file_comes_before_a_bundled_set(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    file.rename(file.with_name("capitals"))
    assert load_task("pairs:capitals", n_train=5).test[0].prompt.startswith("Q: word")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"[", "not valid JSON"),
        (b"{}", "holds a JSON dict"),
        (b"[]", "the list is empty"),
        (b'[{"input": "a", "output": "b"}, {"input": "c"}]', 'record 2 has no "output"'),
        (b'[{"input": "a", "output": "b"}, {"input": " ", "output": "c"}]', "record 2: input is empty"),
        (b'[{"input": "a", "output": 3}]', "record 1: output is a int"),
    ],
)
def test_bad_files(content: bytes | None, said: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_bytes(content)
    for command in (["train"], ["sweep"], ["compose", "x", "x", "--method", "fit"]):
        if command[0] == "compose":
            for name in ("x", "y"):
                laai.Intervention({1: torch.ones(4, 8)}).save(tmp_path / f"{name}.safetensors")
            command = ["compose", tmp_path / "x.safetensors", tmp_path / "y.safetensors", "--method", "fit"]
        line = refused(*command, "--model", "reference", "--task", f"pairs:{path}", "--output", f"{tmp_path}/out/")
        assert str(path) in line and said in line
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.*"))


def test_zero_shot_needs_no_ten_rows_for_training(file: Path, tmp_path: Path) -> None:
    pool = [word for word in WORDS if slow_pool(word)]
    few = tmp_path / "few.json"
    rows = [word for word in WORDS if word not in pool[4:]]
    few.write_text(json.dumps([{"input": word, "output": WORDS[word]} for word in rows]))
    task = f"laai_pairs:{few}"
    (metadata,) = [Setting(ModelSource("reference")).metadata(Cell(task))]
    assert len(list(harness(**metadata).test_docs())) == len(rows) - 4
    none = tmp_path / "none.json"
    none.write_text(json.dumps([{"input": word, "output": WORDS[word]} for word in pool[:4]]))
    with pytest.raises(laai.LaaiError, match="all of its rows are for training; expected test items"):
        harness(file=str(none), n_train=4)


def test_a_task_without_a_file(tmp_path: Path, refused: Callable[..., str]) -> None:
    for task in ("pairs", "pairs:"):
        line = refused("train", "--model", "reference", "--task", task, "--output", f"{tmp_path}/")
        assert "expected pairs:FILE.json" in line and "pairs:capitals" in line
    assert "no task named" in refused("train", "--model", "reference", "--task", "antonym:x")


# The commands


def test_train_and_compose(
    file: Path, small: Path, tmp_path: Path, facts_of: Callable[..., dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", small, "--task", f"pairs:{file}", "--n-train", 5]
    facts = facts_of("train", *flags, "--steps", 3, "--output", f"{tmp_path}/one/")
    assert facts["file"] == str(tmp_path / "one" / "laai_pairs.safetensors")
    trained = laai.Intervention.load(facts["file"])
    assert trained.metadata["task"] == "laai_pairs:words.json"
    # The same pairs elsewhere: the same bytes.
    copy = tmp_path / "words.json"
    copy.write_bytes(file.read_bytes())
    again = ["--model", small, "--task", f"pairs:{copy}", "--n-train", 5, "--steps", 3]
    assert facts_of("train", *again, "--output", f"{tmp_path}/two/")["sha256"] == facts["sha256"]
    files = [facts["file"], facts["file"]]
    composed = facts_of("compose", *files, "--method", "fit", *flags, "--output", f"{tmp_path}/sum/")
    assert composed["file"] == str(tmp_path / "sum" / "laai_pairs.safetensors")
    assert facts_of("inspect", facts["file"], "--model", small, "--task", f"pairs:{file}")["writes"]["prompts"] == 5
    assert cli.main(["inspect", facts["file"], "--model", str(small)]) == 2
    assert "--task examples:FILE or pairs:FILE" in capfd.readouterr().err


def test_sweep(file: Path, small: Path, tmp_path: Path, facts_of: Callable[..., dict[str, Any]]) -> None:
    other = file.with_name("other.json")
    other.write_text(json.dumps([{"input": f"input{n}", "output": "same"} for n in range(60)]))
    line = ["sweep", "--model", small, "--task", f"pairs:{file},pairs:{other},lexicon_antonym", "--n-train", 5]
    line += ["--layers", 1, "--seeds", 1, "--limit", 4, "--l1", 0, "--group", 0, "--output", tmp_path / "out"]
    facts = facts_of(*line)
    assert [r["task"] for r in facts["scores"]] == [
        f"laai_pairs:{file}",
        f"laai_pairs:{other}",
        "laai_lexicon_antonym",
    ]
    assert all(record["mean"] is not None for record in facts["scores"])
    cells = sorted(path.name for path in (tmp_path / "out" / "cells").iterdir())
    assert [name.rpartition("-")[0] for name in cells] == ["laai_lexicon_antonym", "laai_pairs", "laai_pairs"]
    prompts = set()
    for name in cells:
        found = json.loads((tmp_path / "out" / "cells" / name).read_text())
        prompts |= {prompt for prompt, _ in found["result"]["answers"]}
    words = [load_task(f"pairs:{path}", n_train=5).test[0].prompt for path in (file, other)]
    assert set(words) < prompts


def test_demo(
    file: Path, small: Path, tmp_path: Path, facts_of: Callable[..., dict[str, Any]], refused: Callable[..., str]
) -> None:
    line = ["demo", "--model", small, "--limit", 4, "--output", tmp_path / "out"]
    assert "expected one" in refused(*line, "--tasks", f"pairs:{file}", "pairs:capitals")
    facts = facts_of(*line, "--tasks", f"pairs:{file}", "laai_lexicon_antonym")
    assert list(facts["scores"]["delta"]) == ["laai_lexicon_antonym", "laai_pairs"]
    assert (tmp_path / "out" / "laai_pairs.safetensors").is_file()


def test_identities_are_of_the_pairs_and_not_of_the_place(file: Path, tmp_path: Path) -> None:
    setting = Setting(ModelSource("reference"))

    def identity(path: Path) -> dict[str, Any]:
        fit = Fit(f"laai_pairs:{path}", "laai", 0, 5, 1)
        return setting.cell_identity(Cell(fit.task, fits=(fit,)))

    copy = tmp_path / "elsewhere.json"
    copy.write_bytes(file.read_bytes())
    assert identity(copy) == identity(file)
    other = tmp_path / "other.json"
    other.write_text(json.dumps([{"input": a, "output": f"{b}!"} for a, b in WORDS.items()]))
    assert identity(other) != identity(file)
    assert Store(tmp_path).fit_path(Fit(f"laai_pairs:{file}", "laai", 0, 5), {}).parent == tmp_path / "fits"


def test_by_hand(file: Path) -> None:
    fit = Fit(f"laai_pairs:{file}", "laai", 0, 5, 1)
    train, evaluate = by_hand(Setting(ModelSource("reference")), Cell(fit.task, fits=(fit,)))
    assert f"--task pairs:{file}" in train
    assert '"pretrained=$(laai models path reference),' in evaluate and "--tasks laai_pairs " in evaluate
    assert f'"file": "{file}"' in evaluate


def test_names() -> None:
    assert harness_task("pairs:a/b.json") == "laai_pairs"
    for task in ("pairs:a/b:c.json", "laai_pairs:a/b:c.json"):
        assert harness_metadata([task]) == {"file": "a/b:c.json"}
    assert harness_metadata(["opinionqa_group:SEX=Female"]) == {"attribute": "SEX", "group": "Female"}
    assert harness_metadata(["lexicon_antonym"]) == {}
    drawn = harness_metadata(["pairs:x.json", "lexicon_antonym"], seed=0, n_train=10, data="d")
    assert drawn == {"seed": 0, "n_train": 10, "data": "d", "file": "x.json"}


# The bundled sets


@pytest.mark.parametrize("name", word_set_names())
def test_bundled_sets(name: str) -> None:
    content = (WORD_SETS / f"{name}.json").read_text(encoding="utf-8")
    assert content == word_sets.text(word_sets.word_sets()[name]), "run benchmarks/word_sets.py"
    records = json.loads(content)
    inputs = [record["input"] for record in records]
    assert len(records) >= 150 and len({word.casefold() for word in inputs}) == len(inputs)
    for record in records:
        assert set(record) == {"input", "output"}
        for side in record.values():
            assert side and side == side.strip() and side.isascii() and len(side.split()) <= 6
    pairs, _ = read_pairs(WORD_SETS / f"{name}.json")
    assert len(pairs) == len(records)
    if name != "capitals":  # Luxembourg is the capital of Luxembourg; a rule that changes nothing shows nothing
        assert all(record["input"] != record["output"] for record in records)
    split = load_task(f"pairs:{name}")
    assert len(split.test) >= 100 and split.sources == {
        f"{name}.json": hashlib.sha256(content.encode("utf-8")).hexdigest()
    }


def test_there_are_three_bundled_sets() -> None:
    assert word_set_names() == ["american", "capitals", "past_tense"] == sorted(word_sets.word_sets())


@pytest.mark.parametrize(
    ("name", "word", "answer"),
    [
        ("past_tense", "stop", "stopped"),
        ("past_tense", "open", "opened"),
        ("past_tense", "carry", "carried"),
        ("past_tense", "play", "played"),
        ("past_tense", "bake", "baked"),
        ("past_tense", "go", "went"),
        ("american", "organisation", "organization"),
        ("american", "colourful", "colorful"),
        ("american", "theatre", "theater"),
        ("american", "tyre", "tire"),
        ("capitals", "Andorra", "Andorra la Vella"),
    ],
)
def test_rules(name: str, word: str, answer: str) -> None:
    assert word_sets.word_sets()[name][word] == answer
