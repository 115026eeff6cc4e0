"""A report's facts as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval_laai.experiments.scores import MISSING, shown
from lm_eval_laai.paper.by_hand import by_hand
from lm_eval_laai.paper.content import FIGURE_1, JUDGED, Content, map_name
from lm_eval_laai.paper.published import MODEL, PUBLISHED, Published
from lm_eval_laai.paper.tables import Table

_NOTES = {
    "zero": "0-shot draws no examples and the test items are the same for every seed: its spread is zero by "
    "construction. The paper gives a spread, and does not say what was drawn.",
    "6": "In the paper the IA3 and soft-prompt rows repeat Table 5's Mistral-7B and Gemma2-2B rows figure for figure, "
    "most likely a mistake there. Nothing here was tuned to them.",
    "survey": "The bundled survey is invented and has other groups than the paper's OpinionQA: the paper's figures "
    "are there for their order of size only.",
    "groups": "The groups are others than the paper's: its figures are there for their order of size only.",
}


def render(content: Content, facts: Mapping[str, Any]) -> str:
    """The text of report.md, from the facts in report.json."""
    text = [_head(content, facts)]
    text += [_table_text(table, facts["tables"][table.name], content) for table in content.tables]
    if content.sweep is not None:
        text.append(_figure_1_text(content))
    if content.maps:
        text.append(_figure_2_text(content, facts["figure_2"]))
    return "\n".join([*text, _data_text(facts["data"]), _commands_text(content)])


def _head(content: Content, facts: Mapping[str, Any]) -> str:
    first = content.recipes[0]
    lines = [
        "# The paper's tables and figures",
        "",
        f"Layerwise additive activation intervention, arXiv 2502.06115. Made by `{content.command}`.",
        "",
    ]
    lines += [_model_line(model) for model in facts["models"]]
    seeds = ", ".join(map(str, content.seeds))
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    lines += [
        f"- Ten examples of seeds {seeds}, the same for every method; figures are means ± the standard deviation over "
        "seeds (n − 1).",
        f"- {versions}.",
        "- What each method does and how it was trained: docs/methods.md.",
        "- *LAAI* is the paper's setting: start zero, one layer and one penalty for all. *LAAI, chosen* is `laai "
        "train` without flags: in-context start; layer, penalty and evaluations by cross-validation on the examples.",
        "- Exact match (Table 3: KL divergence, lower is better) is the harness's. *paper* lines are the paper's "
        f"figures, on {MODEL} and its own draw of data.",
    ]
    if first.lexicon:
        lines.append(
            "- The bundled model knows its lexicon by heart and nothing else: figures on it compare methods on this "
            "task, and say nothing about a real model."
        )
    if first.adapter_steps is not None:
        lines.append(
            f"- A quick run: adapters were trained for {first.adapter_steps} steps instead of their own number. It "
            "shows that everything runs, and compares nothing."
        )
    if content.judge is not None:
        lines.append(f"- GPT-Eval (second figure of tables 1 and 2): {content.judge}, every seed's predictions.")
    else:
        lines.append("- GPT-Eval was not run (`--judge-model MODEL`).")
    return "\n".join(lines) + "\n"


def _model_line(model: Mapping[str, Any]) -> str:
    identity = ", ".join(f"{name} {str(value)[:16]}" for name, value in model["identity"].items())
    items = "all test items" if model["limit"] is None else f"the first {model['limit']} test items a task"
    return (
        f"- {model['model']} ({identity}; dtype {model['dtype']}, {model['device']}): layer {model['layer']} counted "
        f"from 0, γ = {model['l1']:g}, λ = {model['group']:g}, penalties {model['penalty_scale']}; {items}."
    )


def _table_text(table: Table, rows: Sequence[dict[str, Any]], content: Content) -> str:
    number = f"Table {table.name}. " if table.name.isdigit() else ""
    averaged = table.name == "3"
    judged = table.name in JUDGED
    columns = [*table.columns.values(), *(["average"] if averaged else [])]
    lines = [f"## {number}{table.title}", "", _line(["method", "", *columns]), _line(["---"] * (2 + len(columns)))]
    for row, facts in zip(table.rows, rows, strict=True):
        cells = [facts["columns"][task] for task in table.columns]
        scores = [cell[table.metric] for cell in cells]
        ours = [_plus_minus(s) for s in scores]
        if judged:
            ours = [f"{text}, {_judged(cell['gpt_eval'])}" for text, cell in zip(ours, cells, strict=True)]
        if averaged:
            whole = all(score is not None for score in scores)
            ours.append(f"{sum(s['mean'] for s in scores) / len(scores):.3f}" if whole else MISSING)
        lines.append(_line([row.title, "ours", *ours]))
        published = content.published(table, row)
        if published is not None:
            lines.append(_line(["", "paper", *map(_published, published)]))
    lines += _unmatched(table, content)
    return "\n".join([*lines, "", *_notes(table, content)])


def _unmatched(table: Table, content: Content) -> list[str]:
    """The paper's rows without a counterpart of ours."""
    if not table.name.isdigit():
        return []
    published = PUBLISHED[int(table.name)]
    if content.other_groups(table):
        groups = ["$100,000 or more", "Less than $30,000", "Moderate", "Northeast", "average"]
        head = ["", _line(["the paper, OpinionQA", *groups]), _line(["---"] * 6)]
        return [*head, *(_line([title, *map(_published, row)]) for title, row in published.items())]
    ours = {row.title for row in table.rows}
    return [_line([t, "paper", *map(_published, row)]) for t, row in published.items() if t not in ours]


