"""What a training step costs as prompts get longer, examples more and models deeper: replay and the plain hook.

Random Llamas (hidden size 384), the vector a third of the way up, targets of 2 tokens; a step is one loss and its
gradient. One thing varies at a time, from prompts of 20 tokens, 10 examples and 12 layers.
"""

from __future__ import annotations

from typing import Any

import torch

from laai_core.encode import encode_examples
from laai_core.forward import PlainForward
from laai_core.hooks import frozen
from laai_core.locate import locate
from laai_core.objective import Objective
from laai_core.replay import ReplayForward
from lm_eval_laai.inspection.plot import can_plot
from lm_eval_laai.methods.method import middle_layer
from measure import DOCS, Record, Timings, interleaved, median, milliseconds, parser, ratio
from models import random_llama, word_examples, word_tokenizer

BASE = {"prompt tokens": 20, "examples": 10, "layers": 12}
SWEEPS = {
    "prompt tokens": [8, 30, 100, 300, 1000],
    "examples": [10, 25, 50, 100, 200],
    "layers": [4, 8, 16, 32],
}
PATHS = {"replay": ReplayForward, "plain hook": PlainForward}


def timed(setting: dict[str, int], rounds: int) -> Timings:
    """Seconds per step of both paths."""
    torch.manual_seed(0)
    model = random_llama(hidden=384, intermediate=1024, layers=setting["layers"], heads=6, vocabulary=4096)
    layout, layer = locate(model), middle_layer(setting["layers"])
    examples = word_examples(setting["examples"], setting["prompt tokens"], 2)
    batch, objective = encode_examples(word_tokenizer(), examples, stop=""), Objective(examples)
    vectors = 0.01 * torch.randn(1, model.config.num_attention_heads * model.config.head_dim)
    cases: dict[str, Any] = {}
    for name, kind in PATHS.items():
        forward = kind(layout, batch, layer, "heads")
        cases[name] = lambda forward=forward: forward.loss_and_gradient(vectors, objective, [0])
    with frozen(model):
        return interleaved(cases, rounds)


def plot(measured: dict[str, dict[int, Timings]]) -> None:
    """One panel for each thing that varies."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = Figure(figsize=(3.6 * len(measured), 3.4), layout="constrained")
    panels = figure.subplots(1, len(measured), sharey=True, squeeze=False)[0]
    for panel, (what, by_value) in zip(panels, measured.items(), strict=True):
        for name in PATHS:
            values = [1e3 * median(times, name) for times in by_value.values()]
            panel.loglog(list(by_value), values, marker="o", label=name)
        # What was measured, as whole numbers: a logarithmic axis would label 4 as 4 x 10^0.
        panel.set_xticks(list(by_value), [str(value) for value in by_value])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(FuncFormatter(lambda milliseconds, _: f"{milliseconds:,.0f}"))
        panel.set_xlabel(what)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("ms per step")
    panels[0].legend()
    figure.savefig(DOCS / "cost.png", dpi=110)


def main() -> None:
    arguments = parser(__doc__).parse_args()
    quick = arguments.quick
    measured: dict[str, dict[int, Timings]] = {}
    for what, values in SWEEPS.items():
        measured[what] = {
            value: timed({**BASE, what: value}, arguments.rounds) for value in (values[:2] if quick else values)
        }
    record = Record("size", __doc__ or "", {**BASE, "rounds": arguments.rounds})
    record.keep("seconds per step", measured)
    for what, by_value in measured.items():
        rows = [
            [str(value), *(milliseconds(median(times, name)) for name in PATHS)]
            + [f"{ratio(times, 'plain hook', 'replay'):.1f}×"]
            for value, times in by_value.items()
        ]
        record.table(f"Milliseconds per step by {what}", [what, *PATHS, "plain hook / replay"], rows)
    if can_plot() and not quick:
        DOCS.mkdir(exist_ok=True)
        plot(measured)
        record.figure(DOCS / "cost.png")
    record.save(quick)


if __name__ == "__main__":
    main()
