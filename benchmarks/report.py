"""Render benchmarks/results/*.json as docs/benchmarks.md, and results about accuracy as documents of their own:
`python benchmarks/report.py`.
"""

from __future__ import annotations

import json
from typing import Any

from measure import DOCS, RESULTS, markdown

ORDER = [
    "real_models",
    "time_to_quality",
    "interference",
    "real_optimisers",
    "training",
    "step",
    "products",
    "many",
    "optimisers",
    "evaluation",
    "vllm_overhead",
    "size",
    "memory",
    "few_shot_prefix",
    "gpu",
    "regressions",
    "norms",
]
TITLES = {
    "real_models": "Real models: ten examples against ten shots",
    "time_to_quality": "Real models: seconds until a method is as good as ten shots",
    "interference": "Real models: two vectors at once",
    "real_optimisers": "Real models: optimisers",
    "training": "Training: replay against plain and PEFT",
    "step": "A step against the machine's limits",
    "products": "Products and heads: what was tried",
    "many": "Many vectors in one batch",
    "optimisers": "Optimisers",
    "evaluation": "Evaluation: hf-laai against hf",
    "few_shot_prefix": "Ten shots under a vector: the prefix once a task",
    "vllm_overhead": "In vLLM: the cost of a vector",
    "size": "Cost against size",
    "memory": "Memory of a training",
    "gpu": "On a GPU",
    "regressions": "Planted regressions",
    "norms": "Sizes of vectors",
}
HEAD = """# Benchmarks

Made by `python benchmarks/report.py` from `benchmarks/results/*.json`, which hold every single timing. What is
compared was measured in one process, in turn; figures are medians, and a ratio is the median of the rounds' own
ratios, so a machine that is slow for a while changes little. Times are those of the machine named under each; the
ratios are what is claimed. Otherwise in the first section: scores are means over draws, each method was run by
itself, at the commits in its record, and its CPU seconds are rough. Each script takes `--quick`, which shows that it
runs.
"""


# Results that fill a document of their own, and its first lines.
ALONE = {
    "composition": (
        "compositions.md",
        """# Compositions

`laai compose A B -o C [--weights 1,0.5] [--method METHOD]` makes one vector of several that act at the same site and
position. With vectors v and weights w (1 if not given), layer by layer, METHOD is

- `sum` (default): Σ w v, the paper's "Add";
- `mean`: Σ w v / Σ w;
- `normalised`: Σ w v n / ‖v‖, n the mean of the ‖v‖ (the code of Rimsky et al. 2023, arXiv 2312.06681, scales so);
- `ties`: trim each w v to its largest 20 % of coordinates, elect a sign for each, average those that have it (Yadav et
  al. 2023, arXiv 2306.01708);
- `fit`: the sum with the w that minimise the task loss of the composed task's training examples (`--model`, `--task`).

What follows is made by `python benchmarks/report.py` from `benchmarks/results/composition.json`.
""",
    ),
    "opinion": (
        "opinion.md",
        """# Opinions

The opinion tasks, their data and their metrics are in [tasks.md](tasks.md). What follows is made by
`python benchmarks/report.py` from `benchmarks/results/opinion.json`.
""",
    ),
}


def section(facts: dict[str, Any]) -> str:
    """One benchmark: what it does, the command, where it ran, its tables and pictures."""
    return f"## {TITLES.get(facts['name'], facts['name'])}\n\n{body(facts)}"


def body(facts: dict[str, Any]) -> str:
    """A section but for its title."""
    parts = [facts["about"], f"```bash\n{facts['command']}\n```"]
    parts.append(f"{machine(facts['machine'])} {settings(facts['settings'])}")
    for table in facts["tables"]:
        parts.append(f"**{table['title']}**")
        parts.append(markdown(table["columns"], table["rows"]))
        if table["note"]:
            parts.append(table["note"])
    parts += [f"![{figure}]({figure})" for figure in facts["figures"]]
    return "\n\n".join(parts)


def machine(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    device = "" if facts["device"] == "cpu" else f"{facts['device']}, "
    cpus = f"{facts['processor']}, {facts['cpus']} CPUs, {facts['threads']} threads"
    return f"{device}{cpus}; Python {facts['python']}, {versions}."


def settings(facts: dict[str, Any]) -> str:
    return "Settings: " + "; ".join(f"{name} {value}" for name, value in facts.items()) + "."


def render() -> dict[str, str]:
    """{name of a document: its text} of all results there are."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")}
    alone = {
        document: f"{head.strip()}\n\n{body(found.pop(name))}\n"
        for name, (document, head) in ALONE.items()
        if name in found
    }
    names = [name for name in ORDER if name in found]
    names += sorted(set(found) - set(names))
    return {"benchmarks.md": "\n\n".join([HEAD.strip(), *(section(found[name]) for name in names)]) + "\n", **alone}


def main() -> None:
    DOCS.mkdir(exist_ok=True)
    for name, text in render().items():
        (DOCS / name).write_text(text, encoding="utf-8")
        print(f"wrote docs/{name}")


if __name__ == "__main__":
    main()
