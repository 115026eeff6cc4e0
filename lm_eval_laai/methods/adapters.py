"""LoRA, IA3 and soft prompts: PEFT's own, trained on the same examples, tokens and loss as a vector.

Learning rate and number of steps, which depend on model and method, are chosen by cross-validation on the training
examples alone. A fold's examples take part in the forward pass of its training with weight zero, so that every step
gives their loss.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
from tqdm.auto import tqdm

from laai_core.data.rules import WORD_RULES, rule_named
from laai_core.encode import Batch, encode_examples
from laai_core.errors import LaaiError, WorkFailed
from laai_core.example import Example
from laai_core.hooks import frozen
from laai_core.locate import Layout, locate
from laai_core.objective import Objective
from laai_core.record import model_facts, training_facts
from lm_eval_laai.methods.linear_modules import attention_inputs, down_projection, first_attention, is_transposed
from lm_eval_laai.methods.method import ADAPTER_FACTS, ADAPTER_STEPS
from lm_eval_laai.methods.select import held_out_by_fold

if TYPE_CHECKING:  # importing transformers takes a second
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RANK = 4  # LoRA's
VIRTUAL_TOKENS = 8
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
PATIENCE = 10  # steps without a smaller held-out loss

ANY_TASK = "the answer to this question"


def train_adapter(
    method: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    folder: Path,
    layer: int | None = None,
    seed: int = 0,
    steps: int | None = None,
    task: str | None = None,
    progress: bool = False,
) -> None:
    """Train an adapter and write it to `folder` in PEFT's format, whole or not at all; the model stays as it was.

    Args:
        method: a name in ADAPTERS.
        examples: with targets (loss `nll`) or with options and distributions (loss `kl`), as for a vector.
        layer: required for `lora`; None puts `ia3` on every layer; a `soft_prompt` has no layer.
        seed: of LoRA's random half. Everything else starts from fixed values.
        steps: of AdamW on all examples at once at a constant rate; default: chosen, at most ADAPTER_STEPS.
        task: the harness's name; a soft prompt starts from the task's description.

    Raises:
        LaaiError: on examples or a model that the method cannot take.
    """
    layout = locate(model)
    config = ADAPTERS[method](layout, None if layer is None else layout.layer(layer))
    base_model = model_facts(layout, first_attention(layout))["base_model"]
    data = _Data(layout, tokenizer, examples)
    with _wrapped(layout, config, seed) as wrapped:
        if config.is_prompt_learning:
            _start_from(wrapped, tokenizer, description(task))
        trainer = _Trainer(wrapped, data)
        with tqdm(desc=method, unit=" steps", disable=not progress, leave=False) as bar:
            tried = [trainer.validated(rate, steps, bar) for rate in RATES] if data.folds else []
            usual = _Tried(RATES[len(RATES) // 2], steps or ADAPTER_STEPS, math.inf)
            best = min(tried, key=lambda one: one.validation_loss, default=usual)
            losses = [trained_on for trained_on, _ in trainer.losses(best.lr, best.steps, bar)]
        if not math.isfinite(losses[-1]):
            raise WorkFailed(f"{method}: the loss is not finite after {best.steps} steps at learning rate {best.lr}")
        training = {
            **training_facts(layout, examples, seed),
            "loss": data.objective.name,
            "parameters": sum(p.numel() for p in trainer.parameters),
            "optimizer": "adamw",
            "steps": best.steps,
            "lr": best.lr,
            "tried": [one.facts() for one in tried],
            "task_loss_before": losses[0],
            "task_loss": losses[-1],
        }
        wrapped.peft_config["default"].base_model_name_or_path = base_model
        _save(wrapped, folder, {"method": method, "task": task, "base_model": base_model, "training": training})


def _lora(layout: Layout, layer: int | None) -> peft.PeftConfig:
    assert layer is not None
    modules = attention_inputs(layout, layer, ("query", "value"))
    transposed = is_transposed(layout, modules[0])
    return peft.LoraConfig(r=RANK, target_modules=modules, fan_in_fan_out=transposed, task_type="CAUSAL_LM")


def _ia3(layout: Layout, layer: int | None) -> peft.PeftConfig:
    layers = range(len(layout.blocks)) if layer is None else [layer]
    # Hybrid models have blocks without attention; their feed-forwards take part all the same.
    with_attention = [n for n in layers if not isinstance(layout.projections[n], str)]
    inputs = [path for n in with_attention for path in attention_inputs(layout, n, ("key", "value"))]
    downs = [down_projection(layout, n) for n in layers]
    return peft.IA3Config(
        target_modules=[*inputs, *downs],
        feedforward_modules=downs,
        fan_in_fan_out=is_transposed(layout, downs[0]),
        task_type="CAUSAL_LM",
    )


def _soft_prompt(layout: Layout, layer: int | None) -> peft.PeftConfig:
    return peft.PromptTuningConfig(num_virtual_tokens=VIRTUAL_TOKENS, task_type="CAUSAL_LM")


# PEFT's configuration of each method on a model, for one layer or (None) all; modules by their full paths.
ADAPTERS: dict[str, Callable[[Layout, int | None], peft.PeftConfig]] = {
    "lora": _lora,
    "ia3": _ia3,
    "soft_prompt": _soft_prompt,
}


def description(task: str | None) -> str:
    """A task's rule in words."""
    rule = WORD_RULES.get(rule_named(task or ""))
    return ANY_TASK if rule is None else rule.description


