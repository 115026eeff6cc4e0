"""The documents the reference model is trained on: eleven solved pairs of one relation, so k = 0..10 shots at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from laai_core.data import load_pairs
from laai_core.data.tasks import COMPOSITIONS, LEXICON_PREFIX, RULES, rule_prompt

PAIRS = 11  # ten shots and the question
IGNORE = -100  # the label of a token that carries no loss

# How often each relation is asked. Copying is the likeliest single relation, so without context the model's best guess
# is the word itself: zero-shot answers no rule, and context (or an intervention) has all the work to do.
WEIGHTS = {
    **{name: 0.13 for name in RULES},
    **{name: 0.07 for name in COMPOSITIONS},
    "copy": 0.14,
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


@dataclass(frozen=True)
class Piece:
    """One solved pair as tokens: prompt, answer and blank line; `answer` marks the tokens that are learnt."""

    ids: list[int]
    answer: list[bool]


class Documents:
    """Draws batches of documents. A further kind of document is a further method like `word_document`.

    `length` is the number of tokens of every row, BOS included: longer documents lose their end, shorter are padded.
    """

    def __init__(self, tokenizer: Tokenizer, length: int) -> None:
        self.length = length
        self.bos = tokenizer.token_to_id("<s>")
        self.pad = tokenizer.token_to_id("<pad>")
        table = relations()
        self.names = list(WEIGHTS)
        self.shares = np.array([WEIGHTS[name] for name in self.names])
        self.pieces = {
            name: [piece(tokenizer, rule_prompt(word), f" {answer}") for word, answer in table[name].items()]
            for name in self.names
        }

    def word_document(self, rng: np.random.Generator, words: int) -> tuple[list[int], list[bool], int]:
        """Tokens, loss marks and relation (its index in `names`) of one document: PAIRS of the first `words` words."""
        relation = int(rng.choice(len(self.names), p=self.shares))
        pieces = self.pieces[self.names[relation]]
        ids, answer = [self.bos], [False]
        for index in rng.choice(min(words, len(pieces)), PAIRS, replace=False):
            ids += pieces[index].ids
            answer += pieces[index].answer
        return ids, answer, relation

    def batch(
        self, rng: np.random.Generator, rows: int, words: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token ids and labels, both [rows, length], and relations [rows].

        A label stands at its own token and is IGNORE off the answers.
        """
        ids = torch.full((rows, self.length), self.pad)
        labels = torch.full((rows, self.length), IGNORE)
        relations = torch.zeros(rows, dtype=torch.long)
        for row in range(rows):
            tokens, answer, relations[row] = self.word_document(rng, words)
            size = min(len(tokens), self.length)
            ids[row, :size] = torch.tensor(tokens[:size])
            marks = torch.tensor(answer[:size])
            labels[row, :size][marks] = ids[row, :size][marks]
        return ids, labels, relations


def piece(tokenizer: Tokenizer, prompt: str, target: str) -> Piece:
    """Tokenised part by part: the tokenizer never joins tokens over these borders (tests/test_reference_model.py)."""
    before, learnt, after = (tokenizer.encode(t, add_special_tokens=False).ids for t in (prompt, f"{target}\n", "\n"))
    return Piece(before + learnt + after, [False] * len(before) + [True] * len(learnt) + [False] * len(after))
