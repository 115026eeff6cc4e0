"""Evaluation: what hf-laai costs over the harness's own `hf`, and what it saves.

Overhead: the same generation requests through `hf` and through hf-laai with a vector of scale 0, so that both write
the same text while every hook works. Multiple choice: questions with four options of three to six tokens behind a
100-token prompt, as log-likelihood requests. Both on one random Llama held by both model classes. Routed: the four
lexicon tasks with four vectors, in one `lm_eval` command with a folder of vectors against four commands with a file
each, on the reference model. There every run is a process of its own, as at a prompt; start-up is everything but the
harness's `evaluate` (interpreter, imports, model, data).
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import laai_core as laai
from laai_core.data.tasks import LEXICON_PREFIX, RULES
from lm_eval_laai.methods.method import middle_layer
from lm_eval_laai.model import HFLaai
from lm_eval_laai.tasks import include_path
from measure import Record, Timings, interleaved, median, parser, ratio
from models import REFERENCE_MODEL, parameters, random_llama, reference_model, small_llama, text, word_tokenizer

BATCH_SIZES = [1, 16]
NEW_TOKENS = 16
# `lm_eval` as at a prompt, with the seconds of its `evaluate` in a file.
TIMED_COMMAND = """
import json, sys, time
import lm_eval.evaluator as evaluator
evaluate, spent = evaluator.evaluate, []
def timed(*args, **kwargs):
    start = time.perf_counter()
    try:
        return evaluate(*args, **kwargs)
    finally:
        spent.append(time.perf_counter() - start)
evaluator.evaluate = timed
path = sys.argv.pop(1)
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
json.dump(sum(spent), open(path, "w"))
"""


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, one, 0, metadata=("benchmark", number, 1)) for number, one in enumerate(arguments)]


def generation(count: int) -> list[Instance]:
    """Contexts of 20 to 80 tokens, each continued by NEW_TOKENS."""
    draw = random.Random(0)
    how = {"until": ["\n"], "max_gen_toks": NEW_TOKENS, "do_sample": False}
    return instances("generate_until", [(text(draw, draw.randint(20, 80)), how) for _ in range(count)])


def multiple_choice(count: int) -> list[Instance]:
    """Four options of three to six tokens behind each of `count` 100-token prompts."""
    draw = random.Random(1)
    asked = [(text(draw, 100), [" " + text(draw, length) for length in (3, 4, 5, 6)]) for _ in range(count)]
    return instances("loglikelihood", [(prompt, option) for prompt, options in asked for option in options])


def both_models(model: Any, layer: int, scale: float, batch_size: int) -> dict[str, Any]:
    """`hf` and `hf-laai` around the same weights."""
    width = model.config.num_attention_heads * model.config.head_dim
    vector = torch.randn(width, generator=torch.Generator().manual_seed(0))
    intervention = laai.Intervention({layer: vector}, head_dim=model.config.head_dim)
    shared: dict[str, Any] = {"pretrained": model, "tokenizer": word_tokenizer(), "batch_size": batch_size}
    return {"hf": HFLM(**shared), "hf-laai": HFLaai(intervention=intervention, scale=scale, **shared)}


def compared(models: dict[str, Any], kind: str, requests: list[Instance], rounds: int) -> Timings:
    """Seconds for all requests through both."""
    cases: dict[str, Callable[[], Any]] = {
        name: lambda model=model: getattr(model, kind)(requests, disable_tqdm=True) for name, model in models.items()
    }
    return interleaved(cases, rounds)


def lm_eval(model: str, intervention: Path, tasks: str, limit: int, work: Path) -> tuple[float, float]:
    """Seconds of one command: in all, and in the harness's `evaluate`."""
    seconds = work / "seconds.json"
    command = [sys.executable, "-c", TIMED_COMMAND, str(seconds), "--model", "hf-laai"]
    command += ["--model_args", f"pretrained={model},intervention={intervention}", "--tasks", tasks]
    command += ["--include_path", str(include_path()), "--limit", str(limit), "--batch_size", "16", "--device", "cpu"]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    total = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"lm_eval failed:\n{done.stderr[-2000:]}")
    return total, json.loads(seconds.read_text())


