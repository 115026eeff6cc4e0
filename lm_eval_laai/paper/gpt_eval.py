"""GPT-Eval columns: a judge on the answers that finished cells hold."""

from __future__ import annotations

from collections.abc import Sequence

from lm_eval_laai.experiments.cells import Store
from lm_eval_laai.experiments.scores import Entry, result_of
from lm_eval_laai.judge import Cache, Judge, Sample, judge_samples
from lm_eval_laai.paper.tables import Table


def judged(
    tables: Sequence[Table], seeds: Sequence[int], store: Store, judge: Judge, cache: Cache, concurrency: int
) -> dict[tuple[str, str, str], Entry]:
    """(table, row, task) to the shares of accepted answers, seed by seed; entries with a missing cell are left out."""
    found = {}
    for table in tables:
        for row in table.rows:
            for task in table.columns:
                results = [result_of(row.setting, row.cell(task, seed), store) for seed in seeds]
                if any(result is None for result in results):
                    continue
                shares = [
                    judge_samples(
                        _samples(result["answers"]), task, judge, cache, concurrency=concurrency, progress=True
                    ).share
                    for result in results
                    if result is not None
                ]
                found[table.name, row.title, task] = Entry(shares)
    return found


def _samples(answers: Sequence[Sequence[str]]) -> list[Sample]:
    """As `lm_eval_laai.judge.read_samples` reads the harness's own file: the word, the first line generated."""
    return [Sample.of(number, prompt, answer) for number, (prompt, answer) in enumerate(answers)]
