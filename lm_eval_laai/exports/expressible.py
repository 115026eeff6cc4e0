"""Which interventions another tool can express: sites, positions and operations with a counterpart there.

Every tool here adds vectors. They differ in where: llama.cpp and repeng at the output of a block, at every token;
steering-vectors at the output of a block, its attention or its feed-forward, at every token; pyvene at these, at the
input of the attention's output projection too, and at tokens that are named with each call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from laai_core.errors import LaaiError
from laai_core.intervention import Intervention
from laai_core.locate import Layout


@dataclass(frozen=True)
class Target:
    """A tool: its name, the positions it can act at, and its name for each of our sites that it has."""

    name: str
    positions: tuple[str, ...]
    sites: dict[str, str]


def scaled(intervention: Intervention, target: Target) -> dict[int, torch.Tensor]:
    """{layer: vector [D], scale folded in}, or LaaiError naming what `target` has no counterpart for."""
    if intervention.operation != "add":
        raise LaaiError(f"{target.name} adds vectors: operation {intervention.operation!r} cannot be exported to it")
    if intervention.site not in target.sites:
        why = ""
        if intervention.site == "heads":  # W_o·Δ passes the same block's feed-forward, and in some models a norm
            why = (
                "; nor can W_o·Δ, which enters before the block's feed-forward and is no vector at the block's output"
            )
        raise LaaiError(f"{target.name} has no site {intervention.site!r}: expected {' or '.join(target.sites)}{why}")
    if intervention.position not in target.positions:
        raise LaaiError(
            f"{target.name} cannot act at position {intervention.position!r} alone: expected "
            f"{' or '.join(target.positions)}"
        )
    total = intervention * 1.0
    return {layer: total.vector(layer).flatten() for layer in total.layers}


def attention_output(vectors: dict[int, torch.Tensor], layout: Layout) -> dict[int, torch.Tensor]:
    """{layer: W_o·Δ [hidden]} for {layer: Δ [H * d]} at the input of the attention's output projection W_o.

    The same computation at the projection's output, which is linear: W_o (x + Δ) = W_o x + W_o Δ. In float32.

    Raises:
        LaaiError: the model has no such layer or width, or its projection is no plain linear layer.
    """
    return {layer: _projected(vector, layout.module(layer, "heads"), layer) for layer, vector in vectors.items()}


def _projected(vector: torch.Tensor, projection: Any, layer: int) -> torch.Tensor:
    weight = projection.weight.data
    # A quantised weight is a tensor of another class, or of integers.
    known = isinstance(projection, torch.nn.Linear | Conv1D)
    if not (known and type(weight) is torch.Tensor and weight.is_floating_point()):
        raise LaaiError(
            f"layer {layer}: the attention's output projection is a {type(projection).__name__}, {weight.dtype}, "
            f"expected a plain linear layer: W_o·Δ needs its weight"
        )
    if isinstance(projection, Conv1D):
        weight = weight.T
    if weight.shape[1] != len(vector):
        raise LaaiError(f"layer {layer}: the vector has {len(vector)} entries, this model expects {weight.shape[1]}")
    return weight.float().cpu() @ vector
