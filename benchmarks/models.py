"""The models and the text the benchmarks run on: random weights are as slow as trained ones."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from laai_core.example import Example

REFERENCE_MODEL = Path(__file__).resolve().parent.parent / "reference_model" / "weights"
WORDS = 4096  # of the tokenizer; a model's vocabulary may be larger


def random_llama(
    hidden: int = 640,
    intermediate: int = 1728,
    layers: int = 12,
    heads: int = 10,
    vocabulary: int = 16_000,
    **more: Any,
) -> Any:
    """A Llama with random weights, float32; by default 65 M parameters, 54.5 M of them in the blocks."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    for name, value in more.items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_config(config).eval()


def small_llama(layers: int = 4) -> Any:
    """For --quick."""
    return random_llama(hidden=64, intermediate=128, layers=layers, heads=4, vocabulary=WORDS)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Every word is one token: `w7` is token 7."""
    vocabulary = {"<unk>": 0, "<eos>": 1, **{f"w{number}": number for number in range(2, WORDS)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")


def text(draw: random.Random, words: int) -> str:
    """Random words, as many tokens."""
    return " ".join(f"w{draw.randrange(2, WORDS)}" for _ in range(words))


def word_examples(count: int, prompt_tokens: int, target_tokens: int, seed: int = 0) -> list[Example]:
    """Random training examples of exactly these lengths, when trained with stop=""."""
    draw = random.Random(seed)
    return [Example(text(draw, prompt_tokens), " " + text(draw, target_tokens)) for _ in range(count)]


def reference_model(path: str | Path = REFERENCE_MODEL) -> tuple[Any, Any]:
    """The bundled model and its tokenizer."""
    if not (Path(path) / "config.json").is_file():
        raise SystemExit(f"no model in {path}: expected the repository's reference_model/weights, or another --model")
    transformers_logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval(), AutoTokenizer.from_pretrained(path)


def parameters(model: Any) -> str:
    """For example `70 M`."""
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{count / 1e6:.0f} M" if count >= 1e7 else f"{count / 1e6:.1f} M"
