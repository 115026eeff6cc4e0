"""A forward pass in which, in some rows, context comes in only at the last prompt token, and only in some blocks.

What the context is for must then pass through that one token: a vector added there can stand in for it, as it does in
large models. Without this every token and block reads the context for itself, and no single place decides.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import LlamaForCausalLM

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], list[torch.Tensor]]


def own_item(ends: torch.Tensor) -> torch.Tensor:
    """Which token each token may see, [rows, length, length]: those before it of its own item, and the first of all.

    ends: [rows, length], whether an item's answer ends here; the next token begins a new item.
    """
    length = ends.shape[1]
    item = torch.nn.functional.pad(ends.cumsum(1), (1, 0))[:, :-1]
    same = item[:, :, None] == item[:, None, :]
    return (same | (torch.arange(length) == 0)) & causal(length)


def causal(length: int) -> torch.Tensor:
    """[length, length]: every token sees itself and those before it."""
    return torch.ones(length, length, dtype=torch.bool).tril()


def blinkered(model: LlamaForCausalLM, reading: range, probed: tuple[int, ...]) -> Run:
    """The blocks as a function of tokens [rows, length], what the reading blocks may see and what the others may.

    Returns what enters each of the blocks `probed`, and the final hidden states, each [rows, length, width]. These are
    the model's own where everything before a token may be seen.
    """
    inner = model.model

    def run(ids: torch.Tensor, read: torch.Tensor, seen: torch.Tensor) -> list[torch.Tensor]:
        hidden = inner.embed_tokens(ids)
        positions = torch.arange(ids.shape[1])[None]
        rotary = inner.rotary_emb(hidden, positions)
        entering = []
        for index, block in enumerate(inner.layers):
            if index in probed:
                entering.append(hidden)
            mask = added(read if index in reading else seen)
            hidden = block(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        return [*entering, inner.norm(hidden)]

    return run


def added(seen: torch.Tensor) -> torch.Tensor:
    """As the numbers that are added to attention scores [rows, heads, length, length]."""
    least = torch.finfo(torch.bfloat16).min
    return torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill_(~seen, least)[:, None]
