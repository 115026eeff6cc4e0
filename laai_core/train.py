"""Train vectors on a few examples each: the paper's eq. 2."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm

from laai_core.encode import WHITESPACE
from laai_core.errors import Interrupted, LaaiError, NotFinite
from laai_core.example import Example
from laai_core.hooks import frozen
from laai_core.intervention import Intervention
from laai_core.locate import Layout, locate, verify_causal
from laai_core.objective import SMOOTHING
from laai_core.optimize import OPTIMIZERS, Solution, Step
from laai_core.penalty import Penalty, critical_penalty
from laai_core.problem import Problem

PENALTY_SCALES = ("relative", "absolute")
PATHS = ("auto", "plain", "replay")
_CHOICES = {"penalty_scale": PENALTY_SCALES, "optimizer": OPTIMIZERS, "whitespace": WHITESPACE, "path": PATHS}


@dataclass(frozen=True)
class Job:
    """One vector to train: its examples, its layer (0-based, negative from the end) and its own settings."""

    examples: Sequence[Example]
    layer: int
    l1: float = 0.0001
    group: float = 0.0001
    lr: float = 0.05
    seed: int = 0
    task: str | None = None
    start: Intervention | None = None  # where to begin; default: zero


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns. `objective` and `stationarity` are those of the returned intervention.

    `critical_penalty` is the smallest p for which the starting point, if it is zero, is stationary under
    l1 = group = p: from there on training returns zero.
    """

    intervention: Intervention
    history: list[Step]
    objective: float
    stationarity: float
    critical_penalty: float
    stopped: str | None  # why training ended before its steps, if it did
    finished: bool  # False only in what `NotFinite` and `Interrupted` carry


def train(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    layer: int,
    l1: float = Job.l1,
    group: float = Job.group,
    penalty_scale: str = "relative",
    optimizer: str = "prox",
    steps: int = 100,
    lr: float = Job.lr,
    tolerance: float | None = None,
    seed: int = 0,
    stop: str = "\n",
    site: str = "heads",
    whitespace: str = "refuse",
    projection: str | None = None,
    batch_size: int | None = None,
    path: str = "auto",
    task: str | None = None,
    progress: bool = False,
) -> TrainResult:
    """Minimise mean task loss + l1 * |x|_1 + group * sum_h |x_h|_2 over one vector at one layer.

    Args:
        model: a causal language model of transformers; its weights and mode are left as they were.
        examples: with targets (loss `nll`, eq. 3) or with options and distributions (loss `kl`, eq. 4).
        layer: 0-based, negative from the end.
        l1, group: the paper's gamma and lambda.
        penalty_scale: `absolute` penalises Δ itself (x = Δ, the paper's). `relative` writes Δ = rms * x, rms the root
            mean square of the site's activation at the last prompt tokens, so that one setting fits any model.
        optimizer: `prox` (exact zeros) or `adam` (with `lr`).
        steps: model evaluations, exactly, unless `tolerance` (share of the first stationarity residual) is given, or
            `prox` has nothing left to gain in float32.
        seed: recorded in the file; training itself draws no random numbers.
        stop: appended to every target, so that generation ends where the answer ends.
        whitespace: see `laai_core.encode.encode_pair`.
        projection: see `laai_core.locate.locate`.
        batch_size: rows per forward; default all. Changes memory, not the result.
        path: `plain` runs whole prompts at every step, `replay` only what depends on the vector, `auto` is `replay`
            where the model allows it. They give the same result.
        progress: show a tqdm bar on stderr.

    Raises:
        LaaiError: on bad arguments or data, before anything runs.
        NotFinite: when a loss or a gradient was not finite; `results` has the best so far.
        Interrupted: on Ctrl-C, once there is something to keep; `results` has the best so far.
    """
    (result,) = train_many(
        model,
        tokenizer,
        [Job(examples, layer, l1, group, lr, seed, task)],
        penalty_scale=penalty_scale,
        optimizer=optimizer,
        steps=steps,
        tolerance=tolerance,
        stop=stop,
        site=site,
        whitespace=whitespace,
        projection=projection,
        batch_size=batch_size,
        path=path,
        progress=progress,
    )
    return result


