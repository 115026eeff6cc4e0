"""Can the vectors of two tasks be made into a vector for one task after the other?

The reference model and the four compositions of the bundled lexicon (en_fr_antonym: the French word for the antonym).
A vector is trained on ten examples of each rule and, as "re-optimised", of each composition, by `laai_core.train` with
its defaults at the middle layer (100 evaluations; nothing is chosen by cross-validation), and again under penalties
ten times as strong. `laai compose` then makes one vector of a composition's two rules, by each of its methods. Of
these only `fit` sees examples of the composition: the ten of re-optimised, for two numbers. Every figure is the exact
match of greedy generation on the 441 test words, through the harness (`hf-laai`, one model load, vectors routed by
task): mean ± standard deviation over seeds, which draw the examples.

Stopped, the command goes on where it was: what was measured is kept in `runs/`.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from tqdm import tqdm

import laai_core as laai
from known import Known
from laai_core.data.lexicon import LEXICON
from laai_core.data.rules import COMPOSITIONS, LEXICON_PREFIX, RULES
from lm_eval_laai.methods.compose import METHODS, compose
from lm_eval_laai.methods.method import middle_layer
from lm_eval_laai.model import HFLaai
from lm_eval_laai.tasks import include_path
from measure import Record
from models import REFERENCE_MODEL, reference_model

SHOTS = 10
CLASHING = [("synonym", "antonym"), ("en_fr", "en_de")]
PENALTIES = [laai.Job.l1, 10 * laai.Job.l1]  # l1 = group, relative to the activation
SWEPT_PENALTIES = [0.1 * laai.Job.l1, *PENALTIES, 30 * laai.Job.l1]
SWEPT_SCALES = [0.5, 1.0, 1.5]
SWEPT_SEEDS, SWEPT_ITEMS = 2, 100  # the first of the seeds and of the test words
RUNS = Path("runs", "composition.jsonl")

Vectors = dict[str, laai.Intervention]  # by rule or composition


class Asked(NamedTuple):
    """One task under one vector; None is the untouched model."""

    task: str  # a rule or a composition
    vector: laai.Intervention | None = None
    shots: int = 0
    seed: int = 0  # of the shots
    limit: int | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.task, self.vector.sha256 if self.vector else None, self.shots, self.seed, self.limit)


class Harness:
    """Exact match through the harness, on one model that stays loaded. Known figures are not measured again.

    Args:
        known: a file that every figure is added to.
    """

    def __init__(self, folder: str, known: Path) -> None:
        self.model, self.tokenizer = reference_model(folder)
        self._known = Known(known, [*sorted(Path(folder).glob("*.safetensors")), LEXICON])

    def exact_match(self, asked: Sequence[Asked], what: str) -> list[float]:
        """Shares of right answers, in order."""
        with tqdm(total=len(asked), desc=what, file=sys.stderr) as bar:
            new = {one.key: one for one in asked if one.key not in self._known}
            bar.update(len(asked) - len(new))
            for batch in _batches(list(new.values())):
                for one, score in zip(batch, self._measured(batch), strict=True):
                    self._known[one.key] = score
                bar.update(len(batch))
        return [self._known[one.key] for one in asked]

    def _measured(self, batch: Sequence[Asked]) -> list[float]:
        """One run of the harness: different tasks, a vector for each or for none."""
        names = [f"laai_{LEXICON_PREFIX}{one.task}" for one in batch]
        with tempfile.TemporaryDirectory() as folder:
            for name, one in zip(names, batch, strict=True):
                if one.vector is not None:
                    one.vector.save(Path(folder, f"{name}.safetensors"))
            results = simple_evaluate(
                model=HFLaai(
                    pretrained=self.model,
                    tokenizer=self.tokenizer,
                    intervention=None if batch[0].vector is None else folder,
                    batch_size=128,
                ),
                tasks=names,
                num_fewshot=batch[0].shots,
                limit=batch[0].limit,
                log_samples=False,
                task_manager=TaskManager(
                    include_path=str(include_path()), include_defaults=False, metadata={"seed": batch[0].seed}
                ),
            )
        return [results["results"][name]["exact_match,none"] for name in names]


def _batches(asked: list[Asked]) -> Iterator[list[Asked]]:
    """What one run of the harness can measure together: each task once, all under one setting."""
    rounds: dict[Any, list[Asked]] = {}
    times: dict[Any, int] = defaultdict(int)
    for one in asked:
        setting = (one.vector is None, one.shots, one.seed, one.limit)
        rounds.setdefault((setting, times[setting, one.task]), []).append(one)
        times[setting, one.task] += 1
    yield from rounds.values()


def trained(harness: Harness, seeds: Sequence[int], layer: int, penalty: float) -> dict[int, Vectors]:
    """{seed: a vector for each rule and each composition}, all in one batch."""
    names = [*RULES, *COMPOSITIONS]
    jobs = [
        laai.Job(examples(name, seed), layer, penalty, penalty, seed=seed, task=f"laai_{LEXICON_PREFIX}{name}")
        for seed in seeds
        for name in names
    ]
    vectors = iter(laai.train_many(harness.model, harness.tokenizer, jobs, progress=True))
    return {seed: {name: next(vectors).intervention for name in names} for seed in seeds}


def examples(name: str, seed: int) -> list[laai.Example]:
    return laai.load_task(LEXICON_PREFIX + name, seed=seed, n_train=SHOTS).train


def composed(harness: Harness, vectors: Vectors, name: str, method: str, seed: int) -> laai.Intervention:
    """One composition's vector, of its two rules'."""
    fitting: dict[str, Any] = {}
    if method == "fit":
        fitting = {"model": harness.model, "tokenizer": harness.tokenizer, "examples": examples(name, seed)}
    parents = [vectors[rule] for rule in COMPOSITIONS[name].parts]
    return compose(parents, method, task=f"laai_{LEXICON_PREFIX}{name}", **fitting)


def methods_tables(record: Record, harness: Harness, trained_by_seed: dict[int, Vectors], penalty: float) -> None:
    """The paper's Table 2 with the other methods, and the weights `fit` found."""
    asked: dict[tuple[str, str, int], Asked] = {}
    weights: dict[str, list[list[float]]] = {name: [] for name in COMPOSITIONS}
    for name in COMPOSITIONS:
        for seed, vectors in trained_by_seed.items():
            asked["zero-shot", name, seed] = Asked(name)
            asked["ten-shot", name, seed] = Asked(name, shots=SHOTS, seed=seed)
            for method in METHODS:
                made = composed(harness, vectors, name, method, seed)
                asked[method, name, seed] = Asked(name, made)
                if method == "fit":
                    weights[name].append([parent["weight"] for parent in made.metadata["composition"]["parents"]])
            asked["re-optimised", name, seed] = Asked(name, vectors[name])
    found = dict(zip(asked, harness.exact_match(list(asked.values()), f"methods, penalty {penalty:g}"), strict=True))
    scores: dict[str, dict[str, list[float]]] = {}
    for (method, name, _), score in found.items():
        scores.setdefault(method, {}).setdefault(name, []).append(score)
    for of_method in scores.values():
        of_method["average"] = [statistics.mean(column) for column in zip(*of_method.values(), strict=True)]
    record.keep(f"exact match, penalty {penalty:g}", scores)
    record.keep(f"weights fit found, penalty {penalty:g}", weights)

    titles = {"sum": "sum (the paper's Add)"}
    columns = [*COMPOSITIONS, "average"]
    rows = []
    for method, of_method in scores.items():
        cells = [of_method[name] if method != "zero-shot" else of_method[name][:1] for name in columns]
        rows.append([titles.get(method, method), *map(spread, cells)])
    under = f"penalties of {penalty:g}, {len(trained_by_seed)} seeds"
    record.table(f"Exact match, {under}", ["method", *columns], rows, _said(scores))
    rows = [
        [f"{place} rule", *(spread(column) for column in columns)]
        for place, *columns in zip(
            ["first", "second"], *(zip(*weights[name], strict=True) for name in COMPOSITIONS), strict=True
        )
    ]
    record.table(f"Weights that fit found, {under}", ["weight of the", *COMPOSITIONS], rows)


