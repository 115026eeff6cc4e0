"""The content of a report: its tables and figures, and their settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lm_eval_laai.experiments.cells import Fit
from lm_eval_laai.experiments.curves import Sweep
from lm_eval_laai.experiments.scores import Entry
from lm_eval_laai.paper.published import Published
from lm_eval_laai.paper.tables import Recipe, Row, Table

JUDGED = ("1", "2")  # the tables that have GPT-Eval in the paper
NOT_RUN = "not run"
FIGURE_1 = "paper_figure1.png"


@dataclass(frozen=True)
class Content:
    """Tables and figures with the recipes, seeds and judge behind them.

    `sweep` is Figure 1; `maps` Figure 2, title to vector; `gpt_eval` maps (table, row, task) to the accepted shares,
    where a judge was asked.
    """

    command: str
    recipes: list[Recipe]
    seeds: list[int]
    tables: list[Table]
    sweep: Sweep | None = None
    maps: dict[str, Fit] = field(default_factory=dict)
    gpt_eval: Mapping[tuple[str, str, str], Entry] = field(default_factory=dict)
    judge: str | None = None

    def other_groups(self, table: Table) -> bool:
        """Whether the columns are other groups of people than the paper's."""
        return table.name == "3" and (self.recipes[0].lexicon or bool(self.recipes[0].groups))

    def published(self, table: Table, row: Row) -> list[Published] | None:
        """The paper's figures of a row, column by column."""
        return None if self.other_groups(table) else table.published(row)


def map_name(title: str) -> str:
    """The file name of a panel of Figure 2."""
    return f"paper_figure2_{title}.png"
