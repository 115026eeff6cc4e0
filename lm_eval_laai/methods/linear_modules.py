"""The linear modules that adapters wrap, found by the model's structure as `laai_core.locate` finds the sites."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from laai_core.errors import LaaiError
from laai_core.locate import Layout, widths

_NAMES = {
    "query": ("q_proj", "query", "q_lin", "wq"),
    "key": ("k_proj", "key", "k_lin", "wk"),
    "value": ("v_proj", "value", "v_lin", "wv"),
}


def attention_inputs(layout: Layout, layer: int, kinds: Sequence[str]) -> list[str]:
    """Paths of a layer's projections of `kinds` (query, key, value); of the fused one where they are one module.

    PEFT's own defaults take the fused projection too.

    Raises:
        LaaiError: when a projection is not found; names the linear modules of the attention.
    """
    output = layout.module(layer, "heads")
    block = layout.paths[layout.blocks[layer]]
    attention = layout.paths[output].removeprefix(f"{block}.").split(".")[0]
    linears = {p: m for p, m in _linears(layout, f"{block}.{attention}").items() if m is not output}
    if len(linears) == 1:
        return list(linears)
    chosen = []
    for kind in kinds:
        fitting = [path for path in linears if path.rpartition(".")[2] in _NAMES[kind]]
        if len(fitting) != 1:
            raise LaaiError(
                f"layer {layer}: expected one {kind} projection ({', '.join(_NAMES[kind])}) or a fused one; "
                f"its attention has {', '.join(linears) or 'no linear modules'}"
            )
        chosen += fitting
    return chosen


def down_projection(layout: Layout, layer: int) -> str:
    """Path of the feed-forward's last linear module: the one from the inner width to the hidden size.

    Raises:
        LaaiError: when there is not exactly one, as in mixtures of experts.
    """
    top = layout.paths[layout.module(layer, "mlp")]
    linears = {path: widths(module) for path, module in _linears(layout, top).items()}
    fitting = [path for path, (inner, outer) in linears.items() if outer == layout.hidden_size != inner]
    if len(fitting) != 1:
        raise LaaiError(
            f"layer {layer}: expected one linear module from the feed-forward's inner width to {layout.hidden_size}, "
            f"found {', '.join(fitting) or 'none'} among {', '.join(linears) or 'no linear modules'}"
        )
    return fitting[0]


def is_transposed(layout: Layout, path: str) -> bool:
    """Whether a module keeps its weight as [in, out] (GPT-2's Conv1D): PEFT's `fan_in_fan_out`."""
    return isinstance(layout.model.get_submodule(path), Conv1D)


def _linears(layout: Layout, top: str) -> dict[str, nn.Module]:
    """{path: module} of the linear modules at and under a path."""
    module = layout.model.get_submodule(top)
    return {
        f"{top}.{name}" if name else top: inner
        for name, inner in module.named_modules()
        if isinstance(inner, nn.Linear | Conv1D)
    }
