"""Train vectors on a few examples each: the paper's eq. 2."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm

from laai_core.data import Example
from laai_core.encode import WHITESPACE, Batch, encode_examples
from laai_core.errors import LaaiError
from laai_core.forward import Forward, PlainForward, frozen
from laai_core.intervention import Intervention
from laai_core.locate import Layout, locate, verify_causal
from laai_core.objective import SMOOTHING, Objective
from laai_core.optimize import OPTIMIZERS, Run, Step, minimise
from laai_core.penalty import Penalty, critical_penalty
from laai_core.replay import ReplayForward

logger = logging.getLogger(__name__)

PENALTY_SCALES = ("relative", "absolute")
PATHS = ("auto", "plain", "replay")


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

    Arguments and errors as for `train`; the results are in the order of `jobs`.
    """
    if not jobs:
        raise LaaiError("no jobs, expected at least one")
    for job in jobs:
        check_arguments(
            job.l1, job.group, penalty_scale, optimizer, steps, job.lr, tolerance, whitespace, batch_size, path
        )
    layout = locate(model, projection)
    layers = [layout.layer(job.layer) for job in jobs]
    max_length = getattr(layout.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    prepared: list[tuple[int, list[int], Objective, Batch]] = []
    for layer in sorted(set(layers)):
        layout.shape(layer, site)
        numbers = [number for number, at in enumerate(layers) if at == layer]
        examples = [example for number in numbers for example in jobs[number].examples]
        owners = [run for run, number in enumerate(numbers) for _ in jobs[number].examples]
        batch = encode_examples(tokenizer, examples, stop, max_length, whitespace, owners)
        prepared.append((layer, numbers, Objective(examples), batch))
    results: dict[int, TrainResult] = {}
    with ExitStack() as stack:
        stack.enter_context(frozen(layout.model))
        verify_causal(layout)
        bar = stack.enter_context(tqdm(total=steps * len(jobs), desc="train", disable=not progress, leave=False))
        for layer, numbers, objective, batch in prepared:
            plain = PlainForward(layout, batch, layer, site, batch_size)
            rms = plain.activation_rms() if penalty_scale == "relative" else [1.0] * len(numbers)
            forward = _chosen_path(path, plain, layout, batch, layer, site, batch_size)
            shape = layout.shape(layer, site)
            runs = [
                _run(jobs[number], layout, layer, shape, unit, steps, optimizer, tolerance, bar)
                for number, unit in zip(numbers, rms, strict=True)
            ]
            minimise(_evaluation(forward, objective, rms, batch), runs)
            for number, run, unit in zip(numbers, runs, rms, strict=True):
                facts = {
                    "loss": objective.name,
                    "penalty_scale": penalty_scale,
                    "rms": unit,
                    "optimizer": optimizer,
                    "stop": stop,
                }
                results[number] = _result(layout, layer, site, jobs[number], run, unit, facts)
        bar.refresh()  # short runs end between two of its updates
    return [results[number] for number in range(len(jobs))]


def _run(
    job: Job,
    layout: Layout,
    layer: int,
    shape: tuple[int, ...],
    rms: float,
    steps: int,
    optimizer: str,
    tolerance: float | None,
    bar: Any,
) -> Run:
    """The optimiser of one job. Without heads the whole vector is one group."""

    def report(step: Step) -> None:
        bar.set_postfix(objective=f"{step.objective:.4f}", heads=step.active_heads, refresh=False)
        bar.update()

    start = torch.zeros(shape)
    if job.start is not None:
        start = job.start.scale * job.start.for_model(layout)[layer].view(shape) / rms
    groups = start if start.ndim == 2 else start.unsqueeze(0)
    return Run(Penalty(job.l1, job.group), groups, steps, optimizer, job.lr, tolerance, report)


def _evaluation(forward: Forward, objective: Objective, rms: Sequence[float], batch: Batch) -> Any:
    """What `minimise` calls: x of the active runs to their losses and gradients, with Δ = rms * x."""
    run_of_example = batch.run_of_example.tolist()

    def evaluate(points: list[torch.Tensor], active: list[int]) -> list[tuple[float, torch.Tensor, str]]:
        units = torch.tensor([rms[run] for run in active])
        vectors = units.unsqueeze(1) * torch.stack([x.flatten() for x in points])
        losses, gradients, per_example = forward.loss_and_gradient(vectors, objective, active)
        gradients = units.unsqueeze(1) * gradients.cpu()
        found = []
        for run, x, loss, gradient in zip(active, points, losses.tolist(), gradients, strict=True):
            culprit = _culprit(per_example, run, run_of_example)
            found.append((loss, gradient.view(x.shape), culprit))
        return found

    return evaluate


def _culprit(per_example: torch.Tensor, run: int, run_of_example: list[int]) -> str:
    """Which of a run's examples has a loss that is not finite."""
    bad = (~torch.isfinite(per_example)).nonzero().flatten().tolist()
    first = run_of_example.index(run)
    return next((f" (example {number - first})" for number in bad if run_of_example[number] == run), "")


def _chosen_path(
    path: str, plain: PlainForward, layout: Layout, batch: Batch, layer: int, site: str, batch_size: int | None
) -> Forward:
    """The fast path where it gives the plain one's numbers on this model, else the plain one."""
    if path == "plain" or layout.virtual_tokens:
        return plain
    replay = ReplayForward(layout, batch, layer, site, batch_size)
    if path == "replay":
        return replay
    difference = replay.difference_from(plain)
    tolerance = 1e-3 if layout.model.dtype == torch.float32 else 0.2
    if not isinstance(difference, str) and difference <= tolerance:
        return replay
    reason = difference if isinstance(difference, str) else f"log-probabilities differ by {difference:.2g}"
    logger.warning("%s cannot be replayed (%s): training by full forwards", type(layout.model).__name__, reason)
    return plain


def _result(
    layout: Layout, layer: int, site: str, job: Job, run: Run, rms: float, facts: dict[str, Any]
) -> TrainResult:
    """The best point of a run as an intervention that says how it was made."""
    best = run.result()
    residual = run.penalty.stationarity(best.x, best.gradient)
    training = {
        **facts,
        "epsilon": SMOOTHING,
        "l1": job.l1,
        "group": job.group,
        "lr": job.lr if facts["optimizer"] == "adam" else None,
        "steps": len(run.history),
        "seed": job.seed,
        "n_train": len(job.examples),
        "examples_sha256": examples_sha256(job.examples),
        "objective": best.objective,
        "task_loss": best.loss,
        "stationarity": residual,
        "sparsity": float((best.x == 0).float().mean()),
        "dtype": str(layout.model.dtype).removeprefix("torch."),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    metadata = {**model_facts(layout, layer), "task": job.task, "method": "laai", "training": training}
    vector = (rms * best.x).view(layout.shape(layer, site))
    intervention = Intervention({layer: vector}, site=site, metadata=metadata)
    assert run.first is not None
    critical = critical_penalty(run.first.gradient)
    return TrainResult(intervention, run.history, best.objective, residual, critical, run.stopped)


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


def examples_sha256(examples: Sequence[Example]) -> str:
    """Identity of the training examples, in order."""
    rows = [[e.prompt, e.target, e.options, e.distribution] for e in examples]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()


def check_arguments(
    l1: float,
    group: float,
    penalty_scale: str,
    optimizer: str,
    steps: int,
    lr: float,
    tolerance: float | None,
    whitespace: str,
    batch_size: int | None,
    path: str,
) -> None:
    """LaaiError for an argument of `train` that no model and no data could make good."""
    for name, value in (("l1", l1), ("group", group)):
        if not 0 <= value < float("inf"):
            raise LaaiError(f"{name} is {value}: expected a finite number, 0 or above")
    for name, positive in (("lr", lr), ("tolerance", tolerance)):
        if positive is not None and not 0 < positive < float("inf"):
            raise LaaiError(f"{name} is {positive}: expected a finite number above 0")
    for name, count in (("steps", steps), ("batch_size", batch_size)):
        if count is not None and count < 1:
            raise LaaiError(f"{name} is {count}: expected at least one")
    for name, word, allowed in (
        ("penalty_scale", penalty_scale, PENALTY_SCALES),
        ("optimizer", optimizer, OPTIMIZERS),
        ("whitespace", whitespace, WHITESPACE),
        ("path", path, PATHS),
    ):
        if word not in allowed:
            raise LaaiError(f"unknown {name} {word!r}: expected one of {', '.join(allowed)}")
