"""Load a causal language model and its tokenizer; every failure becomes one line."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from laai_core.errors import LaaiError
from lm_eval_laai.known_models.folder import pretrained
from lm_eval_laai.known_models.package import check_gguf_library

if TYPE_CHECKING:  # importing transformers takes a second
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

AUTO = "auto"  # of `device`


@dataclass(frozen=True)
class ModelSource:
    """A model's origin, device and dtype. Nothing is read before a method is called.

    Args:
        name: a folder, a name on the Hugging Face Hub, or one of `laai models`.
        revision: a branch, tag or commit on the Hub.
        trust_remote_code: whether the model's own Python code may run.
        device: None is the first GPU, or the CPU where there is none; auto spreads whole layers over all GPUs.
        dtype: auto (the checkpoint's own), float32, bfloat16 or float16.
        gguf_file: a GGUF file in that folder or repository, whose weights are dequantised.
    """

    name: str
    revision: str | None = None
    trust_remote_code: bool = False
    device: str | None = None
    dtype: str = "auto"
    gguf_file: str | None = None

    @property
    def pretrained(self) -> str:
        """The name to load, for the harness too: `name`, or a known model's folder. LaaiError if not fetched."""
        return pretrained(self.name)

    def checked_device(self) -> torch.device:
        """The device. LaaiError when this machine does not have it."""
        first = "cuda" if torch.cuda.is_available() else "cpu"
        name = first if self.device in (None, AUTO) else self.device
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:  # PyTorch asserts that it was compiled with CUDA
            raise LaaiError(
                f"device {name!r} cannot be used here ({first_line(error)}); expected one like cpu"
            ) from error

    def config(self) -> Any:
        """The model's configuration. LaaiError when there is none, or when it is no decoder-only model's."""
        if self.gguf_file is not None:
            check_gguf_library()
        path = Path(self.pretrained)
        # A Hub name has one slash at most; other names are paths and not looked up on the Hub.
        is_path = path.is_absolute() or len(path.parts) > 2 or (len(path.parts) == 2 and path.parent.is_dir())
        if not path.is_dir() and (path.exists() or self.name.startswith(".") or is_path):
            raise LaaiError(f"no model folder at {self.name}: expected a folder with config.json, or a Hub name")
        config = self._read(AutoConfig, "config")
        if getattr(config, "is_encoder_decoder", False):
            raise LaaiError(
                f"{self.name} is an encoder-decoder ({config.model_type}): "
                f"expected a decoder-only (causal) language model"
            )
        return config

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer alone."""
        return self._read(AutoTokenizer, "tokenizer")

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model in evaluation mode on its device, and the tokenizer."""
        device = self.checked_device()
        tokenizer = self.tokenizer()
        spread = {"device_map": AUTO} if self.device == AUTO else {}
        model, info = self._read(AutoModelForCausalLM, "model", dtype=self.dtype, output_loading_info=True, **spread)
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            logger.warning(
                "%s lacks %d weights, which are now random: %s", self.name, len(missing), ", ".join(missing[:5])
            )
        return (model if spread else model.to(device)).eval(), tokenizer

    def _read(self, kind: Any, what: str, **arguments: Any) -> Any:
        try:
            with _quiet():
                return kind.from_pretrained(
                    self.pretrained,
                    revision=self.revision,
                    trust_remote_code=self.trust_remote_code,
                    gguf_file=self.gguf_file,
                    **arguments,
                )
        except (LaaiError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the libraries, and a model's own code, may raise anything
            raise LaaiError(f"cannot load the {what} of {self.name}: {first_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Only errors from transformers and the Hub; a loading bar only on a terminal."""
    verbosity, hub_verbosity = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    """The first line names the fault; further lines of transformers list every known model."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
