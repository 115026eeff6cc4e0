"""The model card of an intervention on the Hub: facts, training, scores and usage."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from laai_core.hub import HubPath, hub_path
from laai_core.intervention import Intervention
from lm_eval_laai.facts import flat
from lm_eval_laai.known_models.table import KNOWN
from lm_eval_laai.tasks import harness_metadata

Scores = Mapping[str, Mapping[str, Any]]

_SITES = {
    "heads": "attention-head outputs (the input of the attention output projection)",
    "residual": "output of the decoder block",
    "mlp": "output of the feed-forward module",
}
_POSITIONS = {
    "last": "the last token of the prompt",
    "generated": "the last token of the prompt and every token after it",
    "all": "every token",
}


def model_card(
    intervention: Intervention, repo: str, file: str, scores: Scores | None = None, license: str | None = None
) -> str:
    """The text of README.md.

    Args:
        repo, file: where the intervention will lie.
        scores: {task: {metric: value}}; the `results` of the harness's results file can be handed over as they are.
        license: of the intervention, as the Hub calls it, such as apache-2.0.
    """
    metadata = intervention.metadata
    made_for = str(metadata.get("base_model") or "unknown")
    base = KNOWN[made_for].hub if made_for in KNOWN else made_for
    on_hub = hub_path(base) == HubPath(base)
    if not on_hub:
        base = os.path.basename(os.path.normpath(base))  # without the folders, which are those of one machine
    header = ModelCardData(
        library_name="lm-eval-laai",
        tags=["laai", "activation-steering"],
        pipeline_tag="text-generation",
        license=license,
        base_model=base if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        model_name=repo.partition("/")[2],
        eval_results=_eval_results(scores or {}) or None,
    )
    task = task_of(intervention)
    layers = ", ".join(map(str, intervention.layers))
    verb = "added to" if intervention.operation == "add" else "applied (in-context vector rule) to"
    facts = [
        ("base model", f"[{base}](https://huggingface.co/{base})" if on_hub else base),
        ("trained on", f"its copy that `laai models fetch {made_for}` gets" if made_for in KNOWN else None),
        ("task", task),
        ("method", metadata.get("method")),
        ("layers (from 0)", layers),
        ("site", f"`{intervention.site}`: {_SITES[intervention.site]}"),
        ("position", f"`{intervention.position}`: {_POSITIONS[intervention.position]}"),
        ("operation", f"`{intervention.operation}`, scale {intervention.scale:g}"),
        ("vector", " x ".join(map(str, intervention.vector(intervention.layers[0]).shape))),
        ("SHA-256 of the file", f"`{intervention.sha256}`"),
    ]
    training = metadata.get("training")
    return "\n".join(
        [
            "---",
            header.to_yaml(),
            "---",
            f"# {repo.partition('/')[2]}",
            "",
            f"An activation intervention for {base}, {verb} the {_SITES[intervention.site]} of layer {layers}, "
            f"at {_POSITIONS[intervention.position]}. The model's weights stay as they are.",
            "",
            *_table(("", ""), facts),
            "",
            "## Training",
            "",
            *(_table(("", ""), flat(training)) if isinstance(training, dict) else ["Not recorded."]),
            "",
            "## Scores",
            "",
            *(_table(("task", "metric", "value"), _rows(scores)) if scores else ["None were given."]),
            "",
            "## Use",
            "",
            "```bash",
            _evaluation(intervention, made_for if made_for in KNOWN else base, f"{repo}:{file}"),
            "```",
            "",
            "```python",
            "import laai_core as laai",
            "",
            f'with laai.apply(model, laai.Intervention.load("{repo}:{file}")):',
            "    model.generate(**batch)",
            "```",
            "",
        ]
    )


def task_of(intervention: Intervention) -> str | None:
    """The harness's name of the recorded task, without its data, whose path is that of one machine."""
    return str(intervention.metadata.get("task") or "").partition(":")[0] or None


def _evaluation(intervention: Intervention, model: str, where: str) -> str:
    """The harness's command line for the recorded task, in the dtype of the training."""
    training, task = (intervention.metadata.get(name) for name in ("training", "task"))
    dtype = training.get("dtype") if isinstance(training, dict) else None
    arguments = {"pretrained": model, "dtype": dtype, "intervention": where}
    words = ["lm_eval --model hf-laai --model_args"]
    words.append(",".join(f"{name}={value}" for name, value in arguments.items() if value))
    words.append(f"--tasks {task_of(intervention) or 'TASK'}")
    if str(task).startswith("laai_"):
        words.append('--include_path "$(laai tasks --include-path)"')
        if data := _data(str(task)):
            words.append(f"--metadata {shlex.quote(json.dumps(data, ensure_ascii=False))}")
    return " ".join(words)


def _data(task: str) -> dict[str, str]:
    """The harness's metadata for the data behind a task's colon; a file without its folder, of one machine."""
    data = harness_metadata([task]) if task.partition(":")[2] else {}
    return {name: os.path.basename(value) if name == "file" else value for name, value in data.items()}


def _eval_results(scores: Scores) -> list[EvalResult]:
    """The card's model-index, which the Hub shows as results: finite numbers, without standard errors."""
    return [
        EvalResult("text-generation", task, task, metric.partition(",")[0], value, metric_name=label)
        for task, metrics in scores.items()
        for metric, label, value in _numbers(metrics)
        if math.isfinite(value) and not metric.partition(",")[0].endswith("_stderr")
    ]


def _numbers(metrics: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """(the harness's key `name,filter`, the metric with its filter, value), without the number of items."""
    return [
        (metric, metric.removesuffix(",none"), value)
        for metric, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and metric != "sample_len"
    ]


def _rows(scores: Scores) -> list[tuple[str, str, str]]:
    """(task, metric, value) of every number."""
    return [(task, label, f"{value:.4g}") for task, metrics in scores.items() for _, label, value in _numbers(metrics)]


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A Markdown table; rows that end in None are left out."""
    lines = [[str(cell).replace("|", "\\|") for cell in row] for row in rows if row[-1] is not None]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *lines)]
