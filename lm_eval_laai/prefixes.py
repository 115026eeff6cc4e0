"""The tokens that all prompts of a task begin with, as ten shots are: run once a task instead of once a request.

The first columns of a batch come out of a cache, and the columns are those of a batch without one: padding, positions
and attention windows stay as they were. A row that is padded on the left takes fewer of its prefix's tokens (p), and
runs the others again:

    column   0 1 2 3 4 | 5 6 7
    row 0    p p p p p | a b c        five columns are cached, three run
    row 1    . . p p p | p p d        shorter by two tokens

A prefix's keys and values are the plain model's, except under a vector that acts at all tokens: requests share those
only where the vector is the same.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
from transformers import DynamicCache, GenerationConfig

from laai_core.apply import Edit, hooked
from laai_core.cache import REFUSALS, model_inputs, padded, relative_error, rounding
from laai_core.locate import Layout

logger = logging.getLogger(__name__)

Tokens = Sequence[int]
Prompt = TypeVar("Prompt", str, list[int])
_Key = tuple[tuple[int, ...], Edit | None]  # a prefix, and the edit that acts within it
_Layers = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values [1, heads, tokens, width] of each layer

# Fewer tokens, or a smaller part of the prompt, are hardly worth their copy: zero-shot prompts are run whole.
_FEWEST, _SMALLEST_PART = 16, 1 / 8
# Prefixes are kept for the batches to come; below this many tokens their memory does not matter.
_FREE_TOKENS = 4096


def takes_prefixes(config: GenerationConfig) -> bool:
    """Whether `generate` goes on from a cache that it is given: not where it is told to make one of another kind."""
    usual = config.cache_implementation in (None, "hybrid")  # transformers itself drops "hybrid"
    return usual and getattr(config, "prefill_chunk_size", None) is None


def _short_context(config: Any) -> float:
    """The tokens up to which a forward has LongRoPE's short factors (Phi-3's of 128k tokens), else infinity. A longer
    one has the long factors at every token, so that it cannot continue the cache of a shorter one.
    """
    config = config.get_text_config(decoder=True)
    # transformers 4 has rope_scaling.
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [rope, *(one for one in rope.values() if isinstance(one, dict))]  # one for all layers, or one a layer type
    name = "original_max_position_embeddings"
    lengths = [one.get(name, getattr(config, name, math.inf)) for one in kinds if one.get("rope_type") == "longrope"]
    return min(lengths, default=math.inf)


def common_prefixes(
    tasks: Sequence[str | None], prompts: Sequence[Prompt], encode: Callable[[Prompt], Tokens]
) -> list[tuple[int, ...]]:
    """For each prompt the tokens that the prompts of its task begin with; none where the task has one prompt only.

    The first and the last prompt in alphabetical order have in common what all have. Only these two are encoded: where
    another prompt's tokens part from theirs is found when it is run.
    """
    by_task: dict[str | None, list[Prompt]] = {}
    for task, prompt in zip(tasks, prompts, strict=True):
        by_task.setdefault(task, []).append(prompt)
    found: dict[str | None, tuple[int, ...]] = {}
    for task, of_task in by_task.items():
        first, last = min(of_task), max(of_task)
        found[task] = _common([encode(first), encode(last)]) if first != last else ()
    return [found[task] for task in tasks]


class SharedPrefixes:
    """Keys and values of the prefixes of one model's requests, each computed when a batch first needs it."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.short_context = _short_context(layout.model.config)
        self._kept: dict[_Key, _Layers] = {}  # the one that was used last comes last

    def close(self) -> None:
        """Free all prefixes: before the next run somebody may change the model."""
        self._kept.clear()

    def cache(
        self, prompts: Sequence[Tokens], edits: Sequence[Edit | None], prefixes: Sequence[Tokens], left: bool
    ) -> DynamicCache | None:
        """The keys and values of a batch's first columns; None where sharing does not pay or is not exact.

        Args:
            prompts: tokens of each row up to its last prompt token, which is never taken from the cache.
            edits: of each row.
            prefixes: what each prompt begins with, as from `common_prefixes`; a truncated prompt may begin otherwise.
            left: rows are padded to the longest prompt on the left. Otherwise they are not padded, or on the right.
        """
        longest = max(map(len, prompts))
        prefixes = [prefix[:longest] for prefix in prefixes]  # no more than truncated prompts have
        padding = [longest - len(prompt) if left else 0 for prompt in prompts]
        shared = [
            min(len(_common([prompt, prefix])), len(prompt) - 1)
            for prompt, prefix in zip(prompts, prefixes, strict=True)
        ]
        columns = min(map(sum, zip(padding, shared, strict=True)))
        # With virtual tokens a cache could not be continued: PEFT would prepend them again.
        worth = columns >= max(_FEWEST, _SMALLEST_PART * longest)
        if not worth or longest > self.short_context or self._layout.virtual_tokens or not self._exact:
            return None
        within = [edit if edit is not None and edit.position == "all" else None for edit in edits]
        keys: list[_Key] = [(tuple(prefix), edit) for prefix, edit in zip(prefixes, within, strict=True)]
        cache = self._filled(keys, padding, columns)
        self._forget(set(keys), max(_FREE_TOKENS, len(prompts) * longest))
        return cache

    def _filled(self, keys: Sequence[_Key], padding: Sequence[int], columns: int) -> DynamicCache:
        """A cache of `columns` columns: behind its padding, each row has the first tokens of its prefix."""
        used = list(dict.fromkeys(key for key in keys if key[0]))
        parts = [self._layers(key) for key in used]
        first, start = {}, 0
        for key in used:
            first[key] = start
            start += len(key[0])
        starts = torch.tensor([first.get(key, 0) for key in keys])  # a row without a prefix is all padding here
        within = torch.arange(columns) - torch.tensor(padding).unsqueeze(1)  # [R, columns]
        index = starts.unsqueeze(1) + within.clamp_min(0)
        cache = DynamicCache(config=self._layout.model.config)  # as the model makes its own: sliding windows are cut
        for number, layers in enumerate(zip(*parts, strict=True)):
            keys_of, values_of = zip(*layers, strict=True)
            cache.update(_gathered(keys_of, index), _gathered(values_of, index), number)
        return cache

    def _layers(self, key: _Key) -> _Layers:
        """The keys and values of a prefix, run if they are not kept. Every layer has all columns: batches cut them."""
        if key not in self._kept:
            prefix, edit = key
            inputs = model_inputs(self._layout, *padded([prefix], self._layout.device))
            with torch.no_grad(), hooked(self._layout, [edit]):
                cache: Any = self._layout.model(
                    **inputs, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1
                ).past_key_values
            self._kept[key] = [(layer.keys, layer.values) for layer in cache.layers]
        self._kept[key] = self._kept.pop(key)
        return self._kept[key]

    def _forget(self, needed: set[_Key], tokens: int) -> None:
        """Drop the prefixes that were not used for longest until `tokens` tokens are kept, but none of `needed`."""
        kept = sum(len(prefix) for prefix, _ in self._kept)
        for key in [key for key in self._kept if key not in needed]:
            if kept > tokens:
                kept -= len(key[0])
                del self._kept[key]

    @cached_property
    def _exact(self) -> bool:
        """Whether this model's code continues such a cache, tried on a few tokens (recurrent states cannot be cut)."""
        try:
            exact = all(self._agrees(left) for left in (True, False))
        except REFUSALS as error:
            logger.info("%s: %.200s", type(error).__name__, error)
            exact = False
        finally:
            self.close()
        if not exact:
            logger.info("%s continues no cached prefix: prompts are run whole", type(self._layout.model).__name__)
        return exact

    @torch.no_grad()
    def _agrees(self, left: bool) -> bool:
        """Whether the logits of two rows behind a cached prefix are those of the whole rows, but for rounding."""
        prefix = (1, 2, 2, 1, 2)
        rows, padding = [(*prefix, 1, 1), (*prefix, 2)], [0, int(left)]
        tokens, mask = padded(rows, self._layout.device, left=left)
        cache = self._filled([(prefix, None)] * 2, padding, len(prefix))
        rest = self._layout.model(**continued_inputs(self._layout, tokens, mask, cache)).logits
        rest = rest[mask[:, len(prefix) :].to(rest.device).bool()]
        # As a model is called that nobody tells of positions: some count them otherwise.
        alone = [self._layout.model(input_ids=padded([row], self._layout.device)[0]).logits[0] for row in rows]
        whole = torch.cat([logits[len(prefix) - cut :] for logits, cut in zip(alone, padding, strict=True)])
        return relative_error(rest, whole) <= rounding(self._layout)


def continued_inputs(
    layout: Layout, tokens: torch.Tensor, mask: torch.Tensor, cache: DynamicCache | None
) -> dict[str, Any]:
    """The model's arguments for tokens and mask [R, T] whose first columns are in `cache`."""
    done = 0 if cache is None else cache.get_seq_length()
    inputs = model_inputs(layout, tokens[:, done:], mask[:, done:], mask[:, :done], mask[:, :done].sum(1))
    return inputs | {"past_key_values": cache, "use_cache": True}


def _common(rows: Sequence[Tokens]) -> tuple[int, ...]:
    return tuple(os.path.commonprefix([tuple(row) for row in rows]))


def _gathered(parts: Sequence[torch.Tensor], index: torch.Tensor) -> torch.Tensor:
    """Columns `index` [R, C] of tensors [1, heads, tokens, width] side by side: [R, heads, C, width]."""
    side_by_side = torch.cat(list(parts), 2)[0]
    return side_by_side[:, index.to(side_by_side.device)].transpose(0, 1)
