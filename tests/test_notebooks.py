"""The notebooks run, offline, and the outputs committed with them are those of a run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed: pip install -e '.[test]'")
notebooks = pytest.importorskip("notebooks", reason="nbclient is not installed: pip install -e '.[test]'")

NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?%?")
# Another run has other times, and on another CPU other last bits.
VARIES = re.compile(r"\b[0-9a-f]{64}\b|\bin [\d.]+ s\b|results_[\d.T-]+\.json")


def written(notebook: nbformat.NotebookNode) -> tuple[list[str], list[float]]:
    """The words and the numbers that the cells wrote."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = VARIES.sub("", "".join(output["text"] for output in outputs))
    return NUMBER.sub("#", text).split(), [float(number.rstrip("%")) for number in NUMBER.findall(text)]


@pytest.mark.parametrize("path", notebooks.NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_writes_what_is_committed(path: Path) -> None:
    words, numbers = written(nbformat.read(path, as_version=4))
    assert words
    now = notebooks.run(path)
    assert written(now)[0] == words
    assert written(now)[1] == pytest.approx(numbers, rel=0.05, abs=0.02)


def test_there_are_three() -> None:
    assert [path.stem for path in notebooks.NOTEBOOKS] == ["first_vector", "gate", "own_data"]
