"""What an evaluation of the model buys: proximal gradient against Adam, and a long reference run.

The reference model, four lexicon rules, ten examples of seed 0, the middle layer, penalties relative to the activation
(the default scale), gamma = lambda = a share of `critical_penalty`, all from the in-context start, of which the first
evaluation also gives that penalty (from zero it would be the smallest for which nothing at all is learnt).
An evaluation is one loss and its gradient. A curve is the best objective so far, above the lowest that any run found.
`prox` has no learning rate; Adam runs with its default (0.05) and with five others, of which the best is shown too.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import laai_core as laai
from laai_core.data.tasks import LEXICON_PREFIX, RULES
from lm_eval_laai.inspection.plot import can_plot
from lm_eval_laai.methods.method import middle_layer
from measure import DOCS, Record, parser
from models import REFERENCE_MODEL, reference_model

SHARES = [0.3, 0.03]  # of the critical penalty
RATES = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5]
DEFAULT_RATE = laai.Job.lr


class Problem(NamedTuple):
    """One task at one penalty strength, and what holds at the start."""

    rule: str
    share: float
    examples: Sequence[laai.Example]
    penalty: float
    residual: float  # of stationarity, at the start


def problems(model: Any, tokenizer: Any, layer: int, rules: Sequence[str]) -> list[Problem]:
    """Every rule at every strength; one evaluation, at the start, tells the critical penalty, another the residual."""
    asked = [
        Problem(rule, share, laai.load_task(LEXICON_PREFIX + rule, seed=0).train, 0.0, 0.0)
        for rule in rules
        for share in SHARES
    ]
    at_start = trained(model, tokenizer, layer, asked, "prox", 1, DEFAULT_RATE)
    asked = [
        problem._replace(penalty=problem.share * result.critical_penalty)
        for problem, result in zip(asked, at_start, strict=True)
    ]
    at_start = trained(model, tokenizer, layer, asked, "prox", 1, DEFAULT_RATE)
    return [problem._replace(residual=result.stationarity) for problem, result in zip(asked, at_start, strict=True)]


def trained(
    model: Any, tokenizer: Any, layer: int, asked: Sequence[Problem], optimizer: str, steps: int, lr: float
) -> list[laai.TrainResult]:
    """All problems in one batch."""
    jobs = [laai.Job(problem.examples, layer, problem.penalty, problem.penalty, lr) for problem in asked]
    return laai.train_many(model, tokenizer, jobs, optimizer=optimizer, steps=steps)


def curve(result: laai.TrainResult) -> list[float]:
    """The best objective after 1, 2, ... evaluations."""
    return list(accumulate((step.objective for step in result.history), min))


def reached(curve: Sequence[float], objective: float) -> int | None:
    """Evaluations until the curve is at or below an objective."""
    return next((number for number, value in enumerate(curve, start=1) if value <= objective), None)


def kept(result: laai.TrainResult) -> list[float]:
    """A curve for the JSON; of a long one every twentieth value."""
    values = [round(value, 6) for value in curve(result)]
    return values[:: 20 if len(values) > 1000 else 1]


def plot(asked: Sequence[Problem], curves: dict[str, list[list[float]]], best: Sequence[float]) -> None:
    """Curves above the lowest objective known: a row of panels for each strength."""
    from matplotlib.figure import Figure

    rules = list(dict.fromkeys(problem.rule for problem in asked))
    figure = Figure(figsize=(3 * len(rules), 6), layout="constrained")
    panels = figure.subplots(len(SHARES), len(rules), squeeze=False)
    for number, problem in enumerate(asked):
        panel = panels[SHARES.index(problem.share)][rules.index(problem.rule)]
        for name, found in curves.items():
            gap = [max(value - best[number], 1e-7) for value in found[number]]
            panel.loglog(range(1, len(gap) + 1), gap, label=name, linewidth=1.2)
        panel.set_title(f"{problem.rule}, {problem.share} × critical", fontsize=9)
        panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8)
    figure.supxlabel("evaluations")
    figure.supylabel("objective above the lowest known")
    figure.savefig(DOCS / "optimisers.png", dpi=110)


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--steps", type=int, default=500, help="evaluations of prox and adam (default: %(default)s)")
    flags.add_argument("--long", type=int, default=5000, help="evaluations of the reference (default: %(default)s)")
    flags.add_argument("--model", default=str(REFERENCE_MODEL), help="default: the bundled reference model")
    arguments = flags.parse_args()
    quick = arguments.quick
    steps, long = (20, 40) if quick else (arguments.steps, arguments.long)
    model, tokenizer = reference_model(arguments.model)
    layer = middle_layer(model.config.num_hidden_layers)
    asked = problems(model, tokenizer, layer, list(RULES)[: 1 if quick else None])
    prox = trained(model, tokenizer, layer, asked, "prox", steps, DEFAULT_RATE)
    adam = {lr: trained(model, tokenizer, layer, asked, "adam", steps, lr) for lr in RATES}
    reference = trained(model, tokenizer, layer, asked, "prox", long, DEFAULT_RATE)

    everything = [prox, reference, *adam.values()]
    best = [min(runs[number].objective for runs in everything) for number in range(len(asked))]
    best_rates = [min(RATES, key=lambda rate: adam[rate][number].objective) for number in range(len(asked))]
    best_adam = [adam[rate][number] for number, rate in enumerate(best_rates)]
    by_objective, at_the_end = [], []
    for number, problem in enumerate(asked):
        name = f"{problem.rule}, {problem.share} × critical"
        usual, tuned, path = adam[DEFAULT_RATE][number], best_adam[number], curve(prox[number])
        objectives = [usual.objective, tuned.objective, prox[number].objective, best[number]]
        by_objective.append(
            [name, *(f"{value:.4f}" for value in objectives), best_rates[number]]
            + [reached(path, other.objective) or f"> {steps}" for other in (usual, tuned)]
        )
        facts = [run.intervention.metadata["training"] for run in (usual, prox[number], reference[number])]
        at_the_end.append(
            [name, f"{problem.residual:.3g}"]
            + [f"{one['stationarity'] / problem.residual:.2g}" for one in facts]
            + [f"{one['sparsity']:.1%}" for one in facts]
            + [len(prox[number].history)]
        )
    record = Record(
        "optimisers",
        __doc__ or "",
        {"layer": layer, "evaluations": steps, "of the long run": long, "learning rates of adam": RATES},
    )
    record.table(
        f"Objective after {steps} evaluations, and the evaluations prox takes to get as low",
        ["problem", f"adam {DEFAULT_RATE}", "adam, best rate", "prox", "lowest known", "best rate"]
        + [f"prox to adam {DEFAULT_RATE}'s", "prox to best adam's"],
        by_objective,
        f"Goal: at most {steps // 3}, a third of Adam's.",
    )
    record.table(
        "Stationarity residual at the end, as a share of that at the start, and exact zeros",
        ["problem", "residual at the start", f"adam {DEFAULT_RATE}", "prox", f"prox, {long}"]
        + [f"zeros: adam {DEFAULT_RATE}", "prox", f"prox, {long}", "prox evaluations"],
        at_the_end,
        "Goal: at most 0.01 for prox at 0.3 × critical. The residual is a certificate: 0 at a minimum.",
    )
    names = [f"{problem.rule} {problem.share}" for problem in asked]
    curves = {"prox": prox, **{f"adam {lr}": runs for lr, runs in adam.items()}, f"prox, {long}": reference}
    record.keep("penalties", {name: problem.penalty for name, problem in zip(names, asked, strict=True)})
    record.keep(
        "objective by evaluation",
        {kind: dict(zip(names, map(kept, runs), strict=True)) for kind, runs in curves.items()},
    )
    if can_plot() and not quick:
        DOCS.mkdir(exist_ok=True)
        shown = {"prox": reference, f"adam {DEFAULT_RATE}": adam[DEFAULT_RATE], "adam, best rate": best_adam}
        plot(asked, {name: [curve(run) for run in runs] for name, runs in shown.items()}, best)
        record.figure(DOCS / "optimisers.png")
    record.save(quick)


if __name__ == "__main__":
    main()
