"""Planted regressions, and whether the shipped baseline catches them.

The gate's steps on the reference model: a vector trained for each lexicon rule (by `laai_core.train` with its defaults
at the middle layer; the gate's `laai train` chooses by cross-validation), all evaluated in one run of the harness (441
words a rule), the results file compared with benchmarks/baseline.yaml by `laai check`. Before the evaluation something
is broken, in the vectors or in the code that applies them. Figures are exact match; what fails is named by metric (the
number is worse than the tolerance allows) or by what the harness recorded of the intervention. Damage without effect
on the answers is no regression, and passes: noise of a tenth of the vector's norm.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

import laai_core as laai
from laai_core import positions
from laai_core.data.tasks import LEXICON_PREFIX, RULES
from lm_eval_laai.gate.baseline import load_baseline
from lm_eval_laai.gate.check import FAILED, Finding, compare
from lm_eval_laai.gate.results_file import read_results
from lm_eval_laai.methods.method import middle_layer
from lm_eval_laai.model import HFLaai
from lm_eval_laai.tasks import include_path
from measure import Record, parser
from models import REFERENCE_MODEL, reference_model

BASELINE = Path(__file__).with_name("baseline.yaml")
METRIC = "exact_match,none"


class Gate:
    """The steps of .ci/gate in one process, with the baseline's entries for some rules only.

    Args:
        folder: where vectors, results and the part of the baseline go.
    """

    def __init__(self, rules: list[str], folder: Path) -> None:
        self.model, self.tokenizer = reference_model(REFERENCE_MODEL)
        self.folder, self.tasks = folder, [f"laai_{LEXICON_PREFIX}{rule}" for rule in rules]
        layer = middle_layer(self.model.config.num_hidden_layers)
        self.trained = {}
        for task in self.tasks:
            examples = laai.load_task(task.removeprefix("laai_")).train
            self.trained[task] = laai.train(self.model, self.tokenizer, examples, layer, task=task).intervention
        shipped = yaml.safe_load(BASELINE.read_text(encoding="utf-8"))
        part = {key: {task: shipped[key][task] for task in self.tasks} for key in ("tasks", "interventions")}
        self.baseline = folder / "baseline.yaml"
        self.baseline.write_text(yaml.safe_dump(part), encoding="utf-8")

    def evaluate(self, change: Callable[[laai.Intervention], laai.Intervention]) -> Path:
        """The folder with the results file of changed vectors."""
        vectors, output = self.folder / "vectors", self.folder / "results"
        for old in (vectors, output):
            shutil.rmtree(old, ignore_errors=True)
        for task, trained in self.trained.items():
            change(trained).save(vectors / f"{task}.safetensors")
        lm = HFLaai(pretrained=self.model, tokenizer=self.tokenizer, intervention=str(vectors), batch_size=64)
        write_results(output, model=lm, tasks=self.tasks, bootstrap_iters=0)
        return output

    def findings(self, change: Callable[[laai.Intervention], laai.Intervention]) -> list[Finding]:
        """What `laai check` says of them."""
        return compare(read_results(self.evaluate(change)), load_baseline(self.baseline))


def write_results(output: Path, **arguments: Any) -> None:
    """What `lm_eval run --log_samples --output_path` does, but for the index of all the harness's tasks."""
    manager = TaskManager(include_path=str(include_path()), include_defaults=False)
    results = simple_evaluate(task_manager=manager, **arguments)
    assert results is not None
    tracker = EvaluationTracker(output_path=str(output))
    tracker.save_results_aggregated(results=results, samples=results.pop("samples"))


def remade(iv: laai.Intervention, vector: torch.Tensor, up: int = 0, **changes: Any) -> laai.Intervention:
    (layer,) = iv.layers
    return laai.Intervention({layer + up: vector}, metadata=iv.metadata, **changes)


def as_trained(iv: laai.Intervention) -> laai.Intervention:
    return iv


def flipped(iv: laai.Intervention) -> laai.Intervention:
    return -iv


def without_its_largest_head(iv: laai.Intervention) -> laai.Intervention:
    vector = iv.vector(iv.layers[0])
    vector[vector.norm(dim=1).argmax()] = 0
    return remade(iv, vector)


def noisy(share: float) -> Callable[[laai.Intervention], laai.Intervention]:
    """Noise with this share of the vector's norm."""

    def change(iv: laai.Intervention) -> laai.Intervention:
        vector = iv.vector(iv.layers[0])
        noise = torch.randn(vector.shape, generator=torch.Generator().manual_seed(0))
        return remade(iv, vector + share * noise * vector.norm() / noise.norm())

    return change


def one_layer_up(iv: laai.Intervention) -> laai.Intervention:
    return remade(iv, iv.vector(iv.layers[0]), up=1)


def one_layer_down(iv: laai.Intervention) -> laai.Intervention:
    return remade(iv, iv.vector(iv.layers[0]), up=-1)


def at_generated_tokens(iv: laai.Intervention) -> laai.Intervention:
    return remade(iv, iv.vector(iv.layers[0]), position="generated")


@contextmanager
def one_token_early() -> Iterator[None]:
    """A bug in the application: every position is one too low."""
    right = positions.Call.hits

    def wrong(self: positions.Call, position: str, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        row, column = right(self, position, rows)
        return row, (column - 1).clamp_min(0)

    positions.Call.hits = wrong  # type: ignore[method-assign]
    try:
        yield
    finally:
        positions.Call.hits = right  # type: ignore[method-assign]


# name: what is done to the vectors, what is done to the code, what must fail in every rule
PLANTED: dict[str, tuple[Callable[[laai.Intervention], laai.Intervention], Callable[[], Any], set[str]]] = {
    "nothing": (as_trained, nullcontext, set()),
    "sign flipped": (flipped, nullcontext, {METRIC}),
    "largest head zeroed": (without_its_largest_head, nullcontext, {METRIC}),
    "noise, as much as vector": (noisy(1.0), nullcontext, {METRIC}),
    "noise, a tenth": (noisy(0.1), nullcontext, set()),
    "one layer up": (one_layer_up, nullcontext, {METRIC, "layers"}),
    "one layer down": (one_layer_down, nullcontext, {METRIC, "layers"}),
    "one token early": (as_trained, one_token_early, {METRIC}),
    # Answers are too short for it to show in the numbers.
    "position generated": (at_generated_tokens, nullcontext, {"position"}),
}


def failed(findings: list[Finding]) -> dict[str, set[str]]:
    """{task: what failed}."""
    found: dict[str, set[str]] = {}
    for finding in findings:
        if finding.state == FAILED:
            found.setdefault(finding.task, set()).add(finding.item)
    return found


def main() -> None:
    flags = parser(__doc__)
    arguments = flags.parse_args()
    rules = list(RULES)[: 1 if arguments.quick else None]
    record = Record("regressions", __doc__ or "", {"rules": len(rules)})
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        gate = Gate(rules, Path(folder))
        for name, (change, breaking, _) in PLANTED.items():
            with breaking():
                findings = gate.findings(change)
            print(json.dumps([name, str(failed(findings))]), file=sys.stderr, flush=True)
            scores = [next(f.found for f in findings if (f.task, f.item) == (task, METRIC)) for task in gate.tasks]
            items = failed(findings).values()
            what = ", ".join(sorted(set().union(*items))).replace(METRIC, "exact match")
            rows.append([name, *scores, f"{what} ({len(items)} of {len(rules)} rules)" if what else "-"])
    record.table("Planted, and what failed", ["planted", *rules, "failed"], rows)
    record.save(arguments.quick)


if __name__ == "__main__":
    main()
