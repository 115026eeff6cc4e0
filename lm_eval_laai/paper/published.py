"""The paper's figures (arXiv 2502.06115), as printed: {table: {row: [column by column]}}."""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """Exact match (Table 3: KL), its standard deviation over five seeds, GPT-Eval; None where none is given."""

    value: float
    spread: float | None = None
    gpt_eval: float | None = None


def _row(*cells: tuple[float, ...]) -> list[Published]:
    return [Published(*cell) for cell in cells]


def _plain(*values: float) -> list[Published]:
    return [Published(value) for value in values]


MODEL = "Llama3-8B"
PUBLISHED: dict[int, dict[str, list[Published]]] = {
    1: {
        "0-shot": _row((0.069, 0.012, 0.02), (0.022, 0.005, 0.04), (0.050, 0.026, 0.09), (0.051, 0.012, 0.115)),
        "10-shot": _row((0.000, 0.000, 0.188), (0.075, 0.014, 0.03), (0.000, 0.000, 0.129), (0.000, 0.000, 0.109)),
        "0-shot + function vector": _row(
            (0.129, 0.042, 0.173), (0.054, 0.012, 0.08), (0.000, 0.000, 0.099), (0.124, 0.023, 0.179)
        ),
        "10-shot + function vector": _row(
            (0.241, 0.053, 0.267), (0.123, 0.031, 0.133), (0.056, 0.013, 0.178), (0.122, 0.028, 0.614)
        ),
        "LAAI": _row((0.795, 0.024, 0.768), (0.620, 0.041, 0.872), (0.514, 0.063, 0.902), (0.349, 0.085, 0.74)),
    },
    2: {
        "Add": _row((0.324, 0.140, 0.731), (0.237, 0.046, 0.312), (0.644, 0.125, 0.852), (0.601, 0.215, 0.901)),
        "Re-optimized": _row(
            (0.551, 0.076, 0.896), (0.546, 0.053, 0.724), (0.768, 0.036, 0.937), (0.780, 0.046, 0.984)
        ),
    },
    3: {  # the last column is the paper's average
        "0-shot": _plain(2.761, 2.451, 3.451, 4.131, 3.200),
        "10-shot": _plain(1.665, 2.047, 2.342, 2.244, 2.074),
        "LAAI": _plain(0.283, 0.260, 0.260, 0.288, 0.273),
    },
    4: {
        "unregularised": _plain(0.504, 0.302, 0.371, 0.314),
        "regularised": _plain(0.795, 0.620, 0.514, 0.349),
    },
    5: {
        "Mistral-7B-v0.3": _plain(0.521, 0.385, 0.321),
        "Gemma2-2B": _plain(0.710, 0.221, 0.314),
        MODEL: _plain(0.795, 0.620, 0.514),
    },
    6: {
        "ICV": _plain(0.396, 0.423, 0.008),
        "IA3": _plain(0.521, 0.385, 0.321),
        "Soft prompt": _plain(0.710, 0.221, 0.314),
        "LoRA": _plain(0.681, 0.606, 0.427),
        "LAAI": _plain(0.795, 0.620, 0.514),
    },
}
