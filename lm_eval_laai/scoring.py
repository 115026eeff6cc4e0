"""Log-likelihoods of continuations under interventions: exact per request, one prompt pass per prompt.

Two requests may share logits only when their prompts AND their interventions are equal: with a vector at the
last prompt token, the same text split elsewhere is another computation. Requests that do share a prompt become
  - one plain row, when every continuation is a beginning of the longest one, but for its last token (all one-token
    options; options that differ in their last token only), or else
  - a shared prompt: one pass over the prompt, whose cache all continuations then read.
Both begin behind the prefix that the prompts of a task share (`lm_eval_laai.prefixes`).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from laai_core.apply import Edit, hooked
from laai_core.cache import REFUSALS, model_inputs, padded, rounding, selected
from laai_core.errors import LaaiError
from laai_core.locate import Layout
from lm_eval_laai.finite import check
from lm_eval_laai.prefixes import SharedPrefixes, continued_inputs

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

logger = logging.getLogger(__name__)

# A shared prompt's cache is repeated for its continuations; below this many tokens the memory does not matter.
_FREE_CACHE_TOKENS = 4096

Answer = tuple[float, bool]  # log-probability, and whether greedy decoding would give the continuation


@dataclass(frozen=True, eq=False)
class Row:
    """One request: token ids of its prompt and continuation, its edit, its name in errors, and its task's prefix."""

    prompt: list[int]
    continuation: list[int]
    edit: Edit | None
    name: str
    prefix: tuple[int, ...] = ()


@dataclass(eq=False)
class _Group:
    """Requests with one prompt and one edit."""

    prompt: tuple[int, ...]
    edit: Edit | None
    name: str  # in errors: that of the request with the longest continuation
    prefix: tuple[int, ...]
    members: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)  # request number, continuation

    def longest(self) -> tuple[int, ...]:
        return max((c for _, c in self.members), key=len)

    def is_linear(self) -> bool:
        """Whether one row over prompt + longest continuation predicts every token of every member."""
        longest = self.longest()
        return all(c[:-1] == longest[: len(c) - 1] for _, c in self.members)

    def each(self) -> list[_Group]:
        """A group for each member."""
        return [_Group(self.prompt, self.edit, self.name, self.prefix, [member]) for member in self.members]

    def stems(self) -> list[tuple[int, ...]]:
        """The distinct inputs behind the prompt that predict all but the first tokens."""
        return sorted({c[:-1] for _, c in self.members if len(c) > 1})