def train_many(
    model: Any,
    tokenizer: Any,
    jobs: Sequence[Job],
    penalty_scale: str = "relative",
    optimizer: str = "prox",
    steps: int = 100,
    tolerance: float | None = None,
    stop: str = "\n",
    site: str = "heads",
    whitespace: str = "refuse",
    projection: str | None = None,
    batch_size: int | None = None,
    path: str = "auto",
    progress: bool = False,
) -> list[TrainResult]:
    """Train several vectors; those of one layer run as rows of one batch, each with its own optimiser and end.

    Arguments and errors as for `train`; the results are in the order of `jobs`. A job that is not finite does not stop
    the others: `NotFinite` comes when they are done. `Interrupted` has the jobs of the layer it came at.
    """
    if not jobs:
        raise LaaiError("no jobs, expected at least one")
    settings: dict[str, Any] = {
        "penalty_scale": penalty_scale,
        "whitespace": whitespace,
        "batch_size": batch_size,
        "path": path,
    }
    for job in jobs:
        check_arguments(
            l1=job.l1, group=job.group, lr=job.lr, optimizer=optimizer, steps=steps, tolerance=tolerance, **settings
        )
    layout = locate(model, projection)
    at_layer: dict[int, list[int]] = {}
    for number, job in enumerate(jobs):
        at_layer.setdefault(layout.layer(job.layer), []).append(number)
    problems = [
        (Problem(layout, tokenizer, sets, layers, stop=stop, site=site, **settings), layers)
        for sets, layers in _shared(jobs, at_layer)
    ]
    results: dict[int, TrainResult] = {}
    failed: NotFinite | None = None
    with ExitStack() as stack:
        stack.enter_context(frozen(layout.model))
        verify_causal(layout)
        bar = stack.enter_context(tqdm(total=steps * len(jobs), desc="train", disable=not progress, leave=False))

        def report(done: list[Step]) -> None:
            if done:
                bar.set_postfix(objective=f"{done[-1].objective:.4f}", heads=done[-1].active_heads, refresh=False)
            bar.update(len(done))

        for problem, layers in problems:
            for layer in layers:
                numbers, unit = at_layer[layer], problem.unit(layer)
                here = [jobs[number] for number in numbers]
                start = torch.stack([_start(job, layout, layer, problem.shape(layer)) for job in here]) / unit
                l1, group, lr = torch.tensor([(job.l1, job.group, job.lr) for job in here]).T.view(3, -1, 1, 1)
                unfinished: NotFinite | Interrupted | None = None
                try:
                    solutions = problem.minimise(
                        layer, start, Penalty(l1, group), steps, range(len(here)), optimizer, lr, tolerance, report
                    )
                except (NotFinite, Interrupted) as error:
                    unfinished, solutions = error, error.results
                facts = {"loss": problem.objective.name, "penalty_scale": penalty_scale}
                facts |= {"optimizer": optimizer, "stop": stop}
                for number, solution, rms in zip(numbers, solutions, unit.flatten().tolist(), strict=True):
                    results[number] = _result(layout, layer, site, jobs[number], solution, {**facts, "rms": rms})
                if isinstance(unfinished, Interrupted):
                    raise Interrupted(str(unfinished), [results[number] for number in numbers])
                failed = failed or unfinished
        bar.refresh()  # short runs end between two of its updates
    in_order = [results[number] for number in range(len(jobs))]
    if failed is not None:
        raise NotFinite(failed, in_order)
    return in_order


def _shared(jobs: Sequence[Job], at_layer: dict[int, list[int]]) -> list[tuple[list[list[Example]], list[int]]]:
    """The jobs' examples, and the layers whose jobs have the same ones: what is before Δ runs once for all of them."""
    groups: list[tuple[list[list[Example]], list[int]]] = []
    for layer, numbers in sorted(at_layer.items()):
        sets = [list(jobs[number].examples) for number in numbers]
        known = next((layers for others, layers in groups if others == sets), None)
        if known is None:
            groups.append((sets, [layer]))
        else:
            known.append(layer)
    return groups