def _notes(table: Table, content: Content) -> list[str]:
    notes = []
    if any(row.title == "0-shot" for row in table.rows):
        notes.append(_NOTES["zero"])
    if table.name in _NOTES:
        notes.append(_NOTES[table.name])
    if content.other_groups(table):
        notes.append(_NOTES["survey" if content.recipes[0].lexicon else "groups"])
    if table.name == "4":
        recipe = content.recipes[0]
        notes.append(
            f"Regularised: γ = {recipe.l1:g}, λ = {recipe.group:g}, {recipe.penalty_scale}; the paper's are 0.01 and "
            "0.01 on the vector itself (absolute)."
        )
    return [note + "\n" for note in notes]


def _figure_1_text(content: Content) -> str:
    assert content.sweep is not None
    layers = ", ".join(map(str, content.sweep.layers))
    return (
        f"## Figure 1. Exact match against the layer\n\n![figure 1]({FIGURE_1})\n\n"
        f"Lines are means over {len(content.sweep.seeds)} seeds, bands one standard deviation on both sides; layers "
        f"{layers} counted from 0. The paper shows the unregularised loss alone and chose its layer on it.\n"
    )


def _figure_2_text(content: Content, facts: dict[str, Any]) -> str:
    fit, *_ = content.maps.values()
    lines = [f"## Figure 2. Δ, heads by dimension\n\n{fit.task}, seed {fit.seed}, on one colour scale.\n"]
    for title, f in facts.items():
        shares = f"{f['zero_share']:.1%} zeros, {f['active_heads']} of {f['heads']} heads" if f else MISSING
        lines.append(f"{title}: {shares}\n\n![{title}]({map_name(title)})\n")
    return "\n".join(lines)


def _data_text(data: Mapping[str, Any]) -> str:
    """SHA-256 of the files and of each task's test items."""
    files = {name: digest for facts in data.values() for name, digest in facts["files"].items()}
    lines = ["## Data", "", "SHA-256 of the files, and of each task's test items in order.", ""]
    lines += [f"- {name}: {digest}" for name, digest in sorted(files.items())]
    lines += [f"- {task}, test items: {facts['test_items_sha256']}" for task, facts in data.items()]
    return "\n".join([*lines, ""])


def _commands_text(content: Content) -> str:
    """The commands that compute each row's first cell without this command."""
    lines = ["## By hand", "", "Each row's first cell of the first seed; the others differ in task and seed.", ""]
    seed = content.seeds[0]
    for table in content.tables:
        lines += [f"{'Table ' if table.name.isdigit() else ''}{table.name}", "", "```bash"]
        for row in table.rows:
            cell = row.cell(next(iter(table.columns)), seed)
            lines += [f"# {row.title}", *by_hand(row.setting, cell)]
        lines += ["```", ""]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plus_minus(score: Mapping[str, Any] | None) -> str:
    return MISSING if score is None else shown(score["mean"], score["spread"])


def _judged(judged: Any) -> str:
    return judged if isinstance(judged, str) else _plus_minus(judged)


def _published(cell: Published) -> str:
    text = shown(cell.value, cell.spread)
    return text if cell.gpt_eval is None else f"{text}, {cell.gpt_eval:g}"
