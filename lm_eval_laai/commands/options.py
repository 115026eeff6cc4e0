"""Flags that several commands share, their checks, and the paths of outputs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laai_core.errors import LaaiError
from laai_core.files import SUFFIX
from laai_core.numeric import layer_number
from lm_eval_laai.commands.outputs import check_writable
from lm_eval_laai.methods.method import is_adapter
from lm_eval_laai.tasks import harness_task

if TYPE_CHECKING:
    from lm_eval_laai.experiments.load import ModelSource

# `auto` is the checkpoint's dtype, the harness's default too: train a vector in the dtype it is evaluated in.
DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_model_arguments(parser: argparse._ActionsContainer, required: bool, several: bool = False) -> None:
    """The flags `model_source` reads; with `several`, --model gives a list."""
    text = "a folder, a name on the Hugging Face Hub or of `laai models`" + ("; may be repeated" if several else "")
    parser.add_argument("--model", required=required, action="append" if several else "store", help=text)
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--gguf-file", metavar="NAME", help="a GGUF file in that folder or repository: dequantised")
    parser.add_argument("--trust-remote-code", action="store_true", help="let the model's own Python code run")
    parser.add_argument(
        "--device", help="cpu, cuda:1, ..., or auto: over all GPUs (default: the first, or else the CPU)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="default: auto, as the checkpoint says")


def model_source(arguments: argparse.Namespace) -> ModelSource:
    """The model the flags name."""
    from lm_eval_laai.experiments.load import ModelSource  # here: imports transformers

    return ModelSource(
        arguments.model,
        arguments.revision,
        arguments.trust_remote_code,
        arguments.device,
        arguments.dtype,
        arguments.gguf_file,
    )


def check_unused(arguments: argparse.Namespace, add: Callable[[argparse.ArgumentParser], None], why: str) -> None:
    """LaaiError for a flag, of those that `add` gives a parser, that is not at its default: it would do nothing."""
    parser = argparse.ArgumentParser()
    add(parser)
    for name, default in vars(parser.parse_args([])).items():
        if getattr(arguments, name) != default:
            raise LaaiError(f"--{name.replace('_', '-')}: {why}")


DATA_HELP = "folder of the public data sets (default: $LAAI_DATA, or else where `laai data fetch` puts them)"


def add_layer_argument(parser: argparse.ArgumentParser, default: str) -> None:
    """--layer, for `checked_layer`."""
    parser.add_argument("--layer", type=int, help=f"0-based, negative counts from the end (default: {default})")


def layer_count(config: Any) -> int:
    """Decoder blocks of the model, from its configuration. LaaiError where that does not say."""
    count = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if not isinstance(count, int):
        raise LaaiError(f"{type(config).__name__} has no num_hidden_layers: expected one of transformers")
    return count


def checked_layer(layer: int | None, config: Any) -> int | None:
    """The layer, 0-based, from a model's configuration: a wrong one is refused before the weights are read."""
    return None if layer is None else layer_number(layer, layer_count(config))


def output_path(output: str, task: str) -> Path:
    """The file to write, in a folder that can be written to. Nothing is made yet."""
    path = Path(output).expanduser()
    if output.endswith(("/", "\\")) or path.is_dir():
        path = path / f"{harness_task(task)}{SUFFIX}"
    elif path.suffix != SUFFIX:
        raise LaaiError(f"--output {output}: expected a name that ends in {SUFFIX}, or a folder with a / at its end")
    check_writable(path.parent)
    return path


def adapter_folder(output: str, task: str) -> Path:
    """The folder to write an adapter to, in one that can be written to. Nothing is made yet."""
    path = Path(output).expanduser()
    if output.endswith(("/", "\\")) or (path.is_dir() and not is_adapter(path)):
        path = path / harness_task(task)
    check_writable(path.parent)
    return path


def a_path(text: str) -> Path:
    """The type of a flag: a shell leaves the ~ in --flag=~/file."""
    return Path(text).expanduser()


def task_name(text: str) -> str:
    """The type of a flag: a task with or without laai_."""
    return text.removeprefix("laai_")


def numbers(text: str) -> list[int]:
    """A comma-separated list."""
    return _each([part for part in text.split(",") if part], int, "whole numbers")


def decimals(text: str) -> list[float]:
    """A comma-separated list."""
    return _each(text.split(","), float, "numbers")


def _each(parts: list[str], kind: Callable[[str], Any], name: str) -> list[Any]:
    try:
        return [kind(part) for part in parts]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{','.join(parts)!r:.60}: expected {name} with commas between") from None


def check_counts(arguments: argparse.Namespace) -> None:
    """LaaiError for a number below one."""
    for name in ("seeds", "limit", "batch_size"):
        count = getattr(arguments, name)
        if count is not None and count < 1:
            raise LaaiError(f"--{name.replace('_', '-')} is {count}: expected at least one")
