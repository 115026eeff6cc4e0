"""The word tasks: reading, composing, splitting, and what is said about bad input."""

import hashlib
import json
import random
import unicodedata

import numpy as np
import pytest

from laai_core.data import in_training_pool, load_pairs, load_task, task_names
from laai_core.errors import LaaiError
from laai_core.example import Example

RULES = ["antonym", "synonym", "en_fr", "en_de"]
COMPOSITIONS = ["en_fr_antonym", "en_de_antonym", "en_fr_synonym", "en_de_synonym"]
FILES = {
    "antonym": "antonym.json",
    "synonym": "synonym.json",
    "en_fr": "english-french.json",
    "en_de": "english-german.json",
}


def slow_pool(text):
    """The pool rule, written down a second time."""
    digest = hashlib.sha256(unicodedata.normalize("NFC", text.strip()).encode("utf-8")).hexdigest()
    return int(digest[:8], 16) % 10 < 3


def write_set(folder, rule, pairs):
    folder.mkdir(exist_ok=True)
    records = [{"input": a, "output": b} for a, b in pairs]
    (folder / FILES[rule]).write_text(json.dumps(records), encoding="utf-8")
    return folder


def word_of(example):
    return example.prompt.removeprefix("Q: ").removesuffix("\nA:")


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", RULES + COMPOSITIONS)
@pytest.mark.parametrize("prefix", ["", "lexicon_"])
def test_no_seed_ever_sees_a_test_item(name, prefix, public_data):
    pairs = dict(load_pairs(prefix + name, public_data)[0])
    tests = {tuple(load_task(prefix + name, seed, 10, public_data).test) for seed in range(5)}
    assert len(tests) == 1  # the test items do not depend on the seed
    test_words = [word_of(example) for example in next(iter(tests))]
    assert test_words == [word for word in pairs if not slow_pool(word)]  # in file order
    for seed in range(5):
        train = load_task(prefix + name, seed, 10, public_data).train
        words = [word_of(example) for example in train]
        assert len(set(words)) == 10 and all(slow_pool(word) for word in words)
        assert words == random.Random(seed).sample(sorted(word for word in pairs if slow_pool(word)), 10)
        assert [example.target for example in train] == [" " + pairs[word] for word in words]


def test_compositions_agree_with_a_slow_join(public_data):
    for name, first, second in [
        ("en_fr_antonym", "antonym", "en_fr"),
        ("en_de_antonym", "antonym", "en_de"),
        ("en_fr_synonym", "synonym", "en_fr"),
        ("en_de_synonym", "synonym", "en_de"),
    ]:
        folder = public_data / "function_vectors"
        records = [json.loads((folder / FILES[rule]).read_text(encoding="utf-8")) for rule in (first, second)]
        expected = []
        for step in records[0]:
            found = [r["output"].strip() for r in records[1] if r["input"].strip() == step["output"].strip()]
            expected += [(step["input"].strip(), found[0])] if found else []
        pairs, sources = load_pairs(name, public_data)
        assert [tuple(pair) for pair in pairs] == expected
        assert list(sources) == [FILES[first], FILES[second]]


def test_public_targets_are_stripped_and_several_words_kept(public_data):
    targets = dict(load_pairs("en_de", public_data)[0])
    assert targets["brick"] == "ziegel"  # ends in a line break in the file
    several = sum(len(b.split()) > 1 for rule in RULES for _, b in load_pairs(rule, public_data)[0])
    assert several == 220


def test_a_folder_that_is_the_set_folder_already_is_taken(public_data):
    assert load_task("antonym", data=public_data) == load_task("antonym", data=public_data / "function_vectors")


def test_sources_are_the_files_sums(tmp_path):
    pairs = [(f"word{n}", f"answer{n}") for n in range(100)]
    write_set(tmp_path, "antonym", pairs)
    split = load_task("antonym", data=tmp_path, n_train=3)
    assert split.sources == {"antonym.json": hashlib.sha256((tmp_path / "antonym.json").read_bytes()).hexdigest()}
    assert (split.name, split.seed, len(split.train)) == ("antonym", 0, 3)


def test_environment_variable(tmp_path, monkeypatch):
    write_set(tmp_path, "antonym", [(f"word{n}", "x") for n in range(100)])
    monkeypatch.setenv("LAAI_DATA", str(tmp_path))
    assert load_task("antonym").test


def test_a_repeated_input_is_one_item(tmp_path):
    pairs = [(f"word{n % 50}", f"answer{n}") for n in range(100)]
    decomposed = [("caf\u00e9", "one"), (" cafe\u0301 ", "two")]  # one word, written in two ways
    write_set(tmp_path, "antonym", pairs + decomposed)
    assert [tuple(p) for p in load_pairs("antonym", tmp_path)[0]] == pairs[:50] + [("caf\u00e9", "one")]


def test_join_drops_what_has_no_translation(tmp_path):
    write_set(tmp_path, "antonym", [("hot", "cold"), ("up", "down"), ("wet", "dry")])
    write_set(tmp_path, "en_fr", [("dry", "sec"), ("cold", "froid"), ("cold", "glacial")])
    assert [tuple(p) for p in load_pairs("en_fr_antonym", tmp_path)[0]] == [("hot", "froid"), ("wet", "sec")]


def test_join_of_nothing_is_refused(tmp_path):
    write_set(tmp_path, "antonym", [("hot", "cold")])
    write_set(tmp_path, "en_fr", [("dry", "sec")])
    with pytest.raises(LaaiError, match="no output of the first set is an input of the second"):
        load_pairs("en_fr_antonym", tmp_path)


