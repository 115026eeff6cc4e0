"""Which (row, column) of a forward call an intervention acts on.

Everything is counted in ordinals: the 1-based number of a token among the non-padding tokens of its row, 0 for
padding. A row's prompt ends at ordinal p, so `last` is ordinal == p, `generated` is >= p and `all` is >= 1, whatever
the padding side, the cache or the chunking of the prefill.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from laai_core.errors import LaaiError


@dataclass(frozen=True)
class Call:
    """One forward call: ordinals [B, T] of its tokens and prompt lengths [B], both on the CPU."""

    ordinals: torch.Tensor
    prompt_lengths: torch.Tensor
    columns: int = 0  # that the prompts take in the cache, where this is read off the calls

    def hits(self, position: str, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [m] and columns [m] of the tokens in `rows` [n] that a `position` selects."""
        ordinals = self.ordinals[rows]  # [n, T]
        ends = self.prompt_lengths[rows].unsqueeze(1)  # [n, 1]
        chosen = {"last": ordinals == ends, "generated": ordinals >= ends, "all": ordinals >= 1}[position]
        chosen &= ordinals >= 1  # padding is 0, and so is the end of an empty prompt
        row, column = chosen.nonzero(as_tuple=True)
        return rows[row], column


class PositionTracker:
    """Follows the forward calls of one model and says where each row's prompt ends.

    Args:
        virtual_tokens: tokens PEFT puts in front of every row; never counted.
        prompt_lengths: [R] non-padding tokens of each row's prompt. None: a row's prompt ends at its last
            non-padding token in the call that starts with an empty cache.
    """

    def __init__(self, virtual_tokens: int, prompt_lengths: torch.Tensor | None) -> None:
        self._virtual = virtual_tokens
        self._given = prompt_lengths
        self._caches: dict[int, tuple[Callable[[], Any], int]] = {}  # by id: a cache, and its prompts' columns

    def call(self, batch: int, length: int, cache: Any, mask: Any, prompt: torch.Tensor | None) -> Call:
        """The call's ordinals and prompt lengths.

        Args:
            batch, length: shape of the tokens given to the decoder.
            cache: of earlier tokens, or None.
            mask: the 2-D attention mask over past and present tokens, or None.
            prompt: mask [R, P] of the prompts, on the CPU, of the `generate` that makes the call; or None.
        """
        past = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
        if prompt is not None:
            # generate() may pass a 4-D mask, a dict of masks or none, so ordinals come from the prompt's mask.
            behind = past + length - self._virtual - prompt.shape[1]  # columns after the prompt; negative within it
            real = pad(pad(prompt, (0, behind), value=1), (self._virtual, 0))
            ends = prompt.sum(1) if self._given is None else self._given
            return Call(repeated(_ordinals(real)[:, past:], batch), repeated(ends, batch))
        whole = self._plain_ordinals(batch, length, past, mask)
        ordinals = whole[:, past:]
        if self._given is not None:
            ends = self._given
            if len(ends) != batch:
                raise LaaiError(f"prompt_lengths has {len(ends)} entries, the batch has {batch} rows")
            if past == 0:
                check_lengths(ends, ordinals.max(1).values)
            return Call(ordinals, ends)
        known, columns = self._caches.get(id(cache), (lambda: None, 0))
        if past <= self._virtual:  # prefix tuning starts with its virtual tokens in the cache
            columns = past + length
        elif known() is not cache:
            raise LaaiError("a forward call continues a cache that was filled elsewhere: pass prompt_lengths=")
        # Counted anew: the cache's rows may have been selected, repeated or put in another order since.
        return Call(ordinals, whole[:, :columns].max(1).values, columns)

    def remember(self, values: Iterable[Any], call: Call) -> None:
        """Keep the columns of a call's prompts for the caches among `values`, which later calls may continue."""
        for value in values:
            if hasattr(value, "get_seq_length"):
                self._caches[id(value)] = self._reference(value), call.columns

    def _reference(self, cache: Any) -> Callable[[], Any]:
        """A call gives the cache, as long as it lives; a class may allow no weak references."""
        key = id(cache)
        try:
            return weakref.ref(cache, lambda gone: self._caches.pop(key, None))
        except TypeError:
            return lambda: cache

    def _plain_ordinals(self, batch: int, length: int, past: int, mask: Any) -> torch.Tensor:
        """[batch, past + length] of the cached tokens and the new ones."""
        if mask is None:
            mask = torch.ones(batch, past + length, device="cpu")
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
            raise LaaiError("expected a 2-D attention_mask [batch, tokens]: padding cannot be read off any other")
        if mask.shape[1] != past + length:
            raise LaaiError(f"attention_mask has {mask.shape[1]} columns, expected {past} cached + {length} new")
        real = mask.cpu().ne(0).long()
        real[:, : self._virtual] = 0
        return _ordinals(real)


def check_lengths(prompt_lengths: torch.Tensor, tokens: torch.Tensor) -> None:
    """LaaiError for a prompt length [R] that is more than its row's tokens [R]."""
    for row in (prompt_lengths > tokens).nonzero().flatten().tolist():
        raise LaaiError(f"prompt_lengths[{row}] is {int(prompt_lengths[row])}, the row has {int(tokens[row])} tokens")


def repeated(rows: torch.Tensor, batch: int) -> torch.Tensor:
    """`rows` [R, ...] with each row repeated next to itself to fill `batch` rows: beams and returned sequences."""
    if batch % len(rows):
        raise LaaiError(f"{len(rows)} rows were announced, the model got a batch of {batch}")
    return rows.repeat_interleave(batch // len(rows), 0)


def _ordinals(mask: torch.Tensor) -> torch.Tensor:
    return mask.cumsum(1) * mask
