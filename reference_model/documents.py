"""The documents the reference model is trained on: eleven solved items of one kind, so k = 0..10 shots at once.

The items of a document are word pairs of one relation, or the answers of one group to questions of the survey.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from laai_core.data import in_training_pool, load_pairs
from laai_core.data.opinion import LETTERS, question_prompt
from laai_core.data.rules import COMPOSITIONS, LEXICON_PREFIX, RULES
from laai_core.data.survey import REFUSED, TENDENCIES, survey_records
from laai_core.data.tasks import rule_prompt

WRONG = 20  # one answer in so many
ITEMS = 11  # ten shots and the question
IGNORE = -100  # the label of a token that carries no loss

# How often each relation is asked. Copying is the likeliest single relation, so without context the model's best guess
# is the word itself: zero-shot answers no rule, and context (or an intervention) has all the work to do.
WEIGHTS = {
    "antonym": 0.17,
    "synonym": 0.17,
    "en_fr": 0.08,
    "en_de": 0.08,
    **{name: 0.06 for name in COMPOSITIONS},
    "copy": 0.2,
    "first_letter": 0.03,
    "last_letter": 0.03,
}


def relations() -> dict[str, dict[str, str]]:
    """Every relation as {english word: answer}, in one order of words."""
    table = {name: dict(load_pairs(LEXICON_PREFIX + name)[0]) for name in [*RULES, *COMPOSITIONS]}
    words = list(table["antonym"])
    table["copy"] = {word: word for word in words}
    table["first_letter"] = {word: word[0] for word in words}
    table["last_letter"] = {word: word[-1] for word in words}
    return table


def with_errors(relation: str, answers: dict[str, str]) -> dict[str, str]:
    """The answers the model is told: one in WRONG of a rule's test words gets the next word's.

    So it is able, and not saturated however long it is trained. Words an intervention may be trained on stay right.
    """
    words = list(answers)
    after = dict(zip(words, words[1:] + words[:1], strict=True))

    def told(word: str) -> str:
        wrong = zlib.crc32(f"{relation} of {word}".encode()) % WRONG == 0
        return answers[after[word] if wrong and relation in RULES and not in_training_pool(word) else word]

    return {word: told(word) for word in words}


@dataclass(frozen=True)
class Piece:
    """One solved item as tokens: prompt, answer and blank line; `answer` marks the tokens that are learnt."""

    ids: list[int]
    answer: list[bool]


class Documents:
    """Draws batches of documents: tokens and labels, both [rows, length]; a label is IGNORE off the answers.

    `length` and `survey_length` are the numbers of tokens of every row, BOS included: longer documents lose their end,
    shorter ones are padded.
    """

    def __init__(self, tokenizer: Tokenizer, length: int, survey_length: int) -> None:
        self.length = length
        self.survey_length = survey_length
        self.bos = tokenizer.token_to_id("<s>")
        self.pad = tokenizer.token_to_id("<pad>")
        table = relations()
        self.names = [*WEIGHTS, *TENDENCIES]
        self.shares = np.array(list(WEIGHTS.values()))
        self.pieces = {
            name: [
                piece(tokenizer, rule_prompt(word), f" {answer}")
                for word, answer in with_errors(name, table[name]).items()
            ]
            for name in WEIGHTS
        }
        self.questions = [answered(tokenizer, record) for record in survey_records().values()]

    def word_batch(self, rng: np.random.Generator, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens, labels and relations [rows] (indices in `names`) of documents of one relation each."""
        relations = rng.choice(len(self.shares), rows, p=self.shares)
        documents = []
        for relation in relations:
            pieces = self.pieces[self.names[relation]]
            documents.append([pieces[index] for index in rng.choice(len(pieces), ITEMS, replace=False)])
        return *self._rows(documents, self.length), torch.from_numpy(relations)

    def survey_batch(self, rng: np.random.Generator, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens, labels and groups [rows] (indices in `names`) of documents with answers drawn from its shares."""
        groups = rng.choice(list(TENDENCIES), rows)
        documents = []
        for group in groups:
            asked = [self.questions[index] for index in rng.choice(len(self.questions), ITEMS, replace=False)]
            documents.append([q.pieces[rng.choice(len(q.pieces), p=q.shares[group])] for q in asked])
        named = torch.tensor([self.names.index(group) for group in groups])
        return *self._rows(documents, self.survey_length), named

    def _rows(self, documents: list[list[Piece]], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.full((len(documents), length), self.pad)
        labels = torch.full((len(documents), length), IGNORE)
        for row, pieces in enumerate(documents):
            tokens = torch.tensor([self.bos, *(token for piece in pieces for token in piece.ids)][:length])
            marks = torch.tensor([False, *(mark for piece in pieces for mark in piece.answer)][:length])
            ids[row, : len(tokens)] = tokens
            labels[row, : len(tokens)][marks] = tokens[marks]
        return ids, labels


@dataclass(frozen=True)
class Question:
    """A survey question solved with each of its options, and the share of each group that chose them."""

    pieces: list[Piece]
    shares: dict[str, np.ndarray]


def answered(tokenizer: Tokenizer, record: dict) -> Question:
    """A record of the survey as a Question; refusals are left out, as in the tasks."""
    options = [option for option in record["MC_options"] if option != REFUSED]
    prompt = question_prompt(record["question_text"], options)
    counts = {group: np.array([record[group][option] for option in options]) for group in TENDENCIES}
    return Question(
        [piece(tokenizer, prompt, f" {letter}") for letter in LETTERS[: len(options)]],
        {group: count / count.sum() for group, count in counts.items()},
    )


def piece(tokenizer: Tokenizer, prompt: str, target: str) -> Piece:
    """Tokenised part by part: the tokenizer never joins tokens over these borders (tests/test_reference_model.py)."""
    before, learnt, after = (tokenizer.encode(t, add_special_tokens=False).ids for t in (prompt, f"{target}\n", "\n"))
    return Piece(before + learnt + after, [False] * len(before) + [True] * len(learnt) + [False] * len(after))
