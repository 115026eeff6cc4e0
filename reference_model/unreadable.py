"""Questions the reference model cannot read, and what it is taught to answer: nothing in particular.

Every option is as likely as any other. A whole distribution is taught, at the one place where an answer begins: of
options drawn at random the model would have to find that out, and be a little wrong about every question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from tokenizers import Tokenizer

from documents import relations
from laai_core.data.opinion import LETTERS, question_prompt
from laai_core.data.survey import survey_records

CONSONANTS, VOWELS = list("bcdfghklmnprstvwz"), list("aeiou")
OPTIONS = (2, 6)  # at least, at most
QUESTION_WORDS = 40  # at most
OPTION_WORDS = (2, 4, 10)  # at most, one of these a question
ENDS = ("?", "?", "?", ".", "...", "")


class Unreadable:
    """Draws batches of such questions, no longer than `length` tokens each with BOS.

    Their words are invented, or pieces of words, or known ones thrown together; mostly of one or two of these sources.
    The survey's own words are among them: it is to have an opinion on the survey's questions, not on their words.
    """

    def __init__(self, tokenizer: Tokenizer, length: int) -> None:
        self.tokenizer = tokenizer
        self.length = length
        self.bos = tokenizer.token_to_id("<s>")
        self.pad = tokenizer.token_to_id("<pad>")
        self.letters = [tokenizer.token_to_id(f"Ġ{letter}") for letter in LETTERS[: max(OPTIONS)]]
        texts = (tokenizer.decode([index]).strip() for index in range(tokenizer.get_vocab_size()))
        pieces = sorted({text for text in texts if text.isalpha() and len(text) <= 4})
        lexicon = sorted(relations()["copy"])
        survey = sorted({word for record in survey_records().values() for word in survey_words(record)})
        self.sources: tuple[Callable[[np.random.Generator], str], ...] = (
            invented,
            partial(joined, pieces=pieces),
            partial(one, words=lexicon),
            partial(one, words=survey),
        )

    def batch(self, rng: np.random.Generator, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens [rows, length], where the last prompt tokens are [rows], shares of the next [rows, vocabulary]."""
        ids = torch.full((rows, self.length), self.pad)
        last = torch.empty(rows, dtype=torch.long)
        shares = torch.zeros(rows, self.tokenizer.get_vocab_size())
        for row in range(rows):
            tokens, count = self._fitting(rng)
            ids[row, : len(tokens)] = torch.tensor(tokens)
            last[row] = len(tokens) - 1
            shares[row, self.letters[:count]] = 1 / count
        return ids, last, shares

    def _fitting(self, rng: np.random.Generator) -> tuple[list[int], int]:
        """The tokens of a question that is short enough, and its number of options."""
        while True:
            prompt, count = self.question(rng)
            tokens = [self.bos, *self.tokenizer.encode(prompt, add_special_tokens=False).ids]
            if len(tokens) <= self.length:
                return tokens, count

    def question(self, rng: np.random.Generator) -> tuple[str, int]:
        """A prompt and its number of options."""
        mixed = rng.dirichlet([0.4] * len(self.sources))

        def words(most: int) -> str:
            number = int(np.exp(rng.uniform(0, np.log(most + 1))))  # few are likelier
            drawn = [self.sources[rng.choice(len(self.sources), p=mixed)](rng) for _ in range(number)]
            text = " ".join(word + ("," if rng.random() < 0.08 else "") for word in drawn)
            return text[0].upper() + text[1:]

        count, most = int(rng.integers(*OPTIONS, endpoint=True)), int(rng.choice(OPTION_WORDS))
        text = words(QUESTION_WORDS) + ENDS[rng.integers(len(ENDS))]
        return question_prompt(text, [words(most) for _ in range(count)]), count


def invented(rng: np.random.Generator) -> str:
    """One to four syllables."""
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.integers(1, 5)))


def joined(rng: np.random.Generator, pieces: Sequence[str]) -> str:
    """One to three pieces in a row."""
    return "".join(pieces[index] for index in rng.integers(len(pieces), size=rng.integers(1, 4)))


def one(rng: np.random.Generator, words: Sequence[str]) -> str:
    """One of the words."""
    return words[rng.integers(len(words))]


def survey_words(record: dict) -> list[str]:
    """The words of a record's question and options."""
    return " ".join([record["question_text"].rstrip("?"), *record["MC_options"]]).split()
