"""Training examples as the harness renders a task: every prompt and chat is made by the harness's code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM

from laai_core.encode import Whitespace
from laai_core.errors import LaaiError
from laai_core.example import Example
from lm_eval_laai.chats import INSTRUCTION, SYSTEM, TEMPLATE, check_chat_template, system_message, template_sha256


class ChatTemplate:
    """A tokenizer's chat template, applied by the harness's own method. Keeps the messages of the last call."""

    def __init__(self, tokenizer: Any) -> None:
        check_chat_template(tokenizer)
        self.tokenizer = tokenizer
        self.chat_template_args: dict[str, Any] = {}  # as the harness without chat_template_args=
        self.messages: list[dict[str, str]] = []

    def __call__(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text; without `add_generation_prompt` its last message is left open."""
        self.messages = messages
        return HFLM.apply_chat_template(self, messages, add_generation_prompt)


@dataclass(frozen=True)
class RenderedExample(Example):
    """An example of a harness task, whose few-shot prompts are the harness's too."""

    doc: Any = field(default=None, compare=False, repr=False)
    renderer: Renderer | None = field(default=None, compare=False, repr=False)

    def behind(self, shots: Sequence[Example]) -> str:
        """The harness's few-shot prompt; in a chat the shots are turns of their own."""
        assert self.renderer is not None
        return self.renderer.prompt(self.doc, [shot.doc for shot in shots if isinstance(shot, RenderedExample)])