def _said(scores: dict[str, dict[str, list[float]]]) -> str:
    """What the table says, in words that the figures choose."""

    def mean(method: str, name: str = "average") -> float:
        return statistics.mean(scores[method][name])

    between = sum(mean("zero-shot", name) < mean("sum", name) < mean("re-optimised", name) for name in COMPOSITIONS)
    way = (mean("sum") - mean("zero-shot")) / (mean("re-optimised") - mean("zero-shot"))
    free = max((method for method in METHODS if method != "fit"), key=mean)
    best = max(METHODS, key=mean)
    gain = [a - b for a, b in zip(scores[best]["average"], scores["sum"]["average"], strict=True)]
    return (
        f"Zero-shot does not depend on the seed. Add lies between zero-shot and re-optimised on {between} of "
        f"{len(COMPOSITIONS)} compositions, on average {way:.0%} of the way. Of the methods that see no example of "
        f"the composition {free} is best ({mean(free):.3f}), of all {best} ({mean(best):.3f}; {spread(gain, '+')} "
        f"over the sum, seed by seed)."
    )


def interference_table(record: Record, harness: Harness, trained_by_seed: dict[int, Vectors], penalty: float) -> None:
    """Each component's own task before and after the sum."""
    composing = {rule.parts: name for name, rule in COMPOSITIONS.items()}
    asked: dict[tuple[Any, str, int], Asked] = {}
    for seed, vectors in trained_by_seed.items():
        for rule in RULES:
            asked["alone", rule, seed] = Asked(rule, vectors[rule])
        for pair in (*CLASHING, *composing):
            both = compose([vectors[rule] for rule in pair])
            for rule in pair:
                asked[pair, rule, seed] = Asked(rule, both)
            if pair in composing:
                asked[pair, composing[pair], seed] = Asked(composing[pair], both)
    found = dict(
        zip(asked, harness.exact_match(list(asked.values()), f"interference, penalty {penalty:g}"), strict=True)
    )

    def cell(setting: Any, task: str) -> str:
        return spread([found[setting, task, seed] for seed in trained_by_seed])

    rows = []
    for pair in (*CLASHING, *composing):
        own = [cell(setting, rule) for rule in pair for setting in ("alone", pair)]
        rows.append(
            [" + ".join(pair), "compose" if pair in composing else "clash", *own]
            + [cell(pair, composing[pair]) if pair in composing else "–"]
        )
    own = [f"{rule}, {under}" for rule in ("first", "second") for under in ("alone", "sum")]
    record.keep(
        f"interference, penalty {penalty:g}",
        [[setting, task, seed, score] for (setting, task, seed), score in found.items()],
    )
    record.table(
        f"Interference, penalties of {penalty:g}: each rule's own task, under its own vector and under the sum",
        ["vectors", "expected to", *own, "composition, sum"],
        rows,
        "All tasks ask about the same words. So a row's columns for the sum say how often its answer is the first "
        "rule's, the second's, or the composition's (the second rule of what the first one gives). Where a pair "
        "composes, its rules' own accuracy has to fall: another answer is asked for.",
    )


