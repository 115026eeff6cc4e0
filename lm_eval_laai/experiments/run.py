"""Compute the missing fits of a plan, then the missing scores; each is stored as soon as it is computed.

Under `torchrun` or `accelerate launch` every process takes its share of both; all processes see the store's folder.
Other launches on the same folder may run at the same time: a piece that one process is at is left to it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from laai_core.errors import DiskFailed, LaaiError, NotFinite
from laai_core.settings import Job, StartName
from laai_core.train import train_many
from lm_eval_laai import methods
from lm_eval_laai.experiments.cells import Cell, Fit, Store, named
from lm_eval_laai.experiments.setting import Setting

if TYPE_CHECKING:  # importing transformers takes a second
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Write = Callable[[], object]
Claim = Literal["mine", "busy", "done"]
PAUSE = 1.0  # seconds until pieces that other processes are at are looked at again


@dataclass(frozen=True)
class Plan:
    """The cells to score on one model, and the fits wanted for themselves."""

    setting: Setting
    cells: tuple[Cell, ...]
    fits: tuple[Fit, ...] = ()

    def batches(self) -> list[list[Fit]]:
        """All fits; those of LAAI that share task, layer and number of examples are rows of one batch.

        Batches depend on the plan alone, not on stored fits: another batch rounds otherwise, so that a resumed run
        could give other results than an uninterrupted one.
        """
        batches: dict[Fit, list[Fit]] = {}
        for fit in dict.fromkeys([*self.fits, *(fit for cell in self.cells for fit in cell.fits)]):
            batches.setdefault(_kind(fit), []).append(fit)
        return list(batches.values())

    def left(self, store: Store) -> tuple[set[Fit], set[Cell]]:
        """The fits that are missing, for themselves or for a missing cell, and the missing cells.

        Reads all data, so that faults in the data are found before anything runs.
        """
        cells = {cell for cell in self.cells if store.get(cell, self.setting.cell_identity(cell)) is None}
        needed = {*self.fits, *(fit for cell in cells for fit in cell.fits)}
        return {fit for fit in needed if not self.path(fit, store).exists()}, cells

    def path(self, fit: Fit, store: Store) -> Path:
        """The path of a fit, whether or not it is stored."""
        return store.fit_path(fit, self.setting.fit_identity(fit))


class Process:
    """This process of a launch of one or several: its rank and its device."""

    def __init__(self) -> None:
        on_cpu = not torch.accelerator.is_available()
        # A process may wait long for a slower one.
        self._state = PartialState(cpu=on_cpu, timeout=timedelta(weeks=52))
        self.first = self._state.is_main_process
        self.alone = self._state.num_processes == 1

    def device(self, wanted: str | None) -> str | None:
        """The device `wanted`; in a launch of several processes this process's own."""
        if self.alone:
            return wanted
        return "cpu" if self._state.device.type == "cpu" else str(self._state.device)

    def share(self, work: Sequence[Any]) -> list[Any]:
        """This process's part: every n-th piece."""
        return list(work[self._state.process_index :: self._state.num_processes])

    def wait(self) -> None:
        """Wait until all processes have called this."""
        self._state.wait_for_everyone()


def run(plans: Sequence[Plan], store: Store, process: Process) -> None:
    """Compute every cell and fit that is not in the store.

    A failed computation (an architecture that a method does not support, a prompt that is too long) is logged, leaves
    its cells missing and does not stop the others. A failed write stops everything.
    """
    for plan in plans:
        fits, cells = plan.left(store)
        worker = _Worker(plan, store)
        batches = [batch for batch in process.share(plan.batches()) if not fits.isdisjoint(batch)]
        _each(batches, worker.claimed_fits, worker.fit, "fits", process)
        process.wait()  # a cell may need fits of another process
        cells_here = [[cell] for cell in process.share(plan.cells) if cell in cells]
        _each(cells_here, worker.claimed_cell, worker.score, "cells", process)
        process.wait()


def _each(
    work: Sequence[list[Any]],
    claimed: Callable[[list[Any]], AbstractContextManager[Claim]],
    compute: Callable[[list[Any]], Write],
    name: str,
    process: Process,
) -> None:
    # As a context: the bar is cleared while Ctrl-C unwinds the stack, before the error is printed on its line.
    with tqdm(total=len(work), desc=name, disable=not (process.first and work), leave=False) as bar:
        while work:
            busy = []
            for pieces in work:
                with claimed(pieces) as claim:
                    if claim == "busy":
                        busy.append(pieces)
                        continue
                    if claim == "mine":
                        _computed(pieces, compute)
                bar.update()
            if len(busy) == len(work):
                time.sleep(PAUSE)
            work = busy


