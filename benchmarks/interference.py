"""Real models: what a rule's Δ still does when another rule's is added to it.

Each Δ is that of `laai train` without further flags on ten examples, so the two of a sum act in layers and with
penalties of their own choice. Exact match of each rule's own test words by the harness: under its own Δ, and under the
sum. Trainings and scores are kept in --store: a run that was stopped goes on.

    python benchmarks/interference.py       # both models fetched, the public word sets in $LAAI_DATA
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

from lm_eval_laai.experiments.cells import Cell, Store
from lm_eval_laai.experiments.run import Plan, Process, run
from lm_eval_laai.experiments.scores import entry, shown
from lm_eval_laai.methods import LAAI
from measure import Record, parser
from real_models import EXAMPLES, Place, places_of

# Where Δ does something: Gemma's synonyms are near zero.
RULES = {"smollm2-135m": ("antonym", "synonym"), "gemma-3-270m": ("en_fr", "en_de", "antonym")}


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--seeds", type=int, default=5, help="draws of ten examples: 0, 1, ... (default: %(default)s)")
    flags.add_argument("--store", type=Path, default=Path("runs/interference"), help="default: %(default)s")
    options = flags.parse_args()
    models, seeds, items = (list(RULES)[:1], 1, 2) if options.quick else (list(RULES), options.seeds, None)
    store, lines = Store(options.store), []
    record = Record("interference", __doc__ or "", {"examples": EXAMPLES, "seeds": seeds})
    for model in models:
        places = places_of([model], RULES[model], items)
        pairs = list(combinations(places, 2))
        asked = [(one, others) for pair in pairs for one in pair for others in ((), tuple({*pair} - {one}))]
        cells = {key: [_cell(*key, seed) for seed in range(seeds)] for key in asked}
        run([Plan(places[0].setting, tuple(cell for of in cells.values() for cell in of))], store, Process())
        scores = {key: entry(key[0].setting, of, "exact_match", store) for key, of in cells.items()}
        for first, second in pairs:
            found = [scores[key] for key in ((first, ()), (first, (second,)), (second, ()), (second, (first,)))]
            texts = [shown(one and one.mean, one and one.spread) for one in found]
            lines.append([model, f"{first.rule} + {second.rule}", *texts])
            record.keep(f"{model} {first.rule} + {second.rule}", [one and one.values for one in found])
    columns = ["model", "vectors", "first, alone", "first, sum", "second, alone", "second, sum"]
    record.table(
        "Each rule's own words, under its own vector and under the sum",
        columns,
        lines,
        "Mean ± standard deviation over draws.",
    )
    record.save(options.quick)


def _cell(place: Place, others: tuple[Place, ...], seed: int) -> Cell:
    """A rule's words under its own Δ and those of others."""
    return Cell(f"laai_{place.rule}", fits=tuple(one.fit(LAAI.name, seed) for one in (place, *others)))


if __name__ == "__main__":
    main()
