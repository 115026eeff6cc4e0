"""Train vectors on a few examples each: the paper's eq. 2."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from laai_core.devices import cpu_by_default
from laai_core.errors import Interrupted, LaaiError, NotFinite, Unfinished
from laai_core.example import Example
from laai_core.hooks import frozen
from laai_core.intervention import Intervention
from laai_core.locate import Layout, locate, verify_causal
from laai_core.objective import SMOOTHING
from laai_core.optimize import Solution, Step
from laai_core.penalty import Penalty, critical_penalty
from laai_core.problem import Problem
from laai_core.record import model_facts, training_facts
from laai_core.settings import Job, Settings
from laai_core.start import in_context_starts

if TYPE_CHECKING:  # importing transformers takes a second
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainResult:
    """One trained vector. `objective` and `stationarity` are measured at the returned intervention.

    `critical_penalty` is the smallest p for which the starting point, if it is zero, is stationary under
    l1 = group = p: from this penalty on training returns zero.
    """

    intervention: Intervention
    history: list[Step]
    objective: float
    stationarity: float
    critical_penalty: float
    stopped: str | None  # why training ended before its steps, or None
    finished: bool  # False only in what `NotFinite` and `Interrupted` carry


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    layer: int,
    l1: float = Job.l1,
    group: float = Job.group,
    *,
    progress: bool = False,
    on_step: Callable[[Step], None] = lambda step: None,
    **settings: Any,
) -> TrainResult:
    """Minimise mean task loss + l1 * |x|_1 + group * sum_h |x_h|_2 over one vector at one layer.

    Args:
        model: a causal language model of transformers; its weights and mode are left as they were.
        examples: with targets (loss `nll`, eq. 3) or with options and distributions (loss `kl`, eq. 4).
        layer: 0-based, negative from the end.
        progress: show a tqdm bar on stderr.
        on_step: called with every evaluation, right after it.
        l1, group: the paper's gamma and lambda.
        settings: the other fields of `laai_core.settings.Job` (lr, seed, task, start) and those of `Settings` (steps,
            optimizer, penalty_scale, tolerance, ...), documented there.

    Raises:
        LaaiError: on bad arguments or data, before training begins.
        NotFinite: when a loss or a gradient was not finite; `results` has the best so far.
        WorkFailed: when they were not finite at the start.
        Interrupted: on Ctrl-C, once there is something to keep; `results` has the best so far.
    """
    own = {one.name: settings.pop(one.name) for one in fields(Job) if one.name in settings}
    job = Job(examples, layer, l1, group, **own)

    def on_steps(done: dict[int, Step]) -> None:
        for step in done.values():
            on_step(step)

    (result,) = train_many(model, tokenizer, [job], progress=progress, on_steps=on_steps, **settings)
    return result


@cpu_by_default
def train_many(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    jobs: Sequence[Job],
    *,
    progress: bool = False,
    on_steps: Callable[[dict[int, Step]], None] = lambda steps: None,
    **settings: Any,
) -> list[TrainResult]:
    """Train several vectors; those of one layer run as rows of one batch, each with its own optimiser and end.

    `settings` are fields of `laai_core.settings.Settings`; errors as for `train`; the results are in the order of
    `jobs`. A job that stops being finite does not stop the others: `NotFinite` comes when they are done; one whose
    start is not finite ends all. `Interrupted` has the results of the layer that was running. `on_steps` is called
    after each round of evaluations with {number of the job: its step}; the jobs of a layer go together, one layer
    after the other.
    """
    if not jobs:
        raise LaaiError("no jobs, expected at least one")
    shared = Settings(**settings)
    layout = locate(model, shared.projection)
    at_layer: dict[int, dict[int, Job]] = {}
    for number, job in enumerate(jobs):
        at_layer.setdefault(layout.layer(job.layer), {})[number] = job
    # Layers whose jobs have equal examples share a problem, so that the prefixes run once for all of them.
    groups: dict[tuple[tuple[Example, ...], ...], list[int]] = {}
    for layer, here in sorted(at_layer.items()):
        groups.setdefault(tuple(tuple(job.examples) for job in here.values()), []).append(layer)
    problems = [(Problem(layout, tokenizer, sets, layers, shared), layers) for sets, layers in groups.items()]
    results: dict[int, TrainResult] = {}
    failed: Unfinished | None = None
    with ExitStack() as stack:
        stack.enter_context(frozen(layout.model))
        verify_causal(layout)
        bar = stack.enter_context(
            tqdm(total=shared.steps * len(jobs), desc="train", disable=not progress, leave=False)
        )

        def report(numbers: Sequence[int], done: dict[int, Step]) -> None:
            if done:
                *_, last = done.values()
                bar.set_postfix(objective=f"{last.objective:.4f}", heads=last.active_heads, refresh=False)
            bar.update(len(done))
            on_steps({numbers[run]: step for run, step in done.items()})

        starts = _starts(layout, tokenizer, at_layer, shared)  # all before the first training: one may be refused
        while problems:
            problem, layers = problems.pop(0)  # the packed weights of one problem at a time
            for layer in layers:
                numbers, its_jobs = list(at_layer[layer]), list(at_layer[layer].values())
                told = partial(report, numbers)
                found, unfinished = _at_layer(problem, layer, its_jobs, starts[layer], shared, told)
                if isinstance(unfinished, Interrupted):
                    raise Interrupted(str(unfinished), found)
                results |= zip(numbers, found, strict=True)
                failed = failed or unfinished
        bar.refresh()  # short runs end between two updates of the bar
    in_order = [results[number] for number in range(len(jobs))]
    if failed is not None:
        raise NotFinite(failed, in_order)
    return in_order


def _at_layer(
    problem: Problem,
    layer: int,
    jobs: Sequence[Job],
    starts: torch.Tensor,
    settings: Settings,
    report: Callable[[dict[int, Step]], None],
) -> tuple[list[TrainResult], Unfinished | None]:
    """The results of the jobs of one layer, and the exception that ended some of them early, or None."""
    unit = problem.unit(layer)
    start = starts.view(len(jobs), *problem.shape(layer)) / unit
    weights = torch.tensor([(job.l1, job.group, job.lr) for job in jobs], dtype=torch.float32)
    l1, group, lr = weights.T.view(3, -1, 1, 1)
    options = settings.steps, range(len(jobs)), settings.optimizer, lr, settings.tolerance, report
    unfinished: Unfinished | None = None
    try:
        solutions = problem.minimise(layer, start, Penalty(l1, group), *options)
    except Unfinished as error:
        unfinished, solutions = error, error.results
    rms = unit.flatten().tolist()
    return [_result(problem, layer, settings, *each) for each in zip(jobs, solutions, rms, strict=True)], unfinished


def _starts(
    layout: Layout, tokenizer: PreTrainedTokenizerBase, jobs: Mapping[int, Mapping[int, Job]], settings: Settings
) -> dict[int, torch.Tensor]:
    """{layer: start Δ [J, *shape of the site] of its J jobs}."""
    sets = list(dict.fromkeys(job.examples for here in jobs.values() for job in here.values() if job.begin == "icl"))
    options = settings.site, settings.whitespace, settings.batch_size
    known = in_context_starts(layout, tokenizer, sets, list(jobs), *options) if sets else {}

    def start(job: Job, layer: int) -> torch.Tensor:
        begin, shape = job.begin, layout.shape(layer, settings.site)
        if isinstance(begin, Intervention):
            if (begin.site, begin.operation) != (settings.site, "add") or layer not in begin.for_model(layout):
                raise LaaiError(f"start is {begin!r}: expected one to add at layer {layer}, site {settings.site}")
            return (begin.scale * begin.for_model(layout)[layer]).view(shape)
        if begin == "icl":
            return known[layer][sets.index(job.examples)]
        return torch.zeros(shape, dtype=torch.float32)

    return {layer: torch.stack([start(job, layer) for job in here.values()]) for layer, here in jobs.items()}


def _result(problem: Problem, layer: int, settings: Settings, job: Job, solution: Solution, rms: float) -> TrainResult:
    """The best point of a run, its vector with the provenance as metadata."""
    layout = problem.layout
    residual = float(Penalty(job.l1, job.group).stationarity(solution.x, solution.gradient))
    training = {
        "loss": problem.objective.name,
        "epsilon": SMOOTHING,
        "penalty_scale": settings.penalty_scale,
        "rms": rms,
        "l1": job.l1,
        "group": job.group,
        "optimizer": settings.optimizer,
        "lr": job.lr if settings.optimizer == "adam" else None,
        "stop": settings.stop,
        "start": job.begin.sha256 if isinstance(job.begin, Intervention) else job.begin,
        "steps": len(solution.history),
        "objective": solution.objective,
        "task_loss": solution.loss,
        "stationarity": residual,
        "sparsity": float((solution.x == 0).float().mean()),
        **training_facts(layout, job.examples, job.seed, solution.stopped),
    }
    metadata = {**model_facts(layout, layer), "task": job.task, "method": "laai", "training": training}
    vector = (rms * solution.x).view(layout.shape(layer, settings.site))
    return TrainResult(
        Intervention({layer: vector}, site=settings.site, position=settings.position, metadata=metadata),
        solution.history,
        solution.objective,
        residual,
        float(critical_penalty(solution.first_gradient)),
        solution.stopped,
        solution.finished,
    )
