"""Layerwise additive activation intervention: train, hold, apply and store one sparse vector (arXiv 2502.06115).

The public names are imported when they are first used: who needs `laai_core.errors` alone waits for no torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from laai_core.apply import apply
    from laai_core.data import load_task
    from laai_core.errors import LaaiError
    from laai_core.example import Example, Split
    from laai_core.intervention import Intervention
    from laai_core.train import Job, TrainResult, train, train_many

__all__ = [
    "Example",
    "Intervention",
    "Job",
    "LaaiError",
    "Split",
    "TrainResult",
    "apply",
    "load_task",
    "train",
    "train_many",
]
_FILES = {
    "Example": "example",
    "Intervention": "intervention",
    "Job": "train",
    "LaaiError": "errors",
    "Split": "example",
    "TrainResult": "train",
    "apply": "apply",
    "load_task": "data",
    "train": "train",
    "train_many": "train",
}


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
