"""The task loss that training minimises, of interventions on any examples, without the harness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from laai_core.encode import encode_examples
from laai_core.errors import LaaiError
from laai_core.example import Example
from laai_core.forward import PlainForward
from laai_core.hooks import frozen
from laai_core.intervention import Intervention
from laai_core.locate import locate
from laai_core.objective import Objective

if TYPE_CHECKING:  # importing transformers takes a second
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def task_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[Intervention, Sequence[Example]]],
    batch_size: int | None = None,
) -> list[list[float]]:
    """For each (intervention, examples) the task loss of every example, all in one batch.

    The interventions write to one layer and site, the same for all, at position `last`, as `train` makes them.
    """
    layout = locate(model)
    targets = {(tuple(iv.layers), iv.site, iv.position, iv.operation) for iv, _ in pairs}
    if len(targets) != 1:
        raise LaaiError(f"expected interventions at one place, got {len(targets)}")
    ((layers, site, position, operation),) = targets
    if len(layers) != 1 or (position, operation) != ("last", "add"):
        raise LaaiError("expected interventions that add to one layer at the last prompt token")
    vectors = torch.stack([iv.scale * iv.for_model(layout)[layout.layer(layers[0])] for iv, _ in pairs])
    examples = [example for _, part in pairs for example in part]
    owners = [number for number, (_, part) in enumerate(pairs) for _ in part]
    batch = encode_examples(tokenizer, examples, runs=owners, vocabulary=layout.vocabulary)
    with frozen(layout.model):
        forward = PlainForward(layout, batch, layout.layer(layers[0]), site, batch_size)
        losses = Objective(examples).per_example(forward.continuation_logprobs(vectors)).tolist()
    return [[loss for loss, owner in zip(losses, owners, strict=True) if owner == n] for n in range(len(pairs))]
