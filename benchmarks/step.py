"""One step of the replay against what the machine allows: how fast it reads memory, and how fast it multiplies.

A step reads the weights of the replayed blocks and of the head twice, forward and backward, and multiplies each with
the tokens that are not padding: two operations a weight and token, each way. The floor is the longer of the two, at
the bandwidth and the product rate measured in the same rounds: a sum over 512 MB, and a product of 2,048 x 2,048.
`linear` is the replay with torch's own `linear` on all rows, padding and held-out examples with them, as it was before
the weights were packed; `bf16` is the replay with torch's float32 products rounded to bfloat16, which training does
not use: its line search needs exact losses; `compiled` is `linear` with every block's norms and feed-forward through
torch.compile (where there is g++); `captured` plays the replay's recorded operations without the model's Python code;
`plain` is full hooked forwards. Cases: the random Llama of `training.py`,
and SmolLM2-135M on ten pairs of the public antonyms (`laai models fetch smollm2-135m`, $LAAI_DATA), alone and as the
three folds of the cross-validation. The gradients of all paths are compared before anything is timed: they may differ
by 1e-4, those of `bf16` by 1e-2.

The gain depends on the processor: on an AMD EPYC (`git show 0de8005:docs/benchmarks.md`) linear / replay
was 1.3 to 1.9 and plain / replay 3.3 to 46, replay at 2.3 to 5.7 times the floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from shutil import which
from typing import Any

import torch
from torch import nn
from torch.nn import Linear
from transformers import AutoModelForCausalLM, AutoTokenizer

import laai_core as laai
from laai_core.encode import encode_examples
from laai_core.example import Example
from laai_core.forward import Forward, PlainForward
from laai_core.hooks import frozen, shadowed
from laai_core.locate import Layout, locate
from laai_core.objective import Objective
from laai_core.products import Products
from laai_core.replay import ReplayForward
from lm_eval_laai.known_models.folder import pretrained
from measure import Record, Timings, interleaved, median, milliseconds, parser, ratio
from models import random_llama, small_llama, word_examples, word_tokenizer
from products import rounded

FOLDS = 3
PATHS = ("replay", "bf16", "linear", "compiled", "captured", "plain")
COLUMNS = ["step", "tokens", "floor: read", "multiply", *PATHS, "replay / floor", "linear / floor", "linear / replay"]
COLUMNS += ["linear / bf16", "linear / compiled", "replay / captured", "plain / replay", "replay, GB/s", "GFLOP/s"]


def timed(
    model: Any, tokenizer: Any, sets: Sequence[Sequence[Example]], layer: int, stop: str, rounds: int, folds: bool
) -> tuple[Timings, float, float, int]:
    """Seconds per call of each case; bytes and floating-point operations of a step; its tokens."""
    layout = locate(model)
    examples = [example for part in sets for example in part]
    runs = [run for run, part in enumerate(sets) for _ in part]
    held_out = [number % FOLDS == run for run, part in enumerate(sets) for number in range(len(part))]
    batch = encode_examples(tokenizer, examples, stop, runs=runs, held_out=held_out if folds else None)
    objective = Objective(examples)
    torch.manual_seed(0)
    vectors = 0.01 * torch.randn(len(sets), math.prod(layout.shape(layer, "heads")))
    packed_weights = Products(layout, layer)
    forwards: dict[str, Forward] = {
        "replay": ReplayForward(layout, batch, layer, "heads", products=packed_weights),
        "captured": ReplayForward(layout, batch, layer, "heads", products=packed_weights, captured=True),
        "linear": ReplayForward(layout, batch, layer, "heads"),
    }
    if not folds:
        forwards["plain"] = PlainForward(layout, batch, layer, "heads")
    table, (a, b) = torch.ones(1 << 27), torch.randn(2, 2048, 2048)
    packed = torch.ops.mkldnn._reorder_linear_weight(b)
    cases: dict[str, Any] = {
        name: lambda forward=forward: forward.loss_and_gradient(vectors, objective, range(len(sets)))
        for name, forward in forwards.items()
    }
    cases["bf16"] = lambda: rounded(cases["replay"])
    if which("g++"):
        parts = compiled(layout, layer)
        cases["compiled"] = lambda: shadowing(parts, cases["linear"])
    with frozen(model):
        found = {name: case() for name, case in cases.items()}
        loss, gradient, _ = found["linear"]
        for name, (other, slope, _) in found.items():
            of_loss, of_gradient = (2e-3, 1e-2) if name == "bf16" else (1e-5, 1e-4)
            assert torch.allclose(other, loss, rtol=of_loss), (name, other, loss)
            assert (slope - gradient).norm() <= of_gradient * gradient.norm(), name
        cases["read"] = table.sum
        cases["product"] = lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], "")
        timings = interleaved(cases, rounds)
    weights = model.get_output_embeddings().weight.numel() + sum(
        module.weight.numel()
        for block in layout.blocks[layer:]
        for module in block.modules()
        if type(module) is Linear
    )
    suffixes = [int(n) - p + 1 for n, p in zip(batch.attention_mask.sum(1), batch.prompt_lengths, strict=True)]
    tokens = sum(suffixes)
    backward = sum(n for n, out in zip(suffixes, held_out, strict=True) if not (folds and out))
    # A token is scored where it stands, by the one before it: the head sees as many rows as the blocks.
    assert tokens == len(batch.token)
    return timings, 8.0 * weights, 2.0 * weights * (tokens + backward), tokens


def compiled(layout: Layout, layer: int) -> dict[nn.Module, Any]:
    """{norm or feed-forward: its compiled forward} of the replayed blocks; an attention's would be another for every
    layer's cache. Each is told to run so: a model under hooks does not, and these modules have none."""
    attentions = set(layout.projections)
    parts = (part for block in layout.blocks[layer:] for part in block.children())
    compiles = torch.compiler.set_stance("default")
    return {
        part: compiles(torch.compile(part.forward, dynamic=False))
        for part in parts
        if not attentions & set(part.modules())
    }


