"""Tiny random models and tokenizers, made without network, and module paths written by hand for independent hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

REFERENCE = Path(__file__).resolve().parent.parent / "reference_model" / "weights"
VOCABULARY = 300
MAX_POSITIONS = 128
HIDDEN, LAYERS, HEADS, KV_HEADS = 32, 3, 4, 2
PAD, EOS, BOS = 0, 1, 2
STD = 0.3  # of every matrix: with the usual 0.02 an added vector would change next to nothing

# The names the modern architectures share.
_COMMON: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=HIDDEN,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    max_position_embeddings=MAX_POSITIONS,
    pad_token_id=PAD,
    eos_token_id=EOS,
    bos_token_id=BOS,
)
_GPT2_STYLE: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    n_positions=MAX_POSITIONS,
    n_embd=HIDDEN,
    n_layer=LAYERS,
    n_head=HEADS,
    n_inner=48,
    pad_token_id=PAD,
    eos_token_id=EOS,
    bos_token_id=BOS,
)
# head_dim 16: heads x head_dim = 64, twice the hidden size.
_WIDE_HEADS: dict[str, Any] = dict(_COMMON, head_dim=16)
_GEMMA2: dict[str, Any] = dict(_WIDE_HEADS, query_pre_attn_scalar=16)
_GEMMA3: dict[str, Any] = dict(
    _GEMMA2, layer_types=["sliding_attention", "full_attention", "sliding_attention"], sliding_window=64
)


def _without(arguments: dict[str, Any], name: str) -> dict[str, Any]:
    return {k: v for k, v in arguments.items() if k != name}


_OWN_HEADS = _without(_COMMON, "num_key_value_heads")  # every query head has its own keys and values

# Arguments of each architecture's config.
_CONFIGS: dict[str, dict[str, Any]] = {
    "Llama": _COMMON,
    "Mistral": dict(_COMMON, sliding_window=None),
    "MistralWindow": dict(_COMMON, sliding_window=8),
    "Mixtral": dict(_COMMON, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "Gemma2": dict(_GEMMA2, sliding_window=64),
    "Gemma2Window": dict(_GEMMA2, sliding_window=8),
    "Gemma3Text": _GEMMA3,
    "Gemma3TextWindow": dict(_GEMMA3, sliding_window=8),
    "Qwen2": _COMMON,
    "Qwen3": _WIDE_HEADS,
    "Phi3": _COMMON,
    "GPT2": _GPT2_STYLE,
    "GPTNeoX": _OWN_HEADS,
    "GPTJ": dict(_GPT2_STYLE, rotary_dim=4),
    "OPT": dict(_without(_OWN_HEADS, "intermediate_size"), ffn_dim=48, word_embed_proj_dim=HIDDEN),
    "Falcon": dict(
        _without(_OWN_HEADS, "intermediate_size"),
        ffn_hidden_size=48,
        new_decoder_architecture=True,
        num_kv_heads=KV_HEADS,
    ),
    "StableLm": _COMMON,
    "Olmo2": _COMMON,
    "Granite": _COMMON,
}

WINDOWED = ("MistralWindow", "Gemma2Window", "Gemma3TextWindow")
ARCHITECTURES = tuple(name for name in _CONFIGS if name not in WINDOWED)

_LLAMA_STYLE = [name for name in _CONFIGS if name not in ("GPT2", "GPTNeoX", "GPTJ", "OPT", "Falcon")]
BLOCK_PATHS = {
    **{name: "model.layers.{}" for name in _LLAMA_STYLE},
    "GPT2": "transformer.h.{}",
    "GPTNeoX": "gpt_neox.layers.{}",
    "GPTJ": "transformer.h.{}",
    "OPT": "model.decoder.layers.{}",
    "Falcon": "transformer.h.{}",
}
PROJECTION_PATHS = {
    **{name: "model.layers.{}.self_attn.o_proj" for name in _LLAMA_STYLE},
    "GPT2": "transformer.h.{}.attn.c_proj",
    "GPTNeoX": "gpt_neox.layers.{}.attention.dense",
    "GPTJ": "transformer.h.{}.attn.out_proj",
    "OPT": "model.decoder.layers.{}.self_attn.out_proj",
    "Falcon": "transformer.h.{}.self_attention.dense",
}
MLP_PATHS = {
    **{name: "model.layers.{}.mlp" for name in _LLAMA_STYLE},
    "GPT2": "transformer.h.{}.mlp",
    "GPTNeoX": "gpt_neox.layers.{}.mlp",
    "GPTJ": "transformer.h.{}.mlp",
    "OPT": "model.decoder.layers.{}.fc2",
    "Falcon": "transformer.h.{}.mlp",
}
if transformers.__version__.startswith("4."):
    MLP_PATHS["Mixtral"] = "model.layers.{}.block_sparse_moe"


def head_dim(name: str) -> int:
    """Width of one head at the site `heads`."""
    return _CONFIGS[name].get("head_dim", HIDDEN // HEADS)


def tiny_config(name: str) -> Any:
    """The configuration of `tiny_model(name)`."""
    return getattr(transformers, f"{name.removesuffix('Window')}Config")(**_CONFIGS[name])


def tiny_model(name: str, seed: int = 0) -> Any:
    """A random causal language model in evaluation mode, float32; the same seed gives the same weights."""
    return _random(tiny_config(name), seed)


def _random(config: Any, seed: int = 0, kind: Any = None) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config) if kind else transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Matrices anew; norms and biases keep their value, with some noise so that none is trivial.
            parameter.copy_(STD * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
    # Some configs fall back to ids that this vocabulary lacks.
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = EOS
    model.generation_config.bos_token_id = BOS
    return model.eval()


def longrope_model(border: int) -> Any:
    """A Phi-3 as it is for 128k tokens: rows of more tokens than `border` have other factors."""
    config = tiny_config("Phi3")
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
    name = "rope_parameters" if hasattr(config, "rope_parameters") else "rope_scaling"  # transformers 4 has the latter
    rope = {**(getattr(config, name) or {}), "rope_type": "longrope", **factors}
    setattr(config, name, rope | {"original_max_position_embeddings": border})
    config.original_max_position_embeddings = border
    return _random(config)


_CORPUS = [
    "Q: hot\nA: cold\n\nQ: the wall\nA: a wallpaper\n\nQ: there\nA: here\n\nQ: in the morning\nA: le matin\n\n",
    "Question: and then?\nA. another\nB. nothing\nAnswer: A\n\nthe others are in there and on that one\n",
]
_PIECES = ["▁▁", "th", "the", "▁the", "▁a", "▁c", "ol", "▁col", "in", "er"]
_MERGES = [("▁", "▁"), ("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a"), ("▁", "c"), ("o", "l"), ("▁c", "ol")]
_MERGES += [("i", "n"), ("e", "r")]


def gemma4_model(shared: int = 0) -> Any:
    """Four layers, every second with heads twice as wide; the last `shared` take keys and values of others."""
    config = transformers.Gemma4TextConfig(
        **_without(_COMMON, "num_hidden_layers"),
        num_hidden_layers=4,
        head_dim=8,
        global_head_dim=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
        num_kv_shared_layers=shared,
    )
    return _random(config)


def multimodal_model() -> Any:
    """Gemma 3 as it is loaded with its vision tower: the decoder, of three layers, is a part of a part."""
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    text = transformers.Gemma3TextConfig(**_GEMMA3).to_dict()
    tokens = dict(image_token_index=290, boi_token_index=291, eoi_token_index=292)
    return _random(transformers.Gemma3Config(text_config=text, vision_config=vision | {"patch_size": 14}, **tokens))


def decoder_with_positions(name: str) -> Any:
    """A decoder of three layers that numbers its tokens by itself, from another number than 0 (Roberta) or by columns,
    padding or not (Bart).
    """
    ids = dict(vocab_size=VOCABULARY, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, is_decoder=True)
    if name == "Roberta":
        sizes = dict(hidden_size=HIDDEN, num_hidden_layers=3, num_attention_heads=HEADS, intermediate_size=48)
        return _random(transformers.RobertaConfig(**sizes, **ids, max_position_embeddings=MAX_POSITIONS + 1))
    sizes = dict(d_model=HIDDEN, decoder_layers=3, decoder_attention_heads=HEADS, decoder_ffn_dim=48)
    sizes |= dict(encoder_layers=3, encoder_attention_heads=HEADS)  # which the config gives for the decoder's
    config = transformers.BartConfig(**sizes, **ids, max_position_embeddings=MAX_POSITIONS, decoder_start_token_id=EOS)
    config.is_encoder_decoder = False
    return _random(config, kind=transformers.BartForCausalLM)


def parallel_hybrid_model() -> Any:
    """Falcon-H1: every one of its three layers has attention and a state-space model side by side."""
    sizes = dict(mamba_n_heads=HEADS, mamba_d_head=16, mamba_d_state=8, mamba_d_ssm=64, head_dim=8)
    return _random(transformers.FalconH1Config(**_COMMON, **sizes))


def hybrid_model():
    """LFM2, which mixes convolutions and attention: three layers, the middle one with attention."""
    config = transformers.Lfm2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv"],
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def tiny_tokenizer(bos: bool, kind: str = "bytes") -> PreTrainedTokenizerFast:
    """At most 300 tokens, every text encodable; with `bos` a text begins with <bos>, without there is no such token.

    kind: `bytes` (byte-level BPE, as GPT-2, Llama-3 and Qwen) or `metaspace` (SentencePiece-like, as Llama-2 and
    Mistral: a leading space is implied, unknown characters fall back to bytes).
    """
    tokenizer = Tokenizer.from_str(_tokenizer_json(bos, kind))
    special = {"pad_token": "<pad>", "eos_token": "<eos>"} | ({"bos_token": "<bos>"} if bos else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=MAX_POSITIONS, **special)


@cache
def _tokenizer_json(bos: bool, kind: str) -> str:
    special = ["<pad>", "<eos>", "<bos>"] if bos else ["<pad>", "<eos>"]
    if kind == "bytes":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(_CORPUS, trainer)
    else:
        letters = [chr(ord("a") + i) for i in range(26)]
        vocabulary = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters, *_PIECES]
        numbers = {piece: number for number, piece in enumerate(vocabulary)}
        tokenizer = Tokenizer(models.BPE(numbers, _MERGES, byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        tokenizer.add_special_tokens(special)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
        )
    assert tokenizer.get_vocab_size() <= VOCABULARY
    return tokenizer.to_str()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within the block, new tensors without a dtype have this one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def small_model_folder(folder: Path, positions: int = 1024) -> Path:
    """A quick random Llama with the reference model's tokenizer, so that ten solved examples fit; in a folder."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(REFERENCE)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=positions,
        initializer_range=STD,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
