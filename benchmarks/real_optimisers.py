"""Optimisers on eight landscapes of real models: what an evaluation buys, on the training examples and on other words.

Ten examples of seed 0, the in-context start, penalties 1e-3 relative to the activation. Beside `prox` and `adam` as
they are shipped: Adam at other learning rates, and `prox` with the short Barzilai-Borwein step, with a shorter and a
longer memory of its line search, without and with a narrower bound on the growth of its step, and with a step for
each head (a diagonal metric, constant within the groups, for which the proximal step is exact). Losses are means over
examples; *others* are words of the training pool that were not drawn: no test item is touched. Both are read at the
best objective so far, as a training that ends there gives it. Where a training should end is for the cross-validation
to find: the last table has the lowest loss of other words that it could find.

    python benchmarks/real_optimisers.py        # both models fetched, $LAAI_DATA set
"""

from __future__ import annotations

import contextlib
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from known import Known
from laai_core import optimize
from laai_core.data import load_task
from laai_core.data.split import in_training_pool
from laai_core.data.tasks import load_pairs
from laai_core.example import Example
from laai_core.hooks import frozen
from laai_core.locate import locate
from laai_core.optimize import Optimizer, Points
from laai_core.penalty import Penalty
from laai_core.problem import Problem
from laai_core.settings import Settings
from laai_core.start import in_context_starts
from lm_eval_laai.experiments.load import ModelSource
from measure import Record, parser

CELLS = [
    ("smollm2-135m", "antonym", 8),
    ("smollm2-135m", "antonym", 15),
    ("smollm2-135m", "synonym", 12),
    ("smollm2-135m", "synonym", 18),
    ("gemma-3-270m", "en_fr", 5),
    ("gemma-3-270m", "en_fr", 9),
    ("gemma-3-270m", "en_de", 5),
    ("gemma-3-270m", "antonym", 8),
]
OTHERS = 10
PENALTY = 1e-3
AT = (10, 20, 40)  # evaluations
RATES = (0.02, 0.05, 0.1)


class Variant(NamedTuple):
    """What stands in the place of `prox`; None: nothing."""

    title: str
    steps: Callable[[Penalty, Points], Optimizer] | None


def short_step(memory: int = 3, growth: float = 4.0) -> Callable[[Penalty, Points], Optimizer]:
    """`prox` with the short Barzilai-Borwein step <s, y> / <y, y>, of bounded growth."""

    def steps(penalty: Penalty, point: Points) -> Optimizer:
        length = (optimize.FIRST_SHARE * point.x.norm(dim=(1, 2)).double()).clamp_min(1)
        step = length / point.gradient.norm(dim=(1, 2)).double().clamp_min(1e-12)
        recent = point.objective.unsqueeze(1).repeat(1, memory)
        while True:
            wide = step.to(point.x.dtype).view(-1, 1, 1)
            trial = yield penalty.prox(point.x - wide * point.gradient, wide), torch.zeros(len(step), dtype=torch.bool)
            moved, change = trial.x - point.x, trial.gradient - point.gradient
            square, curvature = moved.square().sum((1, 2)).double(), (moved * change).sum((1, 2)).double()
            accepted = trial.objective <= recent.amax(1) - 1e-4 / (2 * step) * square
            short = curvature / change.square().sum((1, 2)).double().clamp_min(1e-30)
            grown = growth * step
            spectral = torch.where(curvature > 1e-12 * square, torch.minimum(short, grown), grown).clamp(1e-8, 1e8)
            shorter = torch.where(curvature > 0, short.clamp(step / 10, step / 2), step / 2)
            step = torch.where(accepted, spectral, shorter)
            later = torch.cat([recent[:, 1:], trial.objective.unsqueeze(1)], 1)
            recent = torch.where(accepted.unsqueeze(1), later, recent)
            point = trial.where(accepted, point)

    return steps


def step_for_each_head(penalty: Penalty, point: Points) -> Optimizer:
    """`short_step()` with a step of every head's own, within a factor of ten of the whole vector's."""
    length = (optimize.FIRST_SHARE * point.x.norm(dim=(1, 2)).double()).clamp_min(1)
    whole = (length / point.gradient.norm(dim=(1, 2)).double().clamp_min(1e-12)).view(-1, 1, 1)
    step = whole.expand(*point.x.shape[:2], 1)
    recent = point.objective.unsqueeze(1).repeat(1, 3)
    while True:
        wide = step.to(point.x.dtype)
        trial = yield penalty.prox(point.x - wide * point.gradient, wide), torch.zeros(len(whole), dtype=torch.bool)
        moved, change = trial.x - point.x, trial.gradient - point.gradient
        fall = (moved.square().sum(2, keepdim=True).double() / (2 * step)).sum((1, 2))
        accepted = (trial.objective <= recent.amax(1) - 1e-4 * fall).view(-1, 1, 1)
        own, total = (
            (moved * change).sum(axes, keepdim=True).double()
            / change.square().sum(axes, keepdim=True).double().clamp_min(1e-30)
            for axes in (2, (1, 2))
        )
        grown = 4 * whole
        whole_next = torch.where(total > 0, torch.minimum(total, grown), grown).clamp(1e-8, 1e8)
        whole = torch.where(accepted, whole_next, whole / 2)
        heads = torch.where(own > 0, own, whole).clamp(min=whole / 10, max=whole * 10)
        step = torch.where(accepted, heads, step / 2)
        later = torch.cat([recent[:, 1:], trial.objective.unsqueeze(1)], 1)
        recent = torch.where(accepted.view(-1, 1), later, recent)
        point = trial.where(accepted.view(-1), point)


