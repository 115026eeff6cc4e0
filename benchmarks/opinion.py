"""Opinions: how close ten questions bring a small model to the answers of a group of people.

The divergence is KL(model || group), in nats, the paper's eq. 4, lower is better; mean over a group's test questions,
through the harness (`hf-laai`, one model load), then mean ± standard deviation over seeds. A seed draws the ten
training questions: the shots of ten-shot (each with the group's most common answer) and what Δ is trained on.

Two answers that need no model stand beside it. Uniform: every option alike. Best constant: for each number of options
K one distribution, the same for all questions of K options, that minimises the same divergence on those of the ten
training questions that have K options: q proportional to the geometric mean of their (smoothed) distributions; where
none has K options, uniform. It sees what Δ sees of the answers, and nothing of the questions.

The bundled survey is invented, and the reference model has learnt it in context; Δ is trained by `laai_core.train`
with its defaults at the middle layer (100 evaluations; nothing is chosen by cross-validation). The real data are
OpinionQA's 494 contested questions by sex and by race (all groups but people who gave no race), which so small a model
cannot read: there Δ is asked for no more than a good guess, and what matters is not to learn more from ten questions
than is in them. So layer and penalty, as a share of the smallest under which nothing is learnt from the ten
(`critical_penalty` of a training), are chosen, once for all groups and seeds, on questions of the training pool, which
nothing is tested on: those outside the ten, for three groups and two seeds. Questions nobody of a group answered are
left out. Ten solved questions of the real data are more than the 1,024 tokens the model takes, so the harness cuts off
the first of them; ten-shot is measured on a part of the test questions there.

Stopped, the command goes on where it was: what was measured is kept in `runs/`.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from tqdm import tqdm

import laai_core as laai
from known import Known
from laai_core.data import in_training_pool
from laai_core.data.tasks import OPINIONQA_GROUP, load_opinions, opinionqa_group
from laai_core.objective import smoothed
from lm_eval_laai.methods.evaluate import task_losses
from lm_eval_laai.methods.method import middle_layer
from lm_eval_laai.model import HFLaai
from lm_eval_laai.tasks import include_path, list_tasks
from measure import Record
from models import REFERENCE_MODEL, reference_model

SHOTS = 10
BATCH = 32  # prompts at once
METRICS = ("kl", "kl_reverse", "wasserstein", "tv")
REAL = {"SEX": ("Female", "Male"), "RACE": ("Asian", "Black", "Hispanic", "Mixed Race", "Other", "White")}
RUNS = Path("runs", "opinion.jsonl")

Scores = dict[str, float]  # by metric


class Group(NamedTuple):
    """Whose opinions: for people, for `load_task`, for the harness."""

    title: str
    data_set: str
    task: str
    metadata: Mapping[str, str]


def survey_groups() -> list[Group]:
    tasks = [task for task in list_tasks() if task.group == "laai_survey"]
    return [Group(task.name.removeprefix("laai_survey_"), task.data_set, task.name, {}) for task in tasks]


def real_groups() -> list[Group]:
    return [
        Group(
            name, opinionqa_group(attribute, name), f"laai_{OPINIONQA_GROUP}", {"attribute": attribute, "group": name}
        )
        for attribute, names in REAL.items()
        for name in names
    ]


class Setting(NamedTuple):
    """How Δ is trained; `layer` counts from the end when negative, `share` is of the critical penalty."""

    layer: int
    share: float


TRIED = [Setting(layer, share) for layer in (-3, -2, -1) for share in (0.8, 0.6, 0.4, 0.2)]
TRIED_GROUPS = ("Female", "Black", "Asian")
TRIED_SEEDS = (0, 1)
TRIED_EVERY = 3  # of the pool's questions


class Bench:
    """One model, and what is measured on it."""

    def __init__(self, folder: str, data: str | None) -> None:
        self.model, self.tokenizer = reference_model(folder)
        self._known = Known(RUNS, sorted(Path(folder).glob("*.safetensors")))
        self._data = data

    def split(self, group: Group, seed: int) -> laai.Split:
        return laai.load_task(group.data_set, seed=seed, n_train=SHOTS, data=self._data)

    def trained(self, group: Group, seed: int, setting: Setting | None = None) -> laai.Intervention:
        """What `laai_core.train` gives with its defaults at the middle layer, or in a setting."""
        layer = setting.layer if setting else middle_layer(self.model.config.num_hidden_layers)
        fit = partial(laai.train, self.model, self.tokenizer, self.split(group, seed).train, layer, seed=seed)
        if setting is None:
            return fit().intervention
        penalty = setting.share * fit(l1=0.0, group=0.0, steps=1, start="zero").critical_penalty
        return fit(l1=penalty, group=penalty).intervention

    def validated(self, group: Group, seed: int, setting: Setting) -> float:
        """Divergence on every third question of the training pool that is not among the ten."""
        key = ["validation", group.data_set, seed, *setting]
        if key not in self._known:
            self._known[key] = self._validated(group, seed, setting)
        return self._known[key]

    def _validated(self, group: Group, seed: int, setting: Setting) -> float:
        opinions, _ = load_opinions(group.data_set, self._data)
        pool = [one.example() for one in opinions if in_training_pool(one.question.key)]
        ten = self.split(group, seed).train
        others = [example for example in pool if example not in ten]
        vector = self.trained(group, seed, setting)
        pairs = [(vector, others[::TRIED_EVERY])]
        (losses,) = task_losses(self.model, self.tokenizer, pairs, batch_size=BATCH)
        return statistics.mean(losses)

    def scores(
        self, group: Group, seed: int, shots: int = 0, vector: laai.Intervention | None = None, every: int = 1
    ) -> Scores:
        """Means over the test questions, or over every `every`th, by the harness."""
        key = [group.data_set, seed if shots else None, shots, vector.sha256 if vector else None, every]
        if key not in self._known:
            self._known[key] = self._measured(group, seed, shots, vector, every)
        return self._known[key]

    def _measured(self, group: Group, seed: int, shots: int, vector: laai.Intervention | None, every: int) -> Scores:
        metadata = {**group.metadata, "seed": seed, "n_train": SHOTS}
        if self._data is not None:
            metadata["data"] = self._data
        count = len(self.split(group, seed).test)
        results = simple_evaluate(
            model=HFLaai(pretrained=self.model, tokenizer=self.tokenizer, intervention=vector, batch_size=BATCH),
            tasks=[group.task],
            num_fewshot=shots,
            samples={group.task: list(range(0, count, every))},
            bootstrap_iters=0,
            log_samples=False,
            task_manager=TaskManager(include_path=str(include_path()), include_defaults=False, metadata=metadata),
        )
        return {metric: results["results"][group.task][f"{metric},none"] for metric in METRICS}


# What needs no model


def best_constants(examples: Sequence[laai.Example]) -> dict[int, list[float]]:
    """{K: the q that minimises the mean KL(q || pi) over the examples with K options}."""
    logs: dict[int, list[list[float]]] = {}
    for example in examples:
        shares = smoothed(example.distribution or ())
        logs.setdefault(len(shares), []).append([math.log(share) for share in shares])
    constants = {}
    for count, rows in logs.items():
        means = [math.exp(statistics.mean(column)) for column in zip(*rows, strict=True)]
        constants[count] = [mean / sum(means) for mean in means]
    return constants


def divergence(examples: Sequence[laai.Example], constants: Mapping[int, Sequence[float]]) -> float:
    """Mean KL(q || pi), q the constant of as many options, or uniform where there is none."""
    total = 0.0
    for example in examples:
        shares = smoothed(example.distribution or ())
        q = constants.get(len(shares), [1 / len(shares)] * len(shares))
        total += sum(a * math.log(a / b) for a, b in zip(q, shares, strict=True))
    return total / len(examples)


# Tables


def choose(bench: Bench, record: Record) -> Setting:
    """The setting for the real data, and the table it is chosen by."""
    means = {}
    for setting in tqdm(TRIED, desc="settings", file=sys.stderr):
        losses = [
            bench.validated(group, seed, setting)
            for group in real_groups()
            if group.title in TRIED_GROUPS
            for seed in TRIED_SEEDS
        ]
        means[setting] = statistics.mean(losses)
    best = min(means, key=means.__getitem__)
    count = bench.model.config.num_hidden_layers
    record.table(
        "OpinionQA: how Δ is trained",
        ["layer", "l1 = group", "KL"],
        [
            [str(setting.layer % count), f"{setting.share:g} × critical", f"{mean:.3f}"]
            for setting, mean in means.items()
        ],
        f"On training-pool questions only. Chosen: layer {best.layer % count}, {best.share:g} × critical.",
    )
    return best


def measure(
    bench: Bench, groups: Sequence[Group], seeds: Sequence[int], setting: Setting | None, every: int
) -> dict[str, Any]:
    """{column: {group: a value for each seed}}, values by metric where the model is asked. `every`: of ten-shot."""
    found: dict[str, dict[str, list[Any]]] = {}

    def keep(column: str, group: Group, value: Any) -> None:
        found.setdefault(column, {}).setdefault(group.title, []).append(value)

    with tqdm(total=len(groups) * len(seeds), desc="groups and seeds", file=sys.stderr) as bar:
        for group in groups:
            for seed in seeds:
                split = bench.split(group, seed)
                keep("zero-shot", group, bench.scores(group, seed))
                keep("ten-shot", group, bench.scores(group, seed, SHOTS, every=every))
                keep("Δ", group, bench.scores(group, seed, vector=bench.trained(group, seed, setting)))
                keep("uniform", group, {"kl": divergence(split.test, {})})
                keep("best constant", group, {"kl": divergence(split.test, best_constants(split.train))})
                bar.update()
    return found


def add_tables(record: Record, title: str, found: dict[str, Any], note: Callable[[dict[str, float]], str]) -> None:
    """KL by group, and the average over groups by metric."""
    of_kl = {
        column: {group: [scores["kl"] for scores in values] for group, values in by_group.items()}
        for column, by_group in found.items()
    }
    for by_group in of_kl.values():
        by_group["average"] = [statistics.mean(values) for values in zip(*by_group.values(), strict=True)]
    record.keep(title, found)
    columns = list(of_kl)
    rows = [[group, *(spread(of_kl[column][group]) for column in columns)] for group in next(iter(of_kl.values()))]
    means = {column: statistics.mean(of_kl[column]["average"]) for column in columns}
    record.table(f"{title}: KL", ["group", *columns], rows, note(means))
    rows = []
    for metric in METRICS:
        cells = []
        for column in ("zero-shot", "ten-shot", "Δ"):
            per_seed = zip(*found[column].values(), strict=True)
            cells.append(spread([statistics.mean(scores[metric] for scores in groups) for groups in per_seed]))
        rows.append([metric, *cells])
    record.table(f"{title}: all metrics, average of the groups", ["metric", "zero-shot", "ten-shot", "Δ"], rows)


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation over the seeds, or the one value there is."""
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(set(values)) > 1 else mean


