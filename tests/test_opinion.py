"""Opinions: both layouts of OpinionQA and the survey, against pandas and against what is said about bad data."""

from __future__ import annotations

import importlib
import json
import logging
import random
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from scipy.optimize import minimize
from scipy.special import softmax
from scipy.stats import entropy, wasserstein_distance
from test_task_yamls import Scripted
from tiny import tiny_model, tiny_tokenizer

import laai_core as laai
from laai_core.data import in_training_pool, load_task
from laai_core.data.tasks import OPINIONQA, load_opinions, task_names
from laai_core.errors import LaaiError
from lm_eval_laai.commands import cli
from lm_eval_laai.methods.evaluate import task_losses
from lm_eval_laai.model import HFLaai
from lm_eval_laai.tasks import include_path, list_tasks

GROUPS = {
    "INCOME": ["Less than $30,000", "$30,000-$100,000", "$100,000 or more"],
    "POLIDEOLOGY": ["Conservative", "Moderate", "Liberal"],
    "CREGION": ["Northeast", "South"],
    "SEX": ["Male", "Female"],
}
SCALES = [
    (["A lot", "A little, or now and then", "Not at all"], [1.0, 2.0, 3.0], ["Refused"]),
    (["Yes", "No", "About the same"], [1.0, 2.0, 1.5], ["Refused"]),
    (["Very well", "Pretty well", "Not too well", "Not at all well"], [4, 3, 2, 1], ["Not sure", "Refused"]),
    (["Family's", 'The "state"'], [1, 1], ["Refused"]),
]
QUESTIONS = 40  # a wave
PEOPLE = 60


def write_wave(folder: Path, wave: int) -> Path:
    """A wave in the authors' layout, of random people."""
    draw = random.Random(wave)
    folder = folder / "human_resp" / f"American_Trends_Panel_W{wave}"
    folder.mkdir(parents=True)
    info, columns = [], {"QKEY": range(PEOPLE)}
    for attribute, groups in GROUPS.items():
        columns[attribute] = [draw.choice([*groups, ""]) for _ in range(PEOPLE)]
    for number in range(QUESTIONS):
        options, places, refusals = SCALES[number % len(SCALES)]
        key = f"Q{number}_W{wave}"
        info.append(
            {
                "key": key,
                "question": f"In wave {wave}, what about number {number}?",
                "references": repr(options + refusals),
                "option_ordinal": repr(places),
            }
        )
        # Some were not asked; few chose the first option.
        columns[key] = [draw.choice([*options[1:] * 3, options[0], *refusals, ""]) for _ in range(PEOPLE)]
    columns[f"WEIGHT_W{wave}"] = [
        draw.choice([0.0, draw.uniform(0.1, 3), draw.uniform(0.1, 3)]) for _ in range(PEOPLE)
    ]
    pd.DataFrame(info).to_csv(folder / "info.csv")
    pd.DataFrame({"key": GROUPS.keys(), "options": map(repr, GROUPS.values())}).to_csv(folder / "metadata.csv")
    pd.DataFrame(columns).to_csv(folder / "responses.csv", index=False)
    return folder


def by_pandas(folder: Path, attribute: str, group: str) -> dict[str, list[float]]:
    """{key: weighted shares of the options}, for one wave."""
    wave = folder.name.rpartition("W")[2]
    info = pd.read_csv(folder / "info.csv")
    people = pd.read_csv(folder / "responses.csv", keep_default_na=False)
    people = people[people[attribute] == group]
    found = {}
    for _, row in info.iterrows():
        options = eval(row["references"])[: len(eval(row["option_ordinal"]))]  # the test's own file
        sums = people.groupby(row["key"])[f"WEIGHT_W{wave}"].sum().reindex(options, fill_value=0.0)
        if sums.sum() > 0:
            found[row["key"]] = (sums / sums.sum()).tolist()
    return found


def assert_equal(opinions, expected):
    """The same questions in the same order, the same shares."""
    assert [opinion.question.key for opinion in opinions] == list(expected)
    for opinion in opinions:
        assert opinion.distribution == pytest.approx(expected[opinion.question.key], abs=1e-12)


@pytest.fixture(scope="session")
def panel(tmp_path_factory):
    """The folder to pass as `data`: two waves in the authors' layout."""
    data = tmp_path_factory.mktemp("data")
    for wave in (26, 100):
        write_wave(data / "opinionqa", wave)
    return data


