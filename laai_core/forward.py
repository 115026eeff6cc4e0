"""Losses and gradients of several runs at once. A run is one vector with its own examples, the rows it is added to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch.autograd.function import once_differentiable

from laai_core.apply import Edit, hooked
from laai_core.capture import Captured
from laai_core.encode import Batch
from laai_core.errors import LaaiError
from laai_core.hooks import hidden_of, recorded
from laai_core.locate import Layout
from laai_core.memory import until_it_fits
from laai_core.objective import Objective

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """Batch rows that share a forward, and the logits read from it.

    Columns count from the first token given to the model.
    """

    inputs: Any  # return value of `Forward._inputs`
    lengths: list[int]  # [rows] tokens of each prompt
    end: torch.Tensor  # [rows] the column of each prompt's last token
    owner: torch.Tensor  # [rows] index among the active runs
    row: torch.Tensor  # [u] the row of each logit that is read
    column: torch.Tensor  # [u] the column of each logit that is read
    scored: torch.Tensor  # [m] indices of scored tokens in the batch
    logit: torch.Tensor  # [m] index among the u logits of each scored token's logit


class Forward(ABC):
    """Evaluates the task loss of all runs.

    Args:
        batch: the rows of all runs' examples.
        batch_size: rows per forward; default all. Halved when memory runs out; never changes the result.
        captured: record a step's operations, and play them as long as the same runs are evaluated.
    """

    _begins_at_end = False  # whether the model is given the tokens from each prompt's last on, not all

    def __init__(
        self,
        layout: Layout,
        batch: Batch,
        layer: int,
        site: str,
        batch_size: int | None = None,
        position: str = "last",
        captured: bool = False,
    ) -> None:
        self._layout, self._layer, self._site, self._position = layout, layer, site, position
        self._batch = batch.to(layout.device)
        self._batch_size = batch_size or len(batch.prompt_lengths)
        self._last: tuple[Any, list[Part]] = (None, [])
        self._captures = captured
        self._recorded: tuple[Objective, Captured] | None = None  # a step over the parts of `_last`

    @abstractmethod
    def _inputs(self, rows: list[int]) -> Any:
        """The model inputs of some batch rows, which `_logits` finds in `Part.inputs`."""

    @abstractmethod
    def _logits(self, part: Part, edit: Edit) -> torch.Tensor:
        """The logits [u, V] of a part, with an edit applied to its rows."""

    def _edit(self, vectors: torch.Tensor) -> Edit:
        """The edit that adds vectors [rows, D], one for each row of a part."""
        return Edit({self._layer: vectors}, self._site, self._position)

    def loss_and_gradient(
        self, vectors: torch.Tensor, objective: Objective, active: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean task losses [A] and gradients [A, D] of the runs in `active`, and losses [N] of all examples.

        `vectors` [A, D] float32, one for each active run.
        """
        return self._split_until_it_fits(lambda: self._evaluate(vectors, objective, active))

    def _split_until_it_fits(self, call: Callable[[], T]) -> T:
        """The result of `call`, repeated with half the rows per forward each time memory runs out."""

        def with_rows(rows: int) -> T:
            self._batch_size = rows
            return call()

        return until_it_fits(with_rows, self._batch_size)

    def _evaluate(
        self, vectors: torch.Tensor, objective: Objective, active: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        deltas, parts = vectors.detach().to(self._batch.row.device), self._parts(active)
        if not self._captures:
            return self._step(deltas, parts, objective, active)
        if self._recorded is None or self._recorded[0] is not objective:
            step = partial(self._step, parts=parts, objective=objective, active=active)
            tolerance = 1e-2 if self._layout.is_half else 1e-3  # attention on a GPU then sums in changing orders
            self._recorded = objective, Captured(step, deltas, tolerance)
        losses, gradients, per_example = self._recorded[1](deltas)
        return losses, gradients, per_example

    def _step(
        self, vectors: torch.Tensor, parts: Sequence[Part], objective: Objective, active: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`loss_and_gradient` over the parts of the active runs."""
        deltas = vectors.detach().requires_grad_()
        # The loss may couple rows (kl over options): first all log-probabilities, then the gradient part by part,
        # weighted with the loss's derivative with respect to each log-probability. Several parts run twice, as memory
        # holds the activations of one.
        with torch.enable_grad():
            by_row = [deltas[part.owner] for part in parts]
        with torch.set_grad_enabled(len(parts) == 1):
            scores = [self._token_logprobs(*each) for each in zip(by_row, parts, strict=True)]
        with torch.enable_grad():
            logprobs = self._continuations(parts, scores).detach().requires_grad_()
            per_example = objective.per_example(logprobs)
            losses = self._run_means(per_example)[torch.tensor(list(active), device=per_example.device)]
            (weights,) = torch.autograd.grad(losses.sum(), logprobs)
            gradients = torch.zeros_like(deltas)
            for vectors_of_rows, part, score in zip(by_row, parts, scores, strict=True):
                score = score if score.requires_grad else self._token_logprobs(vectors_of_rows, part)
                continuation = self._batch.continuation[part.scored].to(weights.device)
                gradients += torch.autograd.grad((score * weights[continuation]).sum(), deltas)[0]
        return losses.detach(), gradients, per_example.detach()

    @torch.no_grad()
    def continuation_logprobs(self, vectors: torch.Tensor) -> torch.Tensor:
        """[C] log p(continuation | prompt) with `vectors` [R, D] applied, one for every run."""
        deltas = vectors.to(self._batch.row.device)

        def evaluate() -> torch.Tensor:
            parts = self._parts(range(len(vectors)))
            return self._continuations(parts, [self._token_logprobs(deltas[part.owner], part) for part in parts])

        return self._split_until_it_fits(evaluate)

    @torch.no_grad()
    def token_logprobs(self, vectors: torch.Tensor, rows: list[int], runs: Sequence[int]) -> torch.Tensor:
        """Log-probabilities [m] of the scored tokens of `rows`, which belong to `runs`, under `vectors` [runs, D]."""
        deltas = vectors.to(self._batch.row.device)

        def evaluate() -> torch.Tensor:
            part = self._part(rows, runs)
            return self._token_logprobs(deltas[part.owner], part)

        return self._split_until_it_fits(evaluate)

    @torch.no_grad()
    def activation_rms(self) -> list[float]:
        """For each run, the root mean square of the site's activation at its last prompt tokens. LaaiError if 0."""
        runs = range(int(self._batch.run_of_example.max()) + 1)
        width = torch.Size(self._layout.shape(self._layer, self._site)).numel()
        zeros = torch.zeros(len(runs), width, device=self._batch.row.device)
        squares = self._split_until_it_fits(
            lambda: torch.cat([self._mean_squares(part, zeros[part.owner]) for part in self._parts(runs)])
        )
        # An example's options may fill several rows; each of them holds its prompt.
        owners = self._batch.example[self._batch.continuation].tolist()
        row_of_example = dict(zip(owners, self._batch.row.tolist(), strict=True))
        values = self._run_means(squares[[row_of_example[n] for n in range(len(row_of_example))]]).sqrt().tolist()
        if min(values) == 0:
            raise LaaiError(f"layer {self._layer}, site {self._site} is all zero: use --penalty-scale absolute")
        return values

    def _parts(self, active: Sequence[int]) -> list[Part]:
        """The rows of the active runs, `batch_size` at a time. Cached until the runs or the batch size change."""
        key = (tuple(active), self._batch_size)
        if self._last[0] != key:
            self._last, self._recorded = (None, []), None  # frees the old inputs before new ones are made
            wanted = set(active)
            rows = [row for row, run in enumerate(self._batch.run_of_row) if run in wanted]
            size = self._batch_size
            self._last = key, [self._part(rows[start : start + size], active) for start in range(0, len(rows), size)]
        return self._last[1]

    @torch.no_grad()
    def _part(self, rows: list[int], active: Sequence[int]) -> Part:
        batch = self._batch
        lengths = torch.tensor(batch.prompt_lengths)[rows]
        first = (lengths - 1) * self._begins_at_end
        within = torch.full((len(batch.prompt_lengths),), -1)
        within[rows] = torch.arange(len(rows))
        row = within[batch.row.cpu()]
        scored = (row >= 0).nonzero().squeeze(1)
        row = row[scored]
        column = batch.column.cpu()[scored] - first[row]
        # One logit predicts all one-token options of an example.
        logits, logit = torch.stack([row, column]).unique(dim=1, return_inverse=True)
        number = {run: i for i, run in enumerate(active)}
        owner = torch.tensor([number[batch.run_of_row[row]] for row in rows])
        tensors = [t.to(batch.row.device) for t in (lengths - 1 - first, owner, *logits, scored, logit)]
        return Part(self._inputs(rows), lengths.tolist(), *tensors)

    def _token_logprobs(self, vectors: torch.Tensor, part: Part) -> torch.Tensor:
        """Log-probabilities of a part's scored tokens [m], float32, with vectors [rows, D] applied."""
        logits = self._logits(part, self._edit(vectors))
        token = self._batch.token[part.scored]
        return _Logprobs.apply(logits, part.logit.to(logits.device), token.to(logits.device))

    def _mean_squares(self, part: Part, vectors: torch.Tensor) -> torch.Tensor:
        """Mean squares [rows] of the site's activation at a part's last prompt tokens."""
        module = {self._layer: self._layout.module(self._layer, self._site)}
        with recorded(module, keep=hidden_of, inputs=self._site == "heads") as seen:
            self._logits(part, self._edit(vectors))
        (value,) = seen[self._layer]
        activation = value.reshape(len(part.lengths), -1, value.shape[-1])  # OPT's feed-forward flattens rows
        ends = part.end.to(value.device)
        last = self._layout.whole(activation[torch.arange(len(ends)), ends], self._layer, self._site)
        return last.float().square().mean(1).cpu()

    def _continuations(self, parts: Sequence[Part], scores: Sequence[torch.Tensor]) -> torch.Tensor:
        """Token log-probabilities summed by continuation: [C]; continuations of inactive runs have 0."""
        scored, found = torch.cat([part.scored for part in parts]), torch.cat(list(scores))
        total = found.new_zeros(len(self._batch.example))
        return total.index_add(0, self._batch.continuation[scored].to(found.device), found)

    def _run_means(self, per_example: torch.Tensor) -> torch.Tensor:
        """Losses [N] to means by run [runs], over the examples that are not held out."""
        run, share = (tensor.to(per_example.device) for tensor in (self._batch.run_of_example, self._batch.share))
        shares = torch.where(share > 0, share * per_example, 0)  # a held-out loss may be infinite
        return per_example.new_zeros(int(run.max()) + 1).index_add(0, run, shares)


class _Logprobs(torch.autograd.Function):
    """Float32 log-probabilities [m] of `token` [m] under the rows `row` [m] of `logits` [u, V].

    `backward` overwrites the saved log-probabilities [u, V]. Autograd would allocate two more tensors of that size,
    which with many rows and a small model takes as long as some layers.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, row: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        logprobs = logits.float().log_softmax(-1)
        ctx.save_for_backward(logprobs, row, token)
        ctx.dtype = logits.dtype
        return logprobs[row, token]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weights: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logprobs, row, token = ctx.saved_tensors
        of_row = weights.new_zeros(len(logprobs)).index_add(0, row, weights)
        derivative = logprobs.exp_().mul_(-of_row.unsqueeze(1))
        return derivative.index_put_((row, token), weights, accumulate=True).to(ctx.dtype), None, None


class PlainForward(Forward):
    """Full hooked forwards: the reference for `ReplayForward`, and the only forward for all positions."""

    def _inputs(self, rows: list[int]) -> dict[str, Any]:
        ids, mask = self._batch.input_ids[rows], self._batch.attention_mask[rows]
        return {"input_ids": ids, "attention_mask": mask, "use_cache": False}

    def _logits(self, part: Part, edit: Edit) -> torch.Tensor:
        with hooked(self._layout, edit, part.lengths):
            logits = self._layout.model(**part.inputs).logits
        return logits[part.row.to(logits.device), part.column.to(logits.device)]
