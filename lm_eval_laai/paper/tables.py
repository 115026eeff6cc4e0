"""The paper's tables as cells: which method, on which task, with which examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from laai_core.data.rules import COMPOSITIONS, LEXICON_PREFIX, WORD_RULES
from laai_core.data.survey import TENDENCIES
from laai_core.data.tasks import OPINIONQA, OPINIONQA_GROUP, SURVEY_PREFIX
from lm_eval_laai.experiments.cells import Cell, Fit
from lm_eval_laai.experiments.setting import Setting, task_info
from lm_eval_laai.methods import METHODS
from lm_eval_laai.paper.published import PUBLISHED, Published
from lm_eval_laai.tasks import harness_task, recorded_task

EXAMPLES = 10  # of every method, and the shots: the paper's N
STEPS = 100  # evaluations of LAAI at the paper's settings
FOUR_RULES = ("en_fr", "en_de", "antonym", "synonym")
THREE_RULES = ("en_fr", "en_de", "antonym")  # of tables 5 and 6
TITLES = {
    1: "Single rules",
    2: "Compositions",
    3: "Opinions of groups",
    4: "Regularisation",
    5: "Models",
    6: "Baselines",
}


@dataclass(frozen=True)
class Recipe:
    """LAAI's training in one setting, and the fits of the tables' rows."""

    setting: Setting
    lexicon: bool  # the bundled lexicon and survey, not the public sets
    layer: int
    l1: float
    group: float
    penalty_scale: str
    adapter_steps: int | None = None  # None: each method's own number
    groups: tuple[str, ...] = ()  # ATTRIBUTE=GROUP, of Table 3; default: the paper's

    def task(self, name: str) -> str:
        """The harness task of a word task."""
        return harness_task((LEXICON_PREFIX if self.lexicon else "") + name)

    def laai(self, task: str, seed: int, regularised: bool = True, n_train: int = EXAMPLES) -> Fit:
        """The paper's vector: one layer and one penalty for all tasks, from zero."""
        l1, group = (self.l1, self.group) if regularised else (0.0, 0.0)
        return Fit(task, "laai", seed, n_train, self.layer, STEPS, l1, group, self.penalty_scale, "zero")

    def chosen(self, task: str, seed: int, n_train: int = EXAMPLES) -> Fit:
        """The vector of `laai train` without flags: in-context start, the rest chosen by cross-validation."""
        return Fit(task, "laai", seed, n_train, penalty_scale="relative", start="icl" if n_train > 1 else "zero")

    def baseline(self, method: str, task: str, seed: int) -> Fit:
        """Another method's fit: LoRA in LAAI's layer, the others in their authors' layers."""
        steps = self.adapter_steps if METHODS[method].writes_adapter else None
        return Fit(task, method, seed, EXAMPLES, self.layer if method == "lora" else None, steps)


CHOSEN = "LAAI, chosen"  # the row of `Recipe.chosen`
MakeCell = Callable[[str, int], Cell]  # of a harness task and a seed


@dataclass(frozen=True)
class Row:
    """One line of a table: a title, and its cell for each task and seed."""

    title: str
    setting: Setting
    cell: MakeCell


@dataclass(frozen=True)
class Table:
    """Rows by columns. `columns` maps harness tasks to titles."""

    name: str  # a number as the paper's, or a name of ours
    title: str
    columns: dict[str, str]
    rows: list[Row]

    @property
    def metric(self) -> str:
        """The tasks' first metric."""
        return task_info(next(iter(self.columns))).metric

    def cells(self, seeds: Sequence[int]) -> list[tuple[Setting, Cell]]:
        """All cells; a cell that serves several seeds comes once per seed."""
        return [(row.setting, row.cell(task, seed)) for row in self.rows for task in self.columns for seed in seeds]

    def published(self, row: Row) -> list[Published] | None:
        """The paper's figures in a row, if it has such a row."""
        return PUBLISHED.get(int(self.name), {}).get(row.title) if self.name.isdigit() else None


def paper_table(number: int, recipes: Sequence[Recipe]) -> Table:
    """A table of the paper. All but Table 5 are about the first model."""
    recipe = recipes[0]
    columns = _columns(recipe, FOUR_RULES)
    if number == 1:
        rows = _prompted(recipe, function_vectors=True)
    elif number == 2:
        columns = _columns(recipe, COMPOSITIONS)
        rows = _composed(recipe)
    elif number == 3:
        columns = _opinion_columns(recipe)
        rows = _prompted(recipe, function_vectors=False)
    elif number == 4:
        rows = [
            Row("unregularised", recipe.setting, _steered(recipe, regularised=False)),
            Row("regularised", recipe.setting, _steered(recipe)),
        ]
    else:
        columns = _columns(recipe, THREE_RULES)
        rows = _models(recipes) if number == 5 else _baselines(recipe)
    return Table(str(number), TITLES[number], columns, rows)


