"""The type of an entry of METHODS: training function, options and output. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laai_core.errors import LaaiError
from laai_core.example import Example
from laai_core.files import SUFFIX

if TYPE_CHECKING:  # importing transformers takes a second
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_STEPS = 100  # AdamW steps at most
ADAPTER_FACTS = "laai.json"  # provenance of an adapter, in its folder beside PEFT's files
ADAPTER_CONFIG = "adapter_config.json"  # peft.utils.CONFIG_NAME, which takes seconds to import


def middle_layer(count: int) -> int:
    """The middle of a model of `count` layers, 0-based.

    Vectors that stand for a task act best there in models of many sizes (Hendel, Geva & Globerson 2023, "In-context
    learning creates task vectors"), and on the reference model too. The paper's layer is 3 of 32.
    """
    return count // 2


@dataclass(frozen=True)
class Training:
    """The arguments that every method's training takes.

    Args:
        task: the name to record.
        path: the file or folder to write.
        seed: of what the method draws itself; the examples are drawn already.
        progress: show a tqdm bar on stderr.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    examples: list[Example]
    task: str
    path: Path
    layer: int | None
    seed: int
    progress: bool

    @property
    def on(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[Example]]:
        """Model, tokenizer and examples, the first arguments of every method."""
        return self.model, self.tokenizer, self.examples


@dataclass(frozen=True)
class Method:
    """One method.

    Args:
        name: on the command line and in files.
        title: in tables.
        train: (Training, **options): learns from its examples and writes its path, whole or not at all; the model is
            left exactly as it was. Options that are not given are missing.
        options: names of the arguments that not every method takes.
        takes_layer: False for a method that is in no layer.
        writes_adapter: it writes a folder in PEFT's format, for the harness's `peft=`; else a file for hf-laai's
            `intervention=`.
        passes: cost of one training on ten examples, its settings chosen, in forward passes over 64 prompts of 16
            tokens, measured with SmolLM2-135M on one CPU core.
    """

    name: str
    title: str
    train: Callable[..., None]
    passes: float
    options: tuple[str, ...] = ()
    takes_layer: bool = True
    writes_adapter: bool = False

    @property
    def suffix(self) -> str:
        """The ending of the output's name."""
        return "" if self.writes_adapter else SUFFIX

    def check(self, path: Path, layer: int | None, options: Mapping[str, Any]) -> None:
        """LaaiError for arguments that are wrong for every model and all examples. None: an option is not given."""
        for name, value in options.items():
            if value is None:
                continue
            if name not in self.options:
                raise LaaiError(f"{name} is {value}, but the method {self.name} has none: leave it out")
            if name == "steps" and value < 1:
                raise LaaiError(f"steps is {value}: expected at least one")
        if layer is not None and not self.takes_layer:
            raise LaaiError(f"layer is {layer}, but a soft prompt stands before the text, in no layer: leave it out")
        if not self.writes_adapter:
            if path.suffix != SUFFIX:
                raise LaaiError(f"output is {path}: expected a name that ends in {SUFFIX}")
        elif path.suffix == SUFFIX:
            raise LaaiError(f"output is {path}: expected a folder, which is what PEFT reads")
        elif path.exists() and not (path / ADAPTER_FACTS).is_file():  # another tool's adapter may have more beside it
            raise LaaiError(f"{path} exists and is no adapter of ours: expected a new folder, or one to replace")

    def record(self, path: Path) -> dict[str, Any]:
        """The provenance recorded in the output at `path`."""
        if self.writes_adapter:
            facts = json.loads((path / ADAPTER_FACTS).read_text(encoding="utf-8"))
        else:
            from laai_core.intervention import Intervention

            facts = Intervention.load(path).metadata
        return facts["training"]


def is_adapter(folder: Path) -> bool:
    """Whether there is an adapter in PEFT's format."""
    return (folder / ADAPTER_CONFIG).is_file()
