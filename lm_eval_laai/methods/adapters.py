"""LoRA, IA3 and soft prompts: PEFT's own, trained on the same examples, tokens and loss as a vector.

Learning rate and number of steps, which depend on model and method, are chosen by cross-validation on the training
examples alone, with a vector's folds, held-out loss and rules (lm_eval_laai/methods/select.py). A fold's examples take
part in the forward pass of its training with weight zero, so that every step gives their loss.
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
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
from tqdm.auto import tqdm

from laai_core.data.rules import WORD_RULES, rule_named
from laai_core.encode import Batch, encode_examples, refuse_foreign
from laai_core.errors import WorkFailed
from laai_core.example import Example
from laai_core.files import unwritable
from laai_core.hooks import frozen, read_at
from laai_core.locate import Layout, locate, require_gradients
from laai_core.objective import Objective
from laai_core.record import model_facts, training_facts
from lm_eval_laai.methods.linear_modules import attention_inputs, down_projection, is_transposed
from lm_eval_laai.methods.method import ADAPTER_FACTS, ADAPTER_STEPS, middle_layer
from lm_eval_laai.methods.select import bounded, ended, held_out_by_fold, last_good

if TYPE_CHECKING:  # importing transformers takes a second
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RANK = 4  # LoRA's
VIRTUAL_TOKENS = 8
RATES = (1e-2, 3e-3, 3e-2, 1e-1)  # the usual one first, so that the others end early

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
        layer: None is the middle for `lora` and every layer for `ia3`; a `soft_prompt` has no layer.
        seed: of LoRA's random half. Everything else starts from fixed values.
        steps: of AdamW on all examples at once at a constant rate; default: chosen, at most ADAPTER_STEPS.
        task: the harness's name; a soft prompt starts from the task's description.

    Raises:
        LaaiError: on examples or a model that the method cannot take.
    """
    layout = locate(model)
    require_gradients(layout)
    config = ADAPTERS[method](layout, None if layer is None else layout.layer(layer))
    base_model = model_facts(layout)["base_model"]
    data = _Data(layout, tokenizer, examples, _columns_before(config))
    data.batch(None)  # refuses examples before the model is wrapped
    with _wrapped(layout, config, seed) as wrapped:
        if config.is_prompt_learning:
            _start_from(wrapped, tokenizer, description(task))
        trainer = _Trainer(wrapped, data)
        with tqdm(desc=method, unit=" steps", disable=not progress, leave=False) as bar:
            best, tried = trainer.chosen(steps, bar)
            losses = trainer.losses(best.lr, best.steps, bar)
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
    if layer is None:
        layers = layout.having("heads")
        layer = layers[middle_layer(len(layers))]
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


def _columns_before(config: Any) -> int:
    """Columns that an adapter puts before every row: its virtual tokens."""
    return int(config.num_virtual_tokens) if config.is_prompt_learning else 0


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

    def __init__(
        self, layout: Layout, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], before: int = 0
    ) -> None:
        self._tokenizer, self._examples, self._device = tokenizer, examples, layout.device
        self._limit = layout.max_positions and layout.max_positions - before  # `before`: as of `_columns_before`
        self._vocabulary = layout.vocabulary
        self.objective = Objective(examples)
        self.folds = held_out_by_fold(len(examples)) if len(examples) > 1 else []

    def batch(self, held_out: Sequence[bool] | None) -> Batch:
        """All examples, those held out with weight zero."""
        batch = encode_examples(
            self._tokenizer, self._examples, max_length=self._limit, held_out=held_out, vocabulary=self._vocabulary
        )
        return batch.to(self._device)


@dataclass(frozen=True)
class _Tried:
    """A learning rate, its number of steps, and the means of the bounded held-out losses there and at the lowest."""

    lr: float
    steps: int
    held_out_loss: float  # infinite where the first losses were not finite
    smallest_loss: float

    def facts(self) -> dict[str, Any]:
        """For the record; JSON has no infinity."""
        return {name: value if math.isfinite(value) else None for name, value in vars(self).items()}