class Renderer:
    """Makes examples of a task's documents.

    Args:
        task: a harness task of output type generate_until, multiple_choice or loglikelihood.
        tokenizer: the tokenizer whose chat template is applied; None applies none.
        system_instruction: as the harness's `--system_instruction`.

    Raises:
        LaaiError: for a task or a tokenizer without such a rendering.
    """

    def __init__(self, task: Any, tokenizer: Any = None, system_instruction: str | None = None) -> None:
        self._task, self._system = task, system_instruction
        self._chat = None if tokenizer is None else ChatTemplate(tokenizer)
        if not isinstance(task, ConfigurableTask):
            raise LaaiError(f"task {task.task_name} is a Python class of the harness: expected a task in YAML")
        self._kind: str = task.OUTPUT_TYPE
        if self._kind not in ("generate_until", "multiple_choice", "loglikelihood") or getattr(
            task, "MULTIMODAL", False
        ):
            what = "of images or sounds" if getattr(task, "MULTIMODAL", False) else f"of output type {self._kind}"
            raise LaaiError(
                f"task {self.name} is {what}: expected text of generate_until, multiple_choice or loglikelihood"
            )

    @property
    def name(self) -> str:
        """The task's name in the harness."""
        return str(self._task.config.task)

    @property
    def whitespace(self) -> Whitespace:
        """The harness's tokenisation of the task's prompts that end in whitespace."""
        return "generation" if self._kind == "generate_until" else "loglikelihood"

    @property
    def stop(self) -> str:
        """The text that ends generation: the first `until`. Empty for a task that generates nothing."""
        if self._kind != "generate_until":
            return ""
        until = self._task.config.generation_kwargs.get("until") or [""]
        return until if isinstance(until, str) else str(until[0])

    def examples(self, docs: Sequence[Any], loss: str = "nll", shares: bool = False) -> list[Example]:
        """An example for each document.

        Args:
            loss: of a multiple choice: `nll` makes the gold option the target, `kl` keeps all options.
            shares: with `kl`, the documents have a "distribution"; else all of it is on the gold option.

        Raises:
            LaaiError: for a document that is no example, naming its number among `docs`.
        """
        made: list[Example] = []
        for number, doc in enumerate(docs):
            try:
                made.append(self._example(doc, loss, shares))
            except LaaiError as error:
                raise LaaiError(f"task {self.name}, training document {number}: {error}") from None
        return made

    def prompt(self, doc: Any, shots: Sequence[Any] = ()) -> str:
        """The context of a document's requests behind solved documents; of several contexts, the gold option's."""
        context = self._context(doc, shots)
        return context if isinstance(context, str) else context[self._gold(doc)]

    def _context(self, doc: Any, shots: Sequence[Any] = ()) -> str | list[str]:
        self._task.sampler = _Given(shots)
        return self._task.fewshot_context(
            doc,
            num_fewshot=len(shots),
            system_instruction=self._system,
            apply_chat_template=self._chat is not None,
            fewshot_as_multiturn=self._chat is not None,  # the harness's default
            chat_template=self._chat,
            gen_prefix=self._task.doc_to_prefix(doc),
        )

    def _example(self, doc: Any, loss: str, shares: bool) -> Example:
        context = self._context(doc)
        own: dict[str, Any] = {"rendering": self._rendering(doc), "doc": doc, "renderer": self}
        if self._kind == "generate_until":
            if not isinstance(context, str):
                raise LaaiError("it has several contexts and generates: expected one context")
            return RenderedExample(context, self._answer(doc, context), **own)
        chat: dict[str, Any] = {"apply_chat_template": self._chat is not None, "chat_template": self._chat}
        requests = self._task.construct_requests(doc, context, metadata=(self.name, 0, 1), **chat)
        if self._kind == "loglikelihood":
            return RenderedExample(*requests.args, **own)
        gold, count = self._gold(doc), len(self._task.doc_to_choice(doc))
        pairs = [request.args for request in requests[:count]]  # acc_mutual_info appends requests without context
        if loss == "nll":
            return RenderedExample(*pairs[gold], **own)
        if not isinstance(context, str):
            raise LaaiError("its options are in the context: expected --loss nll")
        distribution = doc["distribution"] if shares else [float(number == gold) for number in range(count)]
        return RenderedExample(context, None, [option for _, option in pairs], distribution, **own)

    def _answer(self, doc: Any, prompt: str) -> str:
        """The harness's text behind the prompt of the document as a solved example."""
        task, prefix = self._task, self._task.doc_to_prefix(doc)
        options = {
            "q": task.doc_to_text(doc),
            "c": task.doc_to_choice(doc) if task.config.doc_to_choice else None,
            "gen_prefix": prefix,
            "tgt_delim": task.config.target_delimiter,
            "few_delim": "",
        }
        target = task.doc_to_target(doc)
        if options["c"] is None and not isinstance(target, str | list):
            raise LaaiError(f"its target is {target!r:.60}; expected text")
        solved = task.build_qa_turn(a=target, **options)
        if solved[-1].role != "assistant" or solved[-1].content == prefix:
            raise LaaiError("its target is empty; expected text")
        if self._chat is None:
            bare = "".join(message.to_text() for message in task.build_qa_turn(**options))
            return "".join(message.to_text() for message in solved)[len(bare) :]
        asked = self._chat.messages[: -1 if prefix else None]
        whole = self._chat([*asked, solved[-1].to_dict()], add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise LaaiError(
                "the chat template shows an answered question otherwise than an open one: cannot be trained on"
            )
        return whole[len(prompt) :]

    def _gold(self, doc: Any) -> int:
        """The index of the right option."""
        gold = self._task.doc_to_text(doc) if self._task.multiple_input else self._task.doc_to_target(doc)
        choices = self._task.doc_to_choice(doc)
        gold = gold[0] if isinstance(gold, list) and gold else gold
        if isinstance(gold, str) and gold in choices:
            gold = choices.index(gold)
        if not isinstance(gold, int) or not 0 <= gold < len(choices):
            raise LaaiError(f"its right option is {gold!r:.40}; expected one of {len(choices)}")
        return gold

    def _rendering(self, doc: Any) -> dict[str, Any]:
        """The rendering to record; valid after the document's context was made."""
        facts: dict[str, Any] = {"harness_task": self.name}
        if self._chat is not None:
            facts[TEMPLATE] = template_sha256(self._chat.tokenizer)
            facts[SYSTEM] = system_message(self._chat.messages)
        if self._system is not None:
            facts[INSTRUCTION] = self._system
        return facts


class _Given:
    """A sampler of few-shot examples that returns given documents."""

    def __init__(self, docs: Sequence[Any]) -> None:
        self._docs = docs

    def sample(self, n: int, eval_doc: Any = None) -> Sequence[Any]:
        """All documents: the caller asks for as many as there are."""
        return self._docs
