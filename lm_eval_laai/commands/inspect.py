"""`laai inspect`: the content of an intervention file and, given a model, its size and direct effect there."""

from __future__ import annotations

import argparse
import hashlib
from typing import TYPE_CHECKING, Any

from laai_core.errors import LaaiError
from lm_eval_laai.commands.options import DATA_HELP, a_path, add_model_arguments, check_unused, model_source, task_name
from lm_eval_laai.commands.report import Report, table
from lm_eval_laai.facts import flat
from lm_eval_laai.inspection.plot import check_plot, heat_map

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from laai_core.example import Example
    from laai_core.intervention import Intervention

SHOWN = 5  # vocabulary items at either end
# The ratio of a trained vector's root mean square to the activation's, usually: docs/inspect.md.
USUAL_SIZE = (0.5, 50.0)


def add(parser: argparse.ArgumentParser) -> None:
    """The flags of `inspect`."""
    parser.set_defaults(command=_command)
    parser.add_argument("file", metavar="FILE", help="a .safetensors file, or org/repo[:file][@revision]")
    parser.add_argument("--plot", type=a_path, metavar="FILE.png", help="draw a heat map, heads by dimensions")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    _add_model_arguments(parser)


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say how to run a model."""
    writing = parser.add_argument_group(
        "what it writes: its size on a model, and the words it promotes and suppresses"
    )
    add_model_arguments(writing, required=False)
    writing.add_argument(
        "--task",
        type=task_name,
        help="whose training prompts the model is run on, or examples:FILE (default: the file's own task)",
    )
    writing.add_argument("--data", metavar="DIR", help=DATA_HELP)
    writing.add_argument("--projection", help="module path of the attention output projection, as for train")


def _command(arguments: argparse.Namespace) -> Report:
    from laai_core.hub import local_file
    from laai_core.intervention import Intervention

    if arguments.plot:
        check_plot(arguments.plot)
    path = local_file(arguments.file)
    intervention = Intervention.load(path)
    facts = {
        "file": arguments.file,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        **describe(intervention),
    }
    if arguments.model:
        facts["writes"] = _writes(intervention, arguments)
    else:
        check_unused(arguments, _add_model_arguments, "it is for a run of the model: expected --model with it")
    if arguments.plot:
        heat_map(intervention, arguments.plot)
        facts["plot"] = str(arguments.plot)
    return Report(facts, _text(facts))


def describe(intervention: Intervention) -> dict[str, Any]:
    """Everything about an intervention but the entries of its vectors. Norms are of the stored, unscaled vectors."""
    layers = {}
    for layer in intervention.layers:
        vector = intervention.vector(layer)
        groups = vector if vector.ndim == 2 else vector.unsqueeze(0)
        layers[str(layer)] = {
            "shape": list(vector.shape),
            "norms": groups.double().norm(dim=1).tolist(),  # one per head at `heads`, one elsewhere
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


def _writes(intervention: Intervention, arguments: argparse.Namespace) -> dict[str, Any]:
    """The intervention on a model: size and direct effect, over the prompts of a task's training examples."""
    import torch

    from laai_core.apply import Edit
    from laai_core.encode import encode_text
    from laai_core.locate import locate
    from lm_eval_laai.inspection.vocabulary import written

    task = arguments.task or _own_task(intervention)
    examples = _examples(intervention, task, arguments.data)
    model, tokenizer = model_source(arguments).load()
    prompts = [_rendered(example.prompt, intervention, tokenizer) for example in examples]
    layout = locate(model, arguments.projection)
    edit = Edit.of(intervention, layout)
    found = written(layout, edit, [encode_text(tokenizer, prompt) for prompt in prompts], progress=True)
    layers: dict[str, Any] = {}
    for layer, writing in found.items():
        size = float(edit.vectors[layer].square().mean().sqrt()) / writing.activation_rms
        layers[str(layer)] = {
            "activation_rms": writing.activation_rms,
            # The operation `icv` keeps the activation's norm, whatever the vector's.
            "relative_size": size if intervention.operation == "add" else None,
            "groups": [_extremes(effect, tokenizer) for effect in writing.effects],
        }
    total = torch.stack([writing.effects.sum(0) for writing in found.values()]).sum(0)
    return {
        "model": arguments.model,
        "task": task,
        "prompts": len(prompts),
        "layers": layers,
        "total": _extremes(total, tokenizer),
        "warnings": [w for number, layer in layers.items() if (w := _warning(number, layer["relative_size"]))],
    }


def _own_task(intervention: Intervention) -> str:
    """The task that the file records, where prompts can be taken from its name.

    Rows of one's own are recorded without their folder, or by a name of any kind, without the laai_ of ours.
    """
    from laai_core.data import task_names
    from laai_core.data.tasks import EXAMPLE_OPTIONS, EXAMPLES, PAIRS

    recorded = str(intervention.metadata.get("task") or "")
    task = task_name(recorded)
    if task == recorded or task.partition(":")[0] not in {*task_names()} - {EXAMPLES, EXAMPLE_OPTIONS, PAIRS}:
        raise LaaiError(
            f"the file's task is {recorded or None!r:.60}: expected --task with one of `laai tasks` to take prompts "
            f"from, or --task {EXAMPLES}:FILE or {PAIRS}:FILE for data of your own"
        )
    return task


