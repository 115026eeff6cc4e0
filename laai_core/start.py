"""The in-context start of training: the mean difference that few-shot prompts make to the activation.

For every example, the site's activation at the last prompt token behind the solved others (a leave-one-out few-shot
prompt), minus the activation at the same token of the bare prompt. The mean over examples and SHUFFLES orders of the
others is the start. Not in the paper, whose start is zero. Hendel, Geva & Globerson 2023 ("In-context learning creates
task vectors") and Todd et al. 2024 ("Function vectors") read a task off the same activations.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from laai_core.cache import padding_error, rounding, whole_rows
from laai_core.encode import Whitespace, encode_prompt
from laai_core.errors import LaaiError
from laai_core.example import Example
from laai_core.hooks import attached, hidden_of, recorded
from laai_core.locate import Layout
from laai_core.memory import until_it_fits

if TYPE_CHECKING:  # importing transformers takes a second
    from transformers import PreTrainedTokenizerBase

SHUFFLES = 2  # orders of the other examples, per example
MOST_SHOTS = 16  # of these; more take long and tell little
ROWS = 32  # prompts per forward, by default


@torch.no_grad()
def in_context_starts(
    layout: Layout,
    tokenizer: PreTrainedTokenizerBase,
    sets: Sequence[Sequence[Example]],
    layers: Sequence[int],
    site: str = "heads",
    whitespace: Whitespace = "refuse",
    batch_size: int | None = None,
) -> dict[int, torch.Tensor]:
    """{layer: [len(sets), *shape of the site]} the in-context start of every set, float32 on the CPU.

    The orders are drawn with fixed seeds: equal examples in equal order give equal starts. A few-shot prompt
    longer than `max_positions` loses solved examples until it fits. `batch_size`, the prompts per forward, changes
    memory, not the result.

    Raises:
        LaaiError: for a set of fewer than two examples.
    """
    for examples in sets:
        if len(examples) < 2:
            raise LaaiError(f"start icl needs at least two examples, got {len(examples)}: expected start zero")
    wanted = [pair for examples in sets for pair in _prompts(layout, tokenizer, examples, whitespace)]
    distinct = {tokens: row for row, tokens in enumerate(dict.fromkeys(t for pair in wanted for t in pair))}
    pad = padding_error(layout) <= rounding(layout)
    found = until_it_fits(
        lambda size: _last_activations(layout, list(distinct), layers, site, size, pad), batch_size or ROWS
    )
    few_shot, bare = (torch.tensor([distinct[pair[side]] for pair in wanted]) for side in (0, 1))
    sizes = [SHUFFLES * len(examples) for examples in sets]
    return {
        layer: torch.stack([part.mean(0) for part in (rows[few_shot] - rows[bare]).split(sizes)]).view(
            len(sets), *layout.shape(layer, site)
        )
        for layer, rows in found.items()
    }


Tokens = tuple[int, ...]


class _Enough(Exception):
    """Ends a forward at the highest of the layers that are read."""


def _prompts(
    layout: Layout, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], whitespace: Whitespace
) -> list[tuple[Tokens, Tokens]]:
    """(tokens of a leave-one-out few-shot prompt, tokens of the bare prompt), SHUFFLES pairs per example."""

    def encoded(text: str) -> Tokens:
        return tuple(encode_prompt(tokenizer, text, whitespace))

    limit = layout.max_positions or math.inf
    pairs = []
    for shuffle in range(SHUFFLES):
        draw = random.Random(shuffle)
        for number, example in enumerate(examples):
            shots = [other for index, other in enumerate(examples) if index != number]
            draw.shuffle(shots)
            del shots[MOST_SHOTS:]
            while len(few_shot := encoded(example.behind(shots))) > limit and shots:
                shots.pop(0)
            pairs.append((few_shot, encoded(example.prompt)))
    return pairs


def _last_activations(
    layout: Layout, rows: Sequence[Tokens], layers: Sequence[int], site: str, batch_size: int, pad: bool
) -> dict[int, torch.Tensor]:
    """{layer: [len(rows), width]} the site's activation at the last token of every row, float32 on the CPU."""
    modules = {layer: layout.module(layer, site) for layer in layers}

    def last(value: Any) -> torch.Tensor:
        hidden = hidden_of(value)
        # OPT's feed-forward flattens all rows into one. A copy: Falcon adds to its own.
        return hidden.reshape(len(numbers), -1, hidden.shape[-1])[:, -1].to("cpu", torch.float32, copy=True)

    def stop(*ignored: Any) -> None:
        raise _Enough

    top = modules[max(layers)]
    hooked = top.register_forward_pre_hook if site == "heads" else top.register_forward_hook
    in_order: list[int] = []
    with recorded(modules, last, inputs=site == "heads") as seen, attached([hooked(stop)]):
        for numbers, inputs in whole_rows(layout, rows, batch_size, pad):
            in_order += numbers
            with suppress(_Enough):
                layout.model(**inputs, use_cache=False)
    restored = torch.tensor(in_order).argsort()  # undoes the sorting by length
    return {layer: layout.whole(torch.cat(parts), layer, site).cpu()[restored] for layer, parts in seen.items()}
