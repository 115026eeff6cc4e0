"""Train one Δ on a few examples: the paper's eq. 2, by full forwards and backwards of the hooked model."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm

from laai_core.apply import Edit, hooked
from laai_core.data import Example
from laai_core.encode import WHITESPACE, Batch, encode_examples
from laai_core.errors import LaaiError
from laai_core.intervention import Intervention
from laai_core.locate import Layout, locate, verify_causal
from laai_core.objective import SMOOTHING, Objective
from laai_core.optimize import OPTIMIZERS, Run, Step, minimise
from laai_core.penalty import Penalty

PENALTY_SCALES = ("relative", "absolute")


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns. `objective` and `stationarity` are those of the returned intervention."""

    intervention: Intervention
    history: list[Step]
    objective: float
    stationarity: float
    stopped: str | None  # why training ended before its steps, if it did


def train(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    layer: int,
    l1: float = 0.001,
    group: float = 0.001,
    penalty_scale: str = "relative",
    optimizer: str = "prox",
    steps: int = 100,
    lr: float = 0.05,
    tolerance: float | None = None,
    seed: int = 0,
    stop: str = "\n",
    site: str = "heads",
    whitespace: str = "refuse",
    projection: str | None = None,
    batch_size: int | None = None,
    task: str | None = None,
    progress: bool = False,
) -> TrainResult:
    """Minimise mean task loss + l1 * |x|_1 + group * sum_h |x_h|_2 over one vector at one layer.

    Args:
        model: a causal language model of transformers; its weights and mode are left as they were.
        examples: with targets (loss `nll`, eq. 3) or with options and distributions (loss `kl`, eq. 4).
        layer: 0-based, negative from the end.
        l1, group: the paper's gamma and lambda.
        penalty_scale: `absolute` penalises Δ itself (x = Δ, the paper's). `relative` writes Δ = rms * x, rms the root
            mean square of the site's activation at the last prompt tokens, so that one setting fits any model.
        optimizer: `prox` (exact zeros) or `adam` (with `lr`).
        steps: model evaluations, exactly, unless `tolerance` (share of the first stationarity residual) is given.
        seed: recorded in the file; training itself draws no random numbers.
        stop: appended to every target, so that generation ends where the answer ends.
        whitespace: see `laai_core.encode.encode_pair`.
        projection: see `laai_core.locate.locate`.
        batch_size: rows per forward; default all. Changes memory, not the result.
        progress: show a tqdm bar on stderr.

    Raises:
        LaaiError: on bad arguments or data, before anything runs.
    """
    check_arguments(l1, group, penalty_scale, optimizer, steps, lr, tolerance, whitespace, batch_size)
    layout = locate(model, projection)
    layer = layout.layer(layer)
    shape = layout.shape(layer, site)
    objective = Objective(examples)
    max_length = getattr(layout.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    batch = encode_examples(tokenizer, examples, stop, max_length, whitespace)
    with _frozen(layout.model):
        verify_causal(layout)
        forward = PlainForward(layout, batch, layer, site, batch_size)
        rms = forward.activation_rms() if penalty_scale == "relative" else 1.0
        groups = shape if len(shape) == 2 else (1, *shape)

        def evaluate(x: torch.Tensor) -> tuple[float, torch.Tensor]:
            loss, gradient = forward.loss_and_gradient(rms * x.flatten(), objective)
            return loss, rms * gradient.view(groups)

        with tqdm(total=steps, desc=f"train layer {layer}", disable=not progress, leave=False) as bar:
            run = Run(evaluate, Penalty(l1, group), steps, _reporter(bar))
            best = minimise(run, torch.zeros(groups), optimizer, lr, tolerance)
    residual = run.penalty.stationarity(best.x, best.gradient)
    training = {
        "loss": objective.name,
        "epsilon": SMOOTHING,
        "l1": l1,
        "group": group,
        "penalty_scale": penalty_scale,
        "rms": rms,
        "optimizer": optimizer,
        "lr": lr if optimizer == "adam" else None,
        "steps": len(run.history),
        "seed": seed,
        "n_train": len(examples),
        "stop": stop,
        "examples_sha256": examples_sha256(examples),
        "objective": best.objective,
        "task_loss": best.loss,
        "stationarity": residual,
        "sparsity": float((best.x == 0).float().mean()),
        "dtype": str(layout.model.dtype).removeprefix("torch."),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    metadata = {**model_facts(layout, layer, site), "task": task, "method": "laai", "training": training}
    intervention = Intervention({layer: (rms * best.x).view(shape)}, site=site, metadata=metadata)
    return TrainResult(intervention, run.history, best.objective, residual, run.stopped)


class PlainForward:
    """Loss and gradient by full hooked forwards: the reference every faster path is tested against."""

    def __init__(self, layout: Layout, batch: Batch, layer: int, site: str, batch_size: int | None = None) -> None:
        self._layout, self._layer, self._site = layout, layer, site
        device = layout.model.get_input_embeddings().weight.device
        self._batch = batch.to("cpu" if device.type == "meta" else device)
        rows = len(batch.prompt_lengths)
        size = batch_size or rows
        self._chunks = [range(start, min(start + size, rows)) for start in range(0, rows, size)]

    def loss_and_gradient(self, vector: torch.Tensor, objective: Objective) -> tuple[float, torch.Tensor]:
        """Mean task loss with `vector` [D] at the last prompt tokens, and its gradient [D], both float32.

        With several chunks the continuations' log-probabilities are computed first, then each chunk is run again
        with the loss's derivative by them: the loss may couple rows (kl over options).
        """
        delta = vector.detach().requires_grad_()
        chunks = self._chunks
        with torch.enable_grad():
            if len(chunks) == 1:
                losses = objective.per_example(self._continuations([self._token_logprobs(delta, chunks[0])]))
                loss = losses.mean()
                (gradient,) = torch.autograd.grad(loss, delta)
                return float(loss.detach()), gradient.float()
            with torch.no_grad():
                logprobs = self._continuations([self._token_logprobs(delta, chunk) for chunk in chunks])
            logprobs.requires_grad_()
            loss = objective.per_example(logprobs).mean()
            (weights,) = torch.autograd.grad(loss, logprobs)
            gradient = torch.zeros_like(delta)
            for chunk in chunks:
                index, scores = self._token_logprobs(delta, chunk)
                weighted = (scores * weights[self._batch.continuation[index]]).sum()
                gradient += torch.autograd.grad(weighted, delta)[0]
        return float(loss.detach()), gradient.float()

    @torch.no_grad()
    def continuation_logprobs(self, vector: torch.Tensor) -> torch.Tensor:
        """[C] log p(continuation | prompt) with `vector` [D] applied."""
        return self._continuations([self._token_logprobs(vector, chunk) for chunk in self._chunks])

    @torch.no_grad()
    def activation_rms(self) -> float:
        """Root mean square of the site's activation over the last prompt tokens, one an example."""
        batch = self._batch
        module = self._layout.module(self._layer, self._site)
        seen: list[torch.Tensor] = []

        def keep(value: torch.Tensor) -> None:
            ends = torch.tensor(batch.prompt_lengths[part], device=value.device) - 1
            # OPT's feed-forward sees all rows of the batch in one.
            rows = value.reshape(len(ends), -1, value.shape[-1])
            seen.append(rows[torch.arange(len(ends), device=value.device), ends].float())

        if self._site == "heads":
            handle = module.register_forward_pre_hook(lambda module, args: keep(args[0]))
        else:
            handle = module.register_forward_hook(
                lambda module, args, output: keep(output[0] if isinstance(output, tuple) else output)
            )
        try:
            for chunk in self._chunks:
                part = slice(chunk.start, chunk.stop)
                self._layout.model(
                    input_ids=batch.input_ids[part], attention_mask=batch.attention_mask[part], use_cache=False
                )
        finally:
            handle.remove()
        # An example's options may fill several rows; each of them holds its prompt.
        owners = batch.example[batch.continuation].tolist()
        row_of = dict(zip(owners, batch.row.tolist(), strict=True))
        rms = float(torch.cat(seen)[list(row_of.values())].square().mean().sqrt())
        if rms == 0:
            raise LaaiError(f"layer {self._layer}, site {self._site} is all zero: use --penalty-scale absolute")
        return rms

    def _token_logprobs(self, delta: torch.Tensor, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
        """Which scored tokens lie in `rows`, and their log-probabilities, float32."""
        batch = self._batch
        index = ((batch.row >= rows.start) & (batch.row < rows.stop)).nonzero().squeeze(1)
        part = slice(rows.start, rows.stop)
        with hooked(self._layout, Edit({self._layer: delta}, self._site), batch.prompt_lengths[part]):
            logits = self._layout.model(
                input_ids=batch.input_ids[part], attention_mask=batch.attention_mask[part], use_cache=False
            ).logits
        chosen = logits[batch.row[index] - rows.start, batch.column[index]].float()
        return index, chosen.log_softmax(-1).gather(1, batch.token[index].to(chosen.device).unsqueeze(1)).squeeze(1)

    def _continuations(self, parts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Token log-probabilities summed by continuation: [C]."""
        index = torch.cat([i for i, _ in parts])
        scores = torch.cat([s for _, s in parts])
        total = scores.new_zeros(len(self._batch.example))
        return total.index_add(0, self._batch.continuation[index].to(scores.device), scores)


def model_facts(layout: Layout, layer: int, site: str) -> dict[str, Any]:
    """What a file records of the model (DESIGN: the file)."""
    config = layout.model.config
    return {
        "base_model": getattr(config, "_name_or_path", "") or type(layout.model).__name__,
        "model_type": config.model_type,
        "num_hidden_layers": len(layout.blocks),
        "num_attention_heads": layout.num_heads,
        "head_dim": layout.shape(layer, "heads")[1],
        "hidden_size": layout.hidden_size,
    }


def examples_sha256(examples: Sequence[Example]) -> str:
    """Identity of the training examples, in order."""
    rows = [[e.prompt, e.target, e.options, e.distribution] for e in examples]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()


class _frozen:
    """Evaluation mode and no gradients for the weights, put back as they were at the end."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    def __enter__(self) -> None:
        self._training = [m for m in self._model.modules() if m.training]
        self._learning = [p for p in self._model.parameters() if p.requires_grad]
        self._model.eval()
        for parameter in self._learning:
            parameter.requires_grad_(False)

    def __exit__(self, *error: object) -> None:
        for module in self._training:
            module.training = True
        for parameter in self._learning:
            parameter.requires_grad_(True)


def _reporter(bar: Any) -> Callable[[Step], None]:
    def report(step: Step) -> None:
        bar.update()
        bar.set_postfix(objective=f"{step.objective:.4f}", heads=step.active_heads)

    return report


def check_arguments(
    l1: float,
    group: float,
    penalty_scale: str,
    optimizer: str,
    steps: int,
    lr: float,
    tolerance: float | None,
    whitespace: str,
    batch_size: int | None,
) -> None:
    """LaaiError for an argument of `train` that no model and no data could make good."""
    for name, value in (("l1", l1), ("group", group)):
        if not 0 <= value < float("inf"):
            raise LaaiError(f"{name} is {value}: expected a finite number, 0 or above")
    for name, positive in (("lr", lr), ("tolerance", tolerance)):
        if positive is not None and not 0 < positive < float("inf"):
            raise LaaiError(f"{name} is {positive}: expected a finite number above 0")
    for name, count in (("steps", steps), ("batch_size", batch_size)):
        if count is not None and count < 1:
            raise LaaiError(f"{name} is {count}: expected at least one")
    for name, word, allowed in (
        ("penalty_scale", penalty_scale, PENALTY_SCALES),
        ("optimizer", optimizer, OPTIMIZERS),
        ("whitespace", whitespace, WHITESPACE),
    ):
        if word not in allowed:
            raise LaaiError(f"unknown {name} {word!r}: expected one of {', '.join(allowed)}")
