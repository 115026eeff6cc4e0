"""The same training and the same evaluation, in other batches, on other numbers of threads: how far apart they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from lm_eval.api.instance import Instance

import laai_core as laai
from lm_eval_laai.model import HFLaai


class Apart(NamedTuple):
    """How far trainings are from one that they should equal: the largest of each."""

    vector: float  # of a coordinate, as a share of the largest coordinate
    objective: float  # as a share of it


def apart(pairs: Iterable[tuple[laai.TrainResult, laai.TrainResult]]) -> Apart:
    """Of (training, what it should equal)."""
    vectors, objectives = [], []
    for found, expected in pairs:
        (layer,) = expected.intervention.layers
        a, b = found.intervention.vector(layer), expected.intervention.vector(layer)
        vectors.append(float((a - b).abs().max() / b.abs().max()))
        objectives.append(abs(found.objective / expected.objective - 1))
    return Apart(max(vectors), max(objectives))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within the block, PyTorch computes in `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def by_batch_size(model: Any, tokenizer: Any, sizes: Sequence[int], **options: Any) -> Apart:
    """Trained with so many rows a forward, against all at once."""
    examples = laai.load_task("lexicon_antonym").train
    whole = laai.train(model, tokenizer, examples, **options)
    return apart((laai.train(model, tokenizer, examples, batch_size=size, **options), whole) for size in sizes)


def by_threads(model: Any, tokenizer: Any, counts: Sequence[int], **options: Any) -> Apart:
    """Trained in so many threads, against one."""
    found = []
    for count in (1, *counts):
        with threads(count):
            found.append(laai.train(model, tokenizer, laai.load_task("lexicon_antonym").train, **options))
    return apart((one, found[0]) for one in found[1:])


def by_company(model: Any, tokenizer: Any, layer: int, **options: Any) -> Apart:
    """Trained in one batch with other vectors, against each alone."""
    jobs = [laai.Job(laai.load_task("lexicon_antonym", seed=seed).train, layer, seed=seed) for seed in range(3)]
    together = laai.train_many(model, tokenizer, jobs, **options)
    return apart(
        (one, laai.train_many(model, tokenizer, [job], **options)[0]) for one, job in zip(together, jobs, strict=True)
    )


def by_evaluation_batch(
    model: Any, tokenizer: Any, iv: laai.Intervention, sizes: Sequence[int], items: int
) -> tuple[float, int]:
    """hf-laai with such batch sizes against batch size 1: log-likelihoods' largest difference, and answers changed."""
    examples = laai.load_task("lexicon_antonym").test[:items]
    found = [_evaluated(HFLaai(model, iv, tokenizer=tokenizer, batch_size=size), examples) for size in (1, *sizes)]
    scores, answers = zip(*found, strict=True)
    largest = max(abs(a - b) for other in scores[1:] for a, b in zip(scores[0], other, strict=True))
    changed = sum(a != b for other in answers[1:] for a, b in zip(answers[0], other, strict=True))
    return largest, changed


def _evaluated(lm: HFLaai, examples: Sequence[laai.Example]) -> tuple[list[float], list[str]]:
    def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
        return [Instance(kind, {}, one, index, metadata=("task", index, 1)) for index, one in enumerate(arguments)]

    pairs = [(example.prompt, example.target) for example in examples]
    until = [(example.prompt, {"until": ["\n"], "max_gen_toks": 4}) for example in examples]
    scores = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    answers = lm.generate_until(requests("generate_until", until), disable_tqdm=True)
    return [score for score, _ in scores], answers
