"""Choose layer, penalties and number of evaluations by cross-validation on the training examples alone.

Every fold holds some of the N examples out, computes its own start from the others, trains on the others, and is
scored on those held out at every evaluation. The folds are rows of one batch, and the tokens before the vector run
once for all folds and layers. No test item is ever looked at.

Layers first, from coarse to fine: COARSE of them, evenly spread over the depth where vectors of tasks act, then the
neighbours of the best half a gap away. Then the penalties, at the best layer. Every setting begins at the in-context
start, so that a few evaluations say how good it gets; a setting ends when its held-out loss has not fallen for
PATIENCE evaluations. The setting with the smallest mean held-out loss is chosen. Its number of evaluations is the last
whose mean is within one standard error of the smallest, of the paired differences between the examples' losses: the
minimum over ten examples is noisy, and some evaluations too many cost less than too few.

A vector trained on ten examples fits their accidents. Where the model can follow the rule behind ten shots, the vector
is trained on its own further examples too (`lm_eval_laai.methods.pseudo_labels`). Elsewhere it is the mean of those
that the setting gives on all examples and on each fold's: their accidents are different ones, and a mean has less of
them (bagging: Breiman 1996). Start zero is the paper's training, and its vector that of the examples alone.

The held-out loss is -log((1 - FLOOR) p + FLOOR), p = exp(-loss) of the example: under the plain mean, one held-out
answer that is wrong anyway and gets more so ends a training that is still making others right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from laai_core.devices import cpu_by_default
from laai_core.errors import Interrupted, LaaiError, Unfinished
from laai_core.example import Example
from laai_core.hooks import frozen
from laai_core.intervention import Intervention
from laai_core.locate import Layout, locate, verify_causal
from laai_core.optimize import Step
from laai_core.penalty import Penalty
from laai_core.problem import Problem
from laai_core.record import examples_sha256
from laai_core.settings import Job, Settings, check
from laai_core.start import in_context_starts
from laai_core.train import TrainResult, train_many
from lm_eval_laai.methods.pseudo_labels import pseudo_labelled

if TYPE_CHECKING:  # importing transformers takes a second
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FOLDS = 3  # two would choose settings for training on five of ten examples
COARSE = 5  # layers tried first
DEPTHS = (0.15, 0.75)  # shares of the depth between which these lie
EVALUATIONS = 30  # at most, of a setting
PATIENCE = 8  # evaluations without a smaller held-out loss
FLOOR = 0.01  # probability of an answer that is wrong anyway
HEAD_START = 6  # evaluations of a setting before it is compared with the best one
PENALTIES = (1e-3, 1e-4)  # values of l1 and group, relative to the activation; layers are compared under the last
LONE_DEPTH = 0.4  # share of the depth for a single example, of which nothing can be held out


@dataclass(frozen=True)
class Tried:
    """One setting, its number of evaluations, and the means of the bounded held-out losses there and at the lowest."""

    layer: int
    l1: float
    group: float
    steps: int
    held_out_loss: float
    smallest_loss: float


@dataclass(frozen=True)
class Choice:
    """The setting with the smallest held-out loss, and all that were tried.

    starts: the in-context starts at `layer` of all examples and of each fold; none from zero, or with nothing tried.
    further: examples by the model itself.
    """

    layer: int
    l1: float
    group: float
    steps: int
    tried: list[Tried]
    starts: Sequence[Intervention] = field(default=(), compare=False, repr=False)
    further: Sequence[Example] = ()


@cpu_by_default
def choose(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    layer: int | None = None,
    l1: float | None = None,
    group: float | None = None,
    steps: int | None = None,
    *,
    lr: float = Job.lr,
    start: str | None = None,
    progress: bool = False,
    **settings: Any,
) -> Choice:
    """Choose those of layer, l1, group and steps that are None.

    Args:
        layer, l1, group, steps: fixed where given; with all four, or with one example, nothing is tried.
        lr, start: as `laai_core.settings.Job` has them.
        progress: show a tqdm bar on stderr.
        settings: the other fields of `laai_core.settings.Settings`.

    Raises:
        LaaiError: with the penalty scale absolute, where l1 and group must be given; and as `train` does.
        NotFinite, Interrupted: as `train` does, with no results: a fold's vector is not the result.
    """
    shared = Settings(steps=EVALUATIONS if steps is None else steps, **settings)
    given = {name: value for name, value in (("l1", l1), ("group", group)) if value is not None}
    check(Job, **given, lr=lr, start=start)
    if shared.penalty_scale == "absolute" and None in (l1, group):
        raise LaaiError("penalty_scale absolute: penalties to choose from are relative, expected l1 and group")
    layout = locate(model, shared.projection)
    usable = layout.having(shared.site)
    near: dict[int, set[int]] = {layout.layer(layer): set()} if layer is not None else _coarse(usable)
    coarse = [*near]
    fine = sorted(set().union(*near.values()) - {*coarse})
    *others, usual = dict.fromkeys((p if l1 is None else l1, p if group is None else group) for p in PENALTIES)
    if None not in (layer, l1, group, steps) or len(examples) < 2:
        lone = usable[int(LONE_DEPTH * len(usable))]
        return Choice(lone if layer is None else coarse[0], *usual, shared.steps, [])
    if isinstance(start, Intervention):
        raise LaaiError(
            "start is an Intervention: a choice has starts of its own, expected layer, l1, group and steps"
        )
    folds = _Folds(layout, tokenizer, examples, sorted({*coarse, *fine}), shared, lr, start)
    tried: list[Tried] = []
    with folds.ready(), tqdm(desc="cross-validate", unit=" evaluations", disable=not progress, leave=False) as bar:

        def try_all(settings: Sequence[tuple[int, tuple[float, float]]]) -> Tried:
            for at, penalties in settings:
                bar.set_postfix(layer=at, l1=penalties[0], refresh=False)
                try:
                    tried.append(folds.tried(at, *penalties, bar))
                except Unfinished as error:
                    raise type(error)(f"cross-validation at layer {at}: {error}", []) from None
            return min(tried, key=lambda one: one.smallest_loss)

        middle_first = sorted(coarse, key=lambda at: abs(at - LONE_DEPTH * len(layout.blocks)))
        best = try_all([(at, usual) for at in middle_first])
        best = try_all([(at, usual) for at in fine if at in near[best.layer]])
        best = try_all([(best.layer, penalties) for penalties in others])
        starts, further = folds.starts(best.layer), []
        if starts:
            bar.set_description("label further inputs")
            options = shared.stop, shared.whitespace, shared.batch_size
            further = pseudo_labelled(layout, tokenizer, examples, *options)
    return Choice(best.layer, best.l1, best.group, steps or best.steps, tried, starts, further)


def train_chosen(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    layer: int | None = None,
    *,
    seed: int = 0,
    task: str | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
    **options: Any,
) -> tuple[TrainResult, Choice]:
    """`trained` with the setting that `choose(..., layer, **options)` chooses."""
    choice = choose(model, tokenizer, examples, layer, **options)
    result = trained(model, tokenizer, examples, choice, seed=seed, task=task, on_step=on_step, **options)
    return result, choice


@cpu_by_default
def trained(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    choice: Choice,
    *,
    seed: int = 0,
    task: str | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
    **options: Any,
) -> TrainResult:
    """Train with a choice that was made with the same `options`.

    With further examples, the training on all of them; without, the mean of the vectors of all examples and of the
    folds; with nothing to choose, or from start zero, `laai_core.train.train` on all examples. A mean's objective and
    stationarity are measured on all examples; its history, and what `on_step` is called with, is the training on them.
    """
    own = {one.name: options[one.name] for one in fields(Job) if one.name in options}
    own |= {"layer": choice.layer, "l1": choice.l1, "group": choice.group, "seed": seed, "task": task}
    shared = {one.name: options[one.name] for one in fields(Settings) if one.name in options}
    shared |= {"steps": choice.steps}
    sets = [[*examples, *choice.further]] if choice.further else [examples, *trained_on(examples)]
    jobs = [Job(part, **own | {"start": start}) for part, start in zip(sets, choice.starts, strict=False)]
    facts: dict[str, Any] = {"start": "icl"}  # the jobs have their starts as vectors
    if choice.further:
        facts |= {"pseudo_labels": len(choice.further)}
        facts |= {"n_train": len(examples), "examples_sha256": examples_sha256(examples)}
    try:
        found = train_many(
            model,
            tokenizer,
            jobs or [Job(examples, **own)],
            progress=options.get("progress", False),
            on_steps=lambda steps: on_step(steps[0]) if 0 in steps else None,
            **shared,
        )
    except Unfinished as error:
        if jobs:
            error.results = [_recorded(one, one, **facts) for one in error.results]
        raise
    if not jobs:
        return found[0]
    if choice.further:
        return _recorded(found[0], found[0], **facts)
    mean = reduce(add, (one.intervention for one in found)) * (1 / len(found))
    try:
        (result,) = train_many(model, tokenizer, [Job(examples, **own | {"start": mean})], **shared | {"steps": 1})
    except KeyboardInterrupt:
        raise Interrupted("interrupted", [_recorded(one, one, **facts) for one in found]) from None
    return _recorded(result, found[0], mean_of=len(found), **facts)


def _recorded(result: TrainResult, whole: TrainResult, **facts: Any) -> TrainResult:
    """`result`, measured at a mean or trained, with the history of the training on all examples, and more facts."""
    found = result.intervention
    facts |= {name: whole.intervention.metadata["training"][name] for name in ("steps", "stopped")}
    training = found.metadata["training"] | facts
    return replace(
        result,
        intervention=Intervention(
            {layer: found.vector(layer) for layer in found.layers},
            found.site,
            found.position,
            metadata=found.metadata | {"training": training},
        ),
        history=whole.history,
        critical_penalty=whole.critical_penalty,
        stopped=whole.stopped,
    )


def _coarse(layers: Sequence[int]) -> dict[int, set[int]]:
    """Those of `layers` to try first, each with the neighbours to try next if it is the best."""
    count = len(layers)
    low, high = (share * count for share in DEPTHS)
    places = sorted({int(low + number * (high - low) / (COARSE - 1)) for number in range(COARSE)})
    gap = min((after - before for before, after in zip(places, places[1:], strict=False)), default=0) // 2
    return {
        layers[place]: {layers[other] for other in (place - gap, place + gap) if 0 <= other < count}
        for place in places
    }


def held_out_by_fold(count: int) -> list[list[bool]]:
    """For each fold, which of `count` examples it holds out: each example is held out once."""
    return [[n % FOLDS == fold for n in range(count)] for fold in range(min(count, FOLDS))]


def trained_on(examples: Sequence[Example]) -> list[list[Example]]:
    """For each fold, the examples that it does not hold out."""
    return [[e for e, out in zip(examples, fold, strict=True) if not out] for fold in held_out_by_fold(len(examples))]


class _Folds:
    """One problem whose runs are the folds: each has all examples, some of them held out."""

    def __init__(
        self,
        layout: Layout,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        layers: Sequence[int],
        settings: Settings,
        lr: float,
        start: str | None,
    ) -> None:
        masks = held_out_by_fold(len(examples))
        self._held_out = torch.tensor(masks)
        self._sets = [examples, *trained_on(examples)]
        self._layout, self._tokenizer, self._layers, self._settings = layout, tokenizer, layers, settings
        self._lr, self._start = lr, start
        self._best: list[float] = []  # held-out losses by evaluations, of the setting that reached the lowest
        self._problem = Problem(layout, tokenizer, [examples] * len(masks), layers, settings, masks)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Within the block, the model is frozen and every fold has its start at every layer."""
        with frozen(self._layout.model):
            verify_causal(self._layout)
            shapes = {layer: (len(self._sets), *self._problem.shape(layer)) for layer in self._layers}
            self._starts = {layer: torch.zeros(shape, dtype=torch.float32) for layer, shape in shapes.items()}
            if self._start != "zero":
                # With two examples a fold is left with one, from which no few-shot prompt can be made.
                numbers = [number for number, part in enumerate(self._sets) if len(part) > 1]
                options = self._settings.site, self._settings.whitespace, self._settings.batch_size
                sets = [self._sets[number] for number in numbers]
                found = in_context_starts(self._layout, self._tokenizer, sets, self._layers, *options)
                for layer, starts in self._starts.items():
                    starts[numbers] = found[layer].view(-1, *starts.shape[1:])
            yield

    def starts(self, layer: int) -> list[Intervention]:
        """The in-context starts of all examples and of each fold."""
        if self._start == "zero":
            return []
        vectors = self._starts[layer].view(-1, *self._layout.shape(layer, self._settings.site))
        return [Intervention({layer: one}, self._settings.site, self._settings.position) for one in vectors]

    def tried(self, layer: int, l1: float, group: float, bar: Any) -> Tried:
        """Train every fold in one setting."""
        curve = _Curve(self._held_out, self._best, bar)
        start = self._starts[layer][1:] / self._problem.unit(layer)
        self._problem.minimise(
            layer,
            start,
            Penalty(l1, group),
            self._settings.steps,
            range(len(start)),
            self._settings.optimizer,
            self._lr,
            self._settings.tolerance,
            curve.add,
            on_losses=curve.see,
        )
        if min(curve.losses) < min(self._best, default=math.inf):
            self._best = curve.losses
        steps = last_good(torch.stack(curve.held_out))
        return Tried(layer, l1, group, steps, curve.losses[steps - 1], min(curve.losses))


