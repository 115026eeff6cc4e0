"""Choose penalties, or the layer, by cross-validation on the training examples alone: no test item is ever looked at.

Every fold leaves some of the N examples out, trains on the others and is scored on those left out. The folds of one
setting are rows of one batch. Penalties go from strong to weak, each fold starting from its own last vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from laai_core.data import Example
from laai_core.errors import LaaiError
from laai_core.evaluate import task_losses
from laai_core.intervention import Intervention
from laai_core.locate import locate
from laai_core.train import Job, train_many

# Shares of the smallest penalty under which zero is the answer.
SHARES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005)
STEPS = 40  # evaluations a fold and setting; warm starts make them few
MAX_FOLDS = 10


@dataclass(frozen=True)
class Tried:
    """One setting, and the mean task loss of examples left out of the training."""

    layer: int
    l1: float
    group: float
    validation_loss: float


@dataclass(frozen=True)
class Choice:
    """The setting with the smallest validation loss, and all that were tried."""

    layer: int
    l1: float
    group: float
    tried: list[Tried]


def choose_penalty(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    layer: int,
    l1: float | None = None,
    group: float | None = None,
    **options: Any,
) -> Choice:
    """Choose l1 and group, or the one that is None, at one layer.

    Args:
        l1, group: fixed where given.
        options: of `train_many`: penalty_scale, stop, site, path, ...

    Raises:
        LaaiError: with fewer than two examples, and as `train` does.
    """
    layer = locate(model, options.get("projection")).layer(layer)
    folds = _folds(examples)
    # One evaluation at zero tells where the path begins.
    (probe,) = train_many(model, tokenizer, [Job(examples, layer, 0.0, 0.0)], steps=1, **options)
    starts: list[Intervention | None] = [None] * len(folds)
    tried = []
    for share in SHARES:
        weight = share * probe.critical_penalty
        setting = (weight if l1 is None else l1, weight if group is None else group)
        losses, starts = _validated(model, tokenizer, examples, folds, layer, setting, starts, options)
        tried.append(Tried(layer, *setting, losses))
    return _best(tried)


def choose_layer(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    l1: float = Job.l1,
    group: float = Job.group,
    layers: Sequence[int] | None = None,
    **options: Any,
) -> Choice:
    """Choose among `layers` (default: all) under one penalty, by default relative to each layer's activation.

    Arguments and errors as for `choose_penalty`.
    """
    layout = locate(model, options.get("projection"))
    candidates = range(len(layout.blocks)) if layers is None else [layout.layer(layer) for layer in layers]
    folds = _folds(examples)
    starts: list[Intervention | None] = [None] * len(folds)
    tried = [
        Tried(layer, l1, group, _validated(model, tokenizer, examples, folds, layer, (l1, group), starts, options)[0])
        for layer in candidates
    ]
    return _best(tried)


def _validated(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    folds: list[list[int]],
    layer: int,
    setting: tuple[float, float],
    starts: Sequence[Intervention | None],
    options: dict[str, Any],
) -> tuple[float, list[Intervention | None]]:
    """Mean loss of the examples left out, and each fold's vector."""
    jobs = [
        Job([e for n, e in enumerate(examples) if n not in fold], layer, *setting, start=start)
        for fold, start in zip(folds, starts, strict=True)
    ]
    trained = [r.intervention for r in train_many(model, tokenizer, jobs, steps=STEPS, **options)]
    left_out = [[examples[n] for n in fold] for fold in folds]
    kept = {key: options[key] for key in ("stop", "whitespace", "projection", "batch_size") if key in options}
    losses = task_losses(model, tokenizer, list(zip(trained, left_out, strict=True)), **kept)
    return sum(map(sum, losses)) / len(examples), list(trained)


def _folds(examples: Sequence[Example]) -> list[list[int]]:
    """Numbers of the examples each fold leaves out: one each up to ten examples, then ten folds."""
    if len(examples) < 2:
        raise LaaiError(f"cross-validation needs at least two examples, got {len(examples)}: give the setting itself")
    count = min(len(examples), MAX_FOLDS)
    return [list(range(start, len(examples), count)) for start in range(count)]


def _best(tried: list[Tried]) -> Choice:
    best = min(tried, key=lambda one: one.validation_loss)
    return Choice(best.layer, best.l1, best.group, tried)
