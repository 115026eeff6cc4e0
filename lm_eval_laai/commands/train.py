"""`laai train`: train a Δ or a baseline on a task's training examples, into one file or folder."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from laai_core.data.split import Split
from laai_core.errors import Interrupted, LaaiError, NotFinite, WorkFailed
from laai_core.files import PARTIAL, SUFFIX
from laai_core.locate import locate
from laai_core.products import packed_bytes
from laai_core.settings import Job, Settings
from laai_core.settings import check as check_field
from laai_core.train import TrainResult
from lm_eval_laai.commands.examples import add_own_data_arguments, add_rendering_arguments, training_split, unescaped
from lm_eval_laai.commands.options import (
    DATA_HELP,
    a_path,
    adapter_folder,
    add_layer_argument,
    add_model_arguments,
    checked_layer,
    model_source,
    output_path,
    task_name,
)
from lm_eval_laai.commands.report import Report, table
from lm_eval_laai.commands.step_log import check_log, step_log
from lm_eval_laai.facts import flat
from lm_eval_laai.methods import LAAI, METHODS, fit
from lm_eval_laai.methods.method import Method
from lm_eval_laai.methods.select import train_chosen
from lm_eval_laai.tasks import harness_task, recorded_task

if TYPE_CHECKING:  # importing transformers takes a second
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Fields of Job and Settings that are flags of the same name: type, default and help are the field's.
_FLAGS = {one.name: one for kind in (Job, Settings) for one in fields(kind) if "help" in one.metadata}
_CHOSEN = ("l1", "group", "steps")  # by cross-validation where they are not given
_SHOWN = 3  # pseudo-labels


def add(parser: argparse.ArgumentParser) -> None:
    """The flags of `train`."""
    parser.set_defaults(command=_command)
    parser.add_argument(
        "--method",
        choices=list(METHODS),
        default=LAAI.name,
        help="docs/methods.md says what each is (default: %(default)s)",
    )
    add_model_arguments(parser, required=True)
    parser.add_argument("--task", type=task_name, help="a task, with or without laai_, for example lexicon_antonym")
    add_own_data_arguments(parser)
    add_rendering_arguments(parser)
    parser.add_argument("--data", metavar="DIR", help=DATA_HELP)
    parser.add_argument("--n-train", type=int, default=10, help="training examples (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which examples are drawn (default: %(default)s)")
    add_layer_argument(parser, "of laai chosen by cross-validation; of the others as docs/methods.md says")
    _add_training_arguments(parser)
    parser.add_argument("--heads", type=int, help="of fv: how many heads it sums (default: the share its paper takes)")
    parser.add_argument(
        "--output",
        default="./",
        metavar="FILE or DIR/",
        help=f"a folder gets laai_<task>{SUFFIX}, where intervention=DIR finds it, or an adapter's folder laai_<task> "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--log-to",
        type=a_path,
        metavar="FILE.jsonl",
        help="of laai: a line of JSON for each evaluation of the training, none for the cross-validation, as soon as "
        "it is made: objective, loss, penalty, non-zeros, active heads",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags without defaults, so that a given one can be told from a missing one; `_options` fills defaults in."""
    for name, one in _FLAGS.items():
        default = "chosen by cross-validation" if name in _CHOSEN else one.default
        shown = str(default).encode("unicode_escape").decode()  # the stop's newline as \\n
        text = one.metadata["help"] + ("" if default is None else f" (default: {shown})")
        parser.add_argument(_flag(name), type=_kind(name), choices=one.metadata.get("choices"), help=text)


def _kind(name: str) -> Any:
    """The type of a flag's value, from the field's annotation."""
    if name == "stop":
        return unescaped
    hint = {**get_type_hints(Job), **get_type_hints(Settings)}[name]
    return next((kind for kind in (int, float) if kind in (hint, *get_args(hint))), str)


def _options(arguments: argparse.Namespace, method: Method) -> dict[str, Any]:
    """The method's own flags that were given, checked; for LAAI with the defaults of the others."""
    allowed = {*method.options, "log_to"} if method is LAAI else {*method.options}
    for name in (*_FLAGS, "heads", "log_to"):
        if name not in allowed and getattr(arguments, name) is not None:
            raise LaaiError(f"the method {method.name} has no {_flag(name)}: leave it out")
    options = {name: getattr(arguments, name) for name in method.options}
    if method is LAAI:
        options |= {n: f.default for n, f in _FLAGS.items() if options[n] is None and n not in _CHOSEN}
        given = {name: value for name, value in options.items() if value is not None}
        check_field(Job, **given)
        check_field(Settings, **given)
    return options


def summary(result: TrainResult) -> dict[str, Any]:
    """The figures of a training, for a report."""
    (layer,) = result.intervention.layers
    vector = result.intervention.vector(layer)
    used = vector.ne(0).view(-1, vector.shape[-1])  # one group at sites without heads
    return {
        "sha256": result.intervention.sha256,
        "layer": layer,
        "objective": result.objective,
        "task_loss": result.intervention.metadata["training"]["task_loss"],
        "task_loss_before": result.history[0].loss,
        "stationarity": result.stationarity,
        "active_heads": int(used.any(-1).sum()),
        "heads": len(used),
        "nonzero_share": float(used.float().mean()),
        "evaluations": len(result.history),
        "stopped": result.stopped,
    }


