"""`laai train`: a Δ, or what a baseline learns, from a task's training examples, into one file or folder."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from laai_core.data import load_task
from laai_core.errors import Interrupted, LaaiError, NotFinite, WorkFailed
from laai_core.example import Example, Split
from laai_core.hub import PARTIAL, SUFFIX
from laai_core.intervention import Intervention
from laai_core.settings import Job, Settings
from laai_core.settings import check as check_field
from laai_core.train import TrainResult, train
from lm_eval_laai.commands.report import Report, table
from lm_eval_laai.experiments.load import DTYPES, ModelSource
from lm_eval_laai.facts import flat
from lm_eval_laai.methods import METHODS, OPTIONS, check, default_layer, fit, select
from lm_eval_laai.methods.adapters import ADAPTERS, is_adapter, training_record
from lm_eval_laai.tasks import harness_task

AUTO = "auto"


def _weight(text: str) -> float | str:
    return text if text == AUTO else float(text)


def _layer(text: str) -> int | str:
    return text if text == AUTO else int(text)


# Fields of Job and Settings that are flags of the same name: their kinds, defaults and helps are told there.
_FLAGS = {
    one.name: one
    for kind in (Job, Settings)
    for one in fields(kind)
    if "help" in one.metadata and one.name not in ("stop", "site")
}
_PENALTIES = ("l1", "group")


def add(commands: Any) -> None:
    """Put `train` on a parser."""
    parser = commands.add_parser("train", help="train an intervention, or a baseline, on a task's training examples")
    parser.set_defaults(command=_command)
    parser.add_argument(
        "--method", choices=METHODS, default="laai", help="docs/methods.md says what each is (default: %(default)s)"
    )
    add_model_arguments(parser, required=True)
    parser.add_argument("--task", required=True, help="a task without laai_, for example lexicon_antonym")
    parser.add_argument("--data", metavar="DIR", help="folder of the public data sets (default: $LAAI_DATA)")
    parser.add_argument("--n-train", type=int, default=10, help="training examples (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which examples are drawn (default: %(default)s)")
    add_layer_argument(parser, _layer, "; auto cross-validates over all on the training examples")
    _add_training_arguments(parser)
    parser.add_argument("--heads", type=int, help="of fv: how many heads it sums (default: the share its paper takes)")
    parser.add_argument(
        "--output",
        default="./",
        metavar="FILE or DIR/",
        help=f"a folder gets laai_<task>{SUFFIX}, where intervention=DIR finds it, or an adapter's folder laai_<task> "
        "(default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_model_arguments(parser: argparse.ArgumentParser, required: bool, several: bool = False) -> None:
    """The flags `model_source` reads; with `several`, --model gives a list."""
    text = "a folder, a name on the Hugging Face Hub or of `laai models`" + ("; may be repeated" if several else "")
    parser.add_argument("--model", required=required, action="append" if several else "store", help=text)
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--gguf-file", metavar="NAME", help="a GGUF file in that folder or repository: dequantised")
    parser.add_argument("--trust-remote-code", action="store_true", help="let the model's own Python code run")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the first GPU, or else the CPU)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="default: auto, as the checkpoint says")


def model_source(arguments: argparse.Namespace) -> ModelSource:
    """The model the flags name."""
    return ModelSource(
        arguments.model,
        arguments.revision,
        arguments.trust_remote_code,
        arguments.device,
        arguments.dtype,
        arguments.gguf_file,
    )


def add_layer_argument(parser: argparse.ArgumentParser, kind: Any = int, more: str = "") -> None:
    """--layer, for `choose_layer`."""
    text = "0-based, negative counts from the end (default: the middle of the model)"
    parser.add_argument("--layer", type=kind, help=text + more)


def _add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Without defaults, so that it can be told what was given; `_training_options` fills them in."""
    for name, one in _FLAGS.items():
        text = one.metadata["help"] + ("; auto cross-validates" if name in _PENALTIES else "")
        text += "" if one.default is None else f" (default: {one.default})"
        parser.add_argument(_flag(name), type=_kind(name), choices=one.metadata.get("choices"), help=text)


