"""Opinion questions, and the share of a group that chose each option."""

from __future__ import annotations

import logging
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from laai_core.data.split import check_unicode
from laai_core.errors import LaaiError
from laai_core.example import Example

logger = logging.getLogger(__name__)

LETTERS = string.ascii_uppercase
LONGEST = 10_000  # characters of a question or an option; beyond is a mistake

Counts = dict[str, float]  # answer -> number of people, or their total weight


def question_prompt(question: str, options: Sequence[str]) -> str:
    """The prompt of every opinion task; its possible answers are ` A`, ` B`, ..., one an option."""
    listed = "".join(f"{letter}. {option}\n" for letter, option in zip(LETTERS, options, strict=False))
    return f"Question: {question}\n{listed}Answer:"


@dataclass(frozen=True)
class Question:
    """A question and its K options, in the order they are listed.

    positions [K]: where the options lie on their scale, in any unit; all equal where they have no order.
    refusals: further answers people gave, which are no options and are left out of every share.
    """

    key: str
    text: str
    options: tuple[str, ...]
    positions: tuple[float, ...]
    refusals: tuple[str, ...] = ()


@dataclass(frozen=True)
class Opinion:
    """A question and how one group answered it: distribution [K] sums to 1."""

    question: Question
    distribution: tuple[float, ...]

    def example(self) -> Example:
        """The example for the task loss `kl`."""
        prompt = question_prompt(self.question.text, self.question.options)
        letters = [f" {letter}" for letter in LETTERS[: len(self.distribution)]]
        return Example(prompt, options=letters, distribution=self.distribution)


def opinion(question: Question, counts: Mapping[str, float]) -> Opinion | None:
    """The shares of the options among answers counted (or weighted) by their text; None when all options have 0."""
    chosen = [counts.get(option, 0.0) for option in question.options]
    total = sum(chosen)
    return Opinion(question, tuple(count / total for count in chosen)) if total > 0 else None


def shares(counted: Iterable[tuple[Question, Mapping[str, float]]], who: str, where: str) -> list[Opinion]:
    """The opinions on the answered questions. Warns of unanswered ones; LaaiError when all are."""
    opinions, unanswered = [], []
    for question, counts in counted:
        found = opinion(question, counts)
        if found is None:
            unanswered.append(question.key)
        else:
            opinions.append(found)
    if not opinions:
        raise LaaiError(f"{where}: {who} has no answer that counts to any question; expected some")
    if unanswered:
        more = f" and {len(unanswered) - 5} more" if len(unanswered) > 5 else ""
        logger.warning("%s: without the questions nobody of it answered: %s%s", who, ", ".join(unanswered[:5]), more)
    return opinions


def check_text(text: object, where: str) -> str:
    """A key, a question or an option, stripped. Raises LaaiError, starting with `where`, for anything else."""
    if not isinstance(text, str) or not 0 < len(text.strip()) <= LONGEST:
        raise LaaiError(f"{where} is {text!r:.60}; expected text of at most {LONGEST} characters")
    check_unicode(text, where)
    return text.strip()


def check_options(options: Sequence[str], where: str) -> None:
    """LaaiError, starting with `where`, for options that cannot be asked with one letter each."""
    if not 2 <= len(options) <= len(LETTERS):
        raise LaaiError(f"{where}: options are {len(options)}; expected 2 to {len(LETTERS)}, a letter each")
    if len(set(options)) != len(options):
        repeated = next(option for option in options if options.count(option) > 1)
        raise LaaiError(f"{where}: the option {repeated!r:.60} comes twice; expected distinct texts")


def check_known(answer: str, question: Question, where: str) -> None:
    """LaaiError, starting with `where`, for an answer that is neither an option nor a refusal."""
    known = (*question.options, *question.refusals)
    if answer not in known:
        expected = ", ".join(map(repr, known))
        raise LaaiError(f"{where}: the answer {answer!r:.60} is no option of the question; expected one of {expected}")