def _command(arguments: argparse.Namespace) -> Report:
    # Cheap checks first.
    split = training_split(arguments)
    method = METHODS[arguments.method]
    options = _options(arguments, method)
    path = (adapter_folder if method.writes_adapter else output_path)(arguments.output, arguments.task)
    method.check(path, arguments.layer, options)
    if arguments.log_to is not None:
        check_log(arguments.log_to)
    source = model_source(arguments)
    source.checked_device()
    layer = checked_layer(arguments.layer, source.config())
    model, tokenizer = source.load()
    start = time.perf_counter()
    if method is LAAI:
        learnt = _train(model, tokenizer, split, path, layer, arguments.seed, arguments.log_to, options)
    else:
        fit(method.name, model, tokenizer, split, layer=layer, seed=arguments.seed, output=path, **options)
        learnt = {"training": method.record(path)}
    facts = {
        "file": str(path),
        "task": harness_task(arguments.task),
        "method": method.name,
        "seconds": time.perf_counter() - start,
        **learnt,
    }
    return Report(facts, _text(facts) if method is LAAI else table(flat(facts)))


def _train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    path: Path,
    layer: int | None,
    seed: int,
    log: Path | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Train a Δ and write `path`, or, where training stops before its end, the best so far beside it."""
    task = recorded_task(split.name)
    packed = packed_bytes(locate(model, options["projection"]), 0 if layer is None else layer)
    if packed and options["forward"] != "plain" and options["position"] == "last":
        print(f"training takes up to {packed / 1e6:.0f} MB more for packed weights", file=sys.stderr, flush=True)
    try:
        if log is not None:
            options["on_step"] = step_log(log)
        result, choice = train_chosen(
            model, tokenizer, split.train, layer, seed=seed, task=task, progress=True, **options
        )
    except Interrupted as stopped:
        raise KeyboardInterrupt(_kept(stopped, path)) from None
    except NotFinite as stopped:
        raise WorkFailed(_kept(stopped, path)) from None
    result.intervention.save(path)
    if not any(result.intervention.vector(at).any() for at in result.intervention.layers):
        print("the vector is zero: the penalties are too strong", file=sys.stderr)
    elif choice.steps == 1 and options["steps"] is None:
        print(
            "the vector is its start: no evaluation behind it had a lower held-out loss, so penalties did nothing",
            file=sys.stderr,
        )
    return {
        **summary(result),
        "l1": choice.l1,
        "group": choice.group,
        "tried": [asdict(one) for one in choice.tried],
        "pseudo_labels": [[one.prompt, one.target] for one in choice.further],
    }


def _kept(stopped: Interrupted | NotFinite, path: Path) -> str:
    """Write the best so far, if there is one, beside the file that a finished training writes; returns a message."""
    if not stopped.results:
        return f"{stopped}: {path} was not written"
    partial = path.with_suffix(PARTIAL)
    stopped.results[0].intervention.save(partial)
    return f"{stopped}: the best so far is in {partial}, {path} was not written"


def _text(facts: dict[str, Any]) -> str:
    stopped = f", {facts['stopped']}" if facts["stopped"] else ""
    rows = [
        (one["layer"], f"{one['l1']:.3g}", f"{one['group']:.3g}", one["steps"], f"{one['held_out_loss']:.4f}")
        for one in facts["tried"]
    ]
    tried = table([("layer", "l1", "group", "evaluations", "held-out loss"), *rows]) + "\n\n" if rows else ""
    return tried + table(
        [
            ("file", facts["file"]),
            ("sha256", facts["sha256"]),
            ("layer", facts["layer"]),
            *([("pseudo-labels", _some(facts["pseudo_labels"]))] if facts["pseudo_labels"] else ()),
            ("l1, group", f"{facts['l1']:.3g}, {facts['group']:.3g}"),
            ("objective", f"{facts['objective']:.4f}"),
            ("task loss", f"{facts['task_loss']:.4f} (before: {facts['task_loss_before']:.4f})"),
            ("stationarity", f"{facts['stationarity']:.3g}"),
            ("active heads", f"{facts['active_heads']} of {facts['heads']}"),
            ("non-zero", f"{facts['nonzero_share']:.1%}"),
            ("evaluations", f"{facts['evaluations']} in {facts['seconds']:.1f} s{stopped}"),
        ]
    )


def _some(pairs: Sequence[Sequence[str]]) -> str:
    """How many pseudo-labels there are, and the first of them."""
    first = [f"{prompt.splitlines()[0]} → {target.strip()}" for prompt, target in pairs[:_SHOWN]]
    return f"{len(pairs)}: {'; '.join(first + ['...'] * (len(pairs) > _SHOWN))}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