def examples_table(counts: Sequence[int], recipe: Recipe) -> Table:
    """Scores by the number of examples: not in the paper."""
    rows = []
    for count in counts:
        rows.append(Row(f"{count}-shot", recipe.setting, _shots(count)))
        rows.append(Row(f"LAAI, N = {count}", recipe.setting, _steered(recipe, n_train=count)))
        rows.append(Row(f"{CHOSEN}, N = {count}", recipe.setting, _chosen(recipe, n_train=count)))
    columns = _columns(recipe, FOUR_RULES)
    return Table("examples", "Sample efficiency (not in the paper)", columns, rows)


def _columns(recipe: Recipe, rules: Iterable[str]) -> dict[str, str]:
    return {recipe.task(name): WORD_RULES[name].title for name in rules}


def _prompted(recipe: Recipe, function_vectors: bool) -> list[Row]:
    setting = recipe.setting
    rows = [Row("0-shot", setting, _shots(0)), Row("10-shot", setting, _shots(EXAMPLES))]
    if function_vectors:
        rows += [
            Row("0-shot + function vector", setting, _learnt(recipe, "fv")),
            Row("10-shot + function vector", setting, _learnt(recipe, "fv", EXAMPLES)),
        ]
    return [*rows, Row("LAAI", setting, _steered(recipe)), Row(CHOSEN, setting, _chosen(recipe))]


def _composed(recipe: Recipe) -> list[Row]:
    """Sums of the two rules' vectors, and vectors trained on the composition."""
    setting = recipe.setting
    return [
        Row("10-shot", setting, _shots(EXAMPLES)),
        Row("Add", setting, _added(recipe.laai, recipe)),
        Row("Add, chosen", setting, _added(recipe.chosen, recipe)),
        Row("Re-optimized", setting, _steered(recipe)),
        Row(CHOSEN, setting, _chosen(recipe)),
    ]


def _models(recipes: Sequence[Recipe]) -> list[Row]:
    rows = []
    for recipe in recipes:
        name = recipe.setting.source.name
        rows.append(Row(name, recipe.setting, _steered(recipe)))
        rows.append(Row(f"{name}, chosen", recipe.setting, _chosen(recipe)))
    return rows


def _baselines(recipe: Recipe) -> list[Row]:
    methods = [METHODS[name] for name in ("icv", "ia3", "soft_prompt", "lora")]
    rows = [Row(method.title, recipe.setting, _learnt(recipe, method.name)) for method in methods]
    return [*rows, Row("LAAI", recipe.setting, _steered(recipe)), Row(CHOSEN, recipe.setting, _chosen(recipe))]


def _opinion_columns(recipe: Recipe) -> dict[str, str]:
    if recipe.lexicon:
        return {harness_task(SURVEY_PREFIX + group): group for group in TENDENCIES}
    if recipe.groups:
        return {recorded_task(f"{OPINIONQA_GROUP}:{group}"): group for group in recipe.groups}
    return {harness_task(name): group for name, (_, group) in OPINIONQA.items()}


def _shots(count: int) -> MakeCell:
    return lambda task, seed: Cell(task, count, seed) if count else Cell(task)


def _learnt(recipe: Recipe, method: str, shots: int = 0) -> MakeCell:
    def make(task: str, seed: int) -> Cell:
        return Cell(task, shots, seed if shots else None, (recipe.baseline(method, task, seed),))

    return make


def _steered(recipe: Recipe, **options: Any) -> MakeCell:
    return lambda task, seed: Cell(task, fits=(recipe.laai(task, seed, **options),))


def _chosen(recipe: Recipe, **options: Any) -> MakeCell:
    return lambda task, seed: Cell(task, fits=(recipe.chosen(task, seed, **options),))


def _added(fit: Callable[[str, int], Fit], recipe: Recipe) -> MakeCell:
    parts = {recipe.task(name): [recipe.task(part) for part in rule.parts] for name, rule in COMPOSITIONS.items()}
    return lambda task, seed: Cell(task, fits=tuple(fit(part, seed) for part in parts[task]))
