"""Sixteen vectors in one `train_many` against sixteen separate trainings.

Four seeds (other examples) times four penalties, ten examples each, the same number of Adam steps everywhere. On the
random model prompts have 8 tokens and targets 2; on the reference model they are those of the lexicon's antonyms.
Set-up is included on both sides.
"""

from __future__ import annotations

from typing import Any

import laai_core as laai
from lm_eval_laai.methods.method import middle_layer
from measure import Record, Timings, interleaved, median, parser, ratio
from models import (
    REFERENCE_MODEL,
    parameters,
    random_llama,
    reference_model,
    small_llama,
    word_examples,
    word_tokenizer,
)

SEEDS = range(4)
PENALTIES = [0.0, 0.0003, 0.001, 0.003]
EXAMPLES = 10
RANDOM, REFERENCE = "random Llama", "reference model"
STEPS = {RANDOM: 25, REFERENCE: 100}
GOALS = {RANDOM: "1.8", REFERENCE: "4"}


def timed(model: Any, tokenizer: Any, sets: list[Any], layer: int, stop: str, steps: int, rounds: int) -> Timings:
    """Seconds for all vectors, together and one by one."""
    jobs = [laai.Job(examples, layer, penalty, penalty) for examples in sets for penalty in PENALTIES]
    options: dict[str, Any] = {"optimizer": "adam", "steps": steps, "stop": stop}

    def together() -> None:
        laai.train_many(model, tokenizer, jobs, **options)

    def separately() -> None:
        for job in jobs:
            laai.train_many(model, tokenizer, [job], **options)

    return interleaved({"together": together, "separately": separately}, rounds)


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--model", default=str(REFERENCE_MODEL), help="the reference model (default: the bundled one)")
    arguments = flags.parse_args()
    quick = arguments.quick
    steps = dict.fromkeys(STEPS, 3) if quick else STEPS
    measured: dict[str, Timings] = {}
    sizes: dict[str, str] = {}

    model, layer = (small_llama(), 1) if quick else (random_llama(), 4)
    sizes[RANDOM] = parameters(model)
    sets = [word_examples(EXAMPLES, 8, 2, seed) for seed in SEEDS]
    measured[RANDOM] = timed(model, word_tokenizer(), sets, layer, "", steps[RANDOM], arguments.rounds)

    model, tokenizer = reference_model(arguments.model)
    sizes[REFERENCE] = parameters(model)
    layer = middle_layer(model.config.num_hidden_layers)
    sets = [laai.load_task("lexicon_antonym", seed=seed, n_train=EXAMPLES).train for seed in SEEDS]
    measured[REFERENCE] = timed(model, tokenizer, sets, layer, "\n", steps[REFERENCE], arguments.rounds)

    settings = {"vectors": len(SEEDS) * len(PENALTIES), "penalties": PENALTIES, "rounds": arguments.rounds}
    record = Record("many", __doc__ or "", settings)
    record.keep("seconds", measured)
    rows = [
        [
            f"{name}, {sizes[name]} parameters",
            str(steps[name]),
            f"{median(times, 'separately'):.2f}",
            f"{median(times, 'together'):.2f}",
            f"{ratio(times, 'separately', 'together'):.2f}×",
            f"≥ {GOALS[name]}×",
        ]
        for name, times in measured.items()
    ]
    record.table(
        "Seconds for all sixteen", ["model", "steps", "separately", "together", "separately / together", "goal"], rows
    )
    record.save(quick)


if __name__ == "__main__":
    main()
