"""Ten examples against ten shots on real language models: Δ by default flags, and the baselines beside it.

Six cells: SmolLM2-135M-Instruct on antonym and synonym (200 test items), Gemma-3-270M on English to French and German,
antonym and synonym (100). Every seed draws ten examples; the ten-shot prompt shows the same ten. Scores are the
harness's exact match, greedy, on test words that no choice has seen. `laai models fetch` gets the models, $LAAI_DATA
names the folder of the public word sets. Finished trainings and scores are kept in --store and are not repeated.

    python benchmarks/real_models.py                       # Δ and ten shots, five seeds
    python benchmarks/real_models.py --methods laai,fv,icv,lora,ia3,soft_prompt
    python benchmarks/real_models.py --time                # seconds to train on the examples of seed 0, nothing kept
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from scipy.stats import rankdata

from laai_core.errors import LaaiError
from lm_eval_laai import methods
from lm_eval_laai.experiments.cells import Cell, Fit, Store
from lm_eval_laai.experiments.load import ModelSource
from lm_eval_laai.experiments.run import Plan, Process, run
from lm_eval_laai.experiments.scores import Entry, result_of
from lm_eval_laai.experiments.setting import Setting
from lm_eval_laai.methods import LAAI, METHODS
from measure import Record

EXAMPLES = 10
CELLS = {  # model: test items, rules
    "smollm2-135m": (200, ("antonym", "synonym")),
    "gemma-3-270m": (100, ("en_fr", "en_de", "antonym", "synonym")),
}
SHOTS = "ten-shot"


class Place(NamedTuple):
    """One of the six cells."""

    setting: Setting
    rule: str

    @property
    def title(self) -> str:
        return f"{self.setting.source.name} {self.rule}"

    def fit(self, method: str, seed: int) -> Fit:
        """What `laai train --method METHOD` learns without further flags."""
        chosen = {"penalty_scale": "relative", "start": "icl"} if method == LAAI.name else {}
        return Fit(f"laai_{self.rule}", method, seed, EXAMPLES, **chosen)

    def cell(self, row: str, seed: int) -> Cell:
        """The score of ten shots, or of a method."""
        task = f"laai_{self.rule}"
        return Cell(task, EXAMPLES, seed) if row == SHOTS else Cell(task, fits=(self.fit(row, seed),))


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--models", default=",".join(CELLS), help="default: %(default)s")
    flags.add_argument("--methods", default=LAAI.name, help=f"of {','.join(METHODS)} (default: %(default)s)")
    flags.add_argument("--seeds", type=int, default=5, help="0, 1, ... (default: %(default)s)")
    flags.add_argument("--store", type=Path, default=Path("runs/real_models"), help="default: %(default)s")
    flags.add_argument("--time", action="store_true", help="time the trainings instead")
    flags.add_argument("--quick", action="store_true", help="report what is finished, train and evaluate nothing")
    arguments = flags.parse_args()
    rows = [SHOTS, *arguments.methods.split(",")]
    places = []
    for name in arguments.models.split(","):
        limit, rules = CELLS[name]
        setting = Setting(ModelSource(name, dtype="float32"), None, limit)
        places += [Place(setting, rule) for rule in rules]
    if arguments.time:
        _timed(places, rows[1:])
        return 0
    store, seeds = Store(arguments.store), range(arguments.seeds)
    if not arguments.quick:
        for setting in dict.fromkeys(place.setting for place in places):
            here = [place for place in places if place.setting == setting]
            for seed in seeds:  # a run that is stopped has whole seeds
                run([Plan(setting, tuple(p.cell(row, seed) for row in rows for p in here))], store, Process())
    _report(places, rows, seeds, store)
    return 0


def _report(places: Sequence[Place], rows: Sequence[str], seeds: Sequence[int], store: Store) -> None:
    """Exact match by cell and method over the seeds that are finished, its ratio to ten shots, and average ranks."""
    found: dict[str, list[Entry | None]] = {}
    for row in rows:
        found[row] = []
        for place in places:
            results = [result_of(place.setting, place.cell(row, seed), store) for seed in seeds]
            values = [result["metrics"]["exact_match"] for result in results if result is not None]
            found[row].append(Entry(values) if values else None)
    record = Record("real_models", __doc__ or "", {"seeds": len(seeds), "examples": EXAMPLES})
    whole = {row: [entry for entry in entries if entry] for row, entries in found.items()}
    ranks: dict[str, list[float]] = {row: [] for row in rows}
    for entries in zip(*found.values(), strict=True):  # of one cell; equal scores share a rank
        means = [entry.mean for entry in entries if entry]
        if len(means) == len(rows):
            for row, rank in zip(rows, rankdata([-mean for mean in means]), strict=True):
                ranks[row].append(float(rank))
    lines = []
    for row in rows:
        cells = [_text(entry, len(seeds)) for entry in found[row]]
        complete = len(whole[row]) == len(places)
        average = f"{statistics.fmean(e.mean for e in whole[row]):.3f}" if complete else "-"
        rank = f"{statistics.fmean(ranks[row]):.1f}" if ranks[row] else "-"
        lines.append([row if row == SHOTS else METHODS[row].title, *cells, average, rank])
    shots, ours = found[SHOTS], found.get(LAAI.name, [None] * len(places))
    against = [f"{o.mean / s.mean:.2f}" if o and s and s.mean else "-" for o, s in zip(ours, shots, strict=True)]
    lines.append(["LAAI / ten-shot", *against, "", ""])
    columns = ["method", *(place.title for place in places), "average", "average rank"]
    record.table("Exact match, mean ± standard deviation over seeds", columns, lines)
    record.keep("values", {row: [e and e.values for e in entries] for row, entries in found.items()})
    record.save(
        quick=any(entry is None or len(entry.values) < len(seeds) for entries in found.values() for entry in entries)
    )


def _text(entry: Entry | None, seeds: int) -> str:
    if entry is None:
        return "-"
    spread = "" if entry.spread is None else f" ± {entry.spread:.3f}"
    return f"{entry.mean:.3f}{spread}" + ("" if len(entry.values) == seeds else f" ({len(entry.values)} seeds)")


def _timed(places: Sequence[Place], names: Sequence[str]) -> None:
    """Seconds of one training with what a method chooses on its own, on the cores the process may use."""
    loaded = None
    lines = []
    for place in places:
        if loaded is None or loaded[0] != place.setting:
            loaded = place.setting, *place.setting.source.load()
        seconds = {}
        for name in names:
            split = place.setting.split(f"laai_{place.rule}", 0, EXAMPLES)
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                output = Path(folder, f"fit{METHODS[name].suffix}")
                methods.fit(name, *loaded[1:], split, output=output, progress=False)
                seconds[name] = time.perf_counter() - start
            print(f"{place.title} {name}: {seconds[name]:.0f} s", file=sys.stderr, flush=True)
        lines.append([place.title, *(f"{seconds[name]:.0f}" for name in names)])
    record = Record("real_models_time", __doc__ or "", {"examples": EXAMPLES})
    record.table("Seconds to train, whole", ["cell", *(METHODS[name].title for name in names)], lines)
    record.save(quick=False)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LaaiError as error:
        sys.exit(f"error: {error}")
