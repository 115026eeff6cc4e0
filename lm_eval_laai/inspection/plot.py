"""Heat maps of interventions, heads by dimensions (the paper's figure 2). Needs the extra `plot`."""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from laai_core import files
from laai_core.errors import LaaiError

if TYPE_CHECKING:
    from laai_core.intervention import Intervention

FORMATS = (".png", ".pdf", ".svg")


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def check_plot(path: Path) -> None:
    """LaaiError when no heat map could be drawn to `path`."""
    if path.suffix not in FORMATS:
        raise LaaiError(f"cannot draw {path}: expected a name that ends in {', '.join(FORMATS)}")
    if not can_plot():
        raise LaaiError('a heat map needs matplotlib: pip install "lm-eval-laai[plot]"')


def largest(intervention: Intervention) -> float:
    """The largest absolute entry of the unscaled vectors, which a heat map's colour scale ends at."""
    return max(float(intervention.vector(layer).abs().max()) for layer in intervention.layers)


def heat_map(intervention: Intervention, path: Path, limit: float | None = None) -> None:
    """Draw the layers one below the other, on one colour scale centred at zero. Written whole or not at all.

    Args:
        limit: where the scale ends on both sides, in the activation's units; maps that are compared share it.
            Default: at the largest entry.
    """
    check_plot(path)
    # Figure alone, never pyplot: it draws with Agg, needs no display and leaves no global state.
    from matplotlib.figure import Figure

    vectors = {layer: intervention.vector(layer) for layer in intervention.layers}
    images = {layer: v if v.ndim == 2 else v.unsqueeze(0) for layer, v in vectors.items()}  # [H, d] or [1, hidden]
    limit = limit or largest(intervention) or 1.0
    inches = [max(1.5, 0.12 * len(image)) for image in images.values()]
    figure = Figure(figsize=(8, 0.8 + sum(inches)), layout="constrained")
    axes = figure.subplots(len(images), 1, squeeze=False, height_ratios=inches)[:, 0]
    for axis, (layer, image) in zip(axes, images.items(), strict=True):
        drawn = axis.imshow(
            image.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
        )
        axis.set_title(f"layer {layer}, site {intervention.site}", fontsize="medium")
        axis.set_ylabel("head" if intervention.site == "heads" else "")
        if intervention.site != "heads":
            axis.set_yticks([])
    axes[-1].set_xlabel("dimension")
    figure.colorbar(drawn, ax=list(axes), label="added to the activation")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=150)
    files.write(path, buffer.getvalue())
