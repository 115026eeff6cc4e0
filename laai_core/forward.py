"""Losses and gradients of several runs at once. A run is one vector with its own examples; its rows see only it."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

from laai_core.apply import Edit, hooked
from laai_core.encode import Batch
from laai_core.errors import LaaiError
from laai_core.locate import Layout
from laai_core.objective import Objective

logger = logging.getLogger(__name__)

Scores = tuple[torch.Tensor, torch.Tensor]  # numbers of scored tokens [m], their log-probabilities [m]


class Forward(ABC):
    """Evaluates the task loss of all runs.

    Args:
        batch: the rows of all runs' examples.
        batch_size: rows per forward; default all. Halved by itself when memory runs out; never changes the result.
    """

    def __init__(self, layout: Layout, batch: Batch, layer: int, site: str, batch_size: int | None = None) -> None:
        self._layout, self._layer, self._site = layout, layer, site
        self._batch = batch.to(model_device(layout))
        self._batch_size = batch_size or len(batch.prompt_lengths)

    @abstractmethod
    def _logits(self, rows: Sequence[int], edits: list[Edit | None]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [len(rows), T, V] under one edit a row, and the column [len(rows)] of each row's first column."""

    def loss_and_gradient(
        self, vectors: torch.Tensor, objective: Objective, active: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the runs in `active`: mean task losses [A], gradients [A, D], and losses per example [N] of all examples.

        `vectors` [A, D] float32, one for each active run.
        """
        while True:
            try:
                return self._evaluate(vectors, objective, active)
            except Exception as error:
                if self._batch_size < 2 or not should_reduce_batch_size(error):
                    raise
                self._batch_size = (self._batch_size + 1) // 2
                logger.warning("memory ran out: going on with %d rows a forward", self._batch_size)

    def _evaluate(
        self, vectors: torch.Tensor, objective: Objective, active: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        deltas = vectors.detach().requires_grad_()
        chunks = list(self._chunks(active))
        runs = torch.tensor(list(active), device=self._batch.run_of_example.device)
        if len(chunks) == 1:
            with torch.enable_grad():
                logprobs = self._continuations([self._token_logprobs(deltas, active, chunks[0])])
                per_example = objective.per_example(logprobs)
                losses = self._run_means(per_example)[runs.to(per_example.device)]
                (gradients,) = torch.autograd.grad(losses.sum(), deltas)
            return losses.detach(), gradients, per_example.detach()
        # The loss may couple rows (kl over options), so first all log-probabilities, then chunk by chunk again with
        # the loss's derivative by them.
        with torch.no_grad():
            logprobs = self._continuations([self._token_logprobs(deltas, active, chunk) for chunk in chunks])
        with torch.enable_grad():
            logprobs.requires_grad_()
            per_example = objective.per_example(logprobs)
            losses = self._run_means(per_example)[runs.to(per_example.device)]
            (weights,) = torch.autograd.grad(losses.sum(), logprobs)
            gradients = torch.zeros_like(deltas)
            for chunk in chunks:
                index, scores = self._token_logprobs(deltas, active, chunk)
                weighted = (scores * weights[self._batch.continuation[index]]).sum()
                gradients += torch.autograd.grad(weighted, deltas)[0]
        return losses.detach(), gradients, per_example.detach()

    @torch.no_grad()
    def continuation_logprobs(self, vectors: torch.Tensor) -> torch.Tensor:
        """[C] log p(continuation | prompt) with `vectors` [runs, D] applied, one for every run."""
        active = range(len(vectors))
        return self._continuations([self._token_logprobs(vectors, active, chunk) for chunk in self._chunks(active)])

    def _chunks(self, active: Sequence[int]) -> Iterator[list[int]]:
        wanted = set(active)
        rows = [row for row, run in enumerate(self._batch.run_of_row) if run in wanted]
        for start in range(0, len(rows), self._batch_size):
            yield rows[start : start + self._batch_size]

    def _token_logprobs(self, deltas: torch.Tensor, active: Sequence[int], rows: Sequence[int]) -> Scores:
        """Which scored tokens lie in `rows`, and their log-probabilities, float32."""
        batch = self._batch
        edits = {run: Edit({self._layer: deltas[i]}, self._site) for i, run in enumerate(active)}
        logits, first = self._logits(rows, [edits[batch.run_of_row[row]] for row in rows])
        place = torch.full((len(batch.prompt_lengths),), -1, device=batch.row.device)
        place[torch.tensor(rows, device=batch.row.device)] = torch.arange(len(rows), device=batch.row.device)
        index = (place[batch.row] >= 0).nonzero().squeeze(1)
        row = place[batch.row[index]]
        column = batch.column[index] - first[row]
        chosen = logits[row.to(logits.device), column.to(logits.device)].float()
        token = batch.token[index].to(chosen.device).unsqueeze(1)
        return index, chosen.log_softmax(-1).gather(1, token).squeeze(1)

    def _continuations(self, parts: list[Scores]) -> torch.Tensor:
        """Token log-probabilities summed by continuation: [C]; those of inactive runs stay 0."""
        index = torch.cat([i for i, _ in parts])
        scores = torch.cat([s for _, s in parts])
        total = scores.new_zeros(len(self._batch.example))
        return total.index_add(0, self._batch.continuation[index].to(scores.device), scores)

    def _run_means(self, per_example: torch.Tensor) -> torch.Tensor:
        """Losses [N] to means by run [runs]."""
        run = self._batch.run_of_example.to(per_example.device)
        counts = torch.bincount(run)
        return per_example.new_zeros(len(counts)).index_add(0, run, per_example) / counts


class PlainForward(Forward):
    """Full hooked forwards: the reference every faster path is tested against."""

    def _logits(self, rows: Sequence[int], edits: list[Edit | None]) -> tuple[torch.Tensor, torch.Tensor]:
        batch = self._batch
        part = torch.tensor(rows, device=batch.input_ids.device)
        with hooked(self._layout, edits, [batch.prompt_lengths[row] for row in rows]):
            logits = self._layout.model(
                input_ids=batch.input_ids[part], attention_mask=batch.attention_mask[part], use_cache=False
            ).logits
        return logits, torch.zeros_like(part)

    @torch.no_grad()
    def activation_rms(self) -> list[float]:
        """For each run, the root mean square of the site's activation over its examples' last prompt tokens."""
        batch = self._batch
        module = self._layout.module(self._layer, self._site)
        squares: list[torch.Tensor] = []

        def keep(value: torch.Tensor) -> None:
            ends = torch.tensor([batch.prompt_lengths[row] for row in rows], device=value.device) - 1
            # OPT's feed-forward sees all rows of the batch in one.
            activation = value.reshape(len(ends), -1, value.shape[-1])
            squares.append(activation[torch.arange(len(ends)), ends].float().square().mean(1).cpu())

        if self._site == "heads":
            handle = module.register_forward_pre_hook(lambda module, args: keep(args[0]))
        else:
            handle = module.register_forward_hook(
                lambda module, args, output: keep(output[0] if isinstance(output, tuple) else output)
            )
        runs = range(len(torch.bincount(batch.run_of_example)))
        try:
            for rows in self._chunks(runs):
                part = torch.tensor(rows, device=batch.input_ids.device)
                self._layout.model(
                    input_ids=batch.input_ids[part], attention_mask=batch.attention_mask[part], use_cache=False
                )
        finally:
            handle.remove()
        # An example's options may fill several rows; each of them holds its prompt.
        owners = batch.example[batch.continuation].tolist()
        row_of_example = dict(zip(owners, batch.row.tolist(), strict=True))
        by_example = torch.cat(squares)[[row_of_example[n] for n in range(len(row_of_example))]]
        values = self._run_means(by_example).sqrt().tolist()
        if min(values) == 0:
            raise LaaiError(f"layer {self._layer}, site {self._site} is all zero: use --penalty-scale absolute")
        return values


def model_device(layout: Layout) -> torch.device:
    """Where the model takes its tokens."""
    device = layout.model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device  # offloaded: accelerate moves the inputs


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Evaluation mode and no gradients for the weights, put back as they were at the end."""
    training = [m for m in model.modules() if m.training]
    learning = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in learning:
            parameter.requires_grad_(True)
