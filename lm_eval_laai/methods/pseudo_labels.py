"""Further training examples by the model itself: inputs that it proposes behind the examples, and its own answers.

Ten examples leave open how a rule goes on with other inputs. Where the model follows the rule behind ten shots, its
answers say so, and a vector that is trained on them too replaces the shots better (context distillation: Snell, Klein
& Zhong 2022; pseudo-labels: Lee 2013). Nothing but the model and the examples is used, and nothing is drawn: inputs
begin with the likeliest first tokens behind the solved examples and go on greedily. An input that the data set's split
makes a test item is not among them: the split depends on the input alone (`laai_core.data.split`), so that no test
item has to be looked at.

Wrong labels do harm, so there are none unless the model, behind the others, answers at least TRUSTED of the examples
rightly; and of its answers those are kept to which it gives a probability of at least CONFIDENCE.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from laai_core.cache import padded
from laai_core.data.examples import DEFAULT_TEMPLATE
from laai_core.data.split import in_training_pool
from laai_core.encode import Whitespace, encode_prompt
from laai_core.example import Example
from laai_core.hooks import shadowed
from laai_core.locate import Layout
from laai_core.memory import until_it_fits
from laai_core.start import ROWS
from lm_eval_laai.prefixes import SharedPrefixes

if TYPE_CHECKING:  # importing transformers takes a second
    from transformers import PreTrainedTokenizerBase

INPUTS = 40  # answered at most
PROPOSED = 130  # where seven in ten inputs are test items
TRUSTED = 0.5  # share of the examples
CONFIDENCE = 0.5  # probability of an answer and its end
SPARE = 4  # tokens that an input or an answer may have beyond the longest of the examples


def pseudo_labelled(
    layout: Layout,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    stop: str,
    whitespace: Whitespace = "refuse",
    batch_size: int | None = None,
) -> list[Example]:
    """Up to INPUTS further examples, most of them right where the model can follow the rule; none where it cannot.

    None either for examples with options instead of targets, for prompts that do not end alike, or end in special
    tokens as chats do (the end of a proposed input could not be told), or whose few-shot prompts are not the solved
    examples and then the prompt, for prompts too long for the model, and of a model that cannot generate.

    Args:
        stop: ends an answer, as `laai_core.settings.Settings.stop`; the model's end of text does, too.
        whitespace, batch_size: as `laai_core.settings.Settings` has them.
    """
    if not layout.model.can_generate() or any(one.target is None for one in examples):
        return []
    writer = _Writer(layout, tokenizer, stop, whitespace, batch_size or ROWS)
    shots, again = _shots(examples)
    head, tail = _frame([example.prompt.removeprefix(again) for example in examples])
    input_room = writer.longest(example.prompt.removeprefix(again + head) for example in examples)
    answer_room = writer.longest(example.answer for example in examples)
    whole = len(writer.encoded(examples[0].behind(examples))) + input_room + answer_room
    if any(shots + one.prompt.removeprefix(again) != one.behind(examples) for one in examples):
        return []
    if not tail.strip() or not writer.shows(tail) or whole > (layout.max_positions or whole):
        return []
    left_out = [one.behind([other for other in examples if other is not one]) for one in examples]
    answers = writer.answers(left_out, answer_room)
    right = [a is not None and a.text == e.answer.strip() for a, e in zip(answers, examples, strict=True)]
    if sum(right) < TRUSTED * len(examples):
        return []
    key = _pool_key(examples, again, head, tail)
    inputs = writer.inputs(shots + head.rstrip(), tail, input_room, PROPOSED if key else INPUTS)
    known = {example.prompt.removeprefix(again) for example in examples}
    new = [prompt for prompt in (head + text + tail for text in inputs) if prompt not in known]
    asked = [prompt for prompt in new if key is None or in_training_pool(key(again + prompt))][:INPUTS]
    answers = writer.answers([shots + prompt for prompt in asked], answer_room)
    space = examples[0].answer.removesuffix(examples[0].answer.lstrip())
    return [
        Example(again + prompt, space + answer.text, rendering=examples[0].rendering)
        for prompt, answer in zip(asked, answers, strict=True)
        if answer is not None and answer.text and answer.probability >= CONFIDENCE
    ]


def _shots(examples: Sequence[Example]) -> tuple[str, str]:
    """What a few-shot prompt of all examples has before the question, and what a bare prompt has before it: a
    description of the task, say, which the few-shot prompt has once, before the solved examples.
    """
    prompt, whole = examples[0].prompt, examples[0].behind(examples)
    same = os.path.commonprefix([prompt[::-1], whole[::-1]])
    return whole[: len(whole) - len(same)], prompt[: len(prompt) - len(same)]


def _frame(prompts: Sequence[str]) -> tuple[str, str]:
    """The texts that all prompts have before and behind their inputs."""
    head = os.path.commonprefix(prompts)
    backwards = [prompt.removeprefix(head)[::-1] for prompt in prompts]
    return head, os.path.commonprefix(backwards)[::-1]


def _pool_key(examples: Sequence[Example], again: str, head: str, tail: str) -> Callable[[str], str] | None:
    """The part of a prompt by which the examples' data set is split: behind what every prompt begins with `again`,
    what their template, or else all of them, have around it left out, or nothing. The part under which all examples
    are in the training pool; None where no part is, since they are from elsewhere (a task of the harness, say, which
    has test documents of its own).
    """
    rest = examples[0].prompt.removeprefix(again)
    space = rest[: len(rest) - len(rest.lstrip())] if again else ""  # between an instruction and the prompt
    again, head = again + space, head.removeprefix(space)
    template = (examples[0].rendering or {}).get("prompt_template", DEFAULT_TEMPLATE)
    before, after = template.partition("{")[0], template.rpartition("}")[2]
    for begin, end in ((before, after), (head, tail), ("", "")):

        def key(prompt: str, begin: str = begin, end: str = end) -> str:
            return prompt.removeprefix(again).removeprefix(begin).removesuffix(end)

        if all(in_training_pool(key(example.prompt)) for example in examples):
            return key
    return None


@dataclass(frozen=True)
class _Answer:
    """What the model writes up to its end, without space around it, and the probability that it writes just this."""

    text: str
    probability: float


class _Writer:
    """Greedy continuations of many prompts; what all begin with is run once."""

    def __init__(
        self, layout: Layout, tokenizer: PreTrainedTokenizerBase, stop: str, whitespace: Whitespace, rows: int
    ) -> None:
        self._layout, self._tokenizer = layout, tokenizer
        self._stop, self._whitespace, self._rows = stop, whitespace, rows
        self._prefixes = SharedPrefixes(layout)
        ends = layout.model.generation_config.eos_token_id
        self._ends = {*ends} if isinstance(ends, list) else {ends} - {None}

    def encoded(self, text: str) -> list[int]:
        """Tokens of a prompt."""
        return encode_prompt(self._tokenizer, text, self._whitespace)

    def longest(self, texts: Iterable[str]) -> int:
        """Tokens that a text like these may have."""
        return max(len(self.encoded(text)) for text in texts) + SPARE

    def shows(self, text: str) -> bool:
        """Whether a text can be found in what the model writes, which is decoded without special tokens."""
        tokens = [token for token in self.encoded(text) if token != self._tokenizer.bos_token_id]
        return self._text(tokens) == self._tokenizer.decode(tokens)

    def inputs(self, context: str, tail: str, room: int, count: int) -> list[str]:
        """Up to `count` distinct texts that the model puts between `context` and `tail`, the likeliest first."""
        start = self.encoded(context)
        scores = self._generated([start], 1).logits[0][0]
        first = scores.topk(min(count, len(scores))).indices.tolist()
        begun = len(self._text(start))
        found: dict[str, None] = {}
        for token, (row, _) in zip(first, self._continued([[*start, one] for one in first], room), strict=True):
            text, end, _ = self._text([*start, token, *row])[begun:].partition(tail)
            if end and text.strip() and not (self._stop and self._stop in text):
                found[text.strip()] = None
        return list(found)

    def answers(self, prompts: Sequence[str], room: int) -> list[_Answer | None]:
        """The answer to each prompt; None where it does not end within `room` tokens."""
        return [self._answer(*one) for one in self._continued([self.encoded(text) for text in prompts], room)]

    def _answer(self, row: list[int], log_probabilities: list[float]) -> _Answer | None:
        for count, token in enumerate(row, start=1):
            ends = token in self._ends
            text = self._text(row[: count - ends])
            if ends or (self._stop and self._stop in text):
                answer = text.partition(self._stop)[0] if self._stop else text
                return _Answer(answer.strip(), math.exp(sum(log_probabilities[:count])))
        return None

    def _text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _continued(self, prompts: Sequence[list[int]], count: int) -> list[tuple[list[int], list[float]]]:
        """`count` tokens behind each prompt, and their log-probabilities."""

        def by(rows: int) -> list[tuple[list[int], list[float]]]:
            parts = [prompts[begin : begin + rows] for begin in range(0, len(prompts), rows)]
            return [one for part in parts for one in self._batch(part, count)]

        return until_it_fits(by, self._rows)

    def _batch(self, prompts: Sequence[list[int]], count: int) -> list[tuple[list[int], list[float]]]:
        found = self._generated(prompts, count)
        new = found.sequences[:, max(map(len, prompts)) :]
        likely = [
            logits.log_softmax(-1, dtype=torch.float32).gather(1, new[:, step : step + 1].to(logits.device))
            for step, logits in enumerate(found.logits)
        ]
        return list(zip(new.tolist(), torch.cat(likely, 1).tolist(), strict=True))

    @torch.no_grad()
    def _generated(self, prompts: Sequence[list[int]], count: int) -> Any:
        """What `generate` returns: `sequences` [R, T + count] and `logits`, [R, V] a token."""
        tokens, mask = padded(prompts, self._layout.device, left=True)
        prefix = os.path.commonprefix([tuple(prompt) for prompt in prompts])
        model: Any = self._layout.model
        cache = self._prefixes.cache(prompts, [None] * len(prompts), [prefix] * len(prompts), left=True)
        # The model's own settings may penalise repetition, which an answer of few-shot prompts is.
        greedy = GenerationConfig(eos_token_id=sorted(self._ends) or None, pad_token_id=0)
        with shadowed(model, "generation_config", greedy):
            return model.generate(
                input_ids=tokens,
                attention_mask=mask,
                **({} if cache is None else {"past_key_values": cache}),  # recurrent models refuse the argument
                max_new_tokens=count,
                output_logits=True,
                return_dict_in_generate=True,
            )
