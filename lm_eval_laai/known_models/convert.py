"""A GGUF file as an ordinary model folder: dequantised once, because dequantising at every load takes time."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(gguf: Path, folder: Path) -> None:
    """Write model (float32) and tokenizer of `gguf` to `folder`, as `save_pretrained` lays them out.

    transformers shows a bar while it dequantises. Raises whatever transformers raises for a file it cannot read.
    """
    source, name = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    config = model.config
    # `save_pretrained` refuses a model marked as quantised; these weights are dequantised.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)
    # Local, because tokenizer_config.json records the setting: the same file makes the same folder, online or not.
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name, local_files_only=True)
    tokenizer.save_pretrained(folder)
