"""`laai inspect`: what is in an intervention file."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

from laai_core.commands.report import Report, table
from laai_core.facts import flat
from laai_core.hub import local_file
from laai_core.intervention import Intervention
from laai_core.plot import check_plot, heat_map


def add(commands: Any) -> None:
    """Put `inspect` on a parser."""
    parser = commands.add_parser("inspect", help="show an intervention: layer, site, norms, sparsity, training")
    parser.set_defaults(command=_command)
    parser.add_argument("file", metavar="FILE", help="a .safetensors file, or org/repo[:file][@revision]")
    parser.add_argument("--plot", metavar="FILE.png", help="draw a heat map, heads by dimensions")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def _command(arguments: argparse.Namespace) -> Report:
    if arguments.plot:
        check_plot(Path(arguments.plot))
    path = local_file(arguments.file)
    intervention = Intervention.load(path)
    facts = {
        "file": arguments.file,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        **describe(intervention),
    }
    if arguments.plot:
        heat_map(intervention, Path(arguments.plot))
        facts["plot"] = arguments.plot
    return Report(facts, _text(facts))


def describe(intervention: Intervention) -> dict[str, Any]:
    """Everything about an intervention but its numbers. Norms are of the stored, unscaled vectors."""
    layers = {}
    for layer in intervention.layers:
        vector = intervention.vector(layer)
        groups = vector if vector.ndim == 2 else vector.unsqueeze(0)
        layers[str(layer)] = {
            "shape": list(vector.shape),
            "norms": groups.norm(dim=1).tolist(),  # one a head at `heads`, one elsewhere
            "nonzero": groups.count_nonzero(dim=1).tolist(),
            "active_heads": int(groups.ne(0).any(dim=1).sum()) if vector.ndim == 2 else None,
            "zero_share": float((vector == 0).double().mean()),
        }
    return {
        "site": intervention.site,
        "position": intervention.position,
        "scale": intervention.scale,
        "operation": intervention.operation,
        "layers": layers,
        "metadata": intervention.metadata,
    }


def _text(facts: dict[str, Any]) -> str:
    keys = ("file", "sha256", "site", "position", "scale", "operation")
    parts = [table([(key, facts[key]) for key in keys] + [(k, v) for k, v in flat(facts["metadata"])])]
    for number, layer in facts["layers"].items():
        width = layer["shape"][-1]
        heads = f"{layer['active_heads']} of {layer['shape'][0]} heads active, " if len(layer["shape"]) == 2 else ""
        parts.append(f"\nlayer {number}: {heads}{layer['zero_share']:.1%} exact zeros")
        rows = [
            (index, f"{norm:.4f}", f"{nonzero} of {width}")
            for index, (norm, nonzero) in enumerate(zip(layer["norms"], layer["nonzero"], strict=True))
        ]
        parts.append(table([("head" if heads else "vector", "L2 norm", "non-zero"), *rows]))
    if "plot" in facts:
        parts.append(f"\nheat map: {facts['plot']}")
    return "\n".join(parts)
