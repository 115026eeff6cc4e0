"""Vectors for steering-vectors and pyvene, whose own files are pickles: plain tensors, and code to apply them.

The file is .safetensors: a tensor [D] for each layer, named by its number from 0, float32, scale folded in.
"""

from __future__ import annotations

import torch
from safetensors.torch import save

from laai_core.errors import LaaiError
from laai_core.intervention import Intervention
from laai_core.locate import Layout
from lm_eval_laai.exports.expressible import Target, attention_output, scaled

STEERING_VECTORS = Target(
    "steering-vectors", positions=("all",), sites={"residual": "decoder_block", "mlp": "mlp", "heads": "self_attn"}
)
PYVENE = Target(
    "pyvene",
    positions=("last",),
    sites={"residual": "block_output", "mlp": "mlp_output", "heads": "attention_value_output"},
)

_STEERING_VECTORS_CODE = """\
from safetensors.torch import load_file
from steering_vectors import SteeringVector

vectors = {{int(layer): vector for layer, vector in load_file({path!r}).items()}}
with SteeringVector(vectors, {site!r}).apply(model{where}):
    output = model(**tokens)
"""
# pyvene names positions with each call: with rows of several lengths, a list of them for each layer.
_PYVENE_CODE = """\
import pyvene
from safetensors.torch import load_file

steered = pyvene.IntervenableModel(
    [
        {{
            "layer": int(layer),
            "component": {site!r},
            "intervention": pyvene.AdditionIntervention(embed_dim=len(vector), source_representation=vector),
        }}
        for layer, vector in load_file({path!r}).items()
    ],
    model,
)
last = tokens["input_ids"].shape[1] - 1
_, output = steered(tokens, unit_locations={{"base": last}})
"""


def steering_vectors_file(intervention: Intervention, layout: Layout | None) -> bytes:
    """For `steering_vectors.SteeringVector`; a Δ at `heads` becomes W_o·Δ at the attention's output.

    Args:
        layout: of the model, whose W_o is needed at site `heads`.

    Raises:
        LaaiError: another position or operation, or no model for a Δ at `heads`.
    """
    vectors = scaled(intervention, STEERING_VECTORS)
    if intervention.site == "heads":
        if layout is None:
            raise LaaiError("a Δ at site heads is exported as W_o·Δ: expected --model, whose W_o that is")
        vectors = attention_output(vectors, layout)
    return _file(vectors)


def pyvene_file(intervention: Intervention) -> bytes:
    """For `pyvene.AdditionIntervention`s; LaaiError for another position or operation."""
    return _file(scaled(intervention, PYVENE))


def steering_vectors_code(intervention: Intervention, path: str, layout: Layout | None) -> str:
    """Python that applies the file to a `model` and its `tokens`.

    steering-vectors guesses a module by its name. In Falcon it takes a norm, `ln_attn`, for the attention: at site
    `heads` the code names the projection, whose output the attention's is.
    """
    site, where = STEERING_VECTORS.sites[intervention.site], ""
    if intervention.site == "heads" and layout is not None:
        where = f", {{{site!r}: {_projection_path(layout, intervention.layers)!r}}}"
    return _STEERING_VECTORS_CODE.format(path=path, site=site, where=where)


def _projection_path(layout: Layout, layers: list[int]) -> str:
    """Module path of the attention's output projection, with {num} for the layer."""
    paths = {layout.paths[layout.module(layer, "heads")].replace(f".{layer}.", ".{num}.", 1) for layer in layers}
    if len(paths) != 1:
        raise LaaiError(f"steering-vectors names one module for all layers, this model has {', '.join(sorted(paths))}")
    return paths.pop()


def pyvene_code(site: str, path: str) -> str:
    """Python that applies the file to a `model` and its `tokens`, prompts of one length."""
    return _PYVENE_CODE.format(path=path, site=PYVENE.sites[site])


def _file(vectors: dict[int, torch.Tensor]) -> bytes:
    return save({str(layer): vector.contiguous() for layer, vector in vectors.items()})
