"""The memory a training takes besides the weights: what a formula says, and what was allocated.

Kept for the whole training are the keys and values of every token before the last prompt tokens, and the hidden states
that enter the vector's layer (`kept`). Most of what a step of the replay allocates are the keys and values that layers
from the vector's on attend to, a head of them for every query head; the rest are the activations of the few suffix
tokens, and the logits (`step`, at its peak). The in-context start, a forward over few-shot prompts before the first
step, may take more than both: one layer's activations over them, of which the factor 7 was found here (`start`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from laai_core.encode import encode_examples
from laai_core.hooks import frozen
from laai_core.locate import locate
from laai_core.objective import Objective
from laai_core.products import Products
from laai_core.replay import ReplayForward
from laai_core.start import ROWS, SHUFFLES, in_context_starts
from measure import Record, parser
from models import WORDS, parameters, random_llama, word_examples, word_tokenizer

EXAMPLES, TARGET = 10, 2
PROMPTS = (30, 100)
MB = 1e6


def kept_bytes(config: Any, rows: int, prompt: int, target: int, size: int) -> int:
    """The cache of the prompts but for their last tokens, in every layer, and the states entering one layer."""
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return size * rows * (per_token * (prompt - 1) + config.hidden_size * target)


def step_bytes(config: Any, rows: int, prompt: int, target: int, layer: int, size: int) -> int:
    """Keys and values of the layers from the vector's on, repeated for every query head."""
    per_token = 2 * (config.num_hidden_layers - layer) * config.num_attention_heads * config.head_dim
    return size * rows * per_token * (prompt - 1 + target)


def start_bytes(config: Any, examples: int, prompt: int, size: int) -> int:
    """One layer's activations over the start's prompts: few-shot prompts in two orders, and bare ones."""
    rows = min(ROWS, (SHUFFLES + 1) * examples)
    return size * rows * examples * prompt * (3 * config.intermediate_size + 7 * config.hidden_size)


def allocated(call: Callable[[], Any]) -> tuple[int, int, Any]:
    """Bytes still allocated after a call, the most during it, and its result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = call()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return now, most, result


def measured(model: Any, layer: int, prompt: int) -> list[float]:
    """Megabytes by formula and measured: kept, of a step at its peak, of the start at its peak."""
    examples = word_examples(EXAMPLES, prompt, TARGET)
    layout, tokenizer = locate(model), word_tokenizer()
    batch = encode_examples(tokenizer, examples, stop="")
    vectors = 0.01 * torch.randn(1, math.prod(layout.shape(layer, "heads")))
    with frozen(model):
        forward = ReplayForward(layout, batch, layer, "heads", products=Products(layout, layer))
        # Makes the prefixes, and their views of this batch.
        kept, _, _ = allocated(lambda: forward._parts([0]))
        _, step, _ = allocated(lambda: forward.loss_and_gradient(vectors, Objective(examples), [0]))
        _, start, _ = allocated(lambda: in_context_starts(layout, tokenizer, [examples], [layer]))
    size = model.dtype.itemsize
    sizes = EXAMPLES, prompt, TARGET
    found = [kept_bytes(model.config, *sizes, size), kept, step_bytes(model.config, *sizes, layer, size), step]
    found += [start_bytes(model.config, EXAMPLES, prompt, size), start]
    return [value / MB for value in found]


def main() -> None:
    arguments = parser(__doc__).parse_args()
    shape = dict(hidden=64, intermediate=128, layers=4, heads=4) if arguments.quick else {}
    shape = shape or dict(hidden=256, intermediate=704, layers=8, heads=8)
    layer = shape["layers"] // 2
    settings = {"examples": EXAMPLES, "target tokens": TARGET, "layer": layer, "float": "32 bits"}
    record = Record("memory", __doc__, settings)
    for kv_heads in (shape["heads"], shape["heads"] // 4):
        model = random_llama(**shape, vocabulary=WORDS, num_key_value_heads=kv_heads)
        rows = []
        for prompt in PROMPTS[:1] if arguments.quick else PROMPTS:
            found = measured(model, layer, prompt)
            record.keep(f"{kv_heads} key-value heads, {prompt} prompt tokens", found)
            rows.append([prompt, *(f"{value:.1f}" for value in found)])
        record.table(
            f"Megabytes besides the weights, {shape['heads']} heads, {kv_heads} of keys and values",
            ["prompt tokens", "kept: formula", "kept", "step: formula", "step", "start: formula", "start"],
            rows,
            f"A random Llama of {parameters(model)} parameters, {shape['layers']} layers.",
        )
    record.save(arguments.quick)


if __name__ == "__main__":
    main()
