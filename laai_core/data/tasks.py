"""The tasks by name: four rules and four compositions, over the public sets and over the bundled lexicon."""

from __future__ import annotations

import difflib
import os

from laai_core.data.example import Example, Split
from laai_core.data.lexicon import LEXICON, lexicon_pairs
from laai_core.data.pairs import WordPair, find_set, join_pairs, read_pairs
from laai_core.data.split import split_items
from laai_core.errors import LaaiError

# rule -> (the authors' file, the lexicon's column)
RULES = {
    "antonym": ("antonym.json", "antonym"),
    "synonym": ("synonym.json", "synonym"),
    "en_fr": ("english-french.json", "french"),
    "en_de": ("english-german.json", "german"),
}
# composition -> (the rule applied first, the rule applied to its result)
COMPOSITIONS = {
    "en_fr_antonym": ("antonym", "en_fr"),
    "en_de_antonym": ("antonym", "en_de"),
    "en_fr_synonym": ("synonym", "en_fr"),
    "en_de_synonym": ("synonym", "en_de"),
}
LEXICON_PREFIX = "lexicon_"


def task_names() -> list[str]:
    """Every name `load_task` takes: the public sets' tasks first, then the lexicon's."""
    public = [*RULES, *COMPOSITIONS]
    return public + [LEXICON_PREFIX + name for name in public]


def load_pairs(name: str, data: str | os.PathLike[str] | None = None) -> tuple[list[WordPair], dict[str, str]]:
    """A task's word pairs in file order, one per input, and {file name: SHA-256} of the files read.

    `data` is the folder of the public sets (default $LAAI_DATA); the lexicon's tasks need none.
    Raises LaaiError for an unknown name, and for a file that is missing or malformed.
    """
    if name not in task_names():
        close = difflib.get_close_matches(str(name), task_names(), n=3)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise LaaiError(f"no task named {name!r}; {hint}expected one of {', '.join(task_names())}")
    base = name.removeprefix(LEXICON_PREFIX)
    over_lexicon = base != name
    sources: dict[str, str] = {}

    def rule_pairs(rule: str) -> list[WordPair]:
        file_name, column = RULES[rule]
        if over_lexicon:
            pairs, sources[LEXICON.name] = lexicon_pairs(column)
        else:
            pairs, sources[file_name] = read_pairs(find_set(file_name, data))
        return pairs

    if base in RULES:
        return rule_pairs(base), sources
    first, second = COMPOSITIONS[base]
    joined = join_pairs(rule_pairs(first), rule_pairs(second))
    if not joined:
        files = " and ".join(sources)
        raise LaaiError(f"task {name}: no output of the first set is an input of the second ({files}); expected some")
    return joined, sources


def rule_prompt(word: str) -> str:
    """The prompt of every word task."""
    return f"Q: {word}\nA:"


def load_task(name: str, seed: int = 0, n_train: int = 10, data: str | os.PathLike[str] | None = None) -> Split:
    """The named task's split: `n_train` examples drawn by `seed` from the training pool, and all test examples.

    Prompts are `Q: {input}\\nA:` and targets ` {output}`. The same examples in `train`'s order are the few-shot ones.
    Raises LaaiError for an unknown name, missing or malformed data, or an n_train outside 1..pool.
    """
    pairs, sources = load_pairs(name, data)
    train, test = split_items(pairs, lambda pair: pair.input, seed, n_train, name)

    def example(pair: WordPair) -> Example:
        return Example(prompt=rule_prompt(pair.input), target=f" {pair.output}")

    return Split([example(p) for p in train], [example(p) for p in test], name, seed, sources)
