"""The bundled reference model: it loads, it is small, and able without being saturated."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from laai_core.data import few_shot_prompt, load_pairs, load_task

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "reference_model" / "weights"
RULES = ["antonym", "synonym", "en_fr", "en_de"]
LIMIT = 60  # test words a rule


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(WEIGHTS).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(WEIGHTS)


@pytest.fixture(scope="module")
def evaluate():
    """The script's own evaluation; the scripts of that folder import one another by name."""
    sys.path.insert(0, str(WEIGHTS.parent))
    try:
        import evaluate
    finally:
        sys.path.remove(str(WEIGHTS.parent))
    return evaluate


def test_size_and_shape(model):
    assert (WEIGHTS / "model.safetensors").stat().st_size <= 12_000_000
    assert model.dtype == torch.float32 and model.config.model_type == "llama"
    assert 6 <= model.config.num_hidden_layers <= 8
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.config.max_position_embeddings >= 1024


def test_tokenizer(tokenizer):
    assert None not in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    text = "Q: hot\nA: schön, é 12\n\nQuestion: x\nAnswer:"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("rule", RULES)
def test_no_token_spans_the_border_of_prompt_and_answer(tokenizer, rule):
    """So the pieces the training documents are made of are the tokens of the whole text, as the harness splits it."""
    split = load_task(f"lexicon_{rule}")
    for example in split.train:
        whole = tokenizer(few_shot_prompt([example, example], example.prompt))["input_ids"]
        parts = [example.prompt, f"{example.target}\n", "\n"] * 2 + [example.prompt]
        ids = [i for part in parts for i in tokenizer(part, add_special_tokens=False)["input_ids"]]
        assert whole == [tokenizer.bos_token_id] + ids


def test_some_targets_take_several_tokens_and_most_take_one(tokenizer):
    targets = [f" {pair.output}" for rule in RULES for pair in load_pairs(f"lexicon_{rule}")[0]]
    lengths = [len(ids) for ids in tokenizer(targets, add_special_tokens=False)["input_ids"]]
    assert 0.05 <= sum(length > 1 for length in lengths) / len(lengths) <= 0.3


def test_ten_examples_tell_it_the_rule_and_none_do_not(model, tokenizer, evaluate):
    table = evaluate.report(model, tokenizer, seeds=[0], limit=LIMIT)["average"]
    assert 0.85 <= table["ten-shot, seed 0"] <= 0.97
    assert table["zero-shot"] <= 0.3


def test_greedy_generation_stops_the_answer_with_a_line_break(model, tokenizer):
    split = load_task("lexicon_antonym")
    inputs = tokenizer(few_shot_prompt(split.train, split.test[0].prompt), return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "\n" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