def _kind(name: str) -> Any:
    """What a flag's text becomes: the type in the field's annotation, or also `auto` for a penalty."""
    if name in _PENALTIES:
        return _weight
    hint = {**get_type_hints(Job), **get_type_hints(Settings)}[name]
    return next((kind for kind in (int, float) if kind in (hint, *get_args(hint))), str)


def _training_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for `train`, checked."""
    given = {name: getattr(arguments, name) for name in _FLAGS}
    options = {name: _FLAGS[name].default if value is None else value for name, value in given.items()}
    fixed = {name: None if name in _PENALTIES and value == AUTO else value for name, value in options.items()}
    check_field(Job, **fixed)
    check_field(Settings, **fixed)
    return options


def choose_layer(layer: int | None, config: Any) -> int:
    """The layer, 0-based, from a model's configuration: a wrong one is refused before the weights are read."""
    count = config.get_text_config(decoder=True).num_hidden_layers
    if layer is None:
        return default_layer(count)
    if not -count <= layer < count:
        raise LaaiError(f"layer {layer} is out of range: this model has layers 0 to {count - 1}")
    return layer % count


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


def check_writable(folder: Path) -> None:
    """LaaiError unless files can be made in `folder`, or it can be made itself. Leaves nothing behind."""
    existing = next(f for f in (folder.absolute(), *folder.absolute().parents) if f.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise LaaiError(f"cannot write to {folder}: {error.strerror}; expected a writable folder") from error


def summary(result: TrainResult) -> dict[str, Any]:
    """What a training came to, for a report."""
    best = min(result.history, key=lambda step: step.objective)
    (layer,) = result.intervention.layers
    vector = result.intervention.vector(layer)
    return {
        "sha256": result.intervention.sha256,
        "layer": layer,
        "objective": result.objective,
        "task_loss": best.loss,
        "task_loss_before": result.history[0].loss,
        "stationarity": result.stationarity,
        "active_heads": best.active_heads,
        "heads": len(vector),
        "nonzero_share": best.nonzero / vector.numel(),
        "evaluations": len(result.history),
        "stopped": result.stopped,
    }


def _command(arguments: argparse.Namespace) -> Report:
    # In the order of what it costs to find out that something is wrong.
    split = load_task(arguments.task, seed=arguments.seed, n_train=arguments.n_train, data=arguments.data)
    train_it = _train if arguments.method == "laai" else _train_baseline
    return train_it(arguments, split)


def _train(arguments: argparse.Namespace, split: Split) -> Report:
    options = _training_options(arguments)
    _refuse(arguments, ["heads"])
    path = output_path(arguments.output, arguments.task)
    source = model_source(arguments)
    source.checked_device()
    config = source.config()
    layer = AUTO if arguments.layer == AUTO else choose_layer(arguments.layer, config)
    model, tokenizer = source.load()
    start = time.perf_counter()
    layer, tried = _cross_validated(model, tokenizer, split.train, layer, options)
    try:
        result = train(
            model,
            tokenizer,
            split.train,
            layer=layer,
            seed=arguments.seed,
            task=f"laai_{split.name}",
            progress=True,
            **options,
        )
    except Interrupted as stopped:
        raise KeyboardInterrupt(_kept(stopped, path)) from None
    except NotFinite as stopped:
        raise WorkFailed(_kept(stopped, path)) from None
    seconds = time.perf_counter() - start
    result.intervention.save(path)
    facts = {
        "file": str(path),
        "task": harness_task(arguments.task),
        "method": "laai",
        **summary(result),
        "l1": options["l1"],
        "group": options["group"],
        "tried": [asdict(one) for one in tried],
        "seconds": seconds,
    }
    return Report(facts, _text(facts))


def _kept(stopped: Interrupted | NotFinite, path: Path) -> str:
    """Write the best so far beside the file that a finished training writes; what to say of it."""
    partial = path.with_suffix(PARTIAL)
    stopped.results[0].intervention.save(partial)
    return f"{stopped}: the best so far is in {partial}, {path} was not written"


def _train_baseline(arguments: argparse.Namespace, split: Split) -> Report:
    """`fit`, after everything that can be told to be wrong before the model is loaded."""
    method = arguments.method
    _refuse(arguments, [name for name in (*_FLAGS, "heads") if name not in OPTIONS[method]])
    if arguments.layer == AUTO:
        raise LaaiError(f"--layer auto is of the method laai; {method} takes a number, or its own default")
    if method in ADAPTERS:
        path = adapter_folder(arguments.output, arguments.task)
    else:
        path = output_path(arguments.output, arguments.task)
    options = {name: getattr(arguments, name) for name in ("steps", "heads")}
    check(method, path, arguments.layer, options)
    source = model_source(arguments)
    source.checked_device()
    config = source.config()
    layer = None if arguments.layer is None else choose_layer(arguments.layer, config)
    model, tokenizer = source.load()
    start = time.perf_counter()
    fit(method, model, tokenizer, split, layer=layer, seed=arguments.seed, output=path, **options)
    facts = {
        "file": str(path),
        "task": harness_task(arguments.task),
        "method": method,
        "seconds": time.perf_counter() - start,
        "training": training_record(path) if method in ADAPTERS else Intervention.load(path).metadata["training"],
    }
    return Report(facts, table(flat(facts)))


def _refuse(arguments: argparse.Namespace, names: Sequence[str]) -> None:
    for name in names:
        if getattr(arguments, name) is not None:
            raise LaaiError(f"the method {arguments.method} has no {_flag(name)}: leave it out")


def _cross_validated(
    model: Any, tokenizer: Any, examples: Sequence[Example], layer: int | str, options: dict[str, Any]
) -> tuple[int, list[select.Tried]]:
    """The layer, and what was tried for it and for the penalties; puts the chosen penalties into `options`."""
    shared = {name: options[name] for name in ("penalty_scale", "whitespace", "projection", "batch_size", "forward")}
    tried: list[select.Tried] = []
    if isinstance(layer, str):
        # The layer first, under penalties that are given or usual; then the penalties at that layer.
        usual = {n: _FLAGS[n].default if options[n] == AUTO else options[n] for n in ("l1", "group")}
        choice = select.choose_layer(model, tokenizer, examples, **usual, **shared)
        layer, tried = choice.layer, choice.tried
    if AUTO in (options["l1"], options["group"]):
        given = {n: None if options[n] == AUTO else options[n] for n in ("l1", "group")}
        choice = select.choose_penalty(model, tokenizer, examples, layer, **given, **shared)
        options["l1"], options["group"] = choice.l1, choice.group
        tried = tried + choice.tried
    return layer, tried


def _text(facts: dict[str, Any]) -> str:
    stopped = f", {facts['stopped']}" if facts["stopped"] else ""
    rows = [
        (one["layer"], f"{one['l1']:.3g}", f"{one['group']:.3g}", f"{one['validation_loss']:.4f}")
        for one in facts["tried"]
    ]
    tried = table([("layer", "l1", "group", "validation loss"), *rows]) + "\n\n" if rows else ""
    return tried + table(
        [
            ("file", facts["file"]),
            ("sha256", facts["sha256"]),
            ("layer", facts["layer"]),
            ("l1, group", f"{facts['l1']:.3g}, {facts['group']:.3g}"),
            ("objective", f"{facts['objective']:.4f}"),
            ("task loss", f"{facts['task_loss']:.4f} (before: {facts['task_loss_before']:.4f})"),
            ("stationarity", f"{facts['stationarity']:.3g}"),
            ("active heads", f"{facts['active_heads']} of {facts['heads']}"),
            ("non-zero", f"{facts['nonzero_share']:.1%}"),
            ("evaluations", f"{facts['evaluations']} in {facts['seconds']:.1f} s{stopped}"),
        ]
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
