"""Layerwise additive activation intervention: train, hold, apply and store one sparse vector (arXiv 2502.06115).

    layout = locate(model)                                    # decoder blocks, attention output projections
    batch = encode_examples(tokenizer, examples)              # rows: prompt + target, as the harness tokenises them
    rms = root mean square of the site's activation at the last prompt tokens       # 1 if penalties are absolute
    x = the in-context start / rms, or 0                      # [H, d], the heads of one layer
    repeat steps times:
        logits = model(batch), with rms * x added to the site at every row's last prompt token
        loss = mean over examples of -log p(target | prompt), or of KL(p || pi) over answer options
        gradient = d loss / d x                               # the weights are frozen
        x = prox(x - step * gradient)                         # of l1 * |x|_1 + group * sum over heads of |x_h|_2
    return Intervention({layer: rms * x}) of the smallest loss + penalty seen

In reading order. The words: errors, words, files. The vector: example, intervention, storage. On a model: locate,
hooks, positions, apply. Its training: encode, objective, penalty, optimize, forward, memory, cache, products, replay
and capture (the fast path), problem, settings, start, record, train. `data/` reads and bundles tasks, `hub/` reads the
Hugging Face Hub; the flat files need them for `load_task` and `Intervention.load` alone. `vllm/` applies vectors in
vLLM.

Public names are imported at first use, so that importing `laai_core.errors` alone does not load torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from laai_core.apply import apply as apply
    from laai_core.data import load_examples as load_examples
    from laai_core.data import load_task as load_task
    from laai_core.data.split import Split as Split
    from laai_core.errors import LaaiError as LaaiError
    from laai_core.example import Example as Example
    from laai_core.intervention import Intervention as Intervention
    from laai_core.settings import Job as Job
    from laai_core.train import TrainResult as TrainResult
    from laai_core.train import train as train
    from laai_core.train import train_many as train_many
    from laai_core.version import __version__ as __version__

_FILES = {
    "Example": "example",
    "Intervention": "intervention",
    "Job": "settings",
    "LaaiError": "errors",
    "Split": "data.split",
    "TrainResult": "train",
    "__version__": "version",
    "apply": "apply",
    "load_examples": "data",
    "load_task": "data",
    "train": "train",
    "train_many": "train",
}
__all__ = list(_FILES)


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Refuses the attributes that importing `laai_core.train` and `laai_core.apply` would set.

    The import system binds a submodule to its name in the package, where it would hide the function of that name.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _FILES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
