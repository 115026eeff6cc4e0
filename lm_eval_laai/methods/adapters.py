"""LoRA, IA3 and soft prompts: PEFT's own, trained on the same examples, tokens and loss as a vector.

The learning rate, which depends on model and method, is chosen by cross-validation on the training examples alone.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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

if TYPE_CHECKING:  # importing transformers takes a second
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RANK = 4  # LoRA's
VIRTUAL_TOKENS = 8
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
FOLDS = 5  # of the cross-validation; two would choose rates for training on five of ten examples

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
        steps: of AdamW on all examples at once, its rate falling linearly to zero; default ADAPTER_STEPS.
        task: the harness's name; a soft prompt starts from the task's description.

    Raises:
        LaaiError: on examples or a model that the method cannot take.
    """
    steps = ADAPTER_STEPS if steps is None else steps
    layout = locate(model)
    config = ADAPTERS[method](layout, None if layer is None else layout.layer(layer))
    base_model = model_facts(layout, first_attention(layout))["base_model"]
    data = _Data(layout, tokenizer, examples)
    with _wrapped(layout, config, seed) as wrapped:
        if config.is_prompt_learning:
            _start_from(wrapped, tokenizer, description(task))
        trainer = _Trainer(wrapped, data, steps)
        with tqdm(
            total=(len(RATES) * len(data.folds) + 1) * steps, desc=method, disable=not progress, leave=False
        ) as bar:
            tried = {rate: trainer.validation_loss(rate, bar) for rate in RATES} if data.folds else {}
            rate = min(tried, key=lambda rate: tried[rate]) if tried else RATES[len(RATES) // 2]
            before, after = trainer.run(rate, data.everything, bar)
        if not math.isfinite(after):
            raise WorkFailed(f"{method}: the loss is not finite after {steps} steps at learning rate {rate}")
        training = {
            **training_facts(layout, examples, seed),
            "loss": data.loss,
            "parameters": sum(p.numel() for p in trainer.parameters),
            "optimizer": "adamw",
            "steps": steps,
            "lr": rate,
            "tried": [{"lr": r, "validation_loss": v if math.isfinite(v) else None} for r, v in tried.items()],
            "task_loss_before": before,
            "task_loss": after,
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
        self.loss = Objective(examples).name
        self.everything = list(range(len(examples)))
        folds = [self.everything[start::FOLDS] for start in range(min(FOLDS, len(examples)))]
        self.folds = folds if len(folds) > 1 else []

    def batch(self, numbers: Sequence[int]) -> tuple[Batch, Objective]:
        """Some of the examples."""
        chosen = [self._examples[number] for number in numbers]
        return encode_examples(self._tokenizer, chosen, max_length=self._limit).to(self._device), Objective(chosen)


class _Trainer:
    """Trains one wrapped model several times from the same start."""

    def __init__(self, wrapped: Any, data: _Data, steps: int) -> None:
        self._wrapped, self._data, self._steps = wrapped, data, steps
        self.parameters = [p for p in wrapped.parameters() if p.requires_grad]
        self._start = [p.detach().clone() for p in self.parameters]

    def run(self, rate: float, numbers: Sequence[int], bar: Any) -> tuple[float, float]:
        """Train on the examples `numbers`; returns their mean loss before and after."""
        with torch.no_grad():
            for parameter, start in zip(self.parameters, self._start, strict=True):
                parameter.copy_(start)
        batch, objective = self._data.batch(numbers)
        optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / self._steps)
        first = math.nan
        for step in range(self._steps):
            optimizer.zero_grad()
            loss = self._loss(batch, objective)
            loss.backward()
            optimizer.step()
            schedule.step()
            first = loss.item() if step == 0 else first
            bar.update()
        with torch.no_grad():
            return first, float(self._loss(batch, objective))

    def validation_loss(self, rate: float, bar: Any) -> float:
        """Mean loss of held-out examples, one training per fold; infinite where a training failed."""
        total = 0.0
        for fold in self._data.folds:
            self.run(rate, sorted(set(self._data.everything) - set(fold)), bar)
            with torch.no_grad():
                total += len(fold) * float(self._loss(*self._data.batch(fold)))
        return total / len(self._data.everything) if math.isfinite(total) else math.inf

    def _loss(self, batch: Batch, objective: Objective) -> torch.Tensor:
        logits = self._wrapped(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        logits = logits[:, logits.shape[1] - batch.input_ids.shape[1] :]  # a soft prompt's columns come first
        chosen = logits[batch.row, batch.column].float().log_softmax(-1)
        scores = chosen.gather(1, batch.token.unsqueeze(1)).squeeze(1)
        logprobs = scores.new_zeros(len(batch.example)).index_add(0, batch.continuation, scores)
        return objective.per_example(logprobs).mean()


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
