"""The minimisation problem of several runs: their examples, and losses and gradients as functions of x."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from laai_core.encode import Batch, encode_examples
from laai_core.errors import LaaiError
from laai_core.example import Example
from laai_core.forward import Forward, PlainForward
from laai_core.locate import Layout, require_gradients
from laai_core.objective import Objective
from laai_core.optimize import Solution, minimise
from laai_core.penalty import Penalty
from laai_core.products import Products
from laai_core.replay import Prefixes, ReplayForward
from laai_core.settings import Settings

if TYPE_CHECKING:  # importing transformers takes a second
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Problem:
    """Several runs, each over its own examples, in one batch that all layers share.

    The model runs at first use, within the caller's `frozen(layout.model)`: the prefixes and the test of the replay
    once, the root mean square of the activation once per layer.

    Args:
        sets: the examples of each run.
        layers: all layers that `minimise` will be called with.
        held_out: for each example of each set, True if its loss is reported but not minimised; default: none.
        settings: `steps`, `optimizer`, `tolerance` and `projection` are not read here but by the caller.

    Raises:
        LaaiError: on bad data, before anything runs.
    """

    def __init__(
        self,
        layout: Layout,
        tokenizer: PreTrainedTokenizerBase,
        sets: Sequence[Sequence[Example]],
        layers: Sequence[int],
        settings: Settings,
        held_out: Sequence[Sequence[bool]] | None = None,
    ) -> None:
        for layer in layers:
            layout.shape(layer, settings.site)
        if layout.virtual_tokens:
            raise LaaiError(
                f"the model is under a soft prompt or prefix of {layout.virtual_tokens} virtual tokens: expected the "
                f"model itself, or under another adapter"
            )
        require_gradients(layout)
        examples = [example for part in sets for example in part]
        self._owners = [run for run, part in enumerate(sets) for _ in part]
        watched = None if held_out is None else [one for part in held_out for one in part]
        options = settings.stop, layout.max_positions, settings.whitespace, self._owners, watched, layout.vocabulary
        self._batch = encode_examples(tokenizer, examples, *options)
        self.objective = Objective(examples)
        self.layout, self._settings, self._layers = layout, settings, layers
        self._prefixes = Prefixes(layout, self._batch, layers)
        self._units: dict[int, torch.Tensor] = {}  # of the layers so far
        self._latest: tuple[int, Forward] | None = None  # of one layer: the inputs of its rows take memory

    def unit(self, layer: int) -> torch.Tensor:
        """The factor rms of Δ = rms * x for each run, 1 if penalties are absolute: [R, 1, 1]."""
        if layer not in self._units:
            relative = self._settings.penalty_scale == "relative"
            unit = self._at(layer).activation_rms() if relative else [1.0] * (self._owners[-1] + 1)
            self._units[layer] = torch.tensor(unit, dtype=torch.float32).view(-1, 1, 1)
        return self._units[layer]

    def shape(self, layer: int) -> tuple[int, ...]:
        """The shape [H, d] of one x; at sites without heads the whole vector is one group, [1, hidden]."""
        shape = self.layout.shape(layer, self._settings.site)
        return shape if len(shape) == 2 else (1, *shape)

    def minimise(
        self,
        layer: int,
        start: torch.Tensor,
        penalty: Penalty,
        budget: int,
        runs: Sequence[int],
        *options: Any,
        on_losses: Callable[[torch.Tensor], None] = lambda losses: None,
    ) -> list[Solution]:
        """`laai_core.optimize.minimise` over x [len(runs), H, d] of some runs, with Δ = unit * x.

        `on_losses` is called at every evaluation, before the steps are reported, with the losses [N] of all examples
        of all sets, held out or not; losses of runs that are not evaluated are meaningless.
        """
        forward, unit = self._at(layer), self.unit(layer)

        def evaluate(x: torch.Tensor, active: list[int]) -> tuple[torch.Tensor, torch.Tensor, Callable[[int], str]]:
            numbers = [runs[i] for i in active]
            units = unit[numbers]
            losses, gradients, per_example = forward.loss_and_gradient((units * x).flatten(1), self.objective, numbers)
            on_losses(per_example)
            gradients = units * gradients.cpu().view_as(x)
            return losses.cpu(), gradients, lambda i: self._culprit(per_example, runs[i])

        return minimise(evaluate, start, penalty, budget, *options)

    def _at(self, layer: int) -> Forward:
        replays = self._replays
        if self._latest is None or self._latest[0] != layer:
            self._latest = None  # frees the inputs before new ones are made
            self._latest = layer, self._replayed(layer) if replays else self._plain(layer)
        return self._latest[1]

    @cached_property
    def _products(self) -> Products:
        """The packed weights of all blocks that are replayed."""
        return Products(self.layout, min(self._layers))

    def _replayed(self, layer: int) -> ReplayForward:
        captured = self._settings.forward == "captured"
        return ReplayForward(*self._arguments(layer), self._prefixes, self._products, captured)

    def _plain(self, layer: int) -> PlainForward:
        return PlainForward(*self._arguments(layer), position=self._settings.position)

    def _arguments(self, layer: int) -> tuple[Layout, Batch, int, str, int | None]:
        return self.layout, self._batch, layer, self._settings.site, self._settings.batch_size

    @cached_property
    def _replays(self) -> bool:
        """Whether ReplayForward is to be used: where it gives PlainForward's numbers on this model."""
        if self._settings.forward == "plain" or self._settings.position != "last":
            return False
        highest = max(self._layers)  # the layer that depends on all replayed blocks
        forward = self._replayed(highest)
        difference = forward.difference_from(self._plain(highest))
        if not isinstance(difference, str):
            if difference <= (0.2 if self.layout.is_half else 1e-3):
                self._latest = highest, forward  # with fewer rows a forward, if memory ran out
                return True
            difference = f"log-probabilities differ by {difference:.2g}"
        found = f"{type(self.layout.model).__name__} cannot be replayed ({difference})"
        if self._settings.must_replay:
            raise LaaiError(f"{found}: expected forward auto or plain")
        vars(self).pop("_products", None)  # frees the packed weights, and then the cached prefixes
        self._prefixes = Prefixes(self.layout, self._batch, self._layers)
        logger.warning("%s: training by full forwards", found)
        return False

    def _culprit(self, per_example: torch.Tensor, run: int) -> str:
        """The first example of a run whose loss is not finite, as the end of a message; '' if all are finite."""
        found = per_example[[owner == run for owner in self._owners]]
        bad = (~torch.isfinite(found)).nonzero().flatten().tolist()
        return f" (example {bad[0]})" if bad else ""
