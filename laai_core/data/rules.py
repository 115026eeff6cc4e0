"""The word rules and their compositions: one table of where each is found and how each is named and described."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """A word rule, or a composition of two.

    Args:
        title: in the paper's tables.
        description: the rule in words, from which a soft prompt starts. The French one is the paper's.
        claim: the judge's question about an `input` and a `prediction`. The paper's, verbatim, for the four rules; the
            paper judges compositions too without giving the wording, so these follow the wording of the rules.
        file: of the public set; a composition has none.
        column: of the bundled lexicon; a composition has none.
        parts: of a composition: the rule applied first, the rule applied to its result.
    """

    title: str
    description: str
    claim: str
    file: str = ""
    column: str = ""
    parts: tuple[str, ...] = ()


RULES = {
    "antonym": Rule(
        "Antonym",
        "the antonym of this word",
        '"{input}" is an antonym of "{prediction}".',
        file="antonym.json",
        column="antonym",
    ),
    "synonym": Rule(
        "Synonym",
        "the synonym of this word",
        '"{input}" is a synonym of "{prediction}".',
        file="synonym.json",
        column="synonym",
    ),
    "en_fr": Rule(
        "Eng-Fr",
        "the French translation of this word",
        '"{input}" translated to French is "{prediction}".',
        file="english-french.json",
        column="french",
    ),
    "en_de": Rule(
        "Eng-Ger",
        "the German translation of this word",
        '"{input}" translated to German is "{prediction}".',
        file="english-german.json",
        column="german",
    ),
}
COMPOSITIONS = {
    "en_fr_antonym": Rule(
        "Eng-Fr Antonym",
        "the French translation of the antonym of this word",
        'An antonym of "{input}" translated to French is "{prediction}".',
        parts=("antonym", "en_fr"),
    ),
    "en_de_antonym": Rule(
        "Eng-Ger Antonym",
        "the German translation of the antonym of this word",
        'An antonym of "{input}" translated to German is "{prediction}".',
        parts=("antonym", "en_de"),
    ),
    "en_fr_synonym": Rule(
        "Eng-Fr Synonym",
        "the French translation of the synonym of this word",
        'A synonym of "{input}" translated to French is "{prediction}".',
        parts=("synonym", "en_fr"),
    ),
    "en_de_synonym": Rule(
        "Eng-Ger Synonym",
        "the German translation of the synonym of this word",
        'A synonym of "{input}" translated to German is "{prediction}".',
        parts=("synonym", "en_de"),
    ),
}
WORD_RULES = {**RULES, **COMPOSITIONS}
LEXICON_PREFIX = "lexicon_"  # of the tasks over the bundled lexicon


def rule_named(task: str) -> str:
    """The rule of a task, by any of its names, such as `laai_lexicon_antonym`; other names as they are."""
    return task.removeprefix("laai_").removeprefix(LEXICON_PREFIX)
