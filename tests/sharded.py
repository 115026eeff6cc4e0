"""What test_tensor_parallel runs in two processes, started by torchrun, that share one model between them.

Called as `sharded.py FOLDER NAME...`; FOLDER/NAME is a tiny model. Writes FOLDER/<rank>.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from test_apply import NEW_TOKENS, intervention, padded, prompts
from test_train import RULES, TOKENIZER

import laai_core as laai

SITES = ("heads", "residual", "mlp")
KINDS = [("heads", "last"), ("heads", "generated"), ("residual", "last"), ("mlp", "all"), None, ("heads", "all")]


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


@torch.no_grad()
def applied(name: str, model: Any) -> tuple[torch.Tensor, list[list[int]]]:
    """Log-probabilities and greedy tokens of a batch under five interventions and none."""
    ivs = [None if kind is None else intervention(name, *kind, seed=i) for i, kind in enumerate(KINDS)]
    batch = padded(prompts(len(KINDS)), left=True)
    length = dict(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    with laai.apply(model, ivs):
        logprobs = model(**batch).logits.log_softmax(-1)
        return logprobs[batch["attention_mask"].bool()], model.generate(**batch, **length).tolist()


def trained(model: Any, site: str, forward: str) -> tuple[torch.Tensor, list[float]]:
    """The vector of a short training from the in-context start, and its losses."""
    # A gradient step of a fixed length: quasi-Newton steps would amplify the rounding that is measured here.
    settings = dict(site=site, forward=forward, optimizer="adam", steps=5)
    result = laai.train(model, TOKENIZER, RULES, 1, l1=0.001, group=0.001, **settings)
    return result.intervention.vector(1), [step.loss for step in result.history]


def compared(folder: Path, name: str) -> dict[str, Any]:
    """The largest differences between the model of two processes and the model of one."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    sharded, whole = load(folder / name, tp_plan="auto").eval(), load(folder / name).eval()
    facts: dict[str, Any] = {"sharded": sharded._tp_size}
    (mine, written), (theirs, expected) = applied(name, sharded), applied(name, whole)
    facts["logprobs"], facts["same_text"] = difference(mine, theirs), written == expected
    untouched = whole(**padded(prompts(len(KINDS)), left=True)).logits.log_softmax(-1)
    facts["effect"] = difference(theirs, untouched[padded(prompts(len(KINDS)), left=True)["attention_mask"].bool()])
    facts["trained"] = {}
    for site in SITES:
        for forward in ("plain", "replay"):
            (vector, losses), (want, history) = (trained(model, site, forward) for model in (sharded, whole))
            facts["trained"][f"{site} {forward}"] = [
                difference(vector, want) / float(want.abs().max()),
                difference(torch.tensor(losses), torch.tensor(history)),
                vector.flatten().tolist(),
            ]
    return facts


if __name__ == "__main__":
    folder, *names = sys.argv[1:]
    torch.set_grad_enabled(False)
    found = {name: compared(Path(folder), name) for name in names}
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
