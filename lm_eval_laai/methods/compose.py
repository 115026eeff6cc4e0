"""Compose interventions into one, by the paper's "Add" or by rules beyond the paper."""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from laai_core.apply import Edit
from laai_core.devices import cpu_by_default
from laai_core.encode import Batch, Whitespace, encode_examples
from laai_core.errors import LaaiError, WorkFailed
from laai_core.example import Example
from laai_core.forward import Forward, PlainForward
from laai_core.hooks import frozen
from laai_core.intervention import Intervention
from laai_core.locate import Layout, locate, require_gradients, verify_causal
from laai_core.objective import SMOOTHING, Objective
from laai_core.record import training_facts
from lm_eval_laai.chats import common_rendering

if TYPE_CHECKING:  # importing transformers takes a second
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TIES_DENSITY = 0.2  # share of coordinates that survive trimming: the value of the TIES paper, untuned
FIT_EVALUATIONS = 50  # of the loss and its gradient, at most; two weights take about a dozen


@cpu_by_default
def compose(
    parents: Sequence[Intervention],
    method: str = "sum",
    weights: Sequence[float] | None = None,
    task: str | None = None,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    examples: Sequence[Example] | None = None,
    seed: int = 0,
    stop: str = "\n",
    whitespace: Whitespace = "refuse",
    projection: str | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Intervention:
    """One intervention from several that add, at the same site and position. Layers are united.

    Each parent counts with its own scale; a layer that a parent does not have is zero there. At every layer, with
    parents v_i and weights w_i (default: all 1):

    - `sum`: sum_i w_i v_i, the paper's "Add".
    - `mean`: the sum divided by sum_i w_i.
    - `normalised`: sum_i w_i n v_i / |v_i|, n the mean of the parents' norms, so that no parent drowns another (the
      code of Rimsky et al. 2023, arXiv 2312.06681, scales vectors so). A parent that is zero there is left out of n.
    - `ties`: each w_i v_i keeps the largest 20 % of its coordinates; each coordinate elects the sign of the sum, and
      is the mean of those that have this sign (Yadav et al. 2023, arXiv 2306.01708).
    - `fit`: the sum, with the w_i that minimise the mean task loss (eq. 2, no penalty) of examples of the composed
      task, by L-BFGS from 1.

    Args:
        task: of the result, recorded in its metadata.
        model, tokenizer, examples: for `fit` alone, as are all arguments after these; see `train`.

    Returns:
        An intervention of scale 1. Its metadata has the `composition`: the method, and SHA-256, task and weight of
        every parent, and the rendering of their training prompts, where it is the same; after `fit`, `training`
        records the examples and the fit.

    Raises:
        LaaiError: parents that do not fit each other, or arguments that do not fit the method.
    """
    if method not in METHODS:
        raise LaaiError(f"unknown method {method!r}: expected one of {', '.join(METHODS)}")
    if len(parents) < 2:
        raise LaaiError(f"{len(parents)} intervention to compose: expected at least two")
    total = reduce(operator.add, parents)  # refuses parents that do not fit each other
    stacks = {layer: torch.stack([_scaled(p, layer, total) for p in parents]) for layer in total.layers}
    for size in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
        found = {int(value) for parent in parents if isinstance(value := parent.metadata.get(size), int)}
        if len(found) > 1:
            raise LaaiError(f"the interventions are for models of {size} {sorted(found)}: expected those of one model")
    models = {str(name) for parent in parents if (name := parent.metadata.get("base_model")) is not None}
    if len(models) > 1:
        logger.warning("the interventions were made for different models: %s", ", ".join(sorted(models)))
    factors = _checked_weights(weights, method, len(parents))
    training: dict[str, Any] = {}
    if method == "fit":
        if model is None or tokenizer is None or not examples:
            raise LaaiError("method fit needs a model, its tokenizer and examples of the composed task")
        layout = locate(model, projection)
        require_gradients(layout)
        total.for_model(layout)  # refuses what does not fit the model
        batch = encode_examples(
            tokenizer, examples, stop, layout.max_positions, whitespace, vocabulary=layout.vocabulary
        )
        forward = _WeightedForward(layout, batch, stacks, total, batch_size)
        factors, training = _fit(layout, forward, Objective(examples), factors, progress)
        training |= {"stop": stop, **training_facts(layout, examples, seed)}
    elif model is not None or tokenizer is not None or examples is not None:
        raise LaaiError(f"method {method} uses no model, tokenizer or examples: only fit does")
    composition: dict[str, Any] = {
        "method": method,
        "parents": [
            {"sha256": parent.sha256, "task": parent.metadata.get("task"), "weight": weight}
            for parent, weight in zip(parents, factors, strict=True)
        ],
    }
    if (rendering := common_rendering(parents)) is not None:
        composition["rendering"] = rendering
    if method == "ties":
        composition["density"] = TIES_DENSITY
    metadata = {**total.metadata, "task": task, "method": "compose", "composition": composition}
    if training:
        metadata["training"] = training
    each = torch.tensor(factors, dtype=torch.float32)
    vectors = {layer: METHODS[method](stack, each) for layer, stack in stacks.items()}
    return Intervention(vectors, total.site, total.position, metadata=metadata)


def _scaled(parent: Intervention, layer: int, total: Intervention) -> torch.Tensor:
    """A parent's scaled vector at a layer of the union; zero where the parent has none."""
    if layer in parent.layers:
        return parent.scale * parent.vector(layer)
    return torch.zeros_like(total.vector(layer))


def _checked_weights(weights: Sequence[float] | None, method: str, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    if method == "fit":
        raise LaaiError("method fit finds the weights itself: expected none")
    if len(weights) != count:
        raise LaaiError(f"{len(weights)} weights for {count} interventions: expected one each")
    if not all(math.isfinite(weight) for weight in weights):
        raise LaaiError(f"weights are {list(weights)}: expected finite numbers")
    if method == "mean" and sum(weights) == 0:
        raise LaaiError(f"weights {list(weights)} sum to 0: there is no mean")
    return [float(weight) for weight in weights]


# The methods, at one layer: parents [P, ...] and weights [P] to one vector.


def _sum(stack: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.tensordot(weights, stack, 1)


def _mean(stack: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return _sum(stack, weights) / weights.sum()


def _normalised(stack: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    norms = stack.flatten(1).norm(dim=1)
    present = norms > 0
    if not bool(present.any()):
        return torch.zeros_like(stack[0])
    return _sum(stack[present], weights[present] * norms[present].mean() / norms[present])


def _ties(stack: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    from peft.utils.merge_utils import ties  # seconds to import, and only this needs it

    # Weighted here, not by peft after the signs are elected: a parent of negative weight votes with its negative.
    weighted = [weight * vector for weight, vector in zip(weights, stack, strict=True)]
    return ties(weighted, torch.ones_like(weights), TIES_DENSITY)


METHODS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum": _sum,
    "mean": _mean,
    "normalised": _normalised,
    "ties": _ties,
    "fit": _sum,
}


class _WeightedForward(PlainForward):
    """The loss and its gradient with respect to the parents' weights: `vectors` are weights [runs, P].

    Full forwards, since the parents may lie at several layers and act at any position.

    Args:
        stacks: layer to the parents there [P, ...].
        like: an intervention of their site and position.
    """

    def __init__(
        self,
        layout: Layout,
        batch: Batch,
        stacks: Mapping[int, torch.Tensor],
        like: Intervention,
        batch_size: int | None,
    ) -> None:
        super().__init__(layout, batch, min(stacks), like.site, batch_size, like.position)
        self._stacks = {layout.layer(n): stack.flatten(1).to(self._batch.row.device) for n, stack in stacks.items()}

    def _edit(self, vectors: torch.Tensor) -> Edit:
        return Edit({layer: vectors @ stack for layer, stack in self._stacks.items()}, self._site, self._position)


def _fit(
    layout: Layout, forward: Forward, objective: Objective, start: list[float], progress: bool
) -> tuple[list[float], dict[str, Any]]:
    """The best weights seen, and the facts of the fit."""
    weights = torch.tensor(start, dtype=torch.float32, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weights], max_iter=FIT_EVALUATIONS, max_eval=FIT_EVALUATIONS, line_search_fn="strong_wolfe"
    )
    seen: list[tuple[float, list[float]]] = []
    with frozen(layout.model), tqdm(desc="fit", disable=not progress, leave=False) as bar:
        verify_causal(layout)

        def evaluate() -> float:
            losses, gradients, _ = forward.loss_and_gradient(weights.unsqueeze(0), objective, [0])
            loss = losses.item()
            if not math.isfinite(loss) or not bool(torch.isfinite(gradients).all()):
                raise WorkFailed(f"loss or gradient not finite at weights {weights.tolist()}")
            seen.append((loss, weights.tolist()))
            weights.grad = gradients.squeeze(0).to(weights.device)
            bar.set_postfix(task_loss=f"{loss:.4f}", refresh=False)
            bar.update()
            return loss

        optimiser.step(evaluate)
    task_loss, best = min(seen, key=lambda one: one[0])
    facts = {
        "loss": objective.name,
        "epsilon": SMOOTHING,
        "optimizer": "lbfgs",
        "steps": len(seen),
        "task_loss": task_loss,
        "task_loss_before": seen[0][0],
    }
    return best, facts
