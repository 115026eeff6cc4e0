"""The tasks by name: word rules and their compositions, over the public sets and over the bundled lexicon; opinions of
groups of people, from OpinionQA and from the bundled survey.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from laai_core.data.examples import DEFAULT_TEMPLATE, OwnData, read_examples
from laai_core.data.lexicon import LEXICON, lexicon_pairs
from laai_core.data.opinion import Opinion
from laai_core.data.opinionqa import load_opinionqa
from laai_core.data.pairs import WordPair, find_set, join_pairs, pairs_file, read_pairs, word_set_names
from laai_core.data.rules import COMPOSITIONS, LEXICON_PREFIX, RULES, WORD_RULES
from laai_core.data.split import Split, split_items
from laai_core.data.survey import TENDENCIES, survey_opinions
from laai_core.errors import LaaiError
from laai_core.example import Example

# the paper's groups of OpinionQA -> (attribute, group)
OPINIONQA = {
    "opinionqa_income_100k_or_more": ("INCOME", "$100,000 or more"),
    "opinionqa_income_less_than_30k": ("INCOME", "Less than $30,000"),
    "opinionqa_moderate": ("POLIDEOLOGY", "Moderate"),
    "opinionqa_northeast": ("CREGION", "Northeast"),
}
# Any file of word pairs: `pairs:FILE.json`. The part before the colon is the harness's task.
PAIRS = "pairs"
# Any file of rows, with targets: `examples:FILE.jsonl`; with options and distributions: `example_options:FILE.jsonl`.
EXAMPLES, EXAMPLE_OPTIONS = "examples", "example_options"
# Any group of OpinionQA: `opinionqa_group:SEX=Female`.
OPINIONQA_GROUP = "opinionqa_group"
SURVEY_PREFIX = "survey_"


def task_names() -> list[str]:
    """Every name `load_task` takes: word tasks, then opinion tasks.

    To `pairs`, `examples` and `example_options` :FILE is added, to `opinionqa_group` :ATTRIBUTE=GROUP.
    """
    return [*word_task_names(), *opinion_task_names(), EXAMPLES, EXAMPLE_OPTIONS]


def word_task_names() -> list[str]:
    """The public sets' tasks first, then the lexicon's, then `pairs`."""
    public = list(WORD_RULES)
    return public + [LEXICON_PREFIX + name for name in public] + [PAIRS]


def opinion_task_names() -> list[str]:
    """OpinionQA's tasks, then the survey's."""
    return [*OPINIONQA, OPINIONQA_GROUP, *(SURVEY_PREFIX + group for group in TENDENCIES)]


def opinionqa_group(attribute: str, group: str) -> str:
    """The name of the task of any group of OpinionQA."""
    return f"{OPINIONQA_GROUP}:{attribute}={group}"


def load_pairs(name: str, data: str | os.PathLike[str] | None = None) -> tuple[list[WordPair], dict[str, str]]:
    """A task's word pairs in file order, one per input, and {file name: SHA-256} of the files read.

    `data` is the folder of the public sets (default $LAAI_DATA); the lexicon's tasks need none.
    Raises LaaiError for a name that is no word task's, and for a file that is missing or malformed.
    """
    kind, _, file = name.partition(":")
    if kind == PAIRS:
        return _pairs_of_file(file)
    if name not in word_task_names():
        raise _unknown(name, word_task_names())
    base = name.removeprefix(LEXICON_PREFIX)
    over_lexicon = base != name
    sources: dict[str, str] = {}

    def rule_pairs(rule: str) -> list[WordPair]:
        file_name, column = RULES[rule].file, RULES[rule].column
        if over_lexicon:
            pairs, sources[LEXICON.name] = lexicon_pairs(column)
        else:
            pairs, sources[file_name] = read_pairs(find_set(file_name, data))
        return pairs

    if base in RULES:
        return rule_pairs(base), sources
    first, second = COMPOSITIONS[base].parts
    joined = join_pairs(rule_pairs(first), rule_pairs(second))
    if not joined:
        files = " and ".join(sources)
        raise LaaiError(f"task {name}: no output of the first set is an input of the second ({files}); expected some")
    return joined, sources


def _pairs_of_file(name: str) -> tuple[list[WordPair], dict[str, str]]:
    if not name:
        bundled = ", ".join(f"{PAIRS}:{known}" for known in word_set_names())
        raise LaaiError(f"task {PAIRS!r} names no file; expected {PAIRS}:FILE.json, or a bundled set: {bundled}")
    path = pairs_file(name)
    pairs, digest = read_pairs(path)
    return pairs, {path.name: digest}


def examples_task(data: OwnData, path: os.PathLike[str]) -> str:
    """The task name of a file of own data."""
    return f"{EXAMPLE_OPTIONS if data.has_options else EXAMPLES}:{os.fspath(path)}"


def own_rows(kind: str, file: str, prompt_template: str | None = None) -> OwnData:
    """The rows of `examples:FILE` or `example_options:FILE`. Errors of `read_examples`, or for the other kind."""
    if not file:
        raise LaaiError(f"task {kind!r} names no file; expected {kind}:FILE.jsonl")
    data = read_examples(file, prompt_template)
    if data.has_options != (kind == EXAMPLE_OPTIONS):
        raise LaaiError(f"task {kind}:{file}: the file's rows are of the task {examples_task(data, Path(file))}")
    # Without the folder, which means nothing on another machine and would give equal trainings different bytes.
    return data._replace(name=f"{kind}:{Path(file).name}")


def rule_prompt(word: str) -> str:
    """The prompt of every word task."""
    return DEFAULT_TEMPLATE.replace("{input}", word)


def load_opinions(name: str, data: str | os.PathLike[str] | None = None) -> tuple[list[Opinion], dict[str, str]]:
    """An opinion task's questions with the group's answers, and {file: SHA-256} of the files read.

    Raises LaaiError for a name that is no opinion task's, and for data that is missing or malformed.
    """
    base, _, rest = name.partition(":")
    if name.startswith(SURVEY_PREFIX) and name.removeprefix(SURVEY_PREFIX) in TENDENCIES:
        return survey_opinions(name.removeprefix(SURVEY_PREFIX)), {}
    if name in OPINIONQA:
        return load_opinionqa(*OPINIONQA[name], data)
    if base != OPINIONQA_GROUP:
        raise _unknown(name, opinion_task_names())
    attribute, equals, group = rest.partition("=")
    if not (attribute and equals and group):
        raise LaaiError(f"task {name!r}: expected an attribute and a group, as in {opinionqa_group('SEX', 'Female')}")
    return load_opinionqa(attribute, group, data)


def split_opinions(
    name: str, seed: int = 0, n_train: int = 10, data: str | os.PathLike[str] | None = None
) -> tuple[list[Opinion], list[Opinion], dict[str, str]]:
    """The opinions to train on, the opinions to test on, and {file: SHA-256}; arguments and errors of `load_task`."""
    opinions, sources = load_opinions(name, data)
    return *split_items(opinions, lambda opinion: opinion.question.key, seed, n_train, name), sources


def load_task(name: str, seed: int = 0, n_train: int = 10, data: str | os.PathLike[str] | None = None) -> Split:
    """The named task's split: `n_train` examples drawn by `seed` from the training pool, and all test examples.

    `pairs:FILE.json` is a word task of the file's pairs, or of a bundled set's; its split is called `pairs:` and the
    file's name without its folder. Word tasks: prompts `Q: {input}\\nA:` and targets ` {output}`. Opinion tasks:
    `Question: ...\\nA. ...\\nAnswer:`, options ` A`, ` B`, ... and the group's distribution. The harness's
    few-shot examples are those of `train`, in that order.
    Raises LaaiError for an unknown name, missing or malformed data, or an n_train outside 1..pool.
    """
    kind, _, file = str(name).partition(":")
    if kind in opinion_task_names():
        opinions = split_opinions(name, seed, n_train, data)
        train, test = ([opinion.example() for opinion in part] for part in opinions[:2])
        return Split(train, test, name, seed, opinions[2])
    if kind in (EXAMPLES, EXAMPLE_OPTIONS):
        return own_rows(kind, file).split(seed, n_train)
    if kind != PAIRS and name not in word_task_names():
        raise _unknown(name, task_names())
    pairs, sources = load_pairs(name, data)
    if kind == PAIRS:
        # Without the folder, as in `own_rows`.
        name = f"{PAIRS}:{pairs_file(file).name}"
    drawn, others = split_items(pairs, lambda pair: pair.input, seed, n_train, name)

    def example(pair: WordPair) -> Example:
        return Example(prompt=rule_prompt(pair.input), target=f" {pair.output}")

    return Split([example(p) for p in drawn], [example(p) for p in others], name, seed, sources)


def _unknown(name: str, known: list[str]) -> LaaiError:
    close = difflib.get_close_matches(str(name), known, n=3)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return LaaiError(f"no task named {name!r}; {hint}expected one of {', '.join(known)}")