def said(met: bool) -> str:
    return "met" if met else "NOT met"


def survey_note(means: dict[str, float]) -> str:
    share = means["Δ"] / means["zero-shot"]
    return f"Δ has {share:.0%} of zero-shot's divergence; asked for is at most a quarter: {said(share <= 0.25)}."


def real_note(means: dict[str, float]) -> str:
    over = means["Δ"] / means["best constant"] - 1
    below = means["Δ"] < means["uniform"]
    return (
        f"Asked for is a Δ below uniform ({said(below)}) and at most 15 % above the best constant "
        f"({over:+.0%}: {said(over <= 0.15)})."
    )


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="default: 0 1 2 3 4")
    flags.add_argument("--model", default=str(REFERENCE_MODEL), help="default: the bundled reference model")
    flags.add_argument("--data", help="folder of the public data (default: $LAAI_DATA)")
    flags.add_argument("--every", type=int, default=8, help="of the real data's questions in ten-shot, default: 8")
    arguments = flags.parse_args()
    for name in ("lm_eval", "laai_core"):  # they warn, once a task and run, of what is meant
        logging.getLogger(name).setLevel(logging.ERROR)
    bench = Bench(arguments.model, arguments.data)
    record = Record("opinion", __doc__ or "", {"seeds": arguments.seeds, "ten-shot on every": arguments.every})
    found = measure(bench, survey_groups(), arguments.seeds, setting=None, every=1)
    add_tables(record, "The bundled survey", found, survey_note)
    found = measure(bench, real_groups(), arguments.seeds, choose(bench, record), arguments.every)
    add_tables(record, "OpinionQA by sex and race", found, real_note)
    record.save(quick=False)


if __name__ == "__main__":
    main()