def shadowing(forwards: dict[nn.Module, Any], call: Callable[[], Any]) -> Any:
    """What a call returns while the modules have these forwards."""
    with ExitStack() as stack:
        for module, forward in forwards.items():
            stack.enter_context(shadowed(module, "forward", forward))
        return call()


def row(title: str, timings: Timings, moved: float, operations: float, tokens: int) -> list[str]:
    """A table row."""
    read = moved / ((1 << 29) / median(timings, "read"))
    multiply = operations / (2 * 2048**3 / median(timings, "product"))
    replay = median(timings, "replay")
    floor = max(read, multiply)
    timings = {name: timings.get(name, [math.nan] * len(timings["replay"])) for name in (*PATHS, "product", "read")}
    cells = [
        title,
        str(tokens),
        *map(milliseconds, (read, multiply, *(median(timings, name) for name in PATHS))),
        *(f"{median(timings, name) / floor:.1f}×" for name in ("replay", "linear")),
        *(
            f"{ratio(timings, *names):.1f}×"
            for names in (
                ("linear", "replay"),
                ("linear", "bf16"),
                ("linear", "compiled"),
                ("replay", "captured"),
                ("plain", "replay"),
            )
        ),
        f"{moved / replay / 1e9:.1f}",
        f"{operations / replay / 1e9:.0f}",
    ]
    return ["-" if cell.startswith("nan") else cell for cell in cells]


def main() -> None:
    flags = parser(__doc__)
    flags.set_defaults(rounds=9)
    arguments = flags.parse_args()
    quick, rounds = arguments.quick, arguments.rounds
    record = Record("step", __doc__ or "", {"examples": 10, "rounds": rounds})
    model, layer = (small_llama(), 1) if quick else (random_llama(), 4)
    todo: list[Any] = [
        (f"random Llama, {p} + {n}", model, word_tokenizer(), [word_examples(10, p, n)], layer, "", rounds, False)
        for p, n in ([(8, 2)] if quick else [(8, 2), (120, 1)])
    ]
    if not quick:
        path = pretrained("smollm2-135m")
        real, tokenizer = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
            AutoTokenizer.from_pretrained(path),
        )
        for seed in (0, 1):
            pairs = laai.load_task("antonym", seed=seed).train
            todo.append((f"SmolLM2, seed {seed}", real, tokenizer, [pairs], 12, "\n", rounds, False))
        todo.append(("SmolLM2, seed 1, folds", real, tokenizer, [pairs] * FOLDS, 12, "\n", rounds, True))
    rows, kept = [], {}
    for title, *case in todo:
        found = timed(*case)
        kept[title] = found[0]
        rows.append(row(title, *found))
    record.keep("seconds per call", kept)
    record.table("Milliseconds a step, and the floor", COLUMNS, rows)
    record.save(quick)


if __name__ == "__main__":
    main()