class Scorer:
    """Scores rows on one model.

    Args:
        layout: of the model as it is called (`model` may be a PeftModel around `layout.model`).
        max_length: tokens the model takes.
        softmax_dtype: as HFLM's; None is the dtype of the logits.
        prefixes: of `layout`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layout: Layout,
        max_length: int,
        softmax_dtype: torch.dtype | None,
        prefixes: SharedPrefixes,
    ) -> None:
        self._model, self._layout = model, layout
        self._max_length, self._softmax_dtype = max_length, softmax_dtype
        self._prefixes = prefixes
        self._device = layout.device

    def score(
        self, rows: Sequence[Row], batch_size: int, done: Callable[[int], object] = lambda count: None
    ) -> list[Answer]:
        """Answers in the order of `rows`; `done` is called with the number of requests just answered.

        Raises:
            LaaiError: for a continuation longer than the model's window.
            WorkFailed: for a NaN or infinite logit under an edit.
        """
        answers: list[Answer | None] = [None] * len(rows)
        groups = self._groups(rows)
        groups = _ordered([one for g in groups for one in (g.each() if self._is_long(g) else [g])])
        linear = [group.is_linear() for group in groups]
        shared = [g for g, is_linear in zip(groups, linear, strict=True) if not is_linear]
        plain = [g for g, is_linear in zip(groups, linear, strict=True) if is_linear]
        # With virtual tokens a cached prompt could not be continued: PEFT would prepend them again.
        if shared and (self._layout.virtual_tokens or not self._shares_exactly):
            plain = _ordered([*plain, *(one for group in shared for one in group.each())])
            shared = []
        for part in ([g for g in plain if self._is_long(g)], [g for g in plain if not self._is_long(g)]):
            for start in range(0, len(part), batch_size):
                chunk = part[start : start + batch_size]
                for number, answer in self._plain(chunk):
                    answers[number] = answer
                done(sum(len(group.members) for group in chunk))
        for chunk in _packed(shared, batch_size):
            for number, answer in self._shared(chunk, batch_size):
                answers[number] = answer
            done(sum(len(group.members) for group in chunk))
        assert all(answer is not None for answer in answers)
        return answers  # type: ignore[return-value]

    def _is_long(self, group: _Group) -> bool:
        """Whether a row is so long that LongRoPE has other factors: for every token of a forward that it is in."""
        length = self._layout.virtual_tokens + len(group.prompt) + len(group.longest()) - 1
        return length > self._prefixes.short_context

    def _groups(self, rows: Sequence[Row]) -> list[_Group]:
        groups: dict[tuple[tuple[int, ...], int], _Group] = {}
        for row in rows:
            if not row.prompt:
                raise LaaiError(f"{row.name}: its context has no tokens, of which the vector needs the last")
        prompts = truncated_prompts(rows, self._max_length + 1)
        for number, (row, prompt) in enumerate(zip(rows, map(tuple, prompts), strict=True)):
            key = (prompt, id(row.edit))
            group = groups.setdefault(key, _Group(prompt, row.edit, row.name, row.prefix))
            if group.members and len(row.continuation) > len(group.longest()):
                group.name = row.name
            group.members.append((number, tuple(row.continuation)))
        return list(groups.values())

    def _plain(self, groups: Sequence[_Group]) -> Iterator[tuple[int, Answer]]:
        """One right-padded row per group. Whole rows go without a mask, as the harness calls the model."""
        tokens, mask = padded([g.prompt + g.longest()[:-1] for g in groups], self._device)  # [B, T]
        cache = self._cached_prefixes(groups, left=False)
        inputs = {"input_ids": tokens} if cache is None else continued_inputs(self._layout, tokens, mask, cache)
        done = tokens.shape[1] - inputs["input_ids"].shape[1]
        spans = [(len(g.prompt) - 1 - done, len(g.longest())) for g in groups]
        with hooked(self._layout, [g.edit for g in groups], [len(g.prompt) for g in groups]):
            logits, _ = self._logits(inputs, spans)
        for group, span in zip(groups, logits, strict=True):
            scores = self._log_softmax(span, [group])[0]
            for number, continuation in group.members:
                yield number, _answer(scores[: len(continuation)], continuation)

    def _shared(self, groups: Sequence[_Group], batch_size: int) -> Iterator[tuple[int, Answer]]:
        """A left-padded pass over the prompts, then the continuations' stems against copies of its cache."""
        edits = [g.edit for g in groups]
        lengths = [len(g.prompt) for g in groups]
        tokens, mask = padded([g.prompt for g in groups], self._device, left=True)  # [G, P]
        inputs = continued_inputs(self._layout, tokens, mask, self._cached_prefixes(groups, left=True))
        last = inputs["input_ids"].shape[1] - 1
        with hooked(self._layout, edits, lengths):
            logits, prompts_cache = self._logits(inputs, [(last, 1)] * len(groups))
        first = self._log_softmax(torch.cat(logits)[:, 0], groups)  # [G, V]
        stems = [(g, stem) for g, group in enumerate(groups) for stem in group.stems()]
        tails: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}
        size = max(batch_size, _FREE_CACHE_TOKENS // tokens.shape[1])
        for start in range(0, len(stems), size):
            chunk = stems[start : start + size]
            owners = [g for g, _ in chunk]
            rows = torch.tensor(owners)  # on the CPU: the layers' caches may lie on several devices
            prompt_lengths = torch.tensor(lengths, device=self._device)[rows]
            stem_tokens = padded([stem for _, stem in chunk], self._device)
            inputs = model_inputs(self._layout, *stem_tokens, mask[rows], prompt_lengths)
            inputs |= {"past_key_values": selected(prompts_cache, rows), "use_cache": True}
            with hooked(self._layout, [edits[g] for g in owners], [lengths[g] for g in owners]):
                logits, _ = self._logits(inputs, [(0, len(stem)) for _, stem in chunk])
            for (g, stem), span in zip(chunk, logits, strict=True):
                tails[g, stem] = self._log_softmax(span, [groups[g]])[0]
        for g, group in enumerate(groups):
            for number, continuation in group.members:
                head = first[g].unsqueeze(0)
                stem = continuation[:-1]
                span = torch.cat([head, tails[g, stem].to(head.device)]) if stem else head
                yield number, _answer(span, continuation)

    def _logits(
        self, inputs: dict[str, Any], spans: Sequence[tuple[int, int]]
    ) -> tuple[list[torch.Tensor], DynamicCache | None]:
        """For each row the logits [1, n, V] at n columns, `spans` being (first, n), and the model's cache.

        Of the other columns those alone are computed that another row wants: over a large vocabulary logits take most
        of a pass.
        """
        columns = sorted({column for first, count in spans for column in range(first, first + count)})
        kept = torch.tensor(columns)  # on the CPU: the head may lie on another device
        accepted = "logits_to_keep" in inspect.signature(self._layout.model.forward).parameters
        if accepted and not self._layout.virtual_tokens:
            output = self._model(**inputs, logits_to_keep=kept)
            logits = output.logits
        else:  # PEFT's virtual tokens have columns in prompt tuning and none in prefix tuning: counted from the end
            output = self._model(**inputs)
            logits = output.logits[:, -inputs["input_ids"].shape[1] :][:, kept]
        at = {column: number for number, column in enumerate(columns)}
        found = [logits[row : row + 1, at[first] : at[first] + n] for row, (first, n) in enumerate(spans)]
        return found, getattr(output, "past_key_values", None)

    def _cached_prefixes(self, groups: Sequence[_Group], left: bool) -> DynamicCache | None:
        if self._is_long(groups[0]):  # and so are all of the batch
            return None
        return self._prefixes.cache(
            [g.prompt for g in groups], [g.edit for g in groups], [g.prefix for g in groups], left
        )

    @cached_property
    def _shares_exactly(self) -> bool:
        """Whether continuations behind cached prompts score as whole rows do, tried on a few tokens: the rows of
        recurrent states cannot be repeated, and some decoders count padding as positions.
        """
        continuations: list[tuple[int, tuple[int, ...]]] = [(0, (1, 2, 1)), (1, (2, 1, 2))]
        groups = [_Group(prompt, None, "", (), continuations) for prompt in [(2, 1, 2, 2, 1), (2, 1)]]
        alone = [one for group in groups for one in group.each()]
        try:
            shared = [score for _, (score, _) in self._shared(groups, 1)]
        except REFUSALS:
            return False
        whole = [score for group in alone for _, (score, _) in self._plain([group])]
        tolerance = rounding(self._layout)
        return all(abs(a - b) <= tolerance * abs(b) for a, b in zip(shared, whole, strict=True))

    def _log_softmax(self, logits: torch.Tensor, groups: Sequence[_Group]) -> torch.Tensor:
        """Log-softmax of logits [G, ..., V]; WorkFailed where a group under an edit has logits that are not finite."""
        check(logits, [None if group.edit is None else group.name for group in groups])
        return F.log_softmax(logits, dim=-1, dtype=self._softmax_dtype)


def truncated_prompts(rows: Sequence[Any], window: int) -> list[list[int]]:
    """The last tokens of the prompt of each row, where prompt and continuation may have `window` tokens together.

    Truncated from the left as the harness does, with one warning.

    Raises:
        LaaiError: for a continuation without tokens, or one that leaves no room for a prompt.
    """
    prompts = []
    for row in rows:
        if not row.continuation:
            raise LaaiError(
                f"{row.name}: its continuation has no tokens of its own behind its context, as where both merge "
                f"into one token; expected at least one to score"
            )
        if len(row.continuation) >= window:
            raise LaaiError(f"a continuation of {len(row.continuation)} tokens does not fit the model's {window - 1}")
        prompts.append(row.prompt[len(row.continuation) - window :])
    cut = [row for row, prompt in zip(rows, prompts, strict=True) if len(row.prompt) > len(prompt)]
    if cut:
        said = "%s: a prompt of %d tokens is too long for the model: truncated from the left, as %d of %d requests"
        logger.warning(said, cut[0].name, len(cut[0].prompt), len(cut), len(rows))
    return prompts


def _answer(span: torch.Tensor, continuation: Sequence[int]) -> Answer:
    """span [n, V]: log-probabilities at the n tokens of the continuation."""
    target = torch.tensor(continuation, device=span.device).unsqueeze(1)
    return float(span.gather(1, target).sum()), bool((span.argmax(1, keepdim=True) == target).all())


def _ordered(groups: Sequence[_Group]) -> list[_Group]:
    """The longest first, and with each the others that have its prefix."""
    by_length = sorted(groups, key=lambda g: -(len(g.prompt) + len(g.longest())))
    by_prefix: dict[tuple[int, ...], list[_Group]] = {}
    for group in by_length:
        by_prefix.setdefault(group.prefix, []).append(group)
    return [group for part in by_prefix.values() for group in part]


def _packed(groups: Sequence[_Group], batch_size: int) -> Iterator[list[_Group]]:
    """Successive groups, at least one, whose continuations fill a batch."""
    chunk: list[_Group] = []
    rows = 0
    for group in groups:
        size = len(group.stems())
        if chunk and rows + size > batch_size:
            yield chunk
            chunk, rows = [], 0
        chunk.append(group)
        rows += size
    if chunk:
        yield chunk