def last_good(losses: torch.Tensor) -> int:
    """The last number of evaluations, from 1, within a standard error of the smallest mean of `losses` [E, N]."""
    best = int(losses.mean(1).argmin())
    worse = losses[best:] - losses[best]
    error = worse.std(1) / math.sqrt(losses.shape[1])
    return best + 1 + int((worse.mean(1) <= error).nonzero().max())


def bounded(losses: torch.Tensor) -> torch.Tensor:
    """Losses of held-out examples, bounded by -log FLOOR, which is also the bound of what is no number."""
    return -torch.log((1 - FLOOR) * torch.exp(-losses).nan_to_num(0.0) + FLOOR)


def ended(losses: Sequence[float], rival: Sequence[float]) -> bool:
    """Whether a setting with these mean held-out losses has stopped falling, or is behind the best setting's."""
    count, lowest = len(losses), min(losses)
    behind = count >= HEAD_START and lowest > min(rival[:count], default=math.inf)
    return behind or lowest not in losses[-PATIENCE:]


class _Curve:
    """The mean loss of held-out examples by evaluations, every fold at the best objective it has seen."""

    def __init__(self, mask: torch.Tensor, rival: Sequence[float], bar: Any) -> None:
        self._mask, self._rival, self._bar = mask, rival, bar  # [F, N]; losses by evaluations
        self._now = self._best = torch.full(mask.shape, math.inf, dtype=torch.float32)
        self._objectives = [math.inf] * len(mask)
        self.held_out: list[torch.Tensor] = []  # [N]: every example is held out by one fold
        self.losses: list[float] = []

    def see(self, per_example: torch.Tensor) -> None:
        """Losses [F * N] at the points in evaluation."""
        self._now = bounded(per_example.cpu().view_as(self._mask))

    def add(self, steps: dict[int, Step]) -> bool:
        """The steps of the folds that were evaluated; whether the setting has ended."""
        self._best = self._best.clone()
        for fold, step in steps.items():
            if step.objective < self._objectives[fold]:
                self._objectives[fold], self._best[fold] = step.objective, self._now[fold]
        self.held_out.append(self._best[self._mask])
        self.losses.append(float(self.held_out[-1].mean()))
        self._bar.update()
        return ended(self.losses, self._rival)