class _Trainer:
    """Trains one wrapped model several times from the same start."""

    def __init__(self, wrapped: Any, data: _Data) -> None:
        self._wrapped, self._data = wrapped, data
        self._head = wrapped.get_base_model().get_output_embeddings()
        self._before = _columns_before(wrapped.active_peft_config)
        self.parameters = [p for p in wrapped.parameters() if p.requires_grad]
        self._start = [p.detach().clone() for p in self.parameters]

    def chosen(self, steps: int | None, bar: Any) -> tuple[_Tried, list[_Tried]]:
        """The rate and number of steps with the smallest held-out loss, and all rates that were tried."""
        tried: list[_Tried] = []
        best: list[float] = []  # held-out losses by steps, of the rate that reached the lowest
        for rate in RATES if self._data.folds else ():
            one, losses = self._validated(rate, steps, best, bar)
            if one.smallest_loss < min(best, default=math.inf):
                best = losses
            tried.append(one)
        usual = _Tried(RATES[0], steps or ADAPTER_STEPS, math.inf, math.inf)
        return min(tried, key=lambda one: one.smallest_loss, default=usual), tried

    def losses(self, rate: float, steps: int, bar: Any) -> list[float]:
        """Train on all examples, and return the mean losses after 0, 1, ..., `steps` steps."""
        found = []
        for losses in islice(self._training(rate), steps + 1):
            found.append(losses.mean().item())
            bar.update()
        return found

    def _validated(
        self, rate: float, steps: int | None, rival: Sequence[float], bar: Any
    ) -> tuple[_Tried, list[float]]:
        """Train every fold, one step of each in turn; with `steps`, only the loss after so many counts."""
        counted = range(1, ADAPTER_STEPS + 1) if steps is None else [steps]
        trainings = [self._training(rate, fold) for fold in self._data.folds]
        mask = torch.tensor(self._data.folds)
        held_out: list[torch.Tensor] = []  # [N]: every example is held out by one fold
        means: list[float] = []
        for number in range(counted[-1] + 1):
            losses = torch.stack([next(training) for training in trainings]).cpu()
            bar.update()
            if not losses.isfinite().all():
                break
            if number in counted:
                held_out.append(bounded(losses[mask]))
                means.append(held_out[-1].mean().item())
                if ended(means, rival):
                    break
        if not means:
            return _Tried(rate, counted[-1], math.inf, math.inf), means
        best = last_good(torch.stack(held_out))
        return _Tried(rate, counted[best - 1], means[best - 1], min(means)), means

    def _training(self, rate: float, held_out: Sequence[bool] | None = None) -> Iterator[torch.Tensor]:
        """The losses [N] of all examples after 0, 1, ... steps on those that are not held out.

        Trainings that take turns disturb each other in nothing: each has its own copy of the parameters.
        """
        batch = self._data.batch(held_out)
        own = [start.clone().requires_grad_() for start in self._start]
        optimizer = torch.optim.AdamW(own, lr=rate, weight_decay=0.0)
        while True:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, own, strict=True):
                    parameter.copy_(value)
            losses = self._per_example(batch)
            (losses * batch.share).sum().backward()
            for parameter, value in zip(self.parameters, own, strict=True):
                value.grad, parameter.grad = parameter.grad, None
            yield losses.detach()
            optimizer.step()

    def _per_example(self, batch: Batch) -> torch.Tensor:
        # One logit predicts all one-token options of an example.
        (row, column), logit = torch.stack([batch.row, batch.column]).unique(dim=1, return_inverse=True)
        with read_at(self._head, row, column + self._before):
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            logits = self._wrapped(**inputs, use_cache=False).logits.squeeze(0)
        scores = logits.float().log_softmax(-1)[logit, batch.token]
        logprobs = scores.new_zeros(len(batch.example)).index_add(0, batch.continuation, scores)
        return self._data.objective.per_example(logprobs)


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
    refuse_foreign(ids, len(embedding.weight))
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
        raise unwritable(folder, error) from None
