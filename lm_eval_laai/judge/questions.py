"""The judge's question about a pair, and the parsing of its answer."""

from __future__ import annotations

import re

from laai_core.data.rules import WORD_RULES, rule_named
from laai_core.errors import LaaiError

QUERIES = 5  # a pair: the paper's
NEEDED = 3  # yes answers: "more than twice"

_INSTRUCTION = "Answer 0 if what I say is wrong and 1 if it is correct. "
# The first word, bare or in quotes, brackets or emphasis; "0.5", "1/2" and "10" are no verdicts.
_VERDICT = re.compile(r"""[\s"'`*(\[]*([01])(?![.,/]?\w)""")


def task_named(name: str) -> str:
    """The task of a question, from any of its names: `laai_lexicon_antonym` is judged as `antonym`.

    Raises:
        LaaiError: for a task without a question.
    """
    task = rule_named(name)
    if task not in WORD_RULES:
        raise LaaiError(f"no question for task {name!r}; expected one of {', '.join(WORD_RULES)}")
    return task


def question(task: str, word: str, prediction: str) -> str:
    """The one string the judge gets."""
    text = _INSTRUCTION + WORD_RULES[task].claim.format(input=word, prediction=prediction)
    return text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate could not be sent


def read_answer(text: str) -> bool | None:
    """Yes, no, or None for an answer that is neither 0 nor 1."""
    found = _VERDICT.match(text)
    return None if found is None else found[1] == "1"
