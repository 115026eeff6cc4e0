"""Ways to multiply a few rows with frozen weights, and to get a head's loss and gradient: what was tried.

Products of rows with W^T, W [1536, 576], and of gradients with W, in float32 unless a name says otherwise; as many
weights as no cache holds. `replay` in "A step against the machine's limits" uses `oneDNN, packed`.

The head, of SmolLM2's and Gemma's sizes: log-probabilities of one token a row and their gradients with respect to the
rows. `whole` has all logits at once, as training has; `packed` multiplies as training does; `chunks` takes 4,096 words
at a time, their logits used for the sum of exponentials and for the gradient before the next are made; `attention`
gives the same from torch's fused attention, with the rows as queries and W as keys and values: its output is the mean
of W under the softmax, which is the gradient but for the token's own row of W.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear

from measure import Record, Timings, interleaved, median, milliseconds, parser

ROWS = (10, 20, 40, 80)
HEADS = {"SmolLM2": (49152, 576), "Gemma 3": (262144, 640)}  # words, width
HEAD_ROWS = (24, 72, 240)  # of a training, of three folds, of ten vectors
CHUNK = 4096  # words

onednn, packed = torch.ops.mkldnn._linear_pointwise, torch.ops.mkldnn._reorder_linear_weight


def rounded(call: Callable[[], Any]) -> Any:
    """What a call returns whose float32 products are rounded to bfloat16."""
    flags: Any = torch.backends.mkldnn.matmul
    before, flags.fp32_precision = flags.fp32_precision, "bf16"
    try:
        return call()
    finally:
        flags.fp32_precision = before


def products_timed(rounds: int, weights: int) -> dict[int, Timings]:
    """{rows: seconds of `weights` products x W^T or g W, by each way}; W [1536, 576], too many for a cache."""
    ws = [torch.randn(1536, 576) for _ in range(weights)]
    turned = [w.T.contiguous() for w in ws]
    joined = [torch.cat(pair) for pair in zip(ws[::2], ws[1::2], strict=True)]
    halves = [w.bfloat16() for w in ws]
    mkl, mkl_packed = torch.ops.mkl._mkl_linear, torch.ops.mkl._mkl_reorder_linear_weight
    there, back, pairs, half = ([packed(w) for w in part] for part in (ws, turned, joined, halves))
    high = [w.float() for w in halves]
    coarse, fine = [packed(w) for w in high], [packed(w - h) for w, h in zip(ws, high, strict=True)]
    found = {}
    for rows in ROWS:
        x, g, fixed = torch.randn(rows, 576), torch.randn(rows, 1536), [mkl_packed(w, rows) for w in ws]
        narrow = x.bfloat16()
        upper = narrow.float()
        both = torch.cat([upper, x - upper])
        calls: dict[str, Callable[[], Any]] = {
            "linear": lambda x=x: [linear(x, w) for w in ws],
            "oneDNN, packed": lambda x=x: [onednn(x, w, None, "none", [], "") for w in there],
            "two joined": lambda x=x: [onednn(x, w, None, "none", [], "") for w in pairs],
            "oneDNN, not packed": lambda x=x: [onednn(x, w, None, "none", [], "") for w in ws],
            "MKL, packed": lambda x=x, fixed=fixed, rows=rows: [
                mkl(x, p, w, None, rows) for p, w in zip(fixed, ws, strict=True)
            ],
            "W^T as x": lambda x=x: [onednn(w, x, None, "none", [], "") for w in ws],
            "bf16 linear": lambda x=narrow: [linear(x, w) for w in halves],
            "bf16 packed": lambda x=narrow: [onednn(x, w, None, "none", [], "") for w in half],
            "float32 as bf16 + bf16": lambda both=both, upper=upper: rounded(
                lambda: [
                    (onednn(both, h, None, "none", [], ""), onednn(upper, f, None, "none", [], ""))
                    for h, f in zip(coarse, fine, strict=True)
                ]
            ),
            "backward: g W": lambda g=g: [g @ w for w in ws],
            "on a copied W^T": lambda g=g: [linear(g, w) for w in turned],
            "oneDNN, W^T packed": lambda g=g: [onednn(g, w, None, "none", [], "") for w in back],
        }
        with torch.no_grad():
            found[rows] = interleaved(calls, rounds, at_least=0)
    return found


def heads(rows: int, words: int, width: int) -> dict[str, Callable[[], tuple[torch.Tensor, torch.Tensor]]]:
    """{way: call that returns log-probabilities [rows] and gradients [rows, width]} of one head."""
    weight, x = 0.04 * torch.randn(words, width), 2 * torch.randn(rows, width)
    token = torch.randint(0, words, (rows,))
    there, back = packed(weight), packed(weight.T.contiguous())

    def of_logits(logits: torch.Tensor, times_weight: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        logprobs = logits.log_softmax(-1)
        found = logprobs[torch.arange(rows), token]
        return found, weight[token] - times_weight(logprobs.exp_())

    def of_mean(total: torch.Tensor, mean: torch.Tensor) -> Any:
        return (x * weight[token]).sum(1) - total, weight[token] - mean

    def chunks() -> Any:
        largest, total, mean = torch.full((rows, 1), -torch.inf), torch.zeros(rows, 1), torch.zeros(rows, width)
        for part in weight.split(CHUNK):
            logits = x @ part.T
            larger = torch.maximum(largest, logits.amax(1, keepdim=True))
            shrunk, largest = (largest - larger).exp_(), larger
            logits.sub_(largest).exp_()
            total.mul_(shrunk).add_(logits.sum(1, keepdim=True))
            mean.mul_(shrunk).addmm_(logits, part)
        return of_mean((largest + total.log()).squeeze(1), mean / total)

    def attention() -> Any:
        keys = weight.view(1, 1, words, width)
        mean, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            x.view(1, 1, rows, width), keys, keys, scale=1.0
        )
        return of_mean(total.flatten(), mean.view(rows, width))

    return {
        "whole": lambda: of_logits(x @ weight.T, lambda p: p @ weight),
        "packed": lambda: of_logits(
            onednn(x, there, None, "none", [], ""), lambda p: onednn(p, back, None, "none", [], "")
        ),
        "chunks": chunks,
        "attention": attention,
    }


def heads_timed(rounds: int, rows: int, words: int, width: int) -> Timings:
    """Seconds of each way, after a comparison of what they return."""
    calls = heads(rows, words, width)
    with torch.no_grad():
        scores, gradient = calls["whole"]()
        for name, call in calls.items():
            other, slope = call()
            assert torch.allclose(other, scores, atol=1e-4), name
            assert (slope - gradient).norm() <= 1e-4 * gradient.norm(), name
        return interleaved(calls, rounds)


def main() -> None:
    flags = parser(__doc__)
    flags.set_defaults(rounds=9)
    arguments = flags.parse_args()
    quick, rounds = arguments.quick, arguments.rounds
    torch.manual_seed(0)
    weights = 4 if quick else 32
    record = Record("products", __doc__ or "", {"weights": weights, "chunk": CHUNK, "rounds": rounds})
    tried = products_timed(rounds, weights)
    record.keep("seconds per product", tried)
    record.table(
        "GFLOP/s of rows times W^T, by rows",
        ["way", *map(str, ROWS)],
        [
            [way, *(f"{2e-9 * rows * 1536 * 576 * weights / median(times, way):.0f}" for rows, times in tried.items())]
            for way in tried[ROWS[0]]
        ],
        "float32 as bf16 + bf16: both parts of x times the upper part of W, and the upper of x times the lower of W, "
        "in bfloat16 products with float32 sums.",
    )
    sizes = {"small": (4096, 64)} if quick else HEADS
    timed = {
        f"{name}, {rows} rows": heads_timed(rounds, rows, *size) for name, size in sizes.items() for rows in HEAD_ROWS
    }
    record.keep("seconds per head", timed)
    ways = list(next(iter(timed.values())))
    record.table(
        "Milliseconds of a head's loss and gradient",
        ["head", *ways],
        [[title, *(milliseconds(median(times, way)) for way in ways)] for title, times in timed.items()],
    )
    record.save(quick)


if __name__ == "__main__":
    main()