def sweep_table(record: Record, harness: Harness, seeds: Sequence[int], layer: int) -> None:
    """What the sum depends on: layer, penalty, scale."""
    layers = range(1, harness.model.config.num_hidden_layers - 1)  # at the ends even the rules fail
    settings = sorted({(one, PENALTIES[-1]) for one in layers} | {(layer, penalty) for penalty in SWEPT_PENALTIES})
    rows = []
    for at, penalty in settings:
        asked: dict[str, list[Asked]] = defaultdict(list)
        cosines = []
        for vectors in trained(harness, seeds, at, penalty).values():
            asked["rules"] += [Asked(rule, vectors[rule], limit=SWEPT_ITEMS) for rule in RULES]
            for name, pair in ((name, rule.parts) for name, rule in COMPOSITIONS.items()):
                total = compose([vectors[rule] for rule in pair])
                for scale in SWEPT_SCALES:
                    asked[f"sum × {scale:g}"].append(Asked(name, scale * total, limit=SWEPT_ITEMS))
                asked["re-optimised"].append(Asked(name, vectors[name], limit=SWEPT_ITEMS))
                cosines.append(_cosine(total, vectors[name]))
        flat = [one for part in asked.values() for one in part]
        scores = iter(harness.exact_match(flat, f"layer {at}, penalty {penalty:g}"))
        means = {part: statistics.mean(next(scores) for _ in asked[part]) for part in asked}
        rows.append(
            [f"{at}", f"{penalty:g}", *(f"{means[part]:.3f}" for part in means), f"{statistics.mean(cosines):.2f}"]
        )
    record.table(
        f"What Add depends on: averages over tasks, {len(seeds)} seeds, {SWEPT_ITEMS} test words",
        ["layer", "l1 = group", *asked, "cosine"],
        rows,
        "Rules: each rule under its own vector. Cosine: of the sum and the re-optimised vector.",
    )


def _cosine(a: laai.Intervention, b: laai.Intervention) -> float:
    (layer,) = a.layers
    return float(torch.cosine_similarity(a.vector(layer).flatten(), b.vector(layer).flatten(), dim=0))


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean ± standard deviation, or the one value there is."""
    mean = f"{statistics.mean(values):{sign}.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="default: 0 1 2 3 4")
    flags.add_argument("--layer", type=int, help="default: the middle one")
    flags.add_argument("--model", default=str(REFERENCE_MODEL), help="default: the bundled reference model")
    arguments = flags.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns, once a task and run, of what is meant
    harness = Harness(arguments.model, RUNS)
    layer = middle_layer(harness.model.config.num_hidden_layers) if arguments.layer is None else arguments.layer
    settings = {"layer": layer, "l1 = group": PENALTIES, "examples": SHOTS, "seeds": arguments.seeds}
    record = Record("composition", __doc__ or "", settings)
    for penalty in PENALTIES:
        vectors = trained(harness, arguments.seeds, layer, penalty)
        methods_tables(record, harness, vectors, penalty)
        interference_table(record, harness, vectors, penalty)
    record.save(quick=False)
    sweep_table(record, harness, arguments.seeds[:SWEPT_SEEDS], layer)
    record.save(quick=False)


if __name__ == "__main__":
    main()
