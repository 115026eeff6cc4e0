"""Ten examples against ten shots on real language models: Δ by default flags, and the baselines beside it.

Six cells: SmolLM2-135M-Instruct on antonym and synonym (200 test items), Gemma-3-270M on English to French and German,
antonym and synonym (100). Every seed draws ten examples; the ten-shot prompt shows the same ten. Scores are the
harness's exact match, greedy, on test words that no choice has seen. `laai models fetch` gets the models, $LAAI_DATA
names the folder of the public word sets. Finished trainings and scores are kept in --store; the scores also in
`benchmarks/results/real_models.json`, each with the commit it was measured at. What is there is not measured again.

    python benchmarks/real_models.py                       # Δ and ten shots, five seeds
    python benchmarks/real_models.py --methods laai,fv,icv,lora,ia3,soft_prompt        # the table of all methods
    python benchmarks/real_models.py --models gemma-3-270m --rules synonym --items 500  # where scores are near zero
    python benchmarks/real_models.py --items 100 --seeds 3 \\
        --rules pairs:laai_core/data/word_sets/past_tense.json  # any word pairs, here for both models
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import rankdata

from laai_core.errors import LaaiError
from lm_eval_laai.experiments.cells import Cell, Fit, Store
from lm_eval_laai.experiments.load import ModelSource
from lm_eval_laai.experiments.run import Plan, Process, run
from lm_eval_laai.experiments.scores import Entry, result_of, seconds_of, shown
from lm_eval_laai.experiments.setting import Setting
from lm_eval_laai.methods import LAAI, METHODS
from measure import RESULTS, Record

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
        items, rules = CELLS[self.setting.source.name]
        usual = self.rule in rules and self.setting.limit == items
        more = "" if usual else f", {self.setting.limit} items"
        return f"{self.setting.source.name} {self.rule}{more}"

    def fit(self, method: str, seed: int) -> Fit:
        """What `laai train --method METHOD` learns without further flags."""
        chosen = {"penalty_scale": "relative", "start": "icl"} if method == LAAI.name else {}
        return Fit(f"laai_{self.rule}", method, seed, EXAMPLES, **chosen)

    def cell(self, row: str, seed: int) -> Cell:
        """The score of ten shots, or of a method."""
        task = f"laai_{self.rule}"
        return Cell(task, EXAMPLES, seed) if row == SHOTS else Cell(task, fits=(self.fit(row, seed),))


# Cell: row: seed: [exact match, commit, and if known the CPU seconds of choosing and training].
Scores = dict[str, dict[str, dict[str, list[Any]]]]


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--models", default=",".join(CELLS), help="default: %(default)s")
    flags.add_argument("--rules", help="tasks, or pairs:FILE.json; default: each model's cells")
    flags.add_argument("--items", type=int, help="test items a cell (default: 200, 100 on Gemma)")
    flags.add_argument("--methods", default=LAAI.name, help=f"of {','.join(METHODS)} (default: %(default)s)")
    flags.add_argument("--seeds", type=int, default=5, help="0, 1, ... (default: %(default)s)")
    flags.add_argument("--store", type=Path, default=Path("runs/real_models"), help="default: %(default)s")
    flags.add_argument("--quick", action="store_true", help="train and evaluate nothing, save nothing")
    arguments = flags.parse_args()
    rows = [SHOTS, *arguments.methods.split(",")]
    models = arguments.models.split(",")
    if unknown := sorted({*models} - {*CELLS}):
        flags.error(f"--models: no model {unknown[0]!r}, expected some of {', '.join(CELLS)}")
    places = places_of(models, arguments.rules and arguments.rules.split(","), arguments.items)
    store, scores = Store(arguments.store), _known()
    for setting in dict.fromkeys(place.setting for place in places):
        here = [place for place in places if place.setting == setting]
        for seed in range(arguments.seeds):  # a run that is stopped has whole seeds
            missing = [(p, row) for row in rows for p in here if str(seed) not in scores.get(p.title, {}).get(row, {})]
            if missing and not arguments.quick:
                run([Plan(setting, tuple(place.cell(row, seed) for place, row in missing))], store, Process())
            for place, row in missing:
                result = result_of(place.setting, place.cell(row, seed), store)
                if result is not None:
                    score = [result["metrics"]["exact_match"], _commit()]
                    seconds = None if row == SHOTS else seconds_of(place.setting, place.fit(row, seed), store)
                    score += [] if seconds is None else [seconds]
                    scores.setdefault(place.title, {}).setdefault(row, {})[str(seed)] = score
    _report(scores, arguments.quick)
    return 0


def places_of(
    models: Iterable[str] = CELLS, rules: Sequence[str] | None = None, items: int | None = None
) -> list[Place]:
    """The six cells; or those of other models, rules or numbers of test items."""
    return [
        Place(Setting(ModelSource(name, dtype="float32"), None, items or CELLS[name][0]), rule)
        for name in models
        for rule in rules or CELLS[name][1]
    ]


def _known() -> Scores:
    """The scores of earlier runs."""
    path = RESULTS / "real_models.json"
    found = json.loads(path.read_text(encoding="utf-8"))["measured"]["scores"] if path.exists() else {}
    return {place.title: {} for place in places_of()} | found


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=RESULTS, capture_output=True, text=True, check=True).stdout.strip()


def _report(scores: Scores, quick: bool) -> None:
    """Δ against ten shots on the seeds that both have; every method on the seeds that all of them have."""
    record = Record("real_models", __doc__ or "", {"examples": EXAMPLES})
    six = [place.title for place in places_of()]
    lines, averages, more = [], dict[str, list[float]](), []
    for title, found in scores.items():
        pair = found.get(SHOTS, {}), found.get(LAAI.name, {})
        seeds = sorted(set.intersection(*map(set, pair)))
        if seeds:
            shots, ours = (Entry([of[seed][0] for seed in seeds]) for of in pair)
            ratio = f"{ours.mean / shots.mean:.2f}" if shots.mean else "-"
            line = [title, str(len(ours.values)), _text(shots), _text(ours), ratio]
            if title not in six:
                more.append(line)
                continue
            lines.append(line)
            averages.setdefault(SHOTS, []).append(shots.mean)
            averages.setdefault(LAAI.name, []).append(ours.mean)
    if lines:
        shots_mean, ours_mean = (statistics.fmean(averages[row]) for row in (SHOTS, LAAI.name))
        lines.append(["average", "", f"{shots_mean:.3f}", f"{ours_mean:.3f}", f"{ours_mean / shots_mean:.2f}"])
    columns = ["cell", "seeds", SHOTS, LAAI.title, "ratio"]
    record.table("Exact match, mean ± standard deviation over seeds, default flags", columns, lines + more)
    _compared({title: scores[title] for title in six}, record)
    record.keep("scores", scores)
    record.save(quick)


def _compared(scores: Scores, record: Record) -> None:
    """A table of all methods; averages and ranks are those of the methods that have every cell."""
    rows = [row for row in (SHOTS, *METHODS) if any(row in found for found in scores.values())]
    seeds = {title: set.intersection(*map(set, found.values())) for title, found in scores.items() if found}
    cells = {title: sorted(common) for title, common in seeds.items() if common}
    whole = [row for row in rows if all(row in scores[title] for title in cells)]
    if len(rows) < 3 or not cells:
        return
    entries = {  # row: cell: one for each seed
        row: {title: [scores[title][row][seed] for seed in cells[title]] for title in cells if row in scores[title]}
        for row in rows
    }
    means = {
        row: {title: statistics.fmean(score for score, *_ in of) for title, of in found.items()}
        for row, found in entries.items()
    }
    # Equal scores share a rank.
    ranks = [rankdata([-means[row][title] for row in whole]) for title in cells]
    lines = []
    for row in rows:
        figures = [f"{means[row][title]:.3f}" if title in means[row] else "-" for title in cells]
        if row in whole:
            rank = statistics.fmean(float(one[whole.index(row)]) for one in ranks)
            seconds = _seconds(entries[row].values())
            figures += [f"{statistics.fmean(means[row].values()):.3f}", f"{rank:.1f}", seconds]
        else:
            figures += ["-"] * 3
        lines.append([row if row == SHOTS else METHODS[row].title, *figures])
    names = [f"{title} (seeds {', '.join(numbers)})" for title, numbers in cells.items()]
    columns = ["method", *names, "average", "average rank", "CPU s to train"]
    note = "CPU seconds are the process's, choosing included: the median over cells of the means over seeds. A method "
    note += "that has not been measured in every cell has no average, and the ranks are those among the others. "
    note += "A soft prompt begins as the rule in words (docs/methods.md), which no other method is told, and adds "
    note += "eight tokens to a request. LAAI alone is trained on pseudo-labels too, where it makes any "
    note += "(docs/methods.md): here on gemma-3-270m en_fr only."
    record.table("Methods, exact match", columns, lines, note)


def _seconds(measured: Iterable[list[list[Any]]]) -> str:
    """The median over cells of the mean CPU seconds, where all are known."""
    seconds = [[spent for _, _, *known in of for spent in known] for of in measured]
    known = all(len(some) == len(of) for some, of in zip(seconds, measured, strict=True))
    return f"{statistics.median(map(statistics.fmean, seconds)):.0f}" if known else "-"


def _text(entry: Entry) -> str:
    return shown(entry.mean, entry.spread)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LaaiError as error:
        sys.exit(f"error: {error}")