class _Data:
    """The examples with the tokens and the loss of a vector's training. A single example has no folds."""

    def __init__(self, layout: Layout, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> None:
        self._tokenizer, self._examples = tokenizer, examples
        self._limit, self._device = layout.max_positions, layout.device
        self.objective = Objective(examples)
        self.folds = held_out_by_fold(len(examples)) if len(examples) > 1 else []

    def batch(self, held_out: Sequence[bool] | None) -> Batch:
        """All examples, those held out with weight zero."""
        batch = encode_examples(self._tokenizer, self._examples, max_length=self._limit, held_out=held_out)
        return batch.to(self._device)


@dataclass(frozen=True)
class _Tried:
    """A learning rate: the smallest mean loss of held-out examples, and after how many steps."""

    lr: float
    steps: int
    validation_loss: float  # infinite where a training failed

    def facts(self) -> dict[str, Any]:
        """For the record; JSON has no infinity."""
        return vars(self) | ({} if math.isfinite(self.validation_loss) else {"validation_loss": None})


class _Trainer:
    """Trains one wrapped model several times from the same start."""

    def __init__(self, wrapped: Any, data: _Data) -> None:
        self._wrapped, self._data = wrapped, data
        self.parameters = [p for p in wrapped.parameters() if p.requires_grad]
        self._start = [p.detach().clone() for p in self.parameters]

    def losses(
        self, rate: float, steps: int, bar: Any, held_out: Sequence[bool] | None = None, patience: int | None = None
    ) -> list[tuple[float, float]]:
        """Train, and return the mean losses after 0, 1, ... steps: of the examples trained on, of those held out.

        With `patience`, training ends when the held-out loss has not fallen for as many steps.
        """
        with torch.no_grad():
            for parameter, start in zip(self.parameters, self._start, strict=True):
                parameter.copy_(start)
        batch = self._data.batch(held_out)
        optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=0.0)
        found: list[tuple[float, float]] = []
        while True:
            last = len(found) == steps
            with torch.set_grad_enabled(not last):
                losses = self._per_example(batch)
                loss = (losses * batch.share).sum()
            # The mean of no example is NaN, which nothing reads.
            found.append((loss.item(), losses.detach()[batch.share == 0].mean().item()))
            if last or (patience is not None and _ended([out for _, out in found], patience)):
                return found
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.update()

    def validated(self, rate: float, steps: int | None, bar: Any) -> _Tried:
        """Train on every fold's other examples; without `steps`, as long as a fold's own loss falls."""
        limit, patience = (ADAPTER_STEPS, PATIENCE) if steps is None else (steps, None)
        curves = []
        for fold in self._data.folds:
            curve = [held_out for _, held_out in self.losses(rate, limit, bar, fold, patience)]
            curves.append([sum(fold) * loss for loss in curve + curve[-1:] * (limit + 1 - len(curve))])
        means = [sum(losses) / len(self._data.folds[0]) for losses in zip(*curves, strict=True)]
        numbers = range(1, limit + 1) if steps is None else [steps]
        loss, number = min((means[number] if math.isfinite(means[number]) else math.inf, number) for number in numbers)
        return _Tried(rate, number, loss)

    def _per_example(self, batch: Batch) -> torch.Tensor:
        logits = self._wrapped(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        logits = logits[:, logits.shape[1] - batch.input_ids.shape[1] :]  # a soft prompt's columns come first
        chosen = logits[batch.row, batch.column].float().log_softmax(-1)
        scores = chosen.gather(1, batch.token.unsqueeze(1)).squeeze(1)
        logprobs = scores.new_zeros(len(batch.example)).index_add(0, batch.continuation, scores)
        return self._data.objective.per_example(logprobs)


def _ended(losses: Sequence[float], patience: int) -> bool:
    """Whether the smallest of the losses is not among the last `patience`, or the last is not finite."""
    return not math.isfinite(losses[-1]) or min(losses) not in losses[-patience:]


@contextmanager
def _wrapped(layout: Layout, config: peft.PeftConfig, seed: int) -> Iterator[Any]:
    """Within the block, the model under a new adapter; the model is restored however the block ends."""
    model = layout.model
    children = [(module, dict(module._modules)) for module in model.modules()]
    attributes = set(vars(model))  # PEFT adds `peft_config`
    settings = dict(vars(model.config))  # PEFT sets `pretraining_tp`
    device = layout.device
    with frozen(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            with warnings.catch_warnings():  # PEFT uses a deprecated name
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
                wrapped = peft.get_peft_model(model, config).eval()
            yield wrapped
        finally:
            for module, before in children:
                module._modules.clear()
                module._modules.update(before)
            for name in set(vars(model)) - attributes:
                delattr(model, name)
            vars(model.config).update(settings)


@torch.no_grad()
def _start_from(wrapped: Any, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Initialise the virtual tokens with the text's first tokens, the text repeated where it is too short.

    PEFT's own initialisation loads a tokenizer by name, and writes that name into the adapter.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    ids = (ids * math.ceil(VIRTUAL_TOKENS / len(ids)))[:VIRTUAL_TOKENS]
    embedding = wrapped.get_base_model().get_input_embeddings()
    prompt = wrapped.prompt_encoder["default"].embedding.weight
    prompt.copy_(embedding(torch.tensor(ids, device=embedding.weight.device)))


def _save(wrapped: Any, folder: Path, facts: dict[str, Any]) -> None:
    """Put the adapter's folder in place whole or not at all."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
            new = Path(scratch, "new")
            wrapped.save_pretrained(str(new), save_embedding_layers=False)
            (new / "README.md").unlink(missing_ok=True)  # PEFT's empty template, which names the model's path
            (new / ADAPTER_FACTS).write_text(
                json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8"
            )
            # safetensors makes private files; an adapter is an ordinary one
            (new / peft.utils.SAFETENSORS_WEIGHTS_NAME).chmod((new / ADAPTER_FACTS).stat().st_mode)
            old = Path(scratch, "old")
            try:
                if folder.exists():
                    os.replace(folder, old)
                os.replace(new, folder)
            finally:  # Ctrl-C may come between the two
                if old.exists() and not folder.exists():
                    os.replace(old, folder)
    except OSError as error:
        raise LaaiError(f"cannot write {folder}: {error.strerror or error}") from None
