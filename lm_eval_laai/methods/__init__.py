"""The paper's method and the baselines it is measured against, trained on the same examples by one entry.

A method is one entry of METHODS. A method's libraries are imported when it trains, so that listing the methods loads
neither torch nor PEFT.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laai_core.data.split import Split
from laai_core.devices import cpu_by_default
from laai_core.errors import LaaiError
from lm_eval_laai.methods.method import Method, Training
from lm_eval_laai.tasks import recorded_task

if TYPE_CHECKING:  # importing transformers takes a second
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["LAAI", "METHODS", "fit"]


def _train_laai(given: Training, **options: Any) -> None:
    from lm_eval_laai.methods.select import train_chosen

    result, _ = train_chosen(
        *given.on, given.layer, seed=given.seed, task=given.task, progress=given.progress, **options
    )
    result.intervention.save(given.path)


def _train_function_vector(given: Training, **options: Any) -> None:
    from lm_eval_laai.methods.function_vector import function_vector

    found = function_vector(*given.on, given.layer, given.seed, task=given.task, progress=given.progress, **options)
    found.save(given.path)


def _train_in_context_vector(given: Training) -> None:
    from lm_eval_laai.methods.in_context_vector import in_context_vector

    in_context_vector(*given.on, given.layer, given.seed, given.task).save(given.path)


def _adapter(name: str, title: str, passes: float, **facts: Any) -> Method:
    """One of PEFT's methods."""

    def train(given: Training, steps: int | None = None) -> None:
        from lm_eval_laai.methods.adapters import train_adapter

        train_adapter(name, *given.on, given.path, given.layer, given.seed, steps, given.task, given.progress)

    return Method(name, title, train, passes, ("steps",), writes_adapter=True, **facts)


# The fields of Job and Settings that are flags of `laai train`, by name: importing them takes a second (transformers).
_OF_A_JOB = "l1 group lr start"
_SHARED = "steps tolerance batch_size projection penalty_scale optimizer forward whitespace stop site position"
LAAI = Method("laai", "LAAI", _train_laai, passes=28.0, options=tuple(f"{_OF_A_JOB} {_SHARED}".split()))
METHODS = {
    method.name: method
    for method in (
        LAAI,
        Method("fv", "function vector", _train_function_vector, passes=15.0, options=("heads",)),
        Method("icv", "ICV", _train_in_context_vector, passes=0.2),
        _adapter("lora", "LoRA", passes=42.0),
        _adapter("ia3", "IA3", passes=35.0),
        _adapter("soft_prompt", "Soft prompt", passes=60.0, takes_layer=False),
    )
}


@cpu_by_default
def fit(
    method: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    *,
    layer: int | None = None,
    seed: int = 0,
    output: str | os.PathLike[str],
    progress: bool = True,
    **options: Any,
) -> Path:
    """Train one method on `split.train` and write what it learnt; the model is left exactly as it was.

    Args:
        method: a name in METHODS; docs/methods.md says what each does.
        model: a causal language model of transformers. Only `laai` takes one under an adapter or in shards.
        layer: 0-based, negative from the end. Default: chosen by cross-validation for `laai`, the middle for
            `lora`, a third of the depth for `fv`, every layer for `icv` and `ia3`. A `soft_prompt` has none.
        seed: of what the method draws itself: prompts, initial weights. `split` has drawn the examples.
        output: the .safetensors file (laai, fv, icv), or the folder (lora, ia3, soft_prompt).
        progress: show a tqdm bar on stderr.
        options: those of `METHODS[method].options`; None is the method's own default.

    Returns:
        `output`, for hf-laai's `intervention=` or the harness's `peft=`.

    Raises:
        LaaiError: on a bad argument, or examples or a model that the method cannot take, before anything is written.
    """
    if method not in METHODS:
        raise LaaiError(f"unknown method {method!r}: expected one of {', '.join(METHODS)}")
    path, chosen = Path(output).expanduser(), METHODS[method]
    chosen.check(path, layer, options)
    if chosen is not LAAI and hasattr(model, "get_base_model"):
        raise LaaiError(f"the model is under a PEFT adapter: expected the model itself for the method {method}")
    if chosen is not LAAI and (getattr(model, "_tp_size", None) or 1) > 1:
        raise LaaiError(f"the model is sharded by tensor parallelism: expected a whole one for the method {method}")
    given = {name: value for name, value in options.items() if value is not None}
    task = recorded_task(split.name)
    chosen.train(Training(model, tokenizer, split.train, task, path, layer, seed, progress), **given)
    return path
