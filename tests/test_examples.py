"""Examples of one's own: rows in every format, their split, the task written of them, and the commands on them."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.tasks import TaskManager
from tiny import REFERENCE

import laai_core as laai
from laai_core.data.examples import as_lines, is_filled, read_examples
from laai_core.data.split import in_training_pool
from lm_eval_laai import own_task
from lm_eval_laai.commands import cli
from lm_eval_laai.commands.examples import read_rows
from lm_eval_laai.tasks import include_path

WORDS = [{"input": f"word{n}", "output": f"answer {n}"} for n in range(60)]
SHARES = [
    {"prompt": f"Is {n} big?", "options": [" yes", " no"], "distribution": [n / 60, 1 - n / 60]} for n in range(60)
]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my words.jsonl"
    path.write_text(lines(WORDS))
    return path


@pytest.fixture
def shares(tmp_path: Path) -> Path:
    path = tmp_path / "shares.jsonl"
    path.write_text(lines(SHARES))
    return path


def loaded(folder: Path, name: str, **metadata: Any) -> Any:
    return TaskManager(include_path=str(folder), include_defaults=False, metadata=metadata).load([name])["tasks"][name]


# Reading


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_every_format_gives_the_same_examples(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"words{suffix}"
    rows = [{"input": 'a "b", c', "output": "é"}, {"input": "d", "output": "e f"}]
    text = {
        ".jsonl": "\n" + lines(rows),
        ".json": json.dumps(rows),
        ".csv": 'input,output\r\n"a ""b"", c",é\r\nd,e f\r\n',
    }[suffix]
    path.write_text(text, encoding="utf-8")
    assert laai.load_examples(path) == [
        laai.Example('Q: a "b", c\nA:', " é"),
        laai.Example("Q: d\nA:", " e f"),
    ]


def test_kinds_of_rows_and_templates(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "p {x}", "target": "t\\n"}\n')
    assert laai.load_examples(path) == [laai.Example("p {x}", "t")]  # braces in a prompt are text
    path.write_text('{"a": "1", "b": "{a}", "target": "t"}\n')
    assert laai.load_examples(path, "{b}, {a}:") == [laai.Example("{a}, 1:", "t")]  # filled once
    path.write_text(lines(SHARES[:2]))
    assert laai.load_examples(path)[1] == laai.Example(
        "Is 1 big?", options=[" yes", " no"], distribution=[1 / 60, 59 / 60]
    )
    csv = tmp_path / "x.csv"
    csv.write_text('prompt,options,distribution\nq,"["" a"", "" b""]","[0.25, 0.75]"\n')
    assert laai.load_examples(csv) == [laai.Example("q", options=[" a", " b"], distribution=[0.25, 0.75])]


@pytest.mark.parametrize(("template", "stay"), [(None, "146"), ("{language}: {input} =", "1346"), ("{note}:", "156")])
def test_of_equal_prompts_the_first_stays(template: str | None, stay: str, tmp_path: Path, caplog: Any) -> None:
    """Whatever the input is; those that stay are the same in the file that is written of them."""
    path = tmp_path / "x.jsonl"
    table = [
        ("a", "fr", "x"),
        (" a ", "fr", "x"),
        ("a", "en", "x"),
        ("b", "fr", "x"),
        ("b", "fr", "y"),
        ("c", "fr", "z"),
    ]
    path.write_text(
        lines([{"input": i, "language": o, "note": n, "output": str(k)} for k, (i, o, n) in enumerate(table, 1)])
    )
    data = read_rows(str(path), template)
    assert [item.example.target for item in data.items] == [f" {number}" for number in stay]
    assert f"an earlier one has their prompt: {6 - len(stay)}" in caplog.text
    (tmp_path / "written.jsonl").write_bytes(as_lines(data))
    assert [item[:2] for item in read_examples(tmp_path / "written.jsonl").items] == [item[:2] for item in data.items]


def test_rows_of_one_input_and_several_prompts_are_on_one_side(tmp_path: Path) -> None:
    rows = [{"input": row["input"], "to": to, "output": "x"} for row in WORDS for to in ("fr", "en")]
    path = tmp_path / "x.jsonl"
    path.write_text(lines(rows))
    data = read_examples(path, "{input} {to}:")
    pool = sum(in_training_pool(row["input"]) for row in WORDS)
    split = data.split(0, 2 * pool)
    assert (len(split.train), len(split.test)) == (2 * pool, 120 - 2 * pool)
    assert not {e.prompt[:-4] for e in split.train} & {e.prompt[:-4] for e in split.test}
    own_task.write(data, tmp_path / "tasks")
    few = loaded(tmp_path / "tasks", "x", seed=1, n_train=5)
    assert [doc["prompt"] for doc in few.fewshot_docs()] == [e.prompt for e in data.split(1, 5).train]


def test_files_whose_names_differ_in_other_letters_are_other_tasks(tmp_path: Path) -> None:
    names = []
    for name in ("Wörter.csv", "Wärter.csv", "反义词.csv", "同义词.csv", "my words.csv", "!.csv"):
        (tmp_path / name).write_text("input,output\nhot,cold\n")
        names.append(read_examples(tmp_path / name).name)
    assert len(set(names)) == 6 and names[-2:] == ["my_words", "examples"]
    assert all(re.fullmatch("[A-Za-z0-9_-]+", name) for name in names)


@pytest.mark.parametrize("name", ["😀 words.csv", "caf\udce9.csv"])  # the second is no Unicode: a byte of Latin-1
def test_a_task_of_a_file_of_any_name(name: str, file: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text("input,output\n" + "\n".join(f"w{n},v{n}" for n in range(40)))
    own_task.write(read_examples(tmp_path / name), tmp_path / "tasks", name="mine")
    assert len(list(loaded(tmp_path / "tasks", "mine").test_docs())) > 20


def test_a_written_task_beside_one_that_needs_metadata_of_the_same_name(file: Path, tmp_path: Path) -> None:
    """The harness gives the metadata to all tasks, `file` of `laai_pairs` too."""
    own_task.write(read_examples(file), tmp_path, name="mine")
    written = tmp_path / "mine" / own_task.ROWS
    assert len(own_task.load_beside(written, **{"file": "words.json", "seed": 1})["test"]) > 30


@pytest.mark.parametrize("empty", ["", " ", None])
def test_an_empty_input_that_no_template_names_is_none(empty: Any, tmp_path: Path) -> None:
    """As most rows of Alpaca have it: the prompt then decides about the split."""
    path = tmp_path / "x.jsonl"
    path.write_text(lines([{"instruction": "Say a", "input": empty, "output": "a"}]))
    (item,) = read_examples(path, "{instruction}:").items
    assert (item.key, item.example) == ("Say a:", laai.Example("Say a:", " a"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl", None, "x.jsonl: cannot be read (No such file or directory)"),
        ("x.txt", "a", "expected a name that ends in .jsonl, .csv or .json"),
        ("x.jsonl", "\n\n", "x.jsonl has no row"),
        ("x.jsonl", '{"input": "a", "output": "b"}\n\n{"input": "a"\n', "x.jsonl: row 3: not valid JSON"),
        ("x.jsonl", '{"input": "a", "output": "b"}\n[1]\n', "x.jsonl: row 2 is a list"),
        ("x.jsonl", '{"output": "b"}\n', 'x.jsonl: row 1 has no "prompt" and no "input"'),
        ("x.jsonl", '{"input": "a"}\n', 'x.jsonl: row 1 has no "target", no "output" and no "options"'),
        ("x.jsonl", '{"input": "a", "output": 4}\n', 'x.jsonl: row 1: "output" is a int'),
        ("x.jsonl", '{"input": " ", "output": "b"}\n', 'x.jsonl: row 1: "input" is empty'),
        ("x.jsonl", '{"prompt": "a", "input": 4, "target": "b"}\n', 'x.jsonl: row 1: "input" is a int; expected'),
        ("x.jsonl", '{"input": "a", "output": "\\ud800"}\n', "is not valid Unicode"),
        ("x.jsonl", '{"prompt": "a", "options": ["b", "c"]}\n', 'row 1: "distribution" is missing'),
        (
            "x.jsonl",
            '{"prompt": "a", "options": ["b", "c"], "distribution": [1, 1]}\n',
            "row 1: Example with prompt 'a'",
        ),
        ("x.jsonl", lines([WORDS[0], SHARES[0]]), "x.jsonl: row 2 has options, but"),
        ("x.json", '{"input": "a"}', "holds a JSON dict"),
        ("x.json", '[{"input": "a", "output": "b"}, 3]', "x.json: row 2 is a int"),
        ("x.json", "[" * 100_000, "too deeply nested"),
        ("x.csv", "input,output\na,b\nc\n", "x.csv: row 3 has more or fewer cells"),
        ("x.csv", "\ninput,output\n\n\na,b,c\n", "x.csv: row 5 has more or fewer cells"),
        ("x.csv", "input,output,output\na,b,c\n", "x.csv: row 1 names a column twice"),
        ("x.csv", 'input,output\n"a\nb",c\nd,e,f\n', "x.csv: row 4 has more or fewer cells"),
        ("x.csv", 'input,output\n"a"b,c\n', "x.csv: row 2 is not valid CSV"),
        ("x.csv", "prompt,options,distribution\na,b,c\n", "x.csv: row 2: options: not valid JSON"),
        ("x.jsonl", b"\xff", "not UTF-8 at byte 0"),
    ],
)
def test_bad_rows(name: str, content: Any, said: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for command in (["train", "--model", "reference", "--examples", path], ["task", path]):
        line = refused(*command, "--output", f"{tmp_path}/out/")
        assert said in line and f"row 1: {path}" not in line
        assert not (tmp_path / "out").exists()
    assert said in refused("sweep", "--model", "reference", "--examples", path, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["source lang", "source-lang", "Sprache (von)", "1st", "über"])
def test_a_column_may_have_any_name_that_begins_with_a_letter(
    name: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(lines([{"input": "a", name: "b", "output": "c"}]))
    template = '{"json": {}} {' + name + "}: {input} ="
    assert laai.load_examples(path, template) == [laai.Example('{"json": {}} b: a =', " c")]
    assert is_filled("{" + name + "}: {input} =", "b: a =")
    said = refused("task", path, "--prompt-template", "{another lang}: {input}", "--output", tmp_path / "out")
    assert 'row 1 has no "another lang"; its columns are input, ' in said


def test_texts_that_a_template_makes() -> None:
    assert is_filled("Q: {input}\nA:", "Q: hot\nA:") and is_filled("{a} to {b}:", "hot to cold:")
    assert not is_filled("Q: {input}\nA:", "Say: hot\nA:") and not is_filled("Q: {input}\nA:", "Q: hot\nB:")
    assert is_filled("no column", "no column") and not is_filled("no column", "another")  # of a file, not of ours


@pytest.mark.parametrize(
    ("template", "said"), [("Q:", "names no column"), ("Q: {question}", 'row 1 has no "question"')]
)
def test_bad_templates(template: str, said: str, file: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert said in refused("task", file, "--prompt-template", template, "--output", tmp_path / "out")


# The split


def test_a_template_from_a_shell_has_line_breaks_and_tabs(file: Path, tmp_path: Path) -> None:
    line = ["task", str(file), "--prompt-template", r"Q: {input}\n\tA:", "--output", str(tmp_path / "out")]
    assert cli.main(line) == 0
    rows = (tmp_path / "out" / "my_words" / "examples.jsonl").read_text().splitlines()
    assert all(re.fullmatch(r"Q: \w+\n\tA:", json.loads(row)["prompt"]) for row in rows)


def test_the_split_does_not_move_when_rows_are_added(file: Path, tmp_path: Path) -> None:
    shuffled = [*WORDS, {"input": "new", "output": "row"}]
    random.Random(0).shuffle(shuffled)
    other = tmp_path / "other.jsonl"
    other.write_text(lines(shuffled))
    first, second = read_examples(file).split(0, 5), read_examples(other).split(0, 5)
    added = laai.Example("Q: new\nA:", " row")
    assert set(second.test) - {added} == set(first.test)
    assert all(in_training_pool(e.prompt.removeprefix("Q: ").removesuffix("\nA:")) for e in first.train)
    everything = read_examples(file).split(3, 60, train_on_all=True)
    assert (len(set(everything.train)), everything.test) == (60, [])


# The task


@pytest.mark.parametrize("shots", [0, 3])
def test_the_written_task_shows_the_same_prompts(shots: int, file: Path, shares: Path, tmp_path: Path) -> None:
    for path, name in ((file, "my_words"), (shares, "shares")):
        data = read_examples(path)
        own_task.write(data, tmp_path / "tasks")
        split = data.split(seed=2, n_train=4)
        task = loaded(tmp_path / "tasks", name, seed=2, n_train=4)
        docs = list(task.test_docs())
        assert len(docs) == len(split.test) > 30
        for doc, example in zip(docs, split.test, strict=True):
            assert task.fewshot_context(doc, shots) == example.behind(split.train[:shots])
            if example.options is not None:
                requests = task.construct_requests(doc, "", metadata=(name, 0, 1))
                assert tuple(request.args[1] for request in requests) == example.options
                assert tuple(doc["distribution"]) == example.distribution


def test_a_written_task_can_be_moved_and_is_valid(file: Path, tmp_path: Path) -> None:
    own_task.write(read_examples(file), tmp_path / "tasks", name="2024")  # a number to YAML, unless it is quoted
    own_task.write(read_examples(file), tmp_path / "tasks", name="mine")
    shutil.move(tmp_path / "tasks", tmp_path / "elsewhere")
    command = [sys.executable, "-m", "lm_eval", "validate", "--tasks", "mine", "--include_path", "elsewhere"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert said.returncode == 0 and "All tasks found and valid" in said.stdout, said.stderr
    assert len(list(loaded(tmp_path / "elsewhere", "mine").test_docs())) > 30


@pytest.mark.parametrize(
    ("rows", "flags", "said"),
    [
        (WORDS, ["--name", "a b"], "expected letters, digits, - and _"),
        (WORDS[:1], [], "none of the 1 rows is in the"),
        (
            [{"prompt": f"p{n}", "target": "a\nb" if n > 7 else "a"} for n in range(20)],
            [],
            "x.jsonl: row 9: target 'a\\nb' has a line break inside",
        ),
        (WORDS, ["--max-gen-toks", "0"], "max_gen_toks is 0"),
    ],
)
def test_what_cannot_be_a_task(rows: Any, flags: Any, said: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(lines(rows))
    assert said in refused("task", path, *flags, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_target_of_several_lines_is_no_harness_task(tmp_path: Path) -> None:
    """Exact match compares one line: the score of such a target would be zero whatever the model says."""
    path = tmp_path / "x.jsonl"
    path.write_text(lines([{"prompt": f"p{n}", "target": "a\nb" if n == 7 else "a"} for n in range(40)]))
    with pytest.raises(laai.LaaiError, match="examples:x.jsonl: target .* has a line break inside"):
        loaded(include_path(), "laai_examples", file=str(path))


@pytest.mark.parametrize("name", ["utils.py", "words.yaml", "examples.jsonl", "_word_task_yaml"])
def test_a_task_replaces_its_own_files_only(name: str, tmp_path: Path, refused: Callable[..., str], facts_of) -> None:
    source, folder = tmp_path / "words.jsonl", tmp_path / "words"
    source.write_text(lines(WORDS))
    folder.mkdir()
    (folder / name).write_text("mine\n")
    line = ["task", source, "--output", tmp_path]
    assert f"{folder / name} was not written by `laai task`" in refused(*line)
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [(name, "mine\n")]
    (folder / name).unlink()
    facts_of(*line)
    before = {path.name: path.read_text() for path in folder.iterdir()}
    assert len(before) == 4
    facts_of(*line)
    assert {path.name: path.read_text() for path in folder.iterdir()} == before
    rows = folder / "examples.jsonl"
    assert "is what this command reads" in refused("task", rows, "--name", "words", "--output", tmp_path)
    assert rows.read_text() == before["examples.jsonl"]


def test_tokens_to_generate_are_told(
    file: Path, shares: Path, tmp_path: Path, caplog: Any, facts_of: Callable[..., dict[str, Any]]
) -> None:
    def told(path: Path, *flags: object) -> Any:
        caplog.clear()
        return facts_of("task", path, *flags, "--output", tmp_path).get("max_gen_toks")

    long = tmp_path / "long.jsonl"
    long.write_text(lines([*WORDS, {"input": "new", "output": "é" * 500}]))
    assert (told(file), told(shares), caplog.text) == (16, None, "")
    assert told(long) == 1001 and "max_gen_toks is 1001" in caplog.text  # with the space before it
    assert loaded(tmp_path, "long").config.generation_kwargs["max_gen_toks"] == 1001
    assert (told(long, "--max-gen-toks", 256), caplog.text) == (256, "")


def test_a_name_too_long_for_a_file(file: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "File name too long" in refused("task", file, "--name", "a" * 300, "--output", tmp_path)


# The commands


def test_train_by_file_and_by_standard_input(
    file: Path, small: Path, tmp_path: Path, facts_of: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = [
        "train",
        "--model",
        small,
        "--layer",
        1,
        "--steps",
        2,
        "--l1",
        0,
        "--group",
        0,
        "--n-train",
        4,
        "--stop",
        r";\n",
    ]
    facts = facts_of(*line, "--examples", file, "--output", f"{tmp_path}/out/")
    made = laai.Intervention.load(tmp_path / "out" / "my_words.safetensors")
    assert facts["task"] == made.metadata["task"] == "my_words"
    training = made.metadata["training"]
    assert training["rendering"] == {"prompt_template": "Q: {input}\nA:"} and training["stop"] == ";\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(file.read_bytes())))
    facts_of(*line, "--examples", "-", "--output", tmp_path / "piped.safetensors")
    assert torch.equal(laai.Intervention.load(tmp_path / "piped.safetensors").vector(1), made.vector(1))


def test_a_task_without_rendering_says_nothing_of_it(
    small: Path, tmp_path: Path, facts_of: Callable[..., dict[str, Any]]
) -> None:
    path = tmp_path / "x.safetensors"
    facts_of("train", "--model", small, "--task", "lexicon_antonym", "--layer", 1, "--steps", 2, "--output", path)
    assert "rendering" not in laai.Intervention.load(path).metadata["training"]


def test_a_position_is_trained_and_kept(
    small: Path, file: Path, tmp_path: Path, facts_of: Callable[..., dict[str, Any]]
) -> None:
    """At the prompt's last token alone, or at the target's tokens too: other vectors, and other objectives."""
    found = {}
    for position in ("last", "generated", "all"):
        path = tmp_path / f"{position}.safetensors"
        line = ["train", "--model", small, "--examples", file, "--layer", 1, "--steps", 3, "--l1", 0, "--group", 0]
        facts = facts_of(*line, "--start", "zero", "--position", position, "--site", "residual", "--output", path)
        made = laai.Intervention.load(path)
        assert (made.position, made.site) == (position, "residual")
        found[position] = facts["objective"]
    assert len(set(found.values())) == 3


def test_sweep_and_compose(
    file: Path, shares: Path, small: Path, tmp_path: Path, facts_of: Callable[..., dict[str, Any]]
) -> None:
    line = [
        "sweep",
        "--model",
        small,
        "--layers",
        1,
        "--seeds",
        1,
        "--l1",
        0,
        "--group",
        0,
        "--n-train",
        4,
        "--limit",
        4,
    ]
    kept = file.read_bytes(), shares.read_bytes()
    for path, metric in ((file, "exact_match"), (shares, "kl"), (shares, "kl")):
        facts = facts_of(*line, "--examples", path, "--output", tmp_path)
        (record,) = facts["scores"]
        assert record["metric"] == metric and record["mean"] is not None
    assert (file.read_bytes(), shares.read_bytes()) == kept  # the rows' copies are none of the user's files
    assert len(list((tmp_path / "rows").rglob("*.jsonl"))) == len(list((tmp_path / "cells").iterdir())) == 2
    parents = [tmp_path / f"{n}.safetensors" for n in range(2)]
    for seed, parent in enumerate(parents):
        flags = ["--layer", 1, "--steps", 2, "--n-train", 4, "--seed", seed, "--output", parent]
        facts_of("train", "--model", small, "--examples", file, *flags)
    facts = facts_of(
        "compose", *parents, "--method", "fit", "--model", small, "--examples", file, "--n-train", 4,
        "-o", f"{tmp_path}/sum/",
    )  # fmt: skip
    assert facts["training"]["n_train"] == 4
    assert facts["file"] == str(tmp_path / "sum" / "my_words.safetensors")
    assert laai.Intervention.load(facts["file"]).metadata["task"] == "my_words"


def test_refusals(file: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    line = ["train", "--model", "reference", "--output", f"{tmp_path}/out/"]
    assert "expected one of --task, --examples and --harness-task, got none" in refused(*line)
    assert "got --task and --examples" in refused(*line, "--task", "antonym", "--examples", file)
    assert "--loss does not go with --examples" in refused(*line, "--examples", file, "--loss", "kl")
    for command in (line, ["sweep", *line[1:]]):
        assert "--data does not go with --examples" in refused(*command, "--examples", file, "--data", tmp_path)
    assert "has the stop string 'swe' inside" in refused(*line, "--task", f"examples:{file}", "--stop", "swe")
    assert "expected --examples with it" in refused(*line, "--task", "lexicon_antonym", "--prompt-template", "{a}")
    assert "has the stop string 'w' inside" not in refused(*line, "--examples", file, "--stop", "swe", "--n-train", 99)
    assert "has the stop string 'swe' inside" in refused(*line, "--examples", file, "--stop", "swe")
    assert "trains on --task and --examples" in refused(
        *line, "--method", "icv", "--examples", file, "--system-instruction", "x"
    )
    assert not (tmp_path / "out").exists()


def test_generate(file: Path, tmp_path: Path, capfd: Any, facts_of: Callable[..., dict[str, Any]]) -> None:
    """It puts words into the recorded template, one column a scale."""
    path = tmp_path / "v.safetensors"
    flags = ["--layer", 3, "--steps", 2, "--output", path]
    facts_of("train", "--model", REFERENCE, "--task", "lexicon_antonym", *flags)
    facts = facts_of("generate", "--model", REFERENCE, "--intervention", path, "hot", "big", "--scale", "0,1,2")
    assert [a["prompt"] for a in facts["answers"]] == ["Q: hot\nA:", "Q: big\nA:"]
    assert facts["answers"][0]["by_scale"]["1"] == "cold" != facts["answers"][0]["by_scale"]["0"]
    assert set(facts["answers"][0]["by_scale"]) == {"0", "1", "2"}
    raw = facts_of("generate", "--model", REFERENCE, "--intervention", path, "Q: hot\nA:", "--raw")
    assert raw["answers"][0]["by_scale"]["1"] == "cold"
    assert cli.main(["generate", "--model", str(REFERENCE), "--intervention", str(path), "hot"]) == 0
    out = capfd.readouterr().out.splitlines()
    assert out[0].split() == ["without", "Δ", "with", "Δ"] and out[1].split()[-1] == "cold"
    # A sum of vectors of word tasks gets these tasks' template, whatever its own task is called.
    facts_of("compose", path, path, "-o", tmp_path / "sum.safetensors")
    summed = facts_of("generate", "--model", REFERENCE, "--intervention", tmp_path / "sum.safetensors", "hot")
    assert summed["answers"][0]["prompt"] == "Q: hot\nA:"


def test_generate_under_a_sum_of_vectors_of_own_rows(
    file: Path, small: Path, tmp_path: Path, capfd: Any, facts_of: Callable[..., dict[str, Any]]
) -> None:
    """The template on which the parents agree; without one the word as it is, and a line that says so."""
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("a", "b", "other", "same", "mixed")}
    flags = ["--layer", 1, "--steps", 2, "--n-train", 4]
    for seed, name in enumerate(("a", "b", "other")):
        template = ["--prompt-template", "{input} is"] if name == "other" else []
        line = ["train", "--model", small, "--examples", file, "--seed", seed, *template, *flags]
        facts_of(*line, "--output", paths[name])
    facts_of("compose", paths["a"], paths["b"], "-o", paths["same"])
    facts_of("compose", paths["a"], paths["other"], "-o", paths["mixed"])
    said = "the file records no prompt template: the texts are taken as they are\n"
    for name, prompt, more, told in (
        ("same", "Q: hot\nA:", [], False),
        ("mixed", "hot", [], True),
        ("mixed", "hot", ["--raw"], False),
    ):
        line = ["generate", "--model", str(small), "--intervention", str(paths[name]), "hot", "--json", *more]
        assert cli.main(line) == 0
        out, err = capfd.readouterr()
        assert json.loads(out)["answers"][0]["prompt"] == prompt and (said in err) == told


def test_few_rows_and_rows_that_were_all_trained_on(
    file: Path,
    small: Path,
    tmp_path: Path,
    refused: Callable[..., str],
    facts_of: Callable[..., dict[str, Any]],
    caplog,
) -> None:
    with pytest.raises(laai.LaaiError, match="n_train is '5'; expected a whole number"):
        read_examples(file).split(0, "5")
    few = tmp_path / "few.jsonl"
    few.write_text("".join(file.read_text().splitlines(keepends=True)[:10]))
    line = ["train", "--model", small, "--examples", few, "--layer", 1, "--steps", 1, "--output", f"{tmp_path}/v/"]
    said = refused(*line)
    assert "of the 10 rows are for training" in said and "--split all" in said
    facts_of(*line, "--split", "all")
    assert "a score on" in caplog.text and "would be of rows that were trained on" in caplog.text
