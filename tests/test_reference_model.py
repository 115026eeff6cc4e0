"""The bundled reference model: it loads, it is small, and able without being saturated."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from laai_core.data import load_pairs, load_task

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "reference_model" / "weights"
RULES = ["antonym", "synonym", "en_fr", "en_de"]
LIMIT = 60  # test words a rule


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(WEIGHTS).eval()


@pytest.fixture(scope="module")
def eager():
    """With the attention it was trained with."""
    return AutoModelForCausalLM.from_pretrained(WEIGHTS, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(WEIGHTS)


@pytest.fixture(scope="module")
def scripts():
    """The training script's modules; the scripts of that folder import one another by name."""
    sys.path.insert(0, str(WEIGHTS.parent))
    try:
        import blinkers
        import documents
        import evaluate
        import train
        import unreadable
    finally:
        sys.path.remove(str(WEIGHTS.parent))
    return SimpleNamespace(
        blinkers=blinkers, documents=documents, evaluate=evaluate, train=train, unreadable=unreadable
    )


@pytest.fixture(scope="module")
def documents(tokenizer, scripts):
    return scripts.documents.Documents(tokenizer.backend_tokenizer, scripts.train.LENGTH, scripts.train.SURVEY_LENGTH)


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
        whole = tokenizer(example.behind([example, example]))["input_ids"]
        parts = [example.prompt, f"{example.target}\n", "\n"] * 2 + [example.prompt]
        ids = [i for part in parts for i in tokenizer(part, add_special_tokens=False)["input_ids"]]
        assert whole == [tokenizer.bos_token_id] + ids


def test_some_targets_take_several_tokens_and_most_take_one(tokenizer):
    targets = [f" {pair.output}" for rule in RULES for pair in load_pairs(f"lexicon_{rule}")[0]]
    lengths = [len(ids) for ids in tokenizer(targets, add_special_tokens=False)["input_ids"]]
    assert 0.05 <= sum(length > 1 for length in lengths) / len(lengths) <= 0.3


def test_ten_examples_tell_it_the_rule_and_none_do_not(model, tokenizer, scripts):
    table = scripts.evaluate.report(model, tokenizer, seeds=[0], limit=LIMIT)["average"]
    assert 0.85 <= table["ten-shot, seed 0"] <= 0.97
    assert table["zero-shot"] <= 0.3


def test_greedy_generation_stops_the_answer_with_a_line_break(model, tokenizer):
    split = load_task("lexicon_antonym")
    inputs = tokenizer(split.test[0].behind(split.train), return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "\n" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def test_pieces_of_an_opinion_document_are_the_tokens_of_its_text(tokenizer, documents):
    ids, labels, _ = documents.survey_batch(np.random.default_rng(0), 3)
    for row, known in zip(ids, labels != -100, strict=True):
        tokens = row[row != tokenizer.pad_token_id].tolist()
        assert tokenizer(tokenizer.decode(tokens, skip_special_tokens=True))["input_ids"] == tokens
        answers = tokenizer.decode(row[known]).split()
        assert len(answers) > 5 and all(answer in "ABCDEF" for answer in answers)


def test_after_questions_in_no_language_it_takes_any_option_for_as_likely(model, tokenizer, scripts):
    """Of documents no training step drew (steps seed theirs with two numbers), and as the harness reads them."""
    length = scripts.train.UNREADABLE_LENGTH
    questions = scripts.unreadable.Unreadable(tokenizer.backend_tokenizer, length)
    ids, last, shares = questions.batch(np.random.default_rng(5), 64)
    divergences = []
    for row, place, share in zip(ids, last, shares, strict=True):
        assert (row[place + 1 :] == tokenizer.pad_token_id).all() and place < length
        prompt = tokenizer.decode(row[1 : place + 1])
        options = prompt.count("\n") - 1
        letters = [tokenizer(f" {letter}", add_special_tokens=False)["input_ids"][0] for letter in "ABCDEF"[:options]]
        assert prompt.endswith("\nAnswer:") and share[letters].tolist() == pytest.approx([1 / options] * options)
        with torch.no_grad():
            answer = model(input_ids=row[None, : place + 1]).logits[0, -1].log_softmax(-1)
        divergences.append(-answer[letters].mean().item() - np.log(options))
    assert np.median(divergences) < 0.01 and np.mean(divergences) < 0.02


def test_blocks_that_see_everything_are_the_models_own(eager, documents, scripts):
    ids, *_ = documents.word_batch(np.random.default_rng(0), 4)
    everything = scripts.blinkers.causal(ids.shape[1]).expand(4, -1, -1)
    blocks = scripts.blinkers.blinkered(eager, scripts.train.READING, ())
    with torch.no_grad():
        *_, hidden = blocks(ids, everything, everything)
        assert torch.allclose(hidden, eager.model(ids).last_hidden_state, atol=1e-4)


def test_in_blinkered_rows_context_reaches_only_the_answers(eager, documents, scripts):
    """Another word in the first item changes what follows it: in an open row everything, else only at the answers."""
    train = scripts.train
    ids, labels, _ = documents.word_batch(np.random.default_rng(0), 8)
    other = ids.clone()
    other[:, 4] = ids[:, 4] + 1
    ends, asks = train.answer_ends(labels), train.last_prompt_tokens(labels)
    blocks = scripts.blinkers.blinkered(eager, train.READING, ())
    with torch.no_grad():
        seen = train.mostly_blinkered(labels)
        moved = (blocks(ids, *seen)[-1] - blocks(other, *seen)[-1]).abs().amax(-1) > 1e-6  # [rows, length]
    later = (ends.cumsum(1) > 0) & ~ends & (ids != eager.config.pad_token_id)  # of other items
    assert moved[0][later[0]].all()
    for row in range(1, len(ids)):
        assert moved[row][later[row] & asks[row]].all()
        assert not moved[row][later[row] & (labels[row] == -100) & ~asks[row]].any()
