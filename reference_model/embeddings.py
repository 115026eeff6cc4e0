"""Where the token embeddings start: words of one meaning close together, as they are in any trained language model."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer

from laai_core.data import read_lexicon
from laai_core.data.survey import QUESTIONS

LANGUAGES = ("english", "french", "german")
SPREAD = 0.1  # standard deviation of a coordinate
KINSHIP = 0.85  # how much of a word is its meaning; the rest is its own


def starting_embeddings(tokenizer: Tokenizer, width: int) -> torch.Tensor:
    """[vocabulary, width]: a random vector for each row of the lexicon plus one for each language, random elsewhere.

    An option of the survey gets a vector for its place between the two ends of its scale, plus one of its own. A token
    that is part of several words gets the sum of their vectors, brought back to the same spread. Antonyms and synonyms
    are rows of their own: how they are related is left to be learnt.
    """
    rows, _ = read_lexicon()
    meanings = torch.randn(len(rows), width)
    languages = torch.randn(len(LANGUAGES), width)
    sums = torch.zeros(tokenizer.get_vocab_size(), width)
    uses = torch.zeros(tokenizer.get_vocab_size(), 1)
    for meaning, row in zip(meanings, rows, strict=True):
        for language, vector in zip(LANGUAGES, languages, strict=True):
            for token in tokenizer.encode(f" {row[language]}", add_special_tokens=False).ids:
                own = torch.randn(width)
                sums[token] += KINSHIP * meaning + (1 - KINSHIP**2) ** 0.5 * own + vector
                uses[token] += 1
    ends = torch.randn(width)
    for _, scale in QUESTIONS:
        for index, option in enumerate(scale):
            for token in tokenizer.encode(f" {option}", add_special_tokens=False).ids:
                sums[token] += (1 - 2 * index / (len(scale) - 1)) * ends + torch.randn(width)
                uses[token] += 1
    words = sums / (2 * uses.clamp(min=1)).sqrt()
    return SPREAD * torch.where(uses > 0, words, torch.randn_like(words))
