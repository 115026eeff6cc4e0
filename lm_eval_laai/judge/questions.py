"""What the judge is asked about a pair, and how its answer is read."""

from __future__ import annotations

import re

from laai_core.data.tasks import LEXICON_PREFIX
from laai_core.errors import LaaiError

QUERIES = 5  # a pair: the paper's
NEEDED = 3  # of them say yes: "more than twice"

_INSTRUCTION = "Answer 0 if what I say is wrong and 1 if it is correct. "
_CLAIMS = {
    # The paper's, to the letter.
    "antonym": '"{input}" is an antonym of "{prediction}".',
    "synonym": '"{input}" is a synonym of "{prediction}".',
    "en_fr": '"{input}" translated to French is "{prediction}".',
    "en_de": '"{input}" translated to German is "{prediction}".',
    # The paper judges compositions too and does not say with which words: these are ours, in its manner.
    "en_fr_antonym": 'An antonym of "{input}" translated to French is "{prediction}".',
    "en_de_antonym": 'An antonym of "{input}" translated to German is "{prediction}".',
    "en_fr_synonym": 'A synonym of "{input}" translated to French is "{prediction}".',
    "en_de_synonym": 'A synonym of "{input}" translated to German is "{prediction}".',
}
# The first word, bare or in quotes, brackets or emphasis; "0.5", "1/2" and "10" are no verdicts.
_VERDICT = re.compile(r"""[\s"'`*(\[]*([01])(?![.,/]?\w)""")


def task_named(name: str) -> str:
    """The task of a question, from any of its names: `laai_lexicon_antonym` is judged as `antonym`.

    Raises:
        LaaiError: for a task without a question.
    """
    task = name.removeprefix("laai_").removeprefix(LEXICON_PREFIX)
    if task not in _CLAIMS:
        raise LaaiError(f"no question for task {name!r}; expected one of {', '.join(_CLAIMS)}")
    return task


def question(task: str, word: str, prediction: str) -> str:
    """The one string the judge gets."""
    text = _INSTRUCTION + _CLAIMS[task].format(input=word, prediction=prediction)
    return text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate could not be sent


def read_answer(text: str) -> bool | None:
    """Yes, no, or None for an answer that is neither 0 nor 1."""
    found = _VERDICT.match(text)
    return None if found is None else found[1] == "1"
