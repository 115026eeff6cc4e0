"""Provenance recorded in an intervention's file: the model, the examples, the software."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from laai_core.example import Example
from laai_core.locate import Layout
from laai_core.version import __version__


def model_facts(layout: Layout, layer: int = 0) -> dict[str, Any]:
    """Name and dimensions of the model; head_dim is that of `layer`, or of the first layer that has attention."""
    config = layout.model.config
    layers = [layer, *range(len(layout.blocks))]
    with_heads = next((one for one in layers if not isinstance(layout.projections[one], str)), None)
    name = getattr(config, "_name_or_path", "") or type(layout.model).__name__
    return {
        # Without the folder, which means nothing on another machine and would give equal trainings different bytes.
        "base_model": Path(name).resolve().name if Path(name).exists() else name,
        "model_type": config.model_type,
        "num_hidden_layers": len(layout.blocks),
        "num_attention_heads": layout.num_heads,
        "head_dim": None if with_heads is None else layout.shape(with_heads, "heads")[1],
        "hidden_size": layout.hidden_size,
    }


def training_facts(
    layout: Layout, examples: Sequence[Example], seed: int, stopped: str | None = None
) -> dict[str, Any]:
    """Training facts common to all methods; `stopped`: why training ended before its budget, or None."""
    rendering = examples[0].rendering
    return {
        **({} if rendering is None else {"rendering": dict(rendering)}),
        "stopped": stopped,
        "seed": seed,
        "n_train": len(examples),
        "examples_sha256": examples_sha256(examples),
        "dtype": str(layout.model.dtype).removeprefix("torch."),
        "versions": {
            "laai": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def examples_sha256(examples: Sequence[Example]) -> str:
    """SHA-256 of the training examples in order, without their renderings."""
    rows = [[e.prompt, e.target, e.options, e.distribution] for e in examples]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()
