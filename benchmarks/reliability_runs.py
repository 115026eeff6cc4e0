"""The parts `same` and `long` of reliability.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import endurance
import repeating
from tqdm import tqdm

import laai_core as laai
from lm_eval_laai.methods.method import middle_layer
from models import REFERENCE_MODEL, reference_model
from reliability import ROOT, Part, Table, table

LAAI = "import sys; from lm_eval_laai.commands.cli import main; sys.exit(main())"

# --- determinism


def same(quick: bool, folder: Path) -> Part:
    """Trainings on the reference model (float32, CPU, ten examples of the lexicon's antonyms, the middle layer).

    The same training must give the same bytes in other processes, each with its own hash seed. In other batches, in
    company, or in other threads, matrix products are added up in another order: how far apart the vectors (the largest
    difference of a coordinate, as a share of the largest coordinate) and the objectives (relative) are then, is
    measured. Of an evaluation: the largest difference of a log-likelihood, and the answers that changed.
    """
    part = Part()
    model, tokenizer = reference_model()
    layer = middle_layer(model.config.num_hidden_layers)
    part.tables.append(_bytes_table(part, 2 if quick else 5, folder))
    rows = []
    for optimizer in ("prox", "adam"):
        for steps in (5,) if quick else (5, 30, 100):
            options: dict[str, Any] = {"layer": layer, "optimizer": optimizer, "steps": steps}
            with repeating.threads(1):
                measured = [
                    repeating.by_batch_size(model, tokenizer, [1, 3], **options),
                    repeating.by_company(model, tokenizer, **options),
                ]
            measured.append(repeating.by_threads(model, tokenizer, [2, 4], **options))
            rows.append([optimizer, steps, *(f"{value:.0e}" for apart in measured for value in apart)])
            print(rows[-1], file=sys.stderr, flush=True)
    columns = ["optimiser", "steps", "batch size 1, 3: vector", "objective"]
    columns += ["three in one batch: vector", "objective", "2, 4 threads: vector", "objective"]
    part.tables.append(table("The same training in other batches, company and threads", columns, rows, SAME_NOTE))
    iv = laai.train(model, tokenizer, laai.load_task("lexicon_antonym").train, layer).intervention
    items = 16 if quick else 200
    difference, changed = repeating.by_evaluation_batch(model, tokenizer, iv, [3, 16, 64], items)
    note = "Batch sizes 3, 16 and 64 against 1."
    columns, row = ["items", "log-likelihood", "answers changed"], [items, f"{difference:.0e}", changed]
    part.tables.append(table("The same evaluation in other batches", columns, [row], note))
    return part


SAME_NOTE = """A step starts where the last one ended, so rounding grows with them. Across batch sizes, company and
threads no more is promised than these orders of magnitude; across machines, releases of PyTorch, GPUs and half
precision nothing is, and nothing was measured."""


def _bytes_table(part: Part, times: int, folder: Path) -> Table:
    """The same command in processes that are started one by one."""
    rows = []
    for optimizer in ("prox", "adam"):
        found = set()
        for number in range(times):
            path = folder / f"{optimizer} {number}" / "x.safetensors"
            argv = ["train", "--model", str(REFERENCE_MODEL), "--task", "lexicon_antonym", "--output", str(path)]
            command = [sys.executable, "-c", LAAI, *argv, "--optimizer", optimizer]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(number)}
            subprocess.run(command, check=True, capture_output=True, env=environment)
            found.add(path.read_bytes())
        rows.append([f"`laai train --optimizer {optimizer}`", times, len(found)])
        if len(found) != 1:
            part.faults.append(f"{optimizer}: {len(found)} different files of {times} processes")
    columns = ["command", "processes", "distinct files (1: all alike)"]
    return table("The same training in other processes", columns, rows)


# --- long runs


def long(quick: bool, folder: Path) -> Part:
    """Cycles of apply, run and remove (every site, position and operation; one vector, one a row, two nested, and one
    that ends in an exception), and trainings (both optimisers, both losses, both paths), in one process; and two
    threads with a model each, that apply, generate and train.

    No hook, no method put over another, and no tensor may stay behind; the model must be as it was, and the same
    training give the same bytes, to the bit. Memory is what there was more at the end than after the first ten rounds.
    """
    part = Part()
    cycles, trainings = endurance.Cycles(), endurance.Trainings()
    counts = (20, 10, 5) if quick else (1000, 200, 200)
    with tqdm(total=sum(counts) + 2 * endurance.WARM + counts[2], desc="long", file=sys.stderr) as bar:
        found = {
            "apply and remove": (endurance.grown(cycles.model, cycles.once, counts[0], bar.update), cycles.disturbed),
            "trainings": (endurance.grown(trainings.model, trainings.once, counts[1], bar.update), trainings.changed),
        }
        disturbed = endurance.disturbances(counts[2], bar.update)
    rows = []
    for name, (grown, changed) in found.items():
        kibibytes = [f"{size / 1024:,.0f}" for size in (grown.python, grown.resident)]
        rows.append([name, grown.rounds, grown.hooks, grown.tensors, *kibibytes, changed])
        if grown.hooks or grown.tensors > 0 or changed or grown.python > 256 << 10 or grown.resident > 64 << 20:
            part.faults.append(f"{name}: {grown}, {changed} changed")
    columns = ["what", "rounds", "hooks left", "tensors left", "Python memory, KiB", "resident, KiB", "changed"]
    part.tables.append(table("Long runs", columns, rows))
    if disturbed:
        part.faults.append(f"threads: {disturbed} results disturbed")
    columns = ["what", "results compared, to the bit", "different from alone"]
    row = ["apply, generate, train", 2 * counts[2], disturbed]
    part.tables.append(table("Two threads, two models", columns, [row]))
    return part
