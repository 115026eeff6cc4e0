"""A tiny Llama as a GGUF file, written with the gguf package: float32, so that its weights are known exactly."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from tiny import HEADS, KV_HEADS, tiny_model, tiny_tokenizer

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_tiny_gguf(path: Path) -> None:
    """`tiny_model("Llama")` and the vocabulary of `tiny_tokenizer(bos=True)`."""
    model, tokenizer = tiny_model("Llama"), tiny_tokenizer(bos=True)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = _vocabulary(tokenizer)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types([gguf.TokenType.NORMAL] * len(vocabulary["tokens"]))
    writer.add_token_merges(vocabulary["merges"])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(_gguf_name(name), _permuted(name, tensor.float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _vocabulary(tokenizer) -> dict[str, list[str]]:
    """Tokens by their number, and merges as `left right`."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    count = tiny_model("Llama").config.vocab_size
    by_number = {number: token for token, number in tokenizer.get_vocab().items()}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["merges"]]
    return {"tokens": [by_number.get(n, f"<unused{n}>") for n in range(count)], "merges": merges}


def _gguf_name(name: str) -> str:
    """What GGUF calls a weight of transformers' Llama."""
    plain = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module = name.removesuffix(".weight")
    if module in plain:
        return f"{plain[module]}.weight"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{_NAMES[rest]}.weight"


def _permuted(name: str, weight: np.ndarray) -> np.ndarray:
    """GGUF's Llama interleaves the two halves that rotary embedding turns, in queries and keys."""
    heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else None
    if heads is None:
        return weight
    rows = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, rows, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
