"""Layerwise additive activation intervention: train, hold, apply and store one sparse vector (arXiv 2502.06115)."""

from laai_core.apply import apply
from laai_core.data import load_task
from laai_core.errors import LaaiError
from laai_core.example import Example, Split
from laai_core.intervention import Intervention
from laai_core.settings import Job
from laai_core.train import TrainResult, train, train_many

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