def _examples(intervention: Intervention, task: str, data: str | None) -> list[Example]:
    """A task's training examples: as many, by the seed and (rows of one's own) in the template that the file records.

    Where the training pool has fewer, they are drawn from all rows, as by `laai train --split all`.
    """
    from laai_core.data import load_task
    from laai_core.data.tasks import EXAMPLE_OPTIONS, EXAMPLES, own_rows
    from lm_eval_laai.chats import PROMPT_TEMPLATE, rendering_of

    kind, _, file = task.partition(":")
    seed, count = _recorded_number(intervention, "seed", 0), _recorded_number(intervention, "n_train", 10)
    if kind not in (EXAMPLES, EXAMPLE_OPTIONS):
        return load_task(task, seed, count, data).train
    template = (rendering_of(intervention) or {}).get(PROMPT_TEMPLATE)
    rows = own_rows(kind, file, template if isinstance(template, str) else None)
    count = min(count, len(rows.items))
    return rows.split(seed, count, train_on_all=rows.pool_size < count).train


def _recorded_number(intervention: Intervention, name: str, default: int) -> int:
    training = intervention.metadata.get("training")
    number = training.get(name) if isinstance(training, dict) else None
    return number if isinstance(number, int) else default


def _rendered(prompt: str, intervention: Intervention, tokenizer: PreTrainedTokenizerBase) -> str:
    """A prompt of a task as those that the vector was trained on: under their instruction, or as a chat."""
    from lm_eval_laai.chats import as_evaluated, rendering_of

    made = as_evaluated(prompt, rendering_of(intervention) or {})
    if isinstance(made, str):
        return made
    from lm_eval_laai.rendering import ChatTemplate  # here: imports the harness, which takes seconds

    return ChatTemplate(tokenizer)(made)


def _extremes(effect: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[dict[str, Any]]]:
    """The vocabulary items whose logits rise and fall most under a change [V]; empty for no change."""

    def items(values: torch.Tensor) -> list[dict[str, Any]]:
        ids = values.topk(min(SHOWN, len(values))).indices.tolist() if bool(effect.any()) else []
        return [{"id": i, "text": tokenizer.decode([i]), "logits": float(effect[i])} for i in ids]

    return {"promotes": items(effect), "suppresses": items(-effect)}


def _warning(layer: str, size: float | None) -> str | None:
    low, high = USUAL_SIZE
    if size is None or low <= size <= high:
        return None
    means = "too weak to do much" if size < low else "so strong that little of the prompt may be left"
    return f"layer {layer}: {size:.3g} times the typical activation, usual are {low:g} to {high:g}: {means}"


def _text(facts: dict[str, Any]) -> str:
    keys = ("file", "sha256", "site", "position", "scale", "operation")
    parts = [table([(key, facts[key]) for key in keys] + [(k, v) for k, v in flat(facts["metadata"])])]
    writes = facts.get("writes")
    for number, layer in facts["layers"].items():
        width = layer["shape"][-1]
        heads = f"{layer['active_heads']} of {layer['shape'][0]} heads active, " if len(layer["shape"]) == 2 else ""
        size = writes["layers"][number]["relative_size"] if writes else None
        strength = "" if size is None else f", {size:.3g} times the typical activation"
        parts.append(f"\nlayer {number}: {heads}{layer['zero_share']:.1%} exact zeros{strength}")
        rows: list[tuple[object, ...]] = [("head" if heads else "vector", "L2 norm", "non-zero")]
        for index, (norm, nonzero) in enumerate(zip(layer["norms"], layer["nonzero"], strict=True)):
            rows.append((index, f"{norm:.4f}", f"{nonzero} of {width}"))
        if writes:
            groups = writes["layers"][number]["groups"]
            ends = [("promotes", "suppresses"), *((_listed(g["promotes"]), _listed(g["suppresses"])) for g in groups)]
            rows = [(*row, *end) for row, end in zip(rows, ends, strict=True)]
        parts.append(table(rows))
    if writes:
        parts.append(f"\nin all, directly, in logits, mean over {writes['prompts']} prompts of {writes['task']}:")
        parts.append(table([(end, _listed(writes["total"][end], values=True)) for end in ("promotes", "suppresses")]))
        parts += [f"\nwarning: {warning}" for warning in writes["warnings"]]
    if "plot" in facts:
        parts.append(f"\nheat map: {facts['plot']}")
    return "\n".join(parts)


def _listed(items: list[dict[str, Any]], values: bool = False) -> str:
    return " ".join(f"{item['text']!r}" + (f" {item['logits']:+.2f}" if values else "") for item in items) or "-"
