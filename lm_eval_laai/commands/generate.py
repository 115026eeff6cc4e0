"""`laai generate`: a model's answers without and with an intervention, side by side."""

from __future__ import annotations

import argparse
import math
import sys
from typing import TYPE_CHECKING, Any

from laai_core.errors import LaaiError
from lm_eval_laai.commands.options import add_model_arguments, decimals, model_source
from lm_eval_laai.commands.report import Report, table

if TYPE_CHECKING:
    from laai_core.intervention import Intervention

STOP = "\n"  # where the file records none


def add(parser: argparse.ArgumentParser) -> None:
    """The flags of `generate`."""
    parser.set_defaults(command=_command)
    parser.add_argument(
        "prompts", nargs="+", metavar="TEXT", help="put into the file's prompt template, where it has one"
    )
    add_model_arguments(parser, required=True)
    parser.add_argument(
        "--intervention", required=True, metavar="FILE", help="a .safetensors file, or org/repo[:file][@revision]"
    )
    parser.add_argument(
        "--scale",
        type=decimals,
        default=[0.0, 1.0],
        metavar="X[,X]",
        help="factors on the intervention, a column each; 0 is the model alone (default: 0,1)",
    )
    parser.add_argument("--raw", action="store_true", help="the texts are whole prompts: no template, no chat")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="at most (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the answers as JSON")


def _command(arguments: argparse.Namespace) -> Report:
    from laai_core.intervention import Intervention
    from lm_eval_laai.experiments.harness import warnings_off
    from lm_eval_laai.model import HFLaai

    if arguments.max_new_tokens < 1:
        raise LaaiError(f"--max-new-tokens is {arguments.max_new_tokens}: expected at least one")
    if not all(map(math.isfinite, arguments.scale)):
        raise LaaiError(f"--scale has {arguments.scale}: expected finite numbers")
    if not all(text.strip() for text in arguments.prompts):
        raise LaaiError("a prompt is empty: expected text")
    intervention = Intervention.load(arguments.intervention)
    prompts = list(arguments.prompts) if arguments.raw else _rendered(arguments.prompts, intervention)
    model, tokenizer = model_source(arguments).load()
    contexts: list[str] = []
    answers: dict[float, list[str]] = {}
    for scale in dict.fromkeys(arguments.scale):
        with warnings_off():
            lm = HFLaai(model, intervention, scale=scale, tokenizer=tokenizer, batch_size=len(prompts))
            if arguments.max_new_tokens >= lm.max_length:
                raise LaaiError(
                    f"--max-new-tokens is {arguments.max_new_tokens}: expected fewer than the model's {lm.max_length}"
                )
            contexts = [lm.apply_chat_template(p) if isinstance(p, list) else p for p in prompts]
            answers[scale] = _answers(lm, contexts, _stop(intervention), arguments.max_new_tokens)
    facts = {
        "model": arguments.model,
        "intervention": {"file": arguments.intervention, "sha256": intervention.sha256},
        "answers": [
            {"text": text, "prompt": prompt, "by_scale": {f"{scale:g}": answers[scale][number] for scale in answers}}
            for number, (text, prompt) in enumerate(zip(arguments.prompts, contexts, strict=True))
        ],
    }
    return Report(facts, _table(facts, list(answers)))


def _rendered(texts: list[str], intervention: Intervention) -> list[str | list[dict[str, str]]]:
    """The texts in the template of the file's training prompts; as conversations where those were chats."""
    from lm_eval_laai.chats import as_evaluated, rendering_of, template_of

    rendering = rendering_of(intervention) or {}
    template = template_of(intervention, rendering)
    if template is None:
        print("the file records no prompt template: the texts are taken as they are", file=sys.stderr)
    return [as_evaluated(text if template is None else _filled(template, text), rendering) for text in texts]


def _filled(template: str, text: str) -> str:
    """The template with its one column replaced by the text."""
    from laai_core.data.examples import columns, filled

    names = columns(template)
    if len(names) != 1:
        raise LaaiError(
            f"the file's template {template!r:.60} has the columns {', '.join(names)}: expected --raw prompts"
        )
    return filled(template, {names[0]: text}, "the prompt")


def _stop(intervention: Intervention) -> str:
    """The text that ends the training targets, and so generation."""
    training = intervention.metadata.get("training")
    return str((training.get("stop") if isinstance(training, dict) else None) or STOP)


def _answers(lm: Any, contexts: list[str], stop: str, count: int) -> list[str]:
    """Greedy answers, by the code that evaluates."""
    from lm_eval.api.instance import Instance

    options = {"until": [stop], "max_gen_toks": count, "do_sample": False}
    requests = [Instance("generate_until", {}, (context, dict(options)), 0) for context in contexts]
    return [answer.strip() for answer in lm.generate_until(requests, disable_tqdm=True)]


def _table(facts: dict[str, Any], scales: list[float]) -> str:
    titles = ["without Δ" if scale == 0 else "with Δ" if scale == 1 else f"{scale:g} · Δ" for scale in scales]
    rows = [
        [_line(answer["text"]), *(_line(answer["by_scale"][f"{scale:g}"]) or "(nothing)" for scale in scales)]
        for answer in facts["answers"]
    ]
    return table([["", *titles], *rows])


def _line(text: str) -> str:
    return " ".join(text.split())
