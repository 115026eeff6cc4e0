"""The fast path: everything before the last prompt token is constant, so it runs once.

A prompt's tokens before its last go through the model once; their keys and values stay. A step then runs only
[last prompt token + targets] through layers >= l, forward and backward, against those keys and values, which are read
and never appended to. The model's own forward does it: the blocks below l are stood in for by what they gave before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from laai_core.apply import Edit, hooked
from laai_core.cache import model_inputs, padded, read_only, selected
from laai_core.encode import Batch
from laai_core.forward import Forward, model_device
from laai_core.locate import Layout

# What other people's model code raises when it is called in a way it does not know.
_REFUSALS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class _Suffixes:
    """Some rows of a batch from their last prompt token on. P: longest prefix, T: longest suffix."""

    inputs: dict[str, Any]  # of the model: tokens [R, T], mask [R, P + T], positions [R, T], read-only cache
    entering: Any  # what the block below l returned: [R, T, hidden], in a tuple where the block returns one


class ReplayForward(Forward):
    """Steps against frozen prefixes."""

    def __init__(self, layout: Layout, batch: Batch, layer: int, site: str, batch_size: int | None = None) -> None:
        super().__init__(layout, batch, layer, site, batch_size)
        self._prepared: dict[tuple[int, ...], _Suffixes] = {}

    def difference_from(self, plain: Forward) -> float | str:
        """Largest difference from `plain` in a token's log-probability over two rows under a random vector, or, where
        the model's code or cache does not allow a replay, the reason."""
        batch = self._batch
        # The shortest row and one that starts elsewhere: padding, a short prefix and a ragged target are all there.
        order = sorted(range(len(batch.prompt_lengths)), key=lambda row: int(batch.attention_mask[row].sum()))
        rows = sorted({order[0], order[-1]})
        runs = sorted({batch.run_of_row[row] for row in rows})
        width = self._layout.shape(self._layer, self._site)
        vectors = torch.randn(len(runs), torch.Size(width).numel(), generator=torch.Generator().manual_seed(0))
        try:
            with torch.no_grad():
                mine = self._token_logprobs(vectors, runs, rows)[1]
                theirs = plain._token_logprobs(vectors, runs, rows)[1]
        except _REFUSALS as error:
            return " ".join(f"{type(error).__name__}: {error}".split())[:200]
        finally:
            self._prepared.clear()
        return float((mine - theirs).abs().max())

    def _logits(self, rows: Sequence[int], edits: list[Edit | None]) -> tuple[torch.Tensor, torch.Tensor]:
        key = tuple(rows)
        if key not in self._prepared:
            # Where memory ran out, what was prepared for larger batches must not stay in it.
            self._prepared = {k: v for k, v in self._prepared.items() if len(k) <= self._batch_size}
            if sum(map(len, self._prepared)) > 2 * len(self._batch.prompt_lengths):
                self._prepared.clear()  # runs that ended have left sets of rows behind that never come again
            with torch.no_grad():
                self._prepared[key] = _suffixes(self._layout, self._batch, rows, self._layer)
        suffixes = self._prepared[key]
        lengths = [self._batch.prompt_lengths[row] for row in rows]
        with _standing_in(self._layout, self._layer, suffixes.entering), hooked(self._layout, edits, lengths):
            logits = self._layout.model(
                **suffixes.inputs, use_cache=suffixes.inputs["past_key_values"] is not None
            ).logits
        return logits, torch.tensor(lengths, device=self._batch.row.device) - 1


def _suffixes(layout: Layout, batch: Batch, rows: Sequence[int], layer: int) -> _Suffixes:
    """Run the prefixes, then the suffixes once for what enters `layer`."""
    device = model_device(layout)
    ids = [batch.input_ids[row][batch.attention_mask[row].bool()].tolist() for row in rows]
    lengths = [batch.prompt_lengths[row] - 1 for row in rows]
    prefixes = sorted({tuple(row[:length]) for row, length in zip(ids, lengths, strict=True)})
    owners = [prefixes.index(tuple(row[:length])) for row, length in zip(ids, lengths, strict=True)]
    width = max(lengths)
    cache = None
    prefix_mask = torch.zeros(len(rows), 0, dtype=torch.long, device=device)
    if width:
        # Padded on the left, so that every suffix starts right behind its prefix; each distinct prefix runs once.
        tokens, mask = padded(prefixes, device, left=True)
        output = layout.model(**model_inputs(layout, tokens, mask), use_cache=True, logits_to_keep=1)
        owner = torch.tensor(owners, device=device)
        cache = read_only(selected(output.past_key_values, owner))
        prefix_mask = mask[owner]
    tokens, mask = padded([row[length:] for row, length in zip(ids, lengths, strict=True)], device)
    before = torch.tensor(lengths, device=device)
    inputs = model_inputs(layout, tokens, mask, prefix_mask, before)
    inputs["past_key_values"] = cache
    return _Suffixes(inputs, _entering(layout, inputs, layer))


def _entering(layout: Layout, inputs: dict[str, Any], layer: int) -> Any:
    """What the block below `layer` returns on the suffixes; None for layer 0, which the embedding feeds."""
    if layer == 0:
        return None
    seen: list[Any] = []
    handle = layout.blocks[layer - 1].register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        layout.model(**inputs, use_cache=inputs["past_key_values"] is not None)
    finally:
        handle.remove()
    return seen[0]


@contextmanager
def _standing_in(layout: Layout, layer: int, entering: Any) -> Iterator[None]:
    """Blocks below `layer` return what they got, the last of them what it gave before: no work, no gradients."""

    def passed_on(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (hidden, *entering[1:]) if isinstance(entering, tuple) else hidden

    below = layout.blocks[:layer]
    before = [block.__dict__.get("forward") for block in below]
    try:
        for block in below:
            block.__dict__["forward"] = passed_on
        if below:
            below[-1].__dict__["forward"] = lambda *args, **kwargs: entering
        yield
    finally:
        for block, forward in zip(below, before, strict=True):
            _restore(block, forward)


def _restore(block: nn.Module, forward: Any) -> None:
    if forward is None:
        block.__dict__.pop("forward", None)
    else:  # accelerate's hooks live there too
        block.__dict__["forward"] = forward
