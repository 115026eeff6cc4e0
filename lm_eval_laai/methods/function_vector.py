"""Function vectors (Todd et al. 2024, arXiv 2310.15213): the output of a few attention heads after solved examples.

The mean output of every head at the last token of many-shot prompts; of these, the heads whose mean, put into prompts
with shuffled answers, makes the right answer most probable; the sum of what these heads add to the residual stream.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

from laai_core.cache import model_inputs, padded, padding_error, read_only, selected
from laai_core.encode import encode_pair, refuse_foreign
from laai_core.errors import LaaiError
from laai_core.example import Example
from laai_core.hooks import attached, frozen, recorded
from laai_core.intervention import Intervention
from laai_core.locate import Layout, locate
from laai_core.record import model_facts, training_facts

if TYPE_CHECKING:  # importing transformers takes a second
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Values of the authors' code.
SHOTS = 10
PROMPTS = 100  # over which head outputs are averaged
TRIALS = 25  # prompts with shuffled answers
MIN_HEADS, HEADS_SHARE = 10, 1 / 51.2  # GPT-J 10 of 448, Llama-2-7B 20 of 1024, Llama-2-70B 100 of 5120

ROWS = 64  # patched single tokens per forward
PROMPT_ROWS = 8  # whole prompts per forward
MISPLACED = 0.2  # relative error behind padding of a model that numbers tokens otherwise; int8 rounds by up to 0.08


@dataclass(frozen=True)
class Prompt:
    """A few-shot prompt as token ids, and the first token of its right answer."""

    ids: list[int]
    answer: int


def function_vector(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    layer: int | None = None,
    seed: int = 0,
    heads: int | None = None,
    task: str | None = None,
    progress: bool = False,
) -> Intervention:
    """The function vector of a task, added to the residual stream behind one block at the last prompt token.

    Args:
        examples: at least three, with targets. Each prompt asks one of them after (up to ten of) the others: with
            ten examples there are nine shots, and no prompt contains its own answer.
        layer: the block behind which the vector is added; default a third of the depth, as in the paper. The heads may
            be in any layer.
        seed: of the draws of shots, their order and the shuffled answers.
        heads: number of heads; default one in 51.2 but at least ten, the paper's counts for models from 6B to 70B.

    Raises:
        LaaiError: on examples or a model that do not allow it.
    """
    layout = locate(model)
    count = len(layout.blocks)
    layer = round(count / 3) if layer is None else layout.layer(layer)
    available = sum(isinstance(p, nn.Module) for p in layout.projections) * layout.num_heads
    heads = default_heads(available) if heads is None else heads
    if not 1 <= heads <= available:
        raise LaaiError(f"heads is {heads}: expected 1 to {available}, the model's number of attention heads")
    draw = random.Random(seed)
    correct = few_shot_prompts(tokenizer, examples, PROMPTS, False, draw)
    shuffled = few_shot_prompts(tokenizer, examples, TRIALS, True, draw)
    _refuse(layout, [*correct, *shuffled])
    with (
        frozen(layout.model),
        torch.no_grad(),
        tqdm(total=PROMPTS + TRIALS, desc="function vector", disable=not progress, leave=False) as bar,
    ):
        if padding_error(layout) > MISPLACED:
            raise LaaiError(f"{type(model).__name__} numbers tokens by itself: a function vector needs padded rows")
        means = mean_head_outputs(layout, correct, bar)
        effects = indirect_effects(layout, shuffled, means, bar)
        chosen = sorted(effects, key=lambda head: (-effects[head], head))[:heads]
        vector = _written(layout, means, chosen)
    training = {
        **training_facts(layout, examples, seed),
        "shots": min(SHOTS, len(examples) - 1),
        "prompts": PROMPTS,
        "trials": TRIALS,
        "heads": [[*head, effects[head]] for head in chosen],
    }
    metadata = {**model_facts(layout, chosen[0][0]), "task": task, "method": "fv", "training": training}
    return Intervention({layer: vector}, site="residual", metadata=metadata)


def default_heads(available: int) -> int:
    """The default number of heads."""
    return min(max(MIN_HEADS, round(available * HEADS_SHARE)), available)


def few_shot_prompts(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], count: int, shuffled: bool, draw: random.Random
) -> list[Prompt]:
    """`count` prompts that ask the examples in turn, each after others in random order.

    `shuffled` permutes the shots' answers, so that the prompt shows the form of the task and not the task.
    """
    if len(examples) < 3:
        raise LaaiError(
            f"a function vector needs three examples or more, to ask one after others; got {len(examples)}"
        )
    prompts = []
    for number in range(count):
        asked = number % len(examples)
        others = [example for index, example in enumerate(examples) if index != asked]
        shots = draw.sample(others, min(SHOTS, len(others)))
        if any(shot.target is None for shot in shots):
            raise LaaiError("a function vector needs examples with targets, these have answer options")
        if any(type(shot) is not Example for shot in shots):
            raise LaaiError("a function vector needs plain examples, these were rendered by a task of the harness")
        if shuffled:
            targets = draw.sample([shot.target for shot in shots], len(shots))
            shots = [Example(shot.prompt, target) for shot, target in zip(shots, targets, strict=True)]
        question = examples[asked]
        ids, answer = encode_pair(tokenizer, question.behind(shots), str(question.target))
        prompts.append(Prompt(ids, answer[0]))
    return prompts


def mean_head_outputs(layout: Layout, prompts: Sequence[Prompt], bar: Any) -> dict[int, torch.Tensor]:
    """{layer: [H, d]} the mean input of the output projection at the prompts' last token, float32, on its device."""
    projections = {layer: module for layer, module in enumerate(layout.projections) if isinstance(module, nn.Module)}
    # The last column is each prompt's last token: rows are padded on the left.
    with recorded(projections, keep=lambda outputs: outputs[:, -1].float().sum(0), inputs=True) as sums:
        for start in range(0, len(prompts), PROMPT_ROWS):
            part = prompts[start : start + PROMPT_ROWS]
            tokens, mask = padded([prompt.ids for prompt in part], layout.device, left=True)
            layout.model(**model_inputs(layout, tokens, mask), use_cache=False, logits_to_keep=1)
            bar.update(len(part))
    return {layer: (sum(parts) / len(prompts)).view(layout.shape(layer, "heads")) for layer, parts in sums.items()}


