"""What test_data_parallel and test_tensor_parallel run in one process and, started by torchrun, in two.

Called as `launched.py MODEL INTERVENTIONS OUT [TP_PLAN]`; writes OUT/<rank>.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import datasets
from lm_eval import simple_evaluate

from lm_eval_laai.model import HFLaai

WORDS = ["hot", "wall", "there", "morning", "nothing", "another", "in"]  # an odd number, so that one process gets more


def documents(**_: Any) -> dict[str, datasets.Dataset]:
    rows = [{"prompt": f"Q: {word}\nA:", "answers": [" cold", " here", " le matin"], "gold": 0} for word in WORDS]
    return {"test": datasets.Dataset.from_list(rows)}


def task(name: str, **changes: Any) -> dict[str, Any]:
    common = {"task": name, "custom_dataset": documents, "test_split": "test", "doc_to_text": "prompt"}
    return {**common, "target_delimiter": "", **changes}


TASKS = [
    task("choice", output_type="multiple_choice", doc_to_choice="answers", doc_to_target="gold"),
    task(
        "written",
        output_type="generate_until",
        doc_to_target=" cold",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 4},
        metric_list=[{"metric": "exact_match"}],
    ),
    task(
        "text",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="prompt",
        metric_list=[{"metric": "byte_perplexity"}],
    ),
]
NAMES = [one["task"] for one in TASKS]
KINDS = ("loglikelihood", "generate_until", "loglikelihood_rolling")


def counted(run: Any, kind: str, ran: dict[str, int]) -> Any:
    def count(requests: Any, *rest: Any, **more: Any) -> Any:
        ran[kind] = len(requests)
        return run(requests, *rest, **more)

    return count


def evaluate(model: str, interventions: str | None, **arguments: Any) -> dict[str, Any]:
    """How many requests of each type this process ran, its place, and on rank 0 every answer and metric."""
    lm = HFLaai(model, interventions, device="cpu", batch_size=3, **arguments)
    ran: dict[str, int] = {}
    for kind in KINDS:
        setattr(lm, kind, counted(getattr(lm, kind), kind, ran))
    results = simple_evaluate(model=lm, tasks=[dict(one) for one in TASKS], bootstrap_iters=0)
    facts: dict[str, Any] = {"rank": lm.rank, "world_size": lm.world_size, "ran": ran}
    if results is not None:
        samples = {name: sorted(results["samples"][name], key=lambda s: s["doc_id"]) for name in NAMES}
        facts["answers"] = {name: [sample["filtered_resps"] for sample in rows] for name, rows in samples.items()}
        facts["metrics"] = {name: results["results"][name] for name in NAMES}
    return facts


if __name__ == "__main__":
    model, interventions, out, *plan = sys.argv[1:]
    found = evaluate(model, interventions or None, **({"tp_plan": plan[0]} if plan else {}))
    Path(out, f"{os.environ['RANK']}.json").write_text(json.dumps(found))