def _computed(pieces: list[Any], compute: Callable[[list[Any]], Write]) -> None:
    try:
        write = compute(pieces)
    except DiskFailed:
        raise
    except LaaiError as error:
        if len(pieces) > 1:  # one of them may be the reason, which ended all
            for piece in pieces:
                _computed([piece], compute)
        else:
            logger.error("%s: %s", named(pieces[0]), error)
    else:
        write()


class _Worker:
    """One model, loaded when it is first needed."""

    def __init__(self, plan: Plan, store: Store) -> None:
        self._plan, self._store, self._setting = plan, store, plan.setting
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None

    @contextmanager
    def claimed_fits(self, batch: list[Fit]) -> Iterator[Claim]:
        """The claim on a batch; batches of one kind share a lock, whatever their seeds and penalties."""
        kind = _kind(batch[0])
        with self._store.claimed(kind, self._setting.fit_identity(kind)) as mine:
            paths = [self._plan.path(fit, self._store) for fit in batch]
            yield "busy" if not mine else "done" if all(path.exists() for path in paths) else "mine"

    @contextmanager
    def claimed_cell(self, cells: list[Cell]) -> Iterator[Claim]:
        """The claim on a cell."""
        (cell,) = cells
        identity = self._setting.cell_identity(cell)
        with self._store.claimed(cell, identity) as mine:
            yield "busy" if not mine else "mine" if self._store.get(cell, identity) is None else "done"

    def fit(self, batch: list[Fit]) -> Write:
        """Train a batch; the returned function saves those of its fits that are not stored yet, and what they took."""
        paths = [self._plan.path(fit, self._store) for fit in batch]
        if all(path.exists() for path in paths):  # one of a batch that is tried again
            return lambda: None
        model, tokenizer = self._model()
        start = time.process_time()
        if _is_job(batch[0]):
            shared: dict[str, Any] = {"penalty_scale": batch[0].penalty_scale, "steps": batch[0].steps}
            try:
                results = train_many(model, tokenizer, list(map(self._job, batch)), **shared)
            except NotFinite as error:
                results = error.results
            new = []
            for fit, path, result in zip(batch, paths, results, strict=True):
                if not result.finished:
                    logger.error("%s: %s", named(fit), result.stopped)
                elif not path.exists():
                    new.append((fit, path, result.intervention))
            seconds = (time.process_time() - start) / len(batch)

            def save() -> None:
                for fit, path, intervention in new:
                    intervention.save(path)
                    self._put_seconds(fit, seconds)

            return save
        (fit,) = batch
        methods.fit(
            fit.method,
            model,
            tokenizer,
            self._setting.split(fit.task, fit.seed, fit.n_train),
            layer=fit.layer,
            steps=fit.steps,
            l1=fit.l1,
            group=fit.group,
            penalty_scale=fit.penalty_scale,
            start=fit.start,
            seed=fit.seed,
            output=paths[0],
            progress=False,
        )
        seconds = time.process_time() - start
        return lambda: self._put_seconds(fit, seconds)  # methods.fit has written the output

    def _put_seconds(self, fit: Fit, seconds: float) -> None:
        self._store.put_seconds(fit, self._setting.fit_identity(fit), seconds)

    def _job(self, fit: Fit) -> Job:
        split = self._setting.split(fit.task, fit.seed, fit.n_train)
        assert fit.layer is not None and fit.l1 is not None and fit.group is not None
        name, start = f"laai_{split.name}", cast(StartName | None, fit.start)
        return Job(split.train, fit.layer, fit.l1, fit.group, seed=fit.seed, task=name, start=start)

    def score(self, cells: list[Cell]) -> Write:
        """Evaluate a cell; the returned function stores its result."""
        # Here and not above: the harness takes seconds to import, and a finished plan needs none.
        from lm_eval_laai.experiments import harness

        (cell,) = cells
        paths = [self._plan.path(fit, self._store) for fit in cell.fits]
        if not all(path.exists() for path in paths):
            raise LaaiError("what it needs could not be trained")
        result = harness.score(*self._model(), self._setting, cell, paths)
        return lambda: self._store.put(cell, self._setting.cell_identity(cell), result)

    def _model(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if self._loaded is None:
            self._loaded = self._setting.source.load()
        return self._loaded


def _is_job(fit: Fit) -> bool:
    """Whether `train_many` can train the fit as a row of a batch: no setting is left to be chosen."""
    chosen = None in (fit.layer, fit.l1, fit.group, fit.steps, fit.penalty_scale)
    return fit.method == methods.LAAI.name and not chosen


def _kind(fit: Fit) -> Fit:
    """Equal for the fits that are rows of one batch."""
    return replace(fit, seed=0, l1=None, group=None) if _is_job(fit) else fit