def indirect_effects(
    layout: Layout, prompts: Sequence[Prompt], means: dict[int, torch.Tensor], bar: Any
) -> dict[tuple[int, int], float]:
    """{(layer, head): mean rise of the answer's probability when the head's output at the last token is its mean}.

    All but the last token of a prompt is independent of the heads' outputs at the last one: it runs once, and every
    (layer, head) is one single-token row against its cache.
    """
    heads = layout.num_heads
    totals = {layer: torch.zeros(heads, dtype=torch.float32) for layer in means}
    at_once = max(1, ROWS // heads)
    for start in range(0, len(prompts), at_once):
        part = prompts[start : start + at_once]
        step = _last_tokens(layout, part, heads)
        answers = torch.tensor([prompt.answer for prompt in part for _ in range(heads)])
        untouched = _probability(layout, step, answers)
        for layer, mean in means.items():
            with _replaced(layout, layer, mean, len(part)):
                rise = _probability(layout, step, answers) - untouched
            totals[layer] += rise.view(len(part), heads).sum(0)
        bar.update(len(part))
    return {
        (layer, head): float(total[head]) / len(prompts) for layer, total in totals.items() for head in range(heads)
    }


def _last_tokens(layout: Layout, prompts: Sequence[Prompt], copies: int) -> dict[str, Any]:
    """The model's arguments for every prompt's last token, `copies` rows a prompt, behind the cached rest."""
    device = layout.device
    tokens, mask = padded([prompt.ids[:-1] for prompt in prompts], device, left=True)
    owner = torch.arange(len(prompts), device=device).repeat_interleave(copies)
    cached = layout.model(**model_inputs(layout, tokens, mask), use_cache=True, logits_to_keep=1).past_key_values
    try:
        cache = read_only(selected(cached, owner.cpu()))  # the layers' caches may lie on several devices
    except (AttributeError, NotImplementedError) as error:
        name = type(layout.model).__name__
        raise LaaiError(f"{name}: expected a key-value cache whose rows can be chosen, got {error}") from error
    last = torch.tensor([[prompt.ids[-1]] for prompt in prompts], device=device)[owner]
    inputs = model_inputs(layout, last, torch.ones_like(last), mask[owner], mask.sum(1)[owner])
    return {**inputs, "past_key_values": cache, "use_cache": True}


def _probability(layout: Layout, step: dict[str, Any], answers: torch.Tensor) -> torch.Tensor:
    """[rows] the probability of each row's answer, on the CPU."""
    probabilities = layout.model(**step).logits[:, -1].float().softmax(-1)
    return probabilities.gather(1, answers.to(probabilities.device).unsqueeze(1)).squeeze(1).cpu()


@contextmanager
def _replaced(layout: Layout, layer: int, mean: torch.Tensor, prompts: int) -> Iterator[None]:
    """Row i of each prompt's H rows runs with the output of head i at its one token replaced by `mean`[i]."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        outputs = args[0].clone().view(prompts, len(mean), len(mean), -1)  # [prompts, rows, heads, d]
        each = torch.arange(len(mean), device=outputs.device)
        outputs[:, each, each] = mean.to(outputs)
        return (outputs.view_as(args[0]), *args[1:])

    with attached([layout.module(layer, "heads").register_forward_pre_hook(hook)]):
        yield


def _written(layout: Layout, means: dict[int, torch.Tensor], chosen: Sequence[tuple[int, int]]) -> torch.Tensor:
    """[hidden] the chosen heads' mean contribution to the residual stream, float32 on the CPU.

    Computed by the projection itself, which may be quantised, less its bias, which belongs to no head; scaled as the
    block scales the mean output of all heads.
    """
    total = torch.zeros(layout.hidden_size, dtype=torch.float32)
    for layer in sorted({layer for layer, _ in chosen}):
        projection = layout.module(layer, "heads")
        mean = means[layer]
        kept = torch.zeros_like(mean)
        for at, head in chosen:
            if at == layer:
                kept[head] = mean[head]
        rows = torch.stack([kept.flatten(), torch.zeros_like(kept.flatten()), mean.flatten()]).to(layout.model.dtype)
        part, bias, whole = projection(rows.unsqueeze(0))[0]
        total += ((part.float() - bias.float()) * _scale(layout.blocks[layer], whole)).cpu()
    return total


def _scale(block: nn.Module, output: torch.Tensor) -> torch.Tensor:
    """[hidden] by how much a block scales this output of its attention before it adds it to the residual stream.

    Blocks of Gemma 2 to 4, OLMo 2 and 3, GLM-4, EXAONE 4 and AFMoE have a norm there, those of Granite a factor.
    """
    norm = getattr(block, "post_self_attn_layernorm", getattr(block, "post_norm1", None))
    if norm is None and (hasattr(block, "post_feedforward_layernorm") or hasattr(block, "post_mlp_layernorm")):
        norm = block.post_attention_layernorm  # elsewhere the norm of this name comes before the feed-forward
    scale = torch.ones_like(output) if norm is None else torch.where(output == 0, 0, norm(output) / output)
    return scale.float() * getattr(block, "residual_multiplier", 1)


def _refuse(layout: Layout, prompts: Sequence[Prompt]) -> None:
    """LaaiError for prompts that are too long for the model, or of another tokenizer."""
    refuse_foreign((token for prompt in prompts for token in (*prompt.ids, prompt.answer)), layout.vocabulary)
    limit = layout.max_positions
    longest = max(len(prompt.ids) for prompt in prompts)
    if limit is not None and longest > limit:
        raise LaaiError(f"a prompt of several examples has {longest} tokens, the model takes {limit}")