def _start(job: Job, layout: Layout, layer: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Where a job begins: Δ [H, d]."""
    if job.start is None:
        return torch.zeros(shape)
    return (job.start.scale * job.start.for_model(layout)[layer]).view(shape)


def _result(layout: Layout, layer: int, site: str, job: Job, solution: Solution, facts: dict[str, Any]) -> TrainResult:
    """The best point of a run as an intervention that says how it was made."""
    residual = float(Penalty(job.l1, job.group).stationarity(solution.x, solution.gradient))
    training = {
        **facts,
        "epsilon": SMOOTHING,
        "l1": job.l1,
        "group": job.group,
        "lr": job.lr if facts["optimizer"] == "adam" else None,
        "steps": len(solution.history),
        "objective": solution.objective,
        "task_loss": solution.loss,
        "stationarity": residual,
        "sparsity": float((solution.x == 0).float().mean()),
        **training_facts(layout, job.examples, job.seed, solution.stopped),
    }
    metadata = {**model_facts(layout, layer), "task": job.task, "method": "laai", "training": training}
    vector = (facts["rms"] * solution.x).view(layout.shape(layer, site))
    intervention = Intervention({layer: vector}, site=site, metadata=metadata)
    critical = float(critical_penalty(solution.first_gradient))
    return TrainResult(
        intervention,
        solution.history,
        solution.objective,
        residual,
        critical,
        solution.stopped,
        solution.finished,
    )


def model_facts(layout: Layout, layer: int) -> dict[str, Any]:
    """What a file records of the model (DESIGN: the file)."""
    config = layout.model.config
    name = getattr(config, "_name_or_path", "") or type(layout.model).__name__
    return {
        # Where a local model lay says nothing to anyone else, and would make equal trainings unequal files.
        "base_model": Path(name).resolve().name if Path(name).exists() else name,
        "model_type": config.model_type,
        "num_hidden_layers": len(layout.blocks),
        "num_attention_heads": layout.num_heads,
        "head_dim": layout.shape(layer, "heads")[1],
        "hidden_size": layout.hidden_size,
    }


def training_facts(
    layout: Layout, examples: Sequence[Example], seed: int, stopped: str | None = None
) -> dict[str, Any]:
    """What every method records of its training; `stopped` is why it ended before its budget, if it did."""
    return {
        "stopped": stopped,
        "seed": seed,
        "n_train": len(examples),
        "examples_sha256": examples_sha256(examples),
        "dtype": str(layout.model.dtype).removeprefix("torch."),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """What a file records of the software it was made with."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def examples_sha256(examples: Sequence[Example]) -> str:
    """Identity of the training examples, in order."""
    rows = [[e.prompt, e.target, e.options, e.distribution] for e in examples]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()


def check_arguments(**settings: Any) -> None:
    """LaaiError for an argument of `train` that no model and no data could make good; any of them may be given."""
    given = {name: value for name, value in settings.items() if value is not None}
    for name in ("l1", "group"):
        if not 0 <= given.get(name, 0) < float("inf"):
            raise LaaiError(f"{name} is {given[name]}: expected a finite number, 0 or above")
    for name in ("lr", "tolerance"):
        if not 0 < given.get(name, 1) < float("inf"):
            raise LaaiError(f"{name} is {given[name]}: expected a finite number above 0")
    for name in ("steps", "batch_size"):
        if given.get(name, 1) < 1:
            raise LaaiError(f"{name} is {given[name]}: expected at least one")
    for name, allowed in _CHOICES.items():
        if given.get(name, allowed[0]) not in allowed:
            raise LaaiError(f"unknown {name} {given[name]!r}: expected one of {', '.join(allowed)}")