@pytest.fixture
def wave(tmp_path):
    """One wave that a test may spoil; `tmp_path` is its data folder."""
    return write_wave(tmp_path, 7)


def spoil(path: Path, row: int, column: str, value: object) -> None:
    """Put a value into a cell of a CSV file, counted as a spreadsheet does: the header is row 1."""
    table = pd.read_csv(path, keep_default_na=False, dtype=str)
    table.loc[row - 2, column] = value
    table.to_csv(path, index=False)


def error_of(name, data, **more) -> str:
    with pytest.raises(LaaiError) as caught:
        load_task(name, data=data, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The authors' layout


@pytest.mark.parametrize("name", OPINIONQA)
def test_weighted_shares_equal_pandas(name, panel):
    attribute, group = OPINIONQA[name]
    expected = {}
    for folder in sorted((panel / "opinionqa" / "human_resp").iterdir(), key=lambda path: len(path.name)):
        expected |= by_pandas(folder, attribute, group)
    opinions, sources = load_opinions(name, panel)
    assert_equal(opinions, expected)  # wave after wave, in the files' order
    assert len(sources) == 6 and "American_Trends_Panel_W100/responses.csv" in sources


def test_prompt_options_and_split(panel):
    split = load_task("opinionqa_moderate", seed=1, data=panel)
    assert (len(split.train), split.name, split.seed) == (10, "opinionqa_moderate", 1)
    opinions = {opinion.example().prompt: opinion for opinion in load_opinions("opinionqa_moderate", panel)[0]}
    assert all(in_training_pool(opinions[example.prompt].question.key) for example in split.train)
    keys = [opinions[example.prompt].question.key for example in split.test]
    assert keys == [o.question.key for o in opinions.values() if not in_training_pool(o.question.key)]
    number = next(
        n for n, e in enumerate(split.test) if keys[n] == f"Q{keys[n][1:].split('_')[0]}_W26" and len(e.options) == 4
    )
    example = split.test[number]
    asked = re.fullmatch(r"Q(\d+)_W26", keys[number])[1]
    assert example.prompt == (
        f"Question: In wave 26, what about number {asked}?\n"
        "A. Very well\nB. Pretty well\nC. Not too well\nD. Not at all well\nAnswer:"
    )
    assert example.options == (" A", " B", " C", " D")
    assert opinions[example.prompt].question.positions == (4, 3, 2, 1)


def test_any_group_by_name_and_by_the_harness_metadata(panel):
    name = "opinionqa_group:INCOME=$30,000-$100,000"
    metadata = {"attribute": "INCOME", "group": "$30,000-$100,000", "data": str(panel), "seed": 3, "pretrained": "x"}
    manager = TaskManager(include_path=str(include_path()), include_defaults=False, metadata=metadata)
    task = manager.load("laai_opinionqa_group")["tasks"]["laai_opinionqa_group"]
    split = load_task(name, seed=3, data=panel)
    for docs, examples in ((task.fewshot_docs(), split.train), (task.test_docs(), split.test)):
        assert [(d["prompt"], tuple(d["choices"]), tuple(d["distribution"])) for d in docs] == [
            (e.prompt, e.options, e.distribution) for e in examples
        ]
    named = manager.load("laai_opinionqa_northeast")["tasks"]["laai_opinionqa_northeast"]  # not another by metadata
    northeast = load_task("opinionqa_northeast", data=panel).test
    assert [tuple(doc["distribution"]) for doc in named.test_docs()] == [e.distribution for e in northeast]


def test_the_generic_task_says_what_it_needs(panel):
    manager = TaskManager(include_path=str(include_path()), include_defaults=False, metadata={"data": str(panel)})
    with pytest.raises(LaaiError, match="--metadata"):
        manager.load("laai_opinionqa_group")
    assert "opinionqa_group:SEX=Female" in error_of("opinionqa_group", panel)
    assert "opinionqa_group:SEX=Female" in error_of("opinionqa_group:SEX", panel)


def test_folders(panel, tmp_path):
    expected = load_task("opinionqa_moderate", data=panel)
    for folder in (panel / "opinionqa", panel / "opinionqa" / "human_resp"):
        assert load_task("opinionqa_moderate", data=folder) == expected
    for name in ("opinionqa_moderate", "opinionqa_group:SEX=Male"):
        said = error_of(name, tmp_path)
        assert "human_resp" in said and str(tmp_path) in said and "LAAI_DATA" in said


def test_people_without_a_weight_do_not_count(wave, tmp_path, caplog):
    for row in range(2, PEOPLE + 2, 3):
        spoil(wave / "responses.csv", row, "WEIGHT_W7", "")
    people = pd.read_csv(wave / "responses.csv", keep_default_na=False)
    ours = people[people["SEX"] == "Male"]
    with caplog.at_level(logging.WARNING):
        opinions, _ = load_opinions("opinionqa_group:SEX=Male", tmp_path)
    assert f"{(ours['WEIGHT_W7'] == '').sum()} of SEX=Male have no weight" in caplog.text
    people[people["WEIGHT_W7"] != ""].to_csv(wave / "responses.csv", index=False)
    expected = by_pandas(wave, "SEX", "Male")
    assert_equal(opinions, expected)


def test_unanswered_and_refused_only_questions_are_left_out_by_name(wave, tmp_path, caplog):
    table = pd.read_csv(wave / "responses.csv", keep_default_na=False)
    table.loc[table["SEX"] == "Male", "Q0_W7"] = ""
    table.loc[table["SEX"] == "Male", "Q1_W7"] = "Refused"
    table.loc[(table["SEX"] == "Male") & (table["Q2_W7"] != "Refused"), "WEIGHT_W7"] = 0
    table.to_csv(wave / "responses.csv", index=False)
    with caplog.at_level(logging.WARNING):
        opinions, _ = load_opinions("opinionqa_group:SEX=Male", tmp_path)
    keys = [opinion.question.key for opinion in opinions]
    assert len(keys) > 10 and not {"Q0_W7", "Q1_W7", "Q2_W7"} & set(keys)
    assert "SEX=Male: without the questions nobody of it answered: Q0_W7, Q1_W7, Q2_W7" in caplog.text
    assert {"Q0_W7", "Q1_W7"} <= {o.question.key for o in load_opinions("opinionqa_group:SEX=Female", tmp_path)[0]}


@pytest.mark.parametrize(
    ("file", "row", "column", "value", "said"),
    [
        ("info.csv", 4, "references", "['Yes', 'No'", "expected a Python list of option texts"),
        ("info.csv", 4, "references", "__import__('os').listdir('.')", "expected a Python list of option texts"),
        ("info.csv", 4, "references", "[1, 2]", "expected a Python list of option texts"),
        ("info.csv", 4, "references", "['Yes', 'Yes', 'No', 'Refused']", "'Yes' comes twice"),
        ("info.csv", 4, "references", "['Yes', '', 'No', 'Refused']", "expected text"),
        ("info.csv", 5, "option_ordinal", "[1.0, 2.0", "expected a Python list of numbers"),
        ("info.csv", 5, "option_ordinal", "[1.0, 'two']", "expected a Python list of numbers"),
        ("info.csv", 5, "option_ordinal", "[1, 2, 3, 4, 5, 6, 7]", "at most"),
        ("info.csv", 5, "option_ordinal", "[1, 1e999]", "finite"),
        ("info.csv", 3, "question", "", "expected text"),
        ("info.csv", 3, "key", " ", "expected text"),
        ("metadata.csv", 2, "options", "['Male', ", "expected a Python list of groups"),
        ("responses.csv", 9, "Q3_W7", "Perhaps", "'Perhaps' is no option"),
        ("responses.csv", 9, "WEIGHT_W7", "heavy", "expected a number"),
        ("responses.csv", 9, "WEIGHT_W7", "-1", "expected a number"),
        ("responses.csv", 9, "WEIGHT_W7", "inf", "expected a number"),
    ],
)
def test_bad_cells(wave, tmp_path, file, row, column, value, said):
    spoil(wave / file, row, column, value)
    message = error_of("opinionqa_group:SEX=Male", tmp_path)
    assert message.startswith(f"{wave / file}: row {row}, column {column}") and said in message


def test_an_empty_group(wave, tmp_path):
    table = pd.read_csv(wave / "responses.csv", keep_default_na=False)
    table[table["SEX"] != "Male"].to_csv(wave / "responses.csv", index=False)
    message = error_of("opinionqa_group:SEX=Male", tmp_path)
    assert message.startswith(f"{wave / 'responses.csv'}: no row has 'Male' in the column SEX")
    table["WEIGHT_W7"] = 0.0
    table.to_csv(wave / "responses.csv", index=False)
    assert "SEX=Male has no answer that counts" in error_of("opinionqa_group:SEX=Male", tmp_path)


def test_unknown_attributes_and_groups(wave, tmp_path):
    message = error_of("opinionqa_group:AGE=18-29", tmp_path)
    assert str(wave / "metadata.csv") in message and "INCOME, POLIDEOLOGY, CREGION, SEX" in message
    assert "Male, Female" in error_of("opinionqa_group:SEX=male", tmp_path)


@pytest.mark.parametrize("column", ["WEIGHT_W7", "SEX", "Q3_W7"])
def test_missing_columns(wave, tmp_path, column):
    pd.read_csv(wave / "responses.csv").drop(columns=column).to_csv(wave / "responses.csv", index=False)
    message = error_of("opinionqa_group:SEX=Male", tmp_path)
    assert message.startswith(f"{wave / 'responses.csv'}: row 1 has no column {column}")


def test_files_that_are_no_tables(wave, tmp_path):
    path = wave / "responses.csv"
    good = path.read_bytes()
    for content, said in (
        (good + b"1,2,3\n", f"row {PEOPLE + 2} has 3 cells"),
        (good + b'"1,2', f"row {PEOPLE + 2} is not valid CSV"),
        (b"", "is empty"),
        (b"\xff", "not UTF-8 at byte 0"),
    ):
        path.write_bytes(content)
        assert said in error_of("opinionqa_group:SEX=Male", tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + good)  # a spreadsheet's byte order mark
    assert load_task("opinionqa_group:SEX=Male", n_train=5, data=tmp_path).test
    path.unlink()
    assert "cannot be read" in error_of("opinionqa_group:SEX=Male", tmp_path)


# The aggregated form


def aggregated(folder: Path, records: object, name: str = "SEX") -> Path:
    path = folder / f"{name}_data.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def record(options, **groups):
    return {"MC_options": options, "question_text": "And?", **groups}


def test_aggregated_counts_without_info(tmp_path):
    counts = {"No": 1.0, "Yes": 1.0, "Yes ": 2.0, "Refused": 9.0}
    records = {f"Q{n}": record(["Yes", "No", "Unsure", "Refused"], Male=counts, Female={"No": 2.0}) for n in range(50)}
    records["Q0"]["Male"] = {"Refused": 4.0}
    aggregated(tmp_path, records)
    opinions, _ = load_opinions("opinionqa_group:SEX=Male", tmp_path)
    assert [o.question.key for o in opinions] == [f"Q{n}" for n in range(1, 50)]
    assert {o.distribution for o in opinions} == {(0.75, 0.25, 0.0)}
    assert {o.question.positions for o in opinions} == {(0, 1, 2)}
    assert opinions[0].example().prompt == "Question: And?\nA. Yes\nB. No\nC. Unsure\nAnswer:"
    assert opinions[0].example().answer == " A"


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([], "holds no questions"),
        ({"Q1": 3}, "question Q1 is a int"),
        ({"Q1": {"MC_options": ["a", "b"]}}, "question Q1: question_text is None"),
        ({"Q1": record("ab", Male={})}, "question Q1: MC_options is a str"),
        ({"Q1": record(["a", "Refused"], Male={})}, "question Q1: MC_options: options are 1; expected 2 to 26"),
        ({"Q1": record([str(n) for n in range(27)], Male={})}, "options are 27; expected 2 to 26"),
        ({"Q1": record(["a", "b"], Male=3)}, "question Q1, Male: is a int"),
        ({"Q1": record(["a", "b"], Male={"c": 1.0})}, "question Q1, Male: the answer 'c' is no option"),
        ({"Q1": record(["a", "b"], Male={"a": -1})}, "question Q1, Male: 'a' has the count -1"),
        ({"Q1": record(["a", "b"], Male={"a": True})}, "'a' has the count True"),
        ({"Q1": record(["a", "b"], Female={"a": 1})}, "no question has the group 'Male'; expected one of Female"),
        ({"Q1": record(["a", "b"], Male={})}, "SEX=Male has no answer that counts"),
        ({"Q1": record(["\ud800", "b"], Male={"b": 1})}, "not valid Unicode"),
    ],
)
def test_bad_aggregated_files(tmp_path, records, said):
    path = aggregated(tmp_path, records)
    message = error_of("opinionqa_group:SEX=Male", tmp_path)
    assert said in message and message.startswith(str(path if "no answer" not in said else tmp_path))


