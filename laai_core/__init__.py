"""Layerwise additive activation intervention: train, hold, apply and store one sparse vector (arXiv 2502.06115).

    layout = locate(model)                                    # decoder blocks, attention output projections
    batch = encode_examples(tokenizer, examples)              # rows: prompt + target, as the harness tokenises them
    rms = root mean square of the site's activation at the last prompt tokens       # 1 if penalties are absolute
    x = 0                                                     # [H, d], the heads of one layer
    repeat steps times:
        logits = model(batch), with rms * x added to the site at every row's last prompt token
        loss = mean over examples of -log p(target | prompt), or of KL(p || pi) over answer options
        gradient = d loss / d x                               # the weights are frozen
        x = prox(x - step * gradient)                         # of l1 * |x|_1 + group * sum over heads of |x_h|_2
    return Intervention({layer: rms * x}) of the smallest loss + penalty seen

In reading order. The vector: example, intervention, storage, hub. On a model: locate, hooks, positions, apply.
Its training: encode, objective, penalty, optimize, forward, cache and replay (the fast path), problem, settings,
record, train. `data/` reads and bundles tasks; the rest of the core needs none of it.
"""

from laai_core.apply import apply
from laai_core.data import load_task
from laai_core.errors import LaaiError
from laai_core.example import Example, Split
from laai_core.intervention import Intervention
from laai_core.settings import Job
from laai_core.train import TrainResult, train, train_many
from laai_core.version import __version__

__all__ = [
    "Example",
    "Intervention",
    "Job",
    "LaaiError",
    "Split",
    "TrainResult",
    "__version__",
    "apply",
    "load_task",
    "train",
    "train_many",
]
