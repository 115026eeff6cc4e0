"""Render benchmarks/results/*.json as docs/benchmarks.md: `python benchmarks/report.py`."""

from __future__ import annotations

import json
from typing import Any

from measure import DOCS, RESULTS, markdown

ORDER = ["training", "many", "optimisers", "evaluation", "size", "gpu"]
TITLES = {
    "training": "Training: replay against plain and PEFT",
    "many": "Many vectors in one batch",
    "optimisers": "Optimisers",
    "evaluation": "Evaluation: hf-laai against hf",
    "size": "Cost against size",
    "gpu": "On a GPU",
}
HEAD = """# Benchmarks

Made by `python benchmarks/report.py` from `benchmarks/results/*.json`, which hold every single timing. What is
compared was measured in one process, in turn; figures are medians, and a ratio is the median of the rounds' own
ratios, so a machine that is slow for a while changes little. Times are this machine's; the ratios are what is claimed.
Each script takes `--quick`, which shows that it runs.
"""


def section(facts: dict[str, Any]) -> str:
    """One benchmark: what it does, the command, where it ran, its tables and pictures."""
    parts = [f"## {TITLES.get(facts['name'], facts['name'])}", facts["about"], f"```bash\n{facts['command']}\n```"]
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


def render() -> str:
    """The document of all results there are."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")}
    names = [name for name in ORDER if name in found]
    names += sorted(set(found) - set(names))
    return "\n\n".join([HEAD.strip(), *(section(found[name]) for name in names)]) + "\n"


def main() -> None:
    DOCS.mkdir(exist_ok=True)
    (DOCS / "benchmarks.md").write_text(render(), encoding="utf-8")
    print("wrote docs/benchmarks.md")


if __name__ == "__main__":
    main()
