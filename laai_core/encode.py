"""Text to tokens exactly as the harness does it, and examples to one padded batch.

Training must see the tokens that evaluation scores: prompt ids = encode(prompt), target ids =
encode(prompt + target)[len(prompt ids):], special tokens as the tokenizer adds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from laai_core.cache import padded
from laai_core.errors import LaaiError
from laai_core.example import Example

if TYPE_CHECKING:  # importing transformers takes a second
    from transformers import PreTrainedTokenizerBase

Whitespace = Literal["refuse", "loglikelihood", "generation"]
WHITESPACE: tuple[Whitespace, ...] = get_args(Whitespace)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids; no special tokens are added to a text that already begins with the prefix token (HFLM.tok_encode)."""
    if not (hasattr(tokenizer, "encode") and hasattr(tokenizer, "bos_token")):
        found = type(tokenizer).__name__  # the processor of a multimodal model, say
        raise LaaiError(f"the tokenizer is a {found}: expected the model's own, as AutoTokenizer gives")
    prefix = tokenizer.eos_token if tokenizer.bos_token is None else tokenizer.bos_token
    if prefix and text.startswith(prefix):
        return tokenizer.encode(text, add_special_tokens=False)
    return tokenizer.encode(text)


def refuse_foreign(ids: Iterable[int], vocabulary: int | None) -> None:
    """LaaiError for token ids that a model with so many tokens does not have; None: not known."""
    if vocabulary is not None and (highest := max(ids)) >= vocabulary:
        raise LaaiError(f"the tokenizer gives token {highest}, the model has {vocabulary}: expected the model's own")


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, whitespace: Whitespace) -> list[int]:
    """Token ids of a prompt, with whitespace at its end treated as by `encode_pair`, but that none is refused."""
    return encode_text(tokenizer, prompt.rstrip() if whitespace == "loglikelihood" else prompt)


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: str, target: str, whitespace: Whitespace = "refuse"
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of the target behind the prompt.

    Args:
        whitespace: a prompt that ends in whitespace is tokenised in two ways by the harness: `loglikelihood` moves
            the whitespace to the target first, `generation` keeps it. `refuse` (default) raises.

    Raises:
        LaaiError: when either side has no token left, or the prompt ends in whitespace (see above).
    """
    stripped = prompt.rstrip()
    if stripped != prompt and whitespace == "refuse":
        raise LaaiError(
            f"prompt {prompt!r:.50} ends in whitespace, which puts the vector on different tokens in loglikelihood "
            f"and in generation: strip it, or say which to match (--whitespace loglikelihood or generation)"
        )
    if whitespace == "loglikelihood":
        prompt, target = stripped, prompt[len(stripped) :] + target
    prompt_ids = encode_text(tokenizer, prompt)
    if not prompt or not prompt_ids:
        raise LaaiError(f"prompt {prompt!r:.50} has no tokens: expected at least one to put the vector on")
    target_ids = encode_text(tokenizer, prompt + target)[len(prompt_ids) :]
    if not target_ids:
        raise LaaiError(f"target {target!r:.50} has no tokens of its own behind prompt {prompt!r:.50}")
    return prompt_ids, target_ids


@dataclass(frozen=True)
class Batch:
    """Examples as rows of tokens, right-padded, and where in them each continuation is scored.

    A row is a prompt with all but the last token of a continuation. One-token options of an example share a row.
    """

    input_ids: torch.Tensor  # [R, T]
    attention_mask: torch.Tensor  # [R, T]
    prompt_lengths: list[int]  # R
    run_of_row: list[int]  # R: the run whose vector is added to the row
    # One entry per scored token [M]: its row, the column whose logits predict it, its id, its continuation.
    row: torch.Tensor
    column: torch.Tensor
    token: torch.Tensor
    continuation: torch.Tensor
    example: torch.Tensor  # [C]: the example of each continuation
    run_of_example: torch.Tensor  # [N]
    share: torch.Tensor  # [N]: weight of each example in its run's mean loss; 0 if held out

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`."""
        tensors: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **tensors)


def encode_examples(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    stop: str = "\n",
    max_length: int | None = None,
    whitespace: Whitespace = "refuse",
    runs: Sequence[int] | None = None,
    held_out: Sequence[bool] | None = None,
    vocabulary: int | None = None,
) -> Batch:
    """All examples in one batch. A target gets `stop` appended (so that generation ends there), options do not.

    `runs` [N]: the run of each example, from 0; default: all in run 0. `held_out` [N]: examples that are scored but
    have weight 0 in their run's mean loss; default: none.

    Raises:
        LaaiError: no example, an example that cannot be tokenised, one longer than `max_length` tokens, or one with a
            token that is none of the model's `vocabulary` tokens.
    """
    if not examples:
        raise LaaiError("no training examples, expected at least one")
    runs = [0] * len(examples) if runs is None else runs
    held_out = [False] * len(examples) if held_out is None else held_out
    rows: dict[tuple[int, int, tuple[int, ...]], int] = {}
    prompt_lengths: list[int] = []
    scored: list[tuple[int, int, int, int]] = []
    owners: list[int] = []
    for index, example in enumerate(examples):
        texts = [example.target + stop] if example.target is not None else list(example.options or ())
        for text in texts:
            prompt, continuation = encode_pair(tokenizer, example.prompt, text, whitespace)
            refuse_foreign([*prompt, *continuation], vocabulary)
            ids = (*prompt, *continuation[:-1])
            if max_length is not None and len(ids) > max_length:
                raise LaaiError(
                    f"example {index} ({example.prompt!r:.50}) has {len(ids) + 1} tokens with its target, "
                    f"the model takes {max_length + 1}"
                )
            key = (runs[index], len(prompt), ids)
            if key not in rows:
                rows[key] = len(rows)
                prompt_lengths.append(len(prompt))
            for offset, token in enumerate(continuation):
                scored.append((rows[key], len(prompt) - 1 + offset, token, len(owners)))
            owners.append(index)
    input_ids, mask = padded([ids for *_, ids in rows], torch.device("cpu"))
    rows_of, columns, tokens, continuations = torch.tensor(scored).T
    run = torch.tensor(list(runs))
    trained = 1 - torch.tensor(list(held_out)).float()
    return Batch(
        input_ids,
        mask,
        prompt_lengths,
        [run for run, *_ in rows],
        rows_of,
        columns,
        tokens,
        continuations,
        torch.tensor(owners),
        run,
        trained / torch.bincount(run, trained)[run],
    )
