"""The setting that all cells of one model share: model, data, harness. Computes identities of fits and cells."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers.utils import cached_file, extract_commit_hash

from laai_core import start
from laai_core.data import load_task
from laai_core.data.split import Split
from laai_core.errors import LaaiError
from laai_core.record import examples_sha256
from lm_eval_laai.experiments.cells import Cell, Fit
from lm_eval_laai.experiments.load import ModelSource
from lm_eval_laai.methods import LAAI, pseudo_labels, select
from lm_eval_laai.tasks import TaskInfo, harness_metadata, list_tasks

# Incremented when a change of the code changes the results of finished cells.
# 7: in-context starts and scores of decoders that number tokens by themselves, the scale of function vectors
# 6: long steps of prox; 5: a mean with the folds; 2 to 4: other choices of the number of evaluations
# 1: stopped trainings were stored
CELLS_VERSION = 7
_LIBRARIES = ("torch", "transformers", "lm_eval", "peft")
# Of a folder: weights, configuration, tokenizer, code.
_MODEL_FILES = (".json", ".safetensors", ".bin", ".model", ".txt", ".tiktoken", ".py")


@dataclass(frozen=True)
class Setting:
    """One model on one collection of data.

    Args:
        data: folder of the public data sets; None is $LAAI_DATA.
        limit: test items a task; None is all.
        batch_size: zero-shot prompts at once. Not part of any identity: it moves results by rounding only.
    """

    source: ModelSource
    data: str | None = None
    limit: int | None = None
    batch_size: int = 64

    def split(self, task: str, seed: int = 0, n_train: int = 1) -> Split:
        """The data of a harness task."""
        return _split(task_info(task).data_set, seed, n_train, self.data)

    def rows(self, cell: Cell) -> int:
        """Prompts at once. Where solved examples cannot be cached, log-likelihoods keep the logits of these too."""
        few = max(1, self.batch_size // (1 + cell.shots))
        return self.batch_size if task_info(cell.task).generates else few

    def metadata(self, cell: Cell) -> dict[str, Any]:
        """The harness's --metadata for a cell."""
        # A file of one's own may have fewer rows for training than the YAML's ten, which zero-shot does not need.
        n_train = cell.shots or (1 if ":" in cell.task else None)
        return harness_metadata([cell.task], cell.seed, n_train, self.data)

    def fit_identity(self, fit: Fit) -> dict[str, Any]:
        """Everything a fit depends on."""
        examples = self.split(fit.task, fit.seed, fit.n_train).train
        # By its name alone, without the folder: the SHA-256 sums identify the examples.
        return {
            **asdict(fit),
            **({"constants": _constants()} if fit.method == LAAI.name else {}),
            "task": task_info(fit.task).name,
            "examples_sha256": examples_sha256(examples),
            **self._shared,
        }

    def cell_identity(self, cell: Cell) -> dict[str, Any]:
        """Everything a cell's score depends on."""
        shots = None if cell.seed is None else examples_sha256(self.split(cell.task, cell.seed, cell.shots).train)
        return {
            "task": task_info(cell.task).name,
            "shots": cell.shots,
            "seed": cell.seed,
            "shots_sha256": shots,
            "fits": [self.fit_identity(fit) for fit in cell.fits],
            "test_sha256": self.test_sha256(cell.task),
            **({} if task_info(cell.task).generates else {"files": self.split(cell.task).sources}),  # order of options
            "limit": self.limit,
            **self._shared,
        }

    def test_sha256(self, task: str) -> str:
        """Identity of the test items, in order, before the limit."""
        return _test_sha256(task_info(task).data_set, self.data)

    @cached_property
    def model(self) -> dict[str, Any]:
        """The model's identity: SHA-256 of a folder's files, or a commit on the Hub. LaaiError where it has none."""
        folder = Path(self.source.pretrained)
        gguf = {} if self.source.gguf_file is None else {"gguf_file": self.source.gguf_file}
        if folder.is_dir():
            return {"sha256": _folder_sha256(folder, self.source.gguf_file), **gguf}
        self.source.config()  # downloads the file, and says why where that fails
        file = cached_file(str(folder), self.source.gguf_file or "config.json", revision=self.source.revision)
        commit = extract_commit_hash(file, None)
        if commit is None:
            raise LaaiError(f"{self.source.name}: its commit on the Hub is not known: expected a folder of the model")
        return {**gguf, "hub": self.source.name, "commit": commit}

    @cached_property
    def _shared(self) -> dict[str, Any]:
        return {
            "cells_version": CELLS_VERSION,
            "model": self.model,
            "dtype": self.source.dtype,
            "device": self.source.checked_device().type,
            "software": {name: version(name) for name in _LIBRARIES},
        }


def software() -> dict[str, str]:
    """The versions a report states."""
    return {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}}


def _constants() -> list[str]:
    """What decides a training by LAAI besides its settings: constants of its start, choice and pseudo-labels."""
    names = {
        start: ("SHUFFLES", "MOST_SHOTS"),
        select: ("FOLDS", "COARSE", "DEPTHS", "EVALUATIONS", "PATIENCE", "FLOOR", "HEAD_START", "PENALTIES"),
        pseudo_labels: ("INPUTS", "PROPOSED", "TRUSTED", "CONFIDENCE"),
    }
    return [repr(getattr(module, name)) for module in names for name in names[module]]


@cache
def _tasks() -> dict[str, TaskInfo]:
    return {task.name: task for task in list_tasks()}


def task_info(task: str) -> TaskInfo:
    """The definition in a harness task's YAML; `laai_pairs:FILE` has the data set `pairs:FILE`.

    LaaiError for an unknown name.
    """
    name, colon, rest = task.partition(":")
    if name not in _tasks():
        raise LaaiError(f"no task named {task!r}: `laai tasks` lists them")
    info = _tasks()[name]
    return info._replace(data_set=f"{info.data_set}{colon}{rest}")


@cache
def _split(data_set: str, seed: int, n_train: int, data: str | None) -> Split:
    return load_task(data_set, seed, n_train, data)


@cache
def _test_sha256(data_set: str, data: str | None) -> str:
    return examples_sha256(_split(data_set, 0, 1, data).test)


def _folder_sha256(folder: Path, gguf_file: str | None) -> str:
    digest = hashlib.sha256()
    paths = {path for path in folder.iterdir() if path.suffix in _MODEL_FILES}
    for path in sorted(paths | ({folder / gguf_file} if gguf_file else set())):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
