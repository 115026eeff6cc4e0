"""The same thing many times over in one process, or in two threads at once: what stays behind, and what changes.

test_long_runs does it tens of times, benchmarks/reliability.py a thousand.
"""

from __future__ import annotations

import gc
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny import PAD, tiny_model, tiny_tokenizer
from torch import nn

import laai_core as laai

TOKENS = torch.tensor([[PAD, 5, 6, 7, 8], [9, 10, 11, 12, 13]])
MASK = (TOKENS != PAD).long()
WARM = 10  # rounds before memory is looked at: caches fill, libraries import


@dataclass(frozen=True)
class Grown:
    """What a number of rounds left behind, after the first WARM of them."""

    rounds: int
    hooks: int  # hooks and shadowed methods on the model
    tensors: int  # that Python still knows
    python: int  # bytes, by tracemalloc
    resident: int  # bytes of the process; 0 where the system does not say


def hooks(model: nn.Module) -> int:
    """Hooks of any kind on the model's modules, and methods that instances shadow."""
    found = sum("forward" in vars(m) or "generate" in vars(m) for m in model.modules())
    return found + sum(len(v) for m in model.modules() for k, v in vars(m).items() if k.endswith("_hooks"))


def grown(model: nn.Module, once: Callable[[int], None], rounds: int, each: Callable[[], Any] = lambda: None) -> Grown:
    """Call `once` with 0, 1, ... WARM + rounds - 1, and see what the last `rounds` of them left behind."""
    with _traced():  # from the start: what is freed counts only if its allocation was seen
        for number in range(WARM):
            once(number)
            each()
        tensors, python, resident = _tensors(), tracemalloc.get_traced_memory()[0], _resident()
        for number in range(WARM, WARM + rounds):
            once(number)
            each()
        left = _tensors() - tensors
        return Grown(rounds, hooks(model), left, tracemalloc.get_traced_memory()[0] - python, _resident() - resident)


@contextmanager
def _traced() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


def _tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def _resident() -> int:
    with suppress(OSError):
        return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0]) << 10
    return 0


# --- what is done over and over


def interventions() -> list[laai.Intervention]:
    """One for every site, position and operation that a tiny Llama has room for."""
    draw = torch.Generator().manual_seed(0)
    return [
        laai.Intervention(
            {1: torch.randn((4, 8) if site == "heads" else (32,), generator=draw)}, site, position, operation=operation
        )
        for site in ("heads", "residual", "mlp")
        for position in ("last", "generated", "all")
        for operation in ("add", "icv")
    ]


class Cycles:
    """Apply, run, remove; every cycle another intervention and another way in."""

    def __init__(self) -> None:
        self.model = tiny_model("Llama")
        self._interventions = interventions()
        self._untouched = self._logits()
        self.disturbed = 0  # cycles after which the model was not as it had been, to the bit

    def once(self, number: int) -> None:
        one = self._interventions[number % len(self._interventions)]
        other = self._interventions[(number + 7) % len(self._interventions)]
        way = number % 4
        with suppress(_Expected):
            if way == 0:
                with laai.apply(self.model, one):
                    self._logits()
            elif way == 1:
                with laai.apply(self.model, [one, None], prompt_lengths=[4, 3]):
                    self._logits()
            elif way == 2:
                with laai.apply(self.model, one), laai.apply(self.model, other):
                    self.model.generate(input_ids=TOKENS, attention_mask=MASK, max_new_tokens=2, do_sample=False)
            else:
                with laai.apply(self.model, one):
                    self._logits()
                    raise _Expected
        self.disturbed += not torch.equal(self._logits(), self._untouched)

    def _logits(self) -> torch.Tensor:
        with torch.no_grad():
            return self.model(input_ids=TOKENS, attention_mask=MASK).logits


class _Expected(Exception):
    pass


class Trainings:
    """Short trainings, every one with other examples, another optimiser, path or objective."""

    def __init__(self) -> None:
        self.model, self._tokenizer = tiny_model("Llama"), tiny_tokenizer(bos=True)
        self._digests: dict[int, str] = {}
        self.changed = 0  # trainings that did not give what the same one had given before

    def once(self, number: int) -> None:
        kind = number % WARM
        options = {"optimizer": ["prox", "adam"][kind % 2], "forward": ["replay", "plain"][kind // 2 % 2]}
        examples = laai.load_task("lexicon_antonym", seed=kind, n_train=3).train
        if kind % 3 == 0:
            examples = [laai.Example(e.prompt, options=[" a", " b"], distribution=[0.25, 0.75]) for e in examples]
        result = laai.train(self.model, self._tokenizer, examples, layer=1, steps=4, **options)
        digest = result.intervention.sha256
        self.changed += self._digests.setdefault(kind, digest) != digest


def disturbances(rounds: int, each: Callable[[], Any] = lambda: None) -> int:
    """How many results two threads, each with its own model and vectors, get otherwise than alone: to the bit."""
    names = ("Llama", "GPT2")
    alone = {name: [_work(name, number) for number in range(min(rounds, 4))] for name in names}
    together: dict[str, list[list[torch.Tensor]]] = {name: [] for name in names}
    start = threading.Barrier(len(names))

    def thread(name: str) -> None:
        start.wait()
        for number in range(rounds):
            together[name].append(_work(name, number % 4))
            each()

    threads = [threading.Thread(target=thread, args=(name,)) for name in names]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    missing = sum(rounds - len(results) for results in together.values())  # a thread that failed
    return missing + sum(
        not all(map(torch.equal, found, alone[name][number % 4]))
        for name in names
        for number, found in enumerate(together[name])
    )


def _work(name: str, number: int) -> list[torch.Tensor]:
    """One model's share: logits and an answer under a vector, and a training."""
    model, tokenizer = _own(name)
    iv = interventions()[number]
    with laai.apply(model, iv), torch.no_grad():
        logits = model(input_ids=TOKENS, attention_mask=MASK).logits
        answer = model.generate(input_ids=TOKENS, attention_mask=MASK, max_new_tokens=3, do_sample=False)
    examples = laai.load_task("lexicon_antonym", seed=number, n_train=2).train
    trained = laai.train(model, tokenizer, examples, layer=1, steps=3, optimizer=["prox", "adam"][number % 2])
    return [logits, answer, trained.intervention.vector(1)]


_models: dict[str, Any] = {}


def _own(name: str) -> Any:
    if name not in _models:
        _models[name] = tiny_model(name), tiny_tokenizer(bos=True)
    return _models[name]