def test_aggregated_files_that_are_not_there_or_not_json(tmp_path):
    (tmp_path / "SEX_data.json").write_text("{")
    assert "not valid JSON" in error_of("opinionqa_group:SEX=Male", tmp_path)
    assert "the attributes it has are SEX" in error_of("opinionqa_group:AGE=65+", tmp_path)


@pytest.fixture(scope="session")
def real(public_data):
    if not (public_data / "opinionqa" / "SEX_data.json").is_file():
        pytest.skip(f"OpinionQA in aggregated form is not in {public_data}; set LAAI_DATA")
    return public_data


@pytest.mark.parametrize(("attribute", "group"), [("SEX", "Male"), ("RACE", "Mixed Race")])
def test_the_real_data(real, attribute, group):
    folder = real / "opinionqa"
    info = pd.read_csv(folder / "info.csv").drop_duplicates("key").set_index("key")
    records = json.loads((folder / f"{attribute}_data.json").read_text())
    expected = {}
    for key, found in records.items():
        options = eval(info.loc[key, "references"])[: len(eval(info.loc[key, "option_ordinal"]))]
        counts = pd.Series(found[group], dtype=float).reindex(options, fill_value=0)
        if counts.sum():
            expected[key] = (counts / counts.sum()).tolist()
        assert found["question_text"] == info.loc[key, "question"]
    opinions, _ = load_opinions(f"opinionqa_group:{attribute}={group}", real)
    assert_equal(opinions, expected)
    assert 400 < len(opinions) < len(records) == 494
    # An option with a comma in it is one option here; the aggregated file lists it as two.
    cut = next(o for o in opinions if o.question.key == "GUNTYPEOWNC_W26")
    assert cut.question.options[0] == "Yes, I currently own" and len(cut.distribution) == 3
    seeds = [load_task(f"opinionqa_group:{attribute}={group}", seed, data=real) for seed in range(2)]
    assert seeds[0].test == seeds[1].test and seeds[0].train != seeds[1].train