def routed(path: str, limit: int, rounds: int, work: Path) -> dict[str, list[list[float]]]:
    """[total, evaluate] seconds of each round: one routed run, and the sum of four runs."""
    model, tokenizer = reference_model(path)
    layer = middle_layer(model.config.num_hidden_layers)
    vectors = work / "vectors"
    tasks = {f"laai_{LEXICON_PREFIX}{rule}": f"{LEXICON_PREFIX}{rule}" for rule in RULES}
    for task, data in tasks.items():
        examples = laai.load_task(data, seed=0).train
        laai.train(model, tokenizer, examples, layer, steps=30).intervention.save(vectors / f"{task}.safetensors")

    def one() -> list[float]:
        return list(lm_eval(path, vectors, ",".join(tasks), limit, work))

    def four() -> list[float]:
        runs = [lm_eval(path, vectors / f"{task}.safetensors", task, limit, work) for task in tasks]
        return [sum(part) for part in zip(*runs, strict=True)]

    found: dict[str, list[list[float]]] = {"one routed run": [], "four runs": []}
    for number in range(-1, rounds):
        for name, run in [("one routed run", one), ("four runs", four)][:: 1 if number % 2 else -1]:
            seconds = run()
            print(f"round {number + 1}/{rounds} {name}: {seconds[0]:.1f} s", file=sys.stderr, flush=True)
            if number >= 0:
                found[name].append(seconds)
    return found


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--model", default=str(REFERENCE_MODEL), help="default: the bundled reference model")
    arguments = flags.parse_args()
    quick, rounds = arguments.quick, arguments.rounds
    contexts, questions, limit = (4, 2, 4) if quick else (48, 16, 100)
    model, layer = (small_llama(), 1) if quick else (random_llama(), 4)
    size = f"random Llama, {parameters(model)} parameters"
    record = Record(
        "evaluation",
        __doc__ or "",
        {"model": size, "contexts": contexts, "new tokens": NEW_TOKENS, "questions": questions, "limit": limit}
        | {"rounds": rounds},
    )

    times = compared(both_models(model, layer, 0.0, 16), "generate_until", generation(contexts), 2 * rounds + 1)
    record.keep("generation, seconds", times)
    overhead = ratio(times, "hf-laai", "hf") - 1
    record.table(
        "Generation, the same text",
        ["requests", "hf, s", "hf-laai, s", "overhead", "goal"],
        [
            [f"{contexts} contexts, batch 16", f"{median(times, 'hf'):.2f}", f"{median(times, 'hf-laai'):.2f}"]
            + [f"{overhead:+.1%}", "≤ 2 %"]
        ],
    )

    rows = []
    for batch_size in BATCH_SIZES:
        times = compared(
            both_models(model, layer, 1.0, batch_size), "loglikelihood", multiple_choice(questions), rounds
        )
        record.keep(f"multiple choice, batch {batch_size}, seconds", times)
        rows.append(
            [str(batch_size), f"{median(times, 'hf'):.2f}", f"{median(times, 'hf-laai'):.2f}"]
            + [f"{ratio(times, 'hf-laai', 'hf'):.2f}", "≤ 0.5"]
        )
    columns = ["batch size", "hf, s", "hf-laai, s", "hf-laai / hf", "goal"]
    record.table(f"Multiple choice, {questions} questions", columns, rows)
    record.save(quick)

    with tempfile.TemporaryDirectory() as work:
        runs = routed(arguments.model, limit, rounds, Path(work))
    record.keep("routed, seconds [in all, evaluate]", runs)
    parts: dict[str, Timings] = {
        "in all": {name: [total for total, _ in found] for name, found in runs.items()},
        "start-up": {name: [total - inside for total, inside in found] for name, found in runs.items()},
        "evaluation": {name: [inside for _, inside in found] for name, found in runs.items()},
    }
    record.table(
        f"Four lexicon tasks, four vectors, {limit} items each",
        ["seconds", "four runs", "one routed run", "four / one", "goal"],
        [
            [part, f"{median(times, 'four runs'):.1f}", f"{median(times, 'one routed run'):.1f}"]
            + [f"{ratio(times, 'four runs', 'one routed run'):.2f}×", "≥ 2.5×" if part == "in all" else ""]
            for part, times in parts.items()
        ],
    )
    record.save(quick)


if __name__ == "__main__":
    main()
