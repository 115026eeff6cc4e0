"""Ragged token rows as model inputs, and views of key-value caches that several forwards read.

A view is a shallow copy with its own copies of the cache's layer objects. Layers of keys and values replace their
tensors instead of writing into them, so that the original cache stays unchanged; recurrent states are written into.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import cache_utils

from laai_core.locate import Layout

_STATES = ("update_conv_state", "update_recurrent_state", "update_indexer")  # of layers that keep others
# Exceptions of model code that does not support such arguments or such a cache.
REFUSALS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


def padded(
    rows: Sequence[Sequence[int]], device: torch.device, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask [R, longest] of ragged rows, padded with token 0, on `device`."""
    parts = [torch.tensor(row, dtype=torch.long) for row in rows]
    whole = partial(pad_sequence, batch_first=True, padding_side="left" if left else "right")
    return whole(parts).to(device), whole([torch.ones_like(part) for part in parts]).to(device)


def model_inputs(
    layout: Layout,
    tokens: torch.Tensor,
    mask: torch.Tensor,
    cached_mask: torch.Tensor | None = None,
    cached_lengths: torch.Tensor | None = None,
) -> dict[str, Any]:
    """The model's arguments for tokens and mask [R, T] behind a cache; position ids count non-padding tokens.

    `cached_mask` [R, P] and `cached_lengths` [R]: mask and non-padding tokens of the cache; None: no cache.
    """
    whole = mask if cached_mask is None else torch.cat([cached_mask, mask], 1)
    inputs = {"input_ids": tokens, "attention_mask": whole}
    if "position_ids" in inspect.signature(layout.model.forward).parameters:
        first = 0 if cached_lengths is None else cached_lengths.unsqueeze(1)
        inputs["position_ids"] = first + (mask.cumsum(1) - 1).clamp_min(0)
    return inputs


def whole_rows(
    layout: Layout, rows: Sequence[Sequence[int]], batch_size: int, pad: bool
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """The rows by length, at most `batch_size` a forward: their numbers, and arguments with each row's end in the last
    column. With `pad`, where `padding_error` is rounding, rows of unequal length share a forward.
    """
    by_length = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    for _, group in groupby(by_length, key=lambda row: 0 if pad else len(rows[row])):
        numbers = list(group)
        for begin in range(0, len(numbers), batch_size):
            part = numbers[begin : begin + batch_size]
            tokens, mask = padded([rows[row] for row in part], layout.device, left=True)
            yield part, model_inputs(layout, tokens, mask) if pad else {"input_ids": tokens}


@torch.no_grad()
def padding_error(layout: Layout) -> float:
    """`relative_error` of logits behind padding on the left, tried on a few tokens: decoders like RoBERTa's count
    positions from elsewhere, Bart's count padding too.
    """
    row = (1, 2, 2)
    tokens, mask = padded([row, (*row, 1, 2)], layout.device, left=True)
    alone = layout.model(input_ids=tokens[:1, -len(row) :], use_cache=False).logits[:, -1]
    behind = layout.model(**model_inputs(layout, tokens[:1], mask[:1]), use_cache=False).logits[:, -1]
    return relative_error(behind, alone)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference between two computations of the same logits, as a share of the largest of them."""
    largest = wanted.abs().max()
    return float((found - wanted).abs().max() / largest.clamp_min(torch.finfo(largest.dtype).tiny))  # all may be 0


def rounding(layout: Layout) -> float:
    """The largest error that the model's dtype explains."""
    return 3e-2 if layout.is_half else 1e-4


def selected(cache: Any, rows: torch.Tensor) -> Any:
    """A view of `cache` with batch rows `rows` [n], in that order, repeats allowed.

    Raises:
        AttributeError, NotImplementedError: for caches that hold more than keys and values.
    """
    chosen = _view(cache, copy.copy)
    chosen.batch_select_indices(rows)
    return chosen


def read_only(cache: Any) -> Any:
    """A view of `cache` whose `update` returns cached and new keys and values together without storing the new.

    Raises:
        AttributeError, NotImplementedError: for caches that hold more than keys and values.
    """
    return _view(cache, _read_only_layer)


def _view(cache: Any, copied: Callable[[Any], Any]) -> Any:
    # A model's own class of cache or layer may keep anything.
    ours = all(type(one).__module__ == cache_utils.__name__ for one in (cache, *cache.layers))
    if not ours or any(hasattr(layer, update) for layer in cache.layers for update in _STATES):
        raise NotImplementedError(f"{type(cache).__name__} with states besides keys and values")
    view = copy.copy(cache)
    view.layers = [copied(layer) for layer in cache.layers]
    return view


def _read_only_layer(layer: Any) -> Any:
    frozen = copy.copy(layer)

    def update(keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return copy.copy(layer).update(keys, values, *args, **kwargs)

    frozen.update = update
    return frozen
