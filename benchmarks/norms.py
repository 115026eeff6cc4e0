"""How large are vectors that do something? What `laai inspect` calls a usual size is read off here.

The size of a vector is its root mean square over that of the activation it is added to, at the last prompt tokens of
the ten training examples. First: vectors trained on the four lexicon rules of the reference model, with the defaults
of `laai_core.train` (penalties 1e-4) and others. Then: random (Gaussian) vectors at the middle layer, under ten-shot
prompts of the four rules, where the model answers well by itself: the share of answers whose first token stays the
same.
"""

from __future__ import annotations

from typing import Any

import torch

import laai_core as laai
from laai_core.data.tasks import LEXICON_PREFIX, RULES
from laai_core.locate import locate
from lm_eval_laai.methods.method import middle_layer
from measure import Record, parser
from models import REFERENCE_MODEL, reference_model

# name: site, weight of both penalties, optimiser
SETTINGS = {
    "default": ("heads", 1e-4, "prox"),
    "no penalty": ("heads", 0.0, "prox"),
    "penalties 1e-3": ("heads", 1e-3, "prox"),
    "penalties 1e-2": ("heads", 1e-2, "prox"),
    "no penalty, Adam": ("heads", 0.0, "adam"),
    "site residual": ("residual", 1e-4, "prox"),
    "site mlp": ("mlp", 1e-4, "prox"),
}
SIZES = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]
SEEDS = 1


def trained_sizes(
    model: Any, tokenizer: Any, layer: int, site: str, weight: float, optimizer: str, seeds: int
) -> list[float]:
    """Sizes of the vectors of all rules and seeds at one layer, ascending."""
    jobs = [
        laai.Job(laai.load_task(LEXICON_PREFIX + rule, seed=seed).train, layer, weight, weight, seed=seed)
        for rule in RULES
        for seed in range(seeds)
    ]
    results = laai.train_many(model, tokenizer, jobs, site=site, optimizer=optimizer)
    return sorted(size(result.intervention, layer) for result in results)


def size(intervention: laai.Intervention, layer: int) -> float:
    vector = intervention.vector(layer)
    return float(vector.square().mean().sqrt()) / intervention.metadata["training"]["rms"]


@torch.no_grad()
def unmoved(model: Any, tokenizer: Any, layer: int, rms: float, sizes: list[float], words: int) -> dict[float, float]:
    """Shares of ten-shot answers whose first token a random vector of each size leaves as it was."""
    shape = locate(model).shape(layer, "heads")
    shares = dict.fromkeys(sizes, 0.0)
    for number, rule in enumerate(RULES):
        split = laai.load_task(LEXICON_PREFIX + rule)
        texts = [example.behind(split.train) for example in split.test[:words]]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        before = model(**inputs).logits[:, -1].argmax(-1)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(number))
        for one in sizes:
            with laai.apply(model, laai.Intervention({layer: one * rms * noise / noise.square().mean().sqrt()})):
                after = model(**inputs).logits[:, -1].argmax(-1)
            shares[one] += float((after == before).float().mean()) / len(RULES)
    return shares


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--model", default=REFERENCE_MODEL, help="default: the reference model")
    arguments = flags.parse_args()
    model, tokenizer = reference_model(arguments.model)
    layers = list(range(model.config.num_hidden_layers))
    seeds, words = (1, 8) if arguments.quick else (SEEDS, 100)
    settings = {"seeds": seeds, "vectors a cell": seeds * len(RULES), "ten-shot prompts": words * len(RULES)}
    record = Record("norms", __doc__ or "", settings)
    rows = []
    for name, (site, weight, optimizer) in list(SETTINGS.items())[: 1 if arguments.quick else None]:
        found = [trained_sizes(model, tokenizer, layer, site, weight, optimizer, seeds) for layer in layers]
        record.keep(name, found)
        rows.append([name, *(f"{sizes[0]:.2g} to {sizes[-1]:.2g}" for sizes in found)])
    record.table("Size of trained vectors, smallest to largest", ["", *(f"layer {n}" for n in layers)], rows)
    layer = middle_layer(len(layers))
    example = laai.load_task(LEXICON_PREFIX + next(iter(RULES))).train
    rms = laai.train(model, tokenizer, example, layer, steps=1).intervention.metadata["training"]["rms"]
    shares = unmoved(model, tokenizer, layer, rms, SIZES, words)
    record.keep("unmoved", list(shares.values()))
    record.table(
        "Answers that a random vector leaves as they were",
        ["size", *(f"{one:g}" for one in shares)],
        [["share", *(f"{share:.3f}" for share in shares.values())]],
    )
    record.save(arguments.quick)


if __name__ == "__main__":
    main()
