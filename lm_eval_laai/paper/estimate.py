"""Estimated duration of work, from one timed forward pass.

Costs are in passes over 64 prompts of 16 tokens, as measured with SmolLM2-135M on one CPU core. Another model or
machine has another ratio of reading weights to computing: an order of magnitude.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from lm_eval_laai.experiments.cells import Cell, Fit
from lm_eval_laai.experiments.setting import Setting
from lm_eval_laai.methods import METHODS
from lm_eval_laai.methods.method import ADAPTER_STEPS

if TYPE_CHECKING:  # importing transformers takes a second
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS, TOKENS, REPEATS = 64, 16, 3
FIXED = 0.15  # of a training's cost, where layer and penalty are given
SCORED = 0.5  # passes for 64 test items, besides their prompts


def seconds(setting: Setting, fits: Iterable[Fit], cells: Iterable[Cell]) -> float:
    """Seconds in one process. Loads the model to time it, unless nothing is left to do."""
    fits, cells = list(fits), list(cells)
    if not fits and not cells:
        return 0.0
    model, tokenizer = setting.source.load()
    passes = sum(_training(fit) for fit in fits)
    passes += sum(_scoring(setting, cell, tokenizer) for cell in cells)
    return passes * _one_pass(model)


def _training(fit: Fit) -> float:
    """Passes of a fit."""
    steps = (fit.steps or ADAPTER_STEPS) / ADAPTER_STEPS
    return METHODS[fit.method].passes * steps * (1 if fit.l1 is None else FIXED)


def _scoring(setting: Setting, cell: Cell, tokenizer: PreTrainedTokenizerBase) -> float:
    """Passes to score a cell: its test items, all taken to be as long as the first."""
    test = setting.split(cell.task).test
    tokens = len(tokenizer.encode(test[0].prompt)) * (1 + cell.shots)
    return min(len(test), setting.limit or len(test)) / ROWS * (SCORED + tokens / TOKENS)


def _one_pass(model: PreTrainedModel) -> float:
    """Seconds, the fastest of a few."""
    ids = torch.zeros(ROWS, TOKENS, dtype=torch.long, device=model.device)
    times = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        with torch.no_grad():
            model(input_ids=ids).logits[0, 0, 0].item()  # reading a value waits for an accelerator
        times.append(time.perf_counter() - start)
    return min(times)
