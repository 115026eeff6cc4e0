"""Seconds until a method is as good as ten shots, on the first 100 test words.

Ten examples of seed 0. Exact match is that of the most probable token at every place of the target, and behind it one
that begins a new line (a blank line too, as few-shot prompts have it). A method first chooses its setting by
cross-validation on the ten examples (LAAI: layer, penalty, evaluations; adapters: rate, steps), then trains; exact
match is measured after some of the training's steps, and nothing is chosen by it. Seconds are CPU seconds of one
thread, exact match not counted. ICV and function vectors choose nothing and have one point.

    python benchmarks/time_to_quality.py        # both models fetched, $LAAI_DATA set
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import laai_core
from known import Known
from laai_core.data import load_task
from laai_core.encode import encode_examples
from laai_core.example import Example
from laai_core.intervention import Intervention
from laai_core.locate import Layout, locate
from lm_eval_laai import methods
from lm_eval_laai.experiments.load import ModelSource
from lm_eval_laai.methods import METHODS, adapters, select
from measure import Record, parser

CELLS = [("smollm2-135m", "synonym"), ("gemma-3-270m", "en_fr")]  # where ten shots are good for something
NAMES = ("laai", "icv", "fv", "lora", "ia3", "soft_prompt")
WORDS = 100
ROWS = 20  # of a forward pass of exact match
STEPS = (1, 2, 4, 8, 16, 32, 64)  # after which exact match is measured, and at the end

Curve = dict[str, Any]  # choice: seconds; points: [[seconds of training, exact match], ...]


class Words:
    """The ten examples, and the test words on which exact match is measured."""

    def __init__(self, rule: str, layout: Layout, tokenizer: Any) -> None:
        self.split = load_task(rule, seed=0)
        self._tokenizer, self._device = tokenizer, layout.device

    @torch.no_grad()
    def exact_match(self, model: Any, intervention: Intervention | None = None, shots: bool = False) -> float:
        """Of `model`, which may be under an adapter."""
        right = 0
        train = self.split.train
        for first in range(0, WORDS, ROWS):
            asked = self.split.test[first : first + ROWS]
            if shots:
                asked = [Example(example.behind(train), example.target) for example in asked]
            batch = encode_examples(self._tokenizer, asked).to(self._device)
            arguments = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
            if intervention is None:
                logits = model(**arguments).logits
            else:
                with laai_core.apply(model, intervention, prompt_lengths=batch.prompt_lengths):
                    logits = model(**arguments).logits
            logits = logits[:, logits.shape[1] - batch.input_ids.shape[1] :]  # a soft prompt's columns come first
            found = logits[batch.row, batch.column].argmax(-1)
            same = (found == batch.token) | (self._new_line(batch.token) & self._new_line(found))
            right += len(asked) - len(batch.continuation[~same].unique())
        return right / WORDS

    def _new_line(self, tokens: torch.Tensor) -> torch.Tensor:
        """Which tokens begin a new line."""
        return torch.tensor([self._tokenizer.decode([token]).startswith("\n") for token in tokens.tolist()])


def laai_curve(layout: Layout, tokenizer: Any, words: Words) -> Curve:
    train = words.split.train
    choice, seconds = timed(lambda: select.choose(layout.model, tokenizer, train))
    points = []
    for steps in some_of(choice.steps):
        cut = replace(choice, steps=steps)
        result, spent = timed(lambda cut=cut: select.trained(layout.model, tokenizer, train, cut))
        points.append([spent, words.exact_match(layout.model, result.intervention)])
    return {"choice": seconds, "points": points}


def adapter_curve(method: str, layout: Layout, tokenizer: Any, words: Words) -> Curve:
    config = adapters.ADAPTERS[method](layout, None)
    bar = type("NoBar", (), {"update": lambda self: None})()
    with adapters._wrapped(layout, config, 0) as wrapped:
        if config.is_prompt_learning:
            adapters._start_from(wrapped, tokenizer, adapters.description(words.split.name))
        trainer = adapters._Trainer(wrapped, adapters._Data(layout, tokenizer, words.split.train))
        (best, _), seconds = timed(lambda: trainer.chosen(None, bar))
        points = []
        for steps in some_of(best.steps):
            _, spent = timed(lambda steps=steps: trainer.losses(best.lr, steps, bar))
            points.append([spent, words.exact_match(wrapped)])
    return {"choice": seconds, "points": points}


def vector_curve(method: str, layout: Layout, tokenizer: Any, words: Words) -> Curve:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vector.safetensors")
        fit = lambda: methods.fit(  # noqa: E731
            method, layout.model, tokenizer, words.split, output=path, progress=False
        )
        _, spent = timed(fit)
        return {"choice": 0.0, "points": [[spent, words.exact_match(layout.model, Intervention.load(path))]]}


def curve(method: str, layout: Layout, tokenizer: Any, words: Words) -> Curve:
    if method == "laai":
        return laai_curve(layout, tokenizer, words)
    if METHODS[method].writes_adapter:
        return adapter_curve(method, layout, tokenizer, words)
    return vector_curve(method, layout, tokenizer, words)


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its CPU seconds."""
    start = time.process_time()
    result = call()
    return result, time.process_time() - start


def some_of(steps: int) -> Iterator[int]:
    yield from (some for some in STEPS if some < steps)
    yield steps


def first_as_good(points: Sequence[Sequence[float]], wanted: float) -> float | None:
    """The seconds of the first point that is as good."""
    return next((seconds for seconds, exact in points if exact >= wanted), None)


def main() -> None:
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    known = Known(Path("runs/time_to_quality.jsonl"), [Path(__file__)])
    record = Record("time_to_quality", __doc__ or "", {"words": WORDS})
    lines = []
    for name, rule in CELLS[:1] if arguments.quick else CELLS:
        model, tokenizer = ModelSource(name, dtype="float32").load()
        layout = locate(model)
        words = Words(rule, layout, tokenizer)
        if (name, rule, "ten-shot") not in known:
            known[name, rule, "ten-shot"] = words.exact_match(model, shots=True)
        shots = known[name, rule, "ten-shot"]
        for method in NAMES[:2] if arguments.quick else NAMES:
            if (name, rule, method) not in known:
                print(f"{name} {rule}: {method}", file=sys.stderr, flush=True)
                known[name, rule, method] = curve(method, layout, tokenizer, words)
            found = known[name, rule, method]
            (last, exact), reached = found["points"][-1], first_as_good(found["points"], shots)
            known_setting, whole = ("never", "never") if reached is None else (reached, found["choice"] + reached)
            cells = [found["choice"], last, f"{exact:.2f}", f"{shots:.2f}", whole, known_setting]
            lines.append([f"{name} {rule}", METHODS[method].title, *(text(cell) for cell in cells)])
            record.keep(f"{name} {rule} {method}", found)
    columns = ["cell", "method", "choice, s", "training, s", "exact match", "ten-shot", "as good after, s"]
    columns.append("as good after, s, setting known")
    record.table(
        "CPU seconds in one thread, and exact match of 100 test words",
        columns,
        lines,
        "As good after: the first of the steps at which exact match was measured. Exact match is that of the "
        "training's end, and may be lower again.",
    )
    record.save(arguments.quick)


def text(cell: float | str) -> str:
    return cell if isinstance(cell, str) else f"{cell:.0f}" if cell >= 10 else f"{cell:.1f}"


if __name__ == "__main__":
    main()
