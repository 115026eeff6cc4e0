"""Chat templates: their identity, and whether an intervention was trained on prompts like those it is evaluated on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from laai_core.data.examples import DEFAULT_TEMPLATE, is_filled
from laai_core.data.tasks import word_task_names
from laai_core.errors import LaaiError
from laai_core.intervention import Intervention

# Keys of a rendering.
TEMPLATE, SYSTEM, INSTRUCTION = "chat_template_sha256", "system", "system_instruction"
PROMPT_TEMPLATE = "prompt_template"


def template_sha256(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's chat template."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def check_chat_template(tokenizer: Any) -> None:
    """LaaiError for a tokenizer without a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise LaaiError("the model's tokenizer has no chat template: expected a chat model, or prompts without a chat")


def system_message(messages: Sequence[Mapping[str, str]]) -> str | None:
    """The system message at the beginning of a conversation, if there is one."""
    return messages[0]["content"] if messages and messages[0]["role"] == "system" else None


def rendering_of(intervention: Intervention) -> dict[str, Any] | None:
    """The rendering of the training prompts that the file records; None where it is not known.

    A training that records none was on prompts as they are: an empty rendering, without a chat. A composition that was
    not fitted has the rendering of its parents.
    """
    training, composition = (intervention.metadata.get(name) for name in ("training", "composition"))
    if isinstance(training, dict):
        rendering = training.get("rendering", {})
    else:
        rendering = composition.get("rendering") if isinstance(composition, dict) else None
    return rendering if isinstance(rendering, dict) else None


def common_rendering(interventions: Sequence[Intervention]) -> dict[str, Any] | None:
    """The rendering of all, without the name of a task; None where they differ or one is not known."""
    names = (TEMPLATE, SYSTEM, INSTRUCTION, PROMPT_TEMPLATE)
    first, *others = (
        None if (found := rendering_of(one)) is None else {name: found[name] for name in names if name in found}
        for one in interventions
    )
    return first if all(other == first for other in others) else None


def as_evaluated(prompt: str, rendering: Mapping[str, Any]) -> str | list[dict[str, str]]:
    """A prompt of the task under the instruction of a rendering, or as the conversation that its template shows."""
    if TEMPLATE not in rendering:
        return str(rendering.get(INSTRUCTION, "")) + prompt
    system = rendering.get(SYSTEM)
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": prompt}]


def template_of(intervention: Intervention, rendering: Mapping[str, Any]) -> str | None:
    """The recorded template, or the word tasks' for a file that was trained on a word task or composed of such."""
    if PROMPT_TEMPLATE in rendering:
        return str(rendering[PROMPT_TEMPLATE])
    composition = intervention.metadata.get("composition")
    parents = composition.get("parents") if isinstance(composition, dict) else None
    tasks = [intervention.metadata.get("task")]
    if tasks == [None] and isinstance(parents, list):
        tasks = [parent.get("task") if isinstance(parent, dict) else None for parent in parents]
    words = {f"laai_{name}" for name in word_task_names()}
    return DEFAULT_TEMPLATE if all(str(task).partition(":")[0] in words for task in tasks) else None


class Chats:
    """The contexts that the harness rendered, and their chats.

    Args:
        render: a chat's text as training has it, of its messages and whether it ends in an open answer.
    """

    def __init__(self, render: Callable[[list[dict[str, str]], bool], str]) -> None:
        self._render = render
        self._noted: dict[str, tuple[list[dict[str, str]], bool]] = {}
        self._compared: set[int] = set()

    def note(self, context: str, messages: list[dict[str, str]], add_generation_prompt: bool) -> None:
        """Remember of what a context was rendered."""
        self._noted[context] = messages, add_generation_prompt

    def difference(self, intervention: Intervention, context: str, tokenizer: Any) -> str | None:
        """How training and evaluation prompts differ; None if they do not, or the training's are not known.

        Only an intervention's first context is compared.
        """
        if id(intervention) in self._compared:
            return None
        self._compared.add(id(intervention))
        trained, is_chat = rendering_of(intervention), context in self._noted
        if trained is None:
            return None
        if (TEMPLATE in trained) != is_chat:
            words = ("with", "without") if TEMPLATE in trained else ("without", "with")
            return "the intervention was trained {} a chat template and is evaluated {} one".format(*words)
        if not is_chat:
            instruction = trained.get(INSTRUCTION)
            if isinstance(instruction, str) and not context.startswith(instruction):
                return f"the intervention was trained under the instruction {instruction!r:.60}, this prompt is not"
            template = template_of(intervention, trained)
            if template is not None and not is_filled(template, context.removeprefix(str(instruction or ""))):
                return f"the intervention was trained with the template {template!r:.60}, this prompt has another"
            return None
        if trained[TEMPLATE] != template_sha256(tokenizer):
            return "the intervention was trained with another chat template than the tokenizer's"
        if self._has_arguments(context):
            return "the intervention was trained without arguments of the chat template, such as enable_thinking"
        before, now = trained.get(SYSTEM), system_message(self._noted[context][0])
        if before != now:
            return f"the intervention was trained under the system message {before!r:.60}, evaluated under {now!r:.60}"
        return None

    def _has_arguments(self, context: str) -> bool:
        """Whether arguments of the chat template changed a context; False where it is not known."""
        try:
            return self._render(*self._noted[context]) != context
        except (LaaiError, ValueError, TemplateError):  # no template, or one that needs arguments
            return False
