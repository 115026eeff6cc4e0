"""The paper's method and the baselines it is measured against, trained on the same examples by one entry."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from laai_core.errors import LaaiError
from laai_core.example import Split
from laai_core.hub import SUFFIX
from laai_core.locate import locate
from laai_core.train import train
from lm_eval_laai.methods.adapters import ADAPTERS, is_adapter, train_adapter
from lm_eval_laai.methods.function_vector import function_vector
from lm_eval_laai.methods.in_context_vector import in_context_vector

METHODS = ("laai", "fv", "icv", *ADAPTERS)
# Which of the arguments that not every method has a method takes.
OPTIONS = {"laai": ("l1", "group", "steps"), "fv": ("heads",), "icv": (), **dict.fromkeys(ADAPTERS, ("steps",))}


def default_layer(count: int) -> int:
    """The layer of `laai` and `lora` when none is given, for a model of `count` layers: the middle one.

    There vectors that stand for a task act best in models of many sizes (Hendel, Geva & Globerson 2023, "In-context
    learning creates task vectors"), and on the reference model too. The paper's layer is 3 of 32; `--layer auto`
    measures.
    """
    return count // 2


def fit(
    method: str,
    model: Any,
    tokenizer: Any,
    split: Split,
    *,
    layer: int | None = None,
    seed: int = 0,
    output: str | os.PathLike[str],
    l1: float | None = None,
    group: float | None = None,
    penalty_scale: str = "relative",
    steps: int | None = None,
    heads: int | None = None,
    progress: bool = True,
) -> Path:
    """Train one method on `split.train` and write what it learnt; the model is left exactly as it was.

    Args:
        method: one of METHODS; docs/methods.md says what each does.
        model: a causal language model of transformers. Only `laai` takes one under an adapter.
        layer: 0-based, negative from the end. Default: the middle for `laai` and `lora`, a third of the depth for
            `fv`, every layer for `icv` and `ia3`. A `soft_prompt` has none.
        seed: of what the method draws itself: prompts, initial weights. `split` has drawn the examples.
        output: the .safetensors file (laai, fv, icv), or the folder (lora, ia3, soft_prompt).
        l1, group, penalty_scale: of `laai`, see `laai_core.train`.
        steps: evaluations of `laai`, optimiser steps of an adapter. `fv` and `icv` take none.
        heads: of `fv`: how many heads it sums. Default: the share its paper takes.
        progress: show a tqdm bar on stderr.

    Returns:
        `output`, for hf-laai's `intervention=` or the harness's `peft=`.

    Raises:
        LaaiError: on a bad argument, or examples or a model that the method cannot take, before anything is written.
    """
    path = Path(output).expanduser()
    check(method, path, layer, {"l1": l1, "group": group, "steps": steps, "heads": heads})
    if method != "laai" and hasattr(model, "get_base_model"):
        raise LaaiError(f"the model is under a PEFT adapter: expected the model itself for the method {method}")
    task = f"laai_{split.name}"
    if layer is None and method in ("laai", "lora"):
        layer = default_layer(len(locate(model).blocks))
    if method in ADAPTERS:
        train_adapter(method, model, tokenizer, split.train, path, layer, seed, steps, task, progress)
        return path
    if method == "laai":
        assert layer is not None
        given: dict[str, Any] = {
            name: value for name, value in (("l1", l1), ("group", group), ("steps", steps)) if value is not None
        }
        result = train(
            model,
            tokenizer,
            split.train,
            layer,
            penalty_scale=penalty_scale,
            seed=seed,
            task=task,
            progress=progress,
            **given,
        )
        intervention = result.intervention
    elif method == "fv":
        intervention = function_vector(model, tokenizer, split.train, layer, seed, heads, task, progress)
    else:
        intervention = in_context_vector(model, tokenizer, split.train, layer, seed, task)
    intervention.save(path)
    return path


def check(method: str, path: Path, layer: int | None, options: Mapping[str, Any]) -> None:
    """LaaiError for what of the arguments of `fit` is wrong whatever the model and the examples are."""
    if method not in METHODS:
        raise LaaiError(f"unknown method {method!r}: expected one of {', '.join(METHODS)}")
    for name, value in options.items():
        if value is not None and name not in OPTIONS[method]:
            raise LaaiError(f"{name} is {value}, but the method {method} has none: leave it out")
    if options["steps"] is not None and options["steps"] < 1:
        raise LaaiError(f"steps is {options['steps']}: expected at least one")
    if method == "soft_prompt" and layer is not None:
        raise LaaiError(f"layer is {layer}, but a soft prompt stands before the text, in no layer: leave it out")
    if method in ADAPTERS and path.suffix == SUFFIX:
        raise LaaiError(f"output is {path}: expected a folder, which is what PEFT reads")
    if method in ADAPTERS and path.exists() and not is_adapter(path):
        raise LaaiError(f"{path} exists and is no adapter: expected a new folder, or an adapter's to replace")
    if method not in ADAPTERS and path.suffix != SUFFIX:
        raise LaaiError(f"output is {path}: expected a name that ends in {SUFFIX}")