# The bundled survey


@pytest.mark.parametrize("group", ["keen", "wary", "moderate", "divided"])
def test_the_survey(group):
    split = load_task(f"survey_{group}")
    assert len(split.train) == 10 and len(split.test) >= 80
    assert {len(example.options) for example in split.test} == {3, 4, 5}
    for example in (*split.train, *split.test):
        assert re.fullmatch(r"Question: [^\n]+\?\n([A-E]\. [^\n]+\n){3,5}Answer:", example.prompt)
        assert "Refused" not in example.prompt and sum(example.distribution) == pytest.approx(1)
    # Which letter a tendency is at depends on the question.
    assert len({int(np.argmax(example.distribution)) for example in split.test}) > 1


def test_every_name_of_a_task_is_documented_and_listed():
    document = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    for task in list_tasks():
        assert f"`{task.name}`" in document, f"{task.name} is not in docs/tasks.md"
    assert {"opinionqa_group", "survey_keen", *OPINIONQA} <= set(task_names())
    assert {task.name for task in list_tasks() if task.group == "laai_opinionqa"} == {f"laai_{n}" for n in OPINIONQA}


def test_laai_data_says_where_it_is(panel, tmp_path, capsys):
    assert cli.main(["data", "--data", str(panel), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["opinionqa"]
    assert (found["state"], found["path"]) == ("2 waves", str(panel / "opinionqa"))
    assert found["waves"] == ["American_Trends_Panel_W26", "American_Trends_Panel_W100"]
    aggregated(tmp_path, {"Q1": {}}, "RACE")
    assert cli.main(["data", "--data", str(tmp_path)]) == 0
    assert re.search(rf"OpinionQA +RACE +- +{tmp_path}", capsys.readouterr().out)
    (tmp_path / "empty").mkdir()
    assert cli.main(["data", "--data", str(tmp_path / "empty")]) == 0
    assert re.search("OpinionQA +missing", capsys.readouterr().out)
    assert cli.main(["data", "--data", str(tmp_path / "nowhere")]) == 2
    assert re.search("nowhere: no such folder", capsys.readouterr().err)


# Training, and back through the harness


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny model that takes texts as long as the questions, with a tokenizer that needs few tokens."""
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model("Llama")
    model.config.max_position_embeddings = 512
    model.save_pretrained(folder)
    tiny_tokenizer(bos=True).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("name", "task", "metadata"),
    [
        ("survey_keen", "laai_survey_keen", {}),
        ("opinionqa_moderate", "laai_opinionqa_moderate", {}),
        ("opinionqa_group:SEX=Female", "laai_opinionqa_group", {"attribute": "SEX", "group": "Female"}),
    ],
)
def test_train_then_evaluate(name, task, metadata, model, panel, tmp_path, capsys):
    line = ["train", "--model", model, "--task", name, "--data", panel, "--l1", "0", "--group", "0", "--steps", "15"]
    assert cli.main([*map(str, line), "--output", f"{tmp_path}/", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["task_loss"] < facts["task_loss_before"]
    vector = laai.Intervention.load(tmp_path / f"{task}.safetensors")
    assert vector.metadata["task"] == f"laai_{name}"
    assert (vector.metadata["training"]["loss"], vector.metadata["training"]["epsilon"]) == ("kl", 1e-4)

    lm = HFLaai(pretrained=model, intervention=str(tmp_path), batch_size=8, max_length=512, device="cpu")
    manager = TaskManager(
        include_path=str(include_path()), include_defaults=False, metadata={**metadata, "data": str(panel)}
    )
    result = simple_evaluate(model=lm, tasks=[task], task_manager=manager, limit=6, log_samples=False)
    examples = load_task(name, data=panel).test[:6]
    (losses,) = task_losses(lm.model, lm.tokenizer, [(vector, examples)])
    assert result["results"][task]["kl,none"] == pytest.approx(sum(losses) / 6, abs=1e-4)


def test_wasserstein_is_over_questions_whose_options_have_an_order(panel):
    lm = Scripted(None)
    lm.loglikelihood = lambda requests, disable_tqdm=False: [(-1.0, False) for _ in requests]
    manager = TaskManager(include_path=str(include_path()), include_defaults=False, metadata={"data": str(panel)})
    result = simple_evaluate(model=lm, tasks=["laai_opinionqa_moderate"], task_manager=manager, log_samples=False)
    distances = []
    test = [o for o in load_opinions("opinionqa_moderate", panel)[0] if not in_training_pool(o.question.key)]
    for positions, shares in ((o.question.positions, o.distribution) for o in test):
        if len(positions) > 2:  # the fixture's options without order are two
            uniform = np.full(len(shares), 1 / len(shares))
            span = max(positions) - min(positions)
            distances.append(wasserstein_distance(positions, positions, uniform, shares) / span)
    found = result["results"]["laai_opinionqa_moderate"]
    assert len(distances) < len(test) == found["sample_len"]
    assert found["wasserstein,none"] == pytest.approx(np.mean(distances))
    assert found["wasserstein_stderr,none"] == pytest.approx(np.std(distances, ddof=1) / len(distances) ** 0.5)


# The answers that need no model, which benchmarks/opinion.py shows beside it


def test_references_of_the_benchmark(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    opinion = importlib.import_module("opinion")
    split = load_task("survey_keen", n_train=20)
    constants = opinion.best_constants(split.train)
    assert set(constants) == {3, 4, 5}

    def mean_divergence(q, examples):
        smooth = [(1 - 1e-4) * np.array(e.distribution) + 1e-4 / len(e.distribution) for e in examples]
        return np.mean([entropy(q, pi) for pi in smooth])

    for count, q in constants.items():
        examples = [example for example in split.train if len(example.options) == count]
        best = minimize(lambda logits, e=examples: mean_divergence(softmax(logits), e), np.zeros(count))
        assert best.fun == pytest.approx(mean_divergence(q, examples), abs=1e-6)
        assert softmax(best.x) == pytest.approx(q, abs=1e-2)
    some = [example for example in split.test if len(example.options) == 4]
    assert opinion.divergence(some, constants) == pytest.approx(mean_divergence(constants[4], some))
    assert opinion.divergence(some, {3: [1, 0, 0]}) == pytest.approx(mean_divergence([1 / 4] * 4, some))  # unseen K
