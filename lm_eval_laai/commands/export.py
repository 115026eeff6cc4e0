"""`laai export`: an intervention in another tool's form, where that tool computes the same."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from laai_core import files
from laai_core.errors import LaaiError
from lm_eval_laai.commands.options import (
    add_model_arguments,
    check_unused,
    model_source,
)
from lm_eval_laai.commands.outputs import check_no_input, check_writable
from lm_eval_laai.commands.report import Report

if TYPE_CHECKING:
    from laai_core.locate import Layout

SUFFIXES = {"gguf": ".gguf", "steering-vectors": files.SUFFIX, "pyvene": files.SUFFIX}


def add(parser: argparse.ArgumentParser) -> None:
    """The flags of `export`."""
    parser.set_defaults(command=_command)
    parser.add_argument("file", metavar="FILE", help="a .safetensors file, or org/repo[:file][@revision]")
    text = "gguf (a control vector: llama.cpp, repeng), steering-vectors, or pyvene"
    parser.add_argument("--to", required=True, choices=SUFFIXES, metavar="FORMAT", help=text)
    parser.add_argument("--output", "-o", required=True, metavar="PATH", help=".gguf, or else .safetensors")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    _add_model_arguments(parser)


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the model whose W_o is needed."""
    model = parser.add_argument_group(
        "for steering-vectors, at site heads: the model whose W_o the vector is multiplied by"
    )
    add_model_arguments(model, required=False)
    model.add_argument("--projection", help="module path of the attention output projection, as for train")


def _command(arguments: argparse.Namespace) -> Report:
    from laai_core.intervention import Intervention
    from lm_eval_laai.exports import gguf_file, tensors

    path = Path(arguments.output).expanduser()
    if path.suffix != SUFFIXES[arguments.to]:
        raise LaaiError(f"--output {path}: expected a name that ends in {SUFFIXES[arguments.to]}")
    check_writable(path.parent)
    check_no_input(path, arguments.file)
    intervention = Intervention.load(arguments.file)
    if arguments.to != "steering-vectors" or intervention.site != "heads":
        why = f"--to {arguments.to} at site {intervention.site} uses no model, only steering-vectors at heads does"
        check_unused(arguments, _add_model_arguments, why)
    if arguments.to == "gguf":
        content = gguf_file.control_vector(intervention)
        code = f"llama-cli --model MODEL.gguf --control-vector {path}"
    elif arguments.to == "pyvene":
        content = tensors.pyvene_file(intervention)
        code = tensors.pyvene_code(intervention.site, str(path))
    else:
        tensors.scaled(intervention, tensors.STEERING_VECTORS)  # refused before a model is read
        layout = _layout(arguments)
        content = tensors.steering_vectors_file(intervention, layout)
        code = tensors.steering_vectors_code(intervention, str(path), layout)
    files.write(path, content)
    facts = {"output": str(path), "format": arguments.to, "layers": intervention.layers, "use": code}
    return Report(facts, f"{path}, for {arguments.to}:\n\n{code}".rstrip())


def _layout(arguments: argparse.Namespace) -> Layout | None:
    if not arguments.model:
        return None
    from laai_core.locate import locate

    model, _ = model_source(arguments).load()
    return locate(model, arguments.projection)