@pytest.mark.parametrize("n_train", [0, -1, 1000, 2.0, True])
def test_n_train_outside_the_pool(n_train):
    with pytest.raises(LaaiError) as error:
        load_task("lexicon_antonym", n_train=n_train)
    pool = sum(slow_pool(pair.input) for pair in load_pairs("lexicon_antonym")[0])
    assert f"n_train is {n_train}" in one_line(error) and f"1 to {pool}" in one_line(error)


def test_the_whole_pool_can_be_drawn():
    pool = sum(in_training_pool(pair.input) for pair in load_pairs("lexicon_en_fr")[0])
    assert len(load_task("lexicon_en_fr", n_train=pool).train) == pool


def test_unknown_task_lists_what_exists():
    with pytest.raises(LaaiError) as error:
        load_task("lexicon_antonyms")
    assert "did you mean lexicon_antonym" in one_line(error)
    assert all(name in one_line(error) for name in task_names())


def test_missing_file_names_it_and_both_ways_to_get_it(tmp_path):
    with pytest.raises(LaaiError) as error:
        load_task("en_fr", data=tmp_path / "nowhere")
    text = one_line(error)
    assert "english-french.json" in text and "laai data fetch" in text and "--data" in text and "LAAI_DATA" in text


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "not valid JSON"),
        (b"[{]", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'[{"input": "caf\xe9"}]', "not UTF-8 at byte"),
        (b'{"input": "a", "output": "b"}', "holds a JSON dict"),
        (b"[]", "the list is empty"),
        (b'[{"input": "a", "output": "b"}, ["c", "d"]]', "record 2 is a list"),
        (b'[{"input": "a", "output": "b"}, {"input": "c"}]', 'record 2 has no "output"'),
        (b'[{"input": "a", "output": 3}]', "record 1: output is a int"),
        (b'[{"input": "a", "output": null}]', "record 1: output is a NoneType"),
        (b'[{"input": " ", "output": "b"}]', "record 1: input is empty"),
        (b'[{"input": "a", "output": "\\n"}]', "record 1: output is empty"),
        (b'[{"input": "a", "output": "b\\nc"}]', "line break inside"),
        (b'[{"input": "\\ud800", "output": "b"}]', "not valid Unicode"),
    ],
)
def test_malformed_file(tmp_path, content, expected):
    (tmp_path / "antonym.json").write_bytes(content)
    with pytest.raises(LaaiError) as error:
        load_task("antonym", data=tmp_path)
    assert expected in one_line(error) and str(tmp_path / "antonym.json") in one_line(error)


def test_example_of_a_distribution():
    example = Example("Question?\nAnswer:", options=[" A", " B"], distribution=[0.7, 0.3])
    assert (example.options, example.distribution) == ((" A", " B"), (0.7, 0.3))
    assert hash(example) == hash(Example("Question?\nAnswer:", None, [" A", " B"], [0.7, 0.3]))
    assert example == Example("Question?\nAnswer:", None, (f" {c}" for c in "AB"), np.array([0.7, 0.3]))


@pytest.mark.parametrize(
    "arguments",
    [
        dict(prompt="", target=" x"),
        dict(prompt="Q"),
        dict(prompt="Q", target=" "),
        dict(prompt="Q", target=" x", options=[" A", " B"], distribution=[1, 0]),
        dict(prompt="Q", options=[" A", " B"]),
        dict(prompt="Q", options=[" A"], distribution=[1]),
        dict(prompt="Q", options="AB", distribution=[1, 0]),
        dict(prompt="Q", options=7, distribution=[1, 0]),
        dict(prompt="Q", options={" A", " B"}, distribution=[1, 0]),
        dict(prompt="Q", options={" A": 1, " B": 0}, distribution=[1, 0]),
        dict(prompt="Q", options=[" A", " A"], distribution=[1, 0]),
        dict(prompt="Q", options=[" A", " B"], distribution=[1]),
        dict(prompt="Q", options=[" A", " B"], distribution=0.5),
        dict(prompt="Q", options=[" A", " B"], distribution=np.array(0.5)),
        dict(prompt="Q", options=[" A", " B"], distribution="10"),
        dict(prompt="Q", options=[" A", " B"], distribution=[1.5, -0.5]),
        dict(prompt="Q", options=[" A", " B"], distribution=[10**400, 0]),
        dict(prompt="Q", options=[" A", " B"], distribution=[float("nan"), 0]),
        dict(prompt="Q", options=[" A", " B"], distribution=["a", "b"]),
        dict(prompt="Q", options=[" A", " B"], distribution=[0.5, 0.4]),
    ],
)
def test_examples_that_make_no_sense(arguments):
    with pytest.raises(LaaiError) as error:
        Example(**arguments)
    assert "expected" in one_line(error)


def test_few_shot_prompt():
    shots = [Example("Q: hot\nA:", " cold"), Example("Q: up\nA:", " down")]
    assert Example("Q: wet\nA:", " dry").behind(shots) == "Q: hot\nA: cold\n\nQ: up\nA: down\n\nQ: wet\nA:"
    survey = Example("Q: why\nA:", options=[" A", " B", " C"], distribution=[0.2, 0.5, 0.3])
    assert Example("Q: who\nA:", " I").behind([survey]) == "Q: why\nA: B\n\nQ: who\nA:"
