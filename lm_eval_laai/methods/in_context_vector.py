"""In-context vectors (Liu et al. 2023, arXiv 2311.06668), as the authors' code makes them.

The differences of the last token's hidden states between an example's output and its input, over all layers as one
vector: their mean over the examples plus their first principal direction. `laai_core.apply.icv_step` applies it.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

import torch

from laai_core.cache import padding_error, rounding, whole_rows
from laai_core.data.tasks import rule_prompt
from laai_core.encode import encode_text, refuse_foreign
from laai_core.errors import LaaiError
from laai_core.example import Example
from laai_core.hooks import frozen, hidden_of, recorded
from laai_core.intervention import Intervention
from laai_core.locate import Layout, locate
from laai_core.record import model_facts, training_facts

if TYPE_CHECKING:  # importing transformers takes a second
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STEP = 0.1  # value of the paper and of the authors' README

_BEFORE, _AFTER = rule_prompt("\0").split("\0")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def in_context_vector(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    layer: int | None = None,
    seed: int = 0,
    task: str | None = None,
) -> Intervention:
    """The in-context vector of a task: one vector a layer, applied to the feed-forward outputs of every token.

    Args:
        examples: at least two, with targets.
        layer: apply it in this layer only; default every layer, as the authors do.
        seed: recorded in the file; nothing is drawn.

    Raises:
        LaaiError: on examples or a model that do not allow it.
    """
    if len(examples) < 2:
        raise LaaiError(f"an in-context vector needs two examples or more, for a direction; got {len(examples)}")
    if any(example.target is None for example in examples):
        raise LaaiError("an in-context vector needs examples with targets, these have answer options")
    layout = locate(model)
    layers = range(len(layout.blocks)) if layer is None else [layout.layer(layer)]
    for number in layers:
        layout.module(number, "mlp")
    inputs, outputs = (
        [encode_text(tokenizer, text(example)) for example in examples] for text in (input_text, output_text)
    )
    refuse_foreign(chain(*inputs, *outputs), layout.vocabulary)
    with frozen(layout.model), torch.no_grad():
        before, after = hidden_states(layout, inputs), hidden_states(layout, outputs)
    _, *by_block = shift(before, after)
    metadata = {
        **model_facts(layout),
        "task": task,
        "method": "icv",
        "training": training_facts(layout, examples, seed),
    }
    vectors = {number: by_block[number] for number in layers}
    return Intervention(vectors, "mlp", "all", scale=STEP, operation="icv", metadata=metadata)


def input_text(example: Example) -> str:
    """The input alone: in a word task the word, elsewhere the whole prompt."""
    return _bare(example.prompt.removeprefix(_BEFORE).removesuffix(_AFTER))


def output_text(example: Example) -> str:
    """The output alone."""
    return _bare(str(example.target))


def hidden_states(layout: Layout, rows: Sequence[list[int]]) -> list[torch.Tensor]:
    """The embedding, then every block's output, at each row's last token: [N, width] each, float32 on the CPU."""
    modules = dict(enumerate([layout.model.get_input_embeddings(), *layout.blocks]))
    in_order: list[int] = []
    pad = padding_error(layout) <= rounding(layout)
    with recorded(modules, keep=lambda output: hidden_of(output)[:, -1].float().cpu()) as seen:
        for numbers, inputs in whole_rows(layout, rows, len(rows), pad):
            in_order += numbers
            layout.model(**inputs, use_cache=False, logits_to_keep=1)
    restored = torch.tensor(in_order).argsort()  # undoes the sorting by length
    return [torch.cat(values)[restored] for values in seen.values()]


def shift(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Mean difference plus the first principal direction of the differences, over all [N, width] pairs as one vector.

    The direction has length one over all layers together, so the mean outweighs it. Its sign is that of the
    example that lies furthest along it.
    """
    differences = torch.cat([b - a for a, b in zip(before, after, strict=True)], 1).double()
    mean = differences.mean(0)
    scores, _, directions = torch.linalg.svd(differences - mean, full_matrices=False)
    sign = scores[scores[:, 0].abs().argmax(), 0].sign()
    return list((mean + sign * directions[0]).float().split([part.shape[1] for part in before]))


def _bare(text: str) -> str:
    """The text behind a space and without punctuation, as in the authors' code; a text of punctuation alone stays.

    The authors put no space, because Llama's first tokenizer prepends one. For a byte-level tokenizer a word without
    the space is another token than the same word inside a text.
    """
    return " " + (text.translate(_NO_PUNCTUATION).strip() or text.strip())