VARIANTS = [
    Variant("prox", None),
    Variant("short", short_step()),
    Variant("short, memory 1", short_step(memory=1)),
    Variant("short, memory 10", short_step(memory=10)),
    Variant("short, growth 2", short_step(growth=2)),
    Variant("short, growth free", short_step(growth=1e9)),
    Variant("short, a head", step_for_each_head),
]


@contextlib.contextmanager
def prox_is(steps: Callable[[Penalty, Points], Optimizer] | None) -> Iterator[None]:
    """`laai_core.optimize` with other steps."""
    before = optimize._prox
    try:
        optimize._prox = steps or before
        yield
    finally:
        optimize._prox = before


def examples(rule: str) -> tuple[list[Example], list[Example]]:
    """(the ten of seed 0, OTHERS of the same pool that were not drawn)."""
    train = load_task(rule, seed=0).train
    drawn = {example.prompt for example in train}
    pairs, _ = load_pairs(rule, None)
    pool = [Example(f"Q: {p.input}\nA:", f" {p.output}") for p in pairs if in_training_pool(p.input)]
    others = [example for example in pool if example.prompt not in drawn]
    return train, random.Random(0).sample(others, OTHERS)


class Curve:
    """(best objective, loss of others there) after 1, 2, ... evaluations."""

    def __init__(self, held_out: torch.Tensor) -> None:
        self._held_out, self._now = held_out, 0.0
        self.points: list[tuple[float, float]] = []

    def see(self, losses: torch.Tensor) -> None:
        """Losses of all examples at the point in evaluation."""
        self._now = float((losses.cpu() * self._held_out).sum()) / OTHERS

    def add(self, steps: dict[int, optimize.Step]) -> None:
        """The step of the one run."""
        self.points.append(min([*self.points[-1:], (steps[0].objective, self._now)]))  # by the objective


def curves(
    layout: Any, tokenizer: Any, rule: str, layer: int, known: Known, model: str, progress: Callable[[str], None]
) -> dict[str, list[tuple[float, float]]]:
    """{variant: [(best objective, loss of others there) after 1, 2, ... evaluations]}."""
    train, others = examples(rule)
    found: dict[str, list[tuple[float, float]]] = {}
    todo = [v.title for v in VARIANTS] + [f"adam {rate}" for rate in RATES]
    if any((model, rule, layer, title) not in known for title in todo):
        held_out = torch.tensor([[False] * len(train) + [True] * len(others)])
        problem = Problem(layout, tokenizer, [[*train, *others]], [layer], Settings(), held_out=held_out.tolist())
        shape = problem.shape(layer)
        start = in_context_starts(layout, tokenizer, [train], [layer])[layer].view(1, *shape) / problem.unit(layer)
    for title in todo:
        key = (model, rule, layer, title)
        if key not in known:
            progress(f"{model} {rule} layer {layer}: {title}")
            variant = next((v for v in VARIANTS if v.title == title), None)
            curve = Curve(held_out[0])
            optimizer, rate = ("prox", 0.05) if variant else ("adam", float(title.split()[1]))
            with prox_is(variant.steps if variant else None):
                arguments = layer, start, Penalty(PENALTY, PENALTY), max(AT), [0], optimizer, rate, None, curve.add
                problem.minimise(*arguments, on_losses=curve.see)
            known[key] = curve.points
        found[title] = [tuple(pair) for pair in known[key]]
    return found


def main() -> None:
    flags = parser(__doc__)
    arguments = flags.parse_args()
    files = [Path(__file__), Path(optimize.__file__)]
    known = Known(Path("runs/real_optimisers.jsonl"), files)
    every: list[dict[str, list[tuple[float, float]]]] = []
    loaded: tuple[str, Any, Any] | None = None
    cells = CELLS[:1] if arguments.quick else CELLS
    for model, rule, layer in cells:
        if loaded is None or loaded[0] != model:
            loaded = model, *ModelSource(model, dtype="float32").load()
        layout = locate(loaded[1])
        with frozen(layout.model):
            say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
            every.append(curves(layout, loaded[2], rule, layer, known, model, say))
    titles = list(every[0])
    record = Record(
        "real_optimisers", __doc__ or "", {"penalty": PENALTY, "others": OTHERS, "learning rates of adam": RATES}
    )
    for number, what in enumerate(("Objective", "Loss of other words")):
        for count in AT:
            rows = [
                [f"{model} {rule}, layer {layer}", *(f"{at(found[title], count)[number]:.2f}" for title in titles)]
                for (model, rule, layer), found in zip(cells, every, strict=True)
            ]
            means = [statistics.fmean(at(found[title], count)[number] for found in every) for title in titles]
            rows.append(["mean", *(f"{mean:.2f}" for mean in means)])
            record.table(f"{what} after {count} evaluations", ["landscape", *titles], rows)
    lowest = [{title: min(loss for _, loss in found[title]) for title in titles} for found in every]
    rows = [
        [f"{model} {rule}, layer {layer}", *(f"{one[title]:.2f}" for title in titles)]
        for (model, rule, layer), one in zip(cells, lowest, strict=True)
    ]
    rows.append(["mean", *(f"{statistics.fmean(one[title] for one in lowest):.2f}" for title in titles)])
    record.table(f"Lowest loss of other words in {max(AT)} evaluations", ["landscape", *titles], rows)
    record.save(arguments.quick)


def at(curve: Sequence[tuple[float, float]], count: int) -> tuple[float, float]:
    """A curve after some evaluations, or at its end."""
    return curve[min(count, len(curve)) - 1]


if __name__ == "__main__":
    main()
