"""PEFT baselines: what they are put on and trained on, that they score alike everywhere and leave no trace."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from itertools import islice
from pathlib import Path

import peft
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from test_apply import EVERY
from test_hf_laai import requests
from tiny import LAYERS, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

import laai_core as laai
from laai_core.locate import locate
from lm_eval_laai.methods import METHODS, select
from lm_eval_laai.methods import adapters as adapters_module
from lm_eval_laai.methods.adapters import (
    ADAPTERS,
    RATES,
    VIRTUAL_TOKENS,
    _Data,
    _start_from,
    _Trainer,
    _wrapped,
    description,
    train_adapter,
)
from lm_eval_laai.methods.method import ADAPTER_CONFIG, ADAPTER_STEPS, is_adapter
from lm_eval_laai.methods.select import HEAD_START, PATIENCE, last_good

TOKENIZER = tiny_tokenizer(bos=True)
EXAMPLES = [laai.Example(f"Q: {x}\nA:", f" {y}") for x, y in [("hot", "cold"), ("the wall", "a floor"), ("in", "out")]]
OPINIONS = [
    laai.Example("which one", options=[" a", " b", " other"], distribution=[0.5, 0.3, 0.2]),
    laai.Example("or that", options=[" a", " none at all"], distribution=[0.9, 0.1]),
]
STEPS = 4


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A model's folder, as long as the tokenizer: with `peft=` the harness cuts the embedding to that."""
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model("Llama")
    model.resize_token_embeddings(len(TOKENIZER))
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def loaded(saved: Path):
    return AutoModelForCausalLM.from_pretrained(saved).eval()


@pytest.fixture(scope="module")
def adapters(saved, tmp_path_factory) -> dict[str, Path]:
    """Every kind trained on EXAMPLES."""
    folders = {method: tmp_path_factory.mktemp("adapters") / method for method in ADAPTERS}
    for method, folder in folders.items():
        layer = 1 if method == "lora" else None
        train_adapter(method, loaded(saved), TOKENIZER, EXAMPLES, folder, layer, 0, STEPS, "laai_lexicon_antonym")
    return folders


# Where they go.


def test_lora_has_the_papers_parameters_on_llama_3_8b():
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wrapped = peft.get_peft_model(model, ADAPTERS["lora"](locate(model), 3))
    learnt = {name: p.numel() for name, p in wrapped.named_parameters() if p.requires_grad}
    assert sum(learnt.values()) == 53_248
    assert all(".layers.3.self_attn." in name for name in learnt)


FUSED = {"GPT2": "c_attn", "GPTNeoX": "query_key_value", "Falcon": "query_key_value", "Phi3": "qkv_proj"}
DOWN = {
    "GPT2": "mlp.c_proj",
    "GPTNeoX": "mlp.dense_4h_to_h",
    "Falcon": "mlp.dense_4h_to_h",
    "GPTJ": "mlp.fc_out",
    "OPT": "fc2",
}


@pytest.mark.parametrize("name", EVERY)
def test_modules_are_found_by_structure(name):
    model = tiny_model(name)
    layout = locate(model)
    lora = ADAPTERS["lora"](layout, 1).target_modules
    ends = [FUSED[name]] if name in FUSED else ["q_proj", "v_proj"]
    assert sorted(path.split(".")[-1] for path in lora) == ends
    assert all(".1." in path for path in lora)
    if name == "Mixtral":
        with pytest.raises(laai.LaaiError, match="expected one linear module from the feed-forward"):
            ADAPTERS["ia3"](layout, None)
        return
    ia3 = ADAPTERS["ia3"](layout, None)
    ends = [FUSED[name]] if name in FUSED else ["k_proj", "v_proj"]
    assert len(ia3.target_modules) == LAYERS * (len(ends) + 1)
    assert len(ia3.feedforward_modules) == LAYERS
    assert all(path.endswith(DOWN.get(name, "mlp.down_proj")) for path in ia3.feedforward_modules)
    # PEFT finds what is meant, and each adapter changes what the model says once it is not at its start.
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = model(ids).logits
    for method in ADAPTERS:
        with _wrapped(layout, ADAPTERS[method](layout, 1 if method == "lora" else None), 0) as wrapped:
            named = {n for n, p in wrapped.named_parameters() if p.requires_grad}
            assert len(named) == {"lora": 2 * len(lora), "ia3": len(ia3.target_modules), "soft_prompt": 1}[method]
            with torch.no_grad():
                for n, p in wrapped.named_parameters():
                    if n in named:
                        p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
            changed = wrapped(ids).logits[:, -4:]
        assert (changed - plain).abs().max() > 1e-3
        assert torch.equal(model(ids).logits, plain)


# What they are trained on.


@pytest.mark.parametrize("examples", [EXAMPLES, OPINIONS], ids=["nll", "kl"])
@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_the_loss_is_the_one_a_vector_is_trained_on(method, examples, tmp_path):
    """LoRA and IA3 start as nothing: their first loss is a zero vector's."""
    train_adapter(method, tiny_model("Llama"), TOKENIZER, examples, tmp_path / "a", 1, 0, STEPS)
    record = METHODS["lora"].record(tmp_path / "a")
    zero = laai.train(tiny_model("Llama"), TOKENIZER, examples, layer=1, steps=1, start="zero")
    assert record["task_loss_before"] == pytest.approx(zero.history[0].loss, rel=1e-5)
    assert record["task_loss"] < record["task_loss_before"]
    assert record["loss"] == ("nll" if examples is EXAMPLES else "kl")
    assert record["examples_sha256"] == zero.intervention.metadata["training"]["examples_sha256"]


def loss_by_hand(wrapped, examples) -> torch.Tensor:
    """Mean over examples of -log p(target and line break | prompt): one row without padding each."""
    losses = []
    for example in examples:
        prompt = TOKENIZER.encode(example.prompt)
        target = TOKENIZER.encode(f"{example.prompt}{example.target}\n")[len(prompt) :]
        logits = wrapped(input_ids=torch.tensor([prompt + target[:-1]])).logits[0, -len(target) :]
        losses.append(-sum(row.log_softmax(-1)[token] for row, token in zip(logits, target, strict=True)))
    return sum(losses) / len(losses)


def training_by_hand(saved: Path, examples, rate: float):
    """The model under IA3 before the first step, after one, after two, ..."""
    wrapped = peft.get_peft_model(loaded(saved), ADAPTERS["ia3"](locate(loaded(saved)), None))
    learnt = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, weight_decay=0.0, lr=rate)
    while True:
        yield wrapped
        optimizer.zero_grad()
        loss_by_hand(wrapped, examples).backward()
        optimizer.step()


def held_out_by_hand(saved: Path, rate: float):
    """Every example is held out once: the bounded losses after one step, two, ... of a training on the others."""
    trainings = [training_by_hand(saved, [e for e in EXAMPLES if e is not out], rate) for out in EXAMPLES]
    for models in islice(zip(*trainings, strict=True), 1, None):
        with torch.no_grad():
            losses = [float(loss_by_hand(model, [out])) for model, out in zip(models, EXAMPLES, strict=True)]
        yield [-math.log((1 - select.FLOOR) * math.exp(-loss) + select.FLOOR) for loss in losses]


@pytest.fixture
def unbounded(monkeypatch) -> None:
    """The tiny model gives every answer less than the usual bound."""
    monkeypatch.setattr(select, "FLOOR", 1e-12)


def test_training_and_cross_validation_by_hand(saved, tmp_path, unbounded):
    train_adapter("ia3", loaded(saved), TOKENIZER, EXAMPLES, tmp_path / "a", None, 0, STEPS)
    record = METHODS["ia3"].record(tmp_path / "a")
    for one in record["tried"]:
        assert one["steps"] == STEPS
        expected = statistics.fmean(next(islice(held_out_by_hand(saved, one["lr"]), STEPS - 1, None)))
        assert one["held_out_loss"] == one["smallest_loss"] == pytest.approx(expected, rel=1e-3)
    best = min(record["tried"], key=lambda one: one["smallest_loss"])
    assert [one["lr"] for one in record["tried"]] == list(RATES) and record["lr"] == best["lr"]
    whole = next(islice(training_by_hand(saved, EXAMPLES, record["lr"]), STEPS, None))
    assert record["task_loss"] == pytest.approx(float(loss_by_hand(whole, EXAMPLES).detach()), rel=1e-3)


def test_rates_and_steps_are_chosen_by_the_rules_of_a_vector(saved, tmp_path, monkeypatch, unbounded):
    """Against every fold trained alone."""
    monkeypatch.setattr(adapters_module, "RATES", (1e-1, 3e-1, 1e-3))
    train_adapter("ia3", loaded(saved), TOKENIZER, EXAMPLES, tmp_path / "a")
    record = METHODS["ia3"].record(tmp_path / "a")
    tried, rival, ends = [], [], []
    for rate in adapters_module.RATES:
        held_out, losses = [], []
        for found in islice(held_out_by_hand(saved, rate), ADAPTER_STEPS):
            held_out.append(found)
            losses.append(statistics.fmean(found))
            behind = len(losses) >= HEAD_START and min(losses) > min(rival[: len(losses)], default=math.inf)
            flat = len(losses) > PATIENCE and min(losses[-PATIENCE:]) > min(losses)
            if behind or flat:
                break
        ends.append("behind" if behind else "flat" if flat else "limit")
        steps = last_good(torch.tensor(held_out))
        tried.append({"lr": rate, "steps": steps, "held_out_loss": losses[steps - 1], "smallest_loss": min(losses)})
        rival = min(losses, rival, key=lambda curve: min(curve, default=math.inf))
    assert {"behind", "flat"} <= {*ends}  # these rates show both
    assert record["tried"] == [pytest.approx(one, rel=2e-3) for one in tried]
    best = min(tried, key=lambda one: one["smallest_loss"])
    assert (record["lr"], record["steps"]) == (best["lr"], best["steps"])


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("method", ["lora", "soft_prompt"])
def test_the_losses_are_those_of_full_logits(method, name):
    """Of surveys, where options share logits."""
    layout = locate(tiny_model(name))
    with _wrapped(layout, ADAPTERS[method](layout, 1), 0) as wrapped:
        trainer = _Trainer(wrapped, _Data(layout, TOKENIZER, OPINIONS))
        batch = trainer._data.batch(None)
        with torch.no_grad():
            found = trainer._per_example(batch)
            logits = wrapped(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        logits = logits[:, -batch.input_ids.shape[1] :]
        scores = logits[batch.row, batch.column].log_softmax(-1).gather(1, batch.token.unsqueeze(1)).squeeze(1)
        logprobs = torch.zeros(len(batch.example)).index_add(0, batch.continuation, scores)
        torch.testing.assert_close(found, trainer._data.objective.per_example(logprobs), rtol=1e-5, atol=1e-5)


def test_a_rate_ends_where_a_loss_is_not_finite(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(adapters_module, "RATES", (1e-2, 3e37))
    train_adapter("ia3", loaded(saved), TOKENIZER, EXAMPLES, tmp_path / "a")
    record = METHODS["ia3"].record(tmp_path / "a")
    assert record["lr"] == 1e-2
    assert record["tried"][1] == {"lr": 3e37, "steps": ADAPTER_STEPS, "held_out_loss": None, "smallest_loss": None}


@torch.no_grad()
def directly(model, folder: Path, prompt: list[int], target: list[int]) -> float:
    """log p(target | prompt) by PEFT: one row without padding."""
    wrapped = peft.PeftModel.from_pretrained(model, str(folder)).eval()
    logits = wrapped(input_ids=torch.tensor([prompt + target[:-1]])).logits[0]
    logprobs = logits[-len(target) :].log_softmax(-1)
    return float(sum(logprobs[i, token] for i, token in enumerate(target)))


@pytest.mark.parametrize("method", ADAPTERS)
def test_training_peft_and_the_harness_give_the_same_scores(method, saved, adapters):
    lm = HFLM(str(saved), peft=str(adapters[method]), device="cpu", batch_size=2)
    pairs = [(example.prompt, f"{example.target}\n") for example in EXAMPLES]
    harness = [score for score, _ in lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)]
    direct = [directly(loaded(saved), adapters[method], *lm._encode_pair(*pair)) for pair in pairs]
    assert harness == pytest.approx(direct, abs=1e-4)
    record = METHODS["lora"].record(adapters[method])
    assert -sum(direct) / len(direct) == pytest.approx(record["task_loss"], abs=1e-4)
    assert abs(record["task_loss"] - record["task_loss_before"]) > 1e-2


def test_folds():
    def folds(count):
        masks = _Data(locate(tiny_model("Llama")), TOKENIZER, EXAMPLES[:1] * count).folds
        return [[number for number, out in enumerate(mask) if out] for mask in masks]

    assert folds(10) == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    assert folds(2) == [[0], [1]] and folds(1) == []


def test_one_example_is_not_cross_validated(tmp_path):
    train_adapter("ia3", tiny_model("Llama"), TOKENIZER, EXAMPLES[:1], tmp_path / "one", None, 0, 1)
    record = METHODS["lora"].record(tmp_path / "one")
    assert record["tried"] == [] and record["lr"] == RATES[0]


def test_a_soft_prompt_starts_from_the_tasks_description(saved, tmp_path):
    assert description("laai_lexicon_en_fr") == description("laai_en_fr") == "the French translation of this word"
    assert description("laai_survey_moderate") == description(None)
    model = loaded(saved)
    ids = TOKENIZER.encode(description("laai_en_fr"), add_special_tokens=False)[:VIRTUAL_TOKENS]
    assert len(ids) == VIRTUAL_TOKENS
    train_adapter("soft_prompt", model, TOKENIZER, EXAMPLES, tmp_path / "a", None, 0, 1, "laai_en_fr")
    weight = peft.PeftModel.from_pretrained(loaded(saved), str(tmp_path / "a")).get_prompt(1)[0]
    moved = (weight - model.get_input_embeddings().weight[ids]).abs().max()
    assert 0 < moved < 1.01 * max(RATES)  # one step of AdamW moves every entry by the rate


def test_a_short_description_is_repeated():
    model = tiny_model("Llama")
    with _wrapped(locate(model), ADAPTERS["soft_prompt"](locate(model), None), 0) as wrapped:
        _start_from(wrapped, TOKENIZER, "abc")
        start = wrapped.get_prompt(1)[0]
    ids = TOKENIZER.encode("abc", add_special_tokens=False)
    assert len(ids) == 3
    assert torch.equal(start, model.get_input_embeddings().weight[[*ids, *ids, *ids[:2]]])


# What they leave.


def state(model):
    """Everything that could have been changed, and the parameters' bits."""
    return (
        [(name, id(module), module.training) for name, module in model.named_modules()],
        [
            (name, p.requires_grad, hashlib.sha256(p.detach().numpy().tobytes()).hexdigest())
            for name, p in model.named_parameters()
        ],
        sorted(vars(model)),
        model.config.to_dict(),
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
    )


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
@pytest.mark.parametrize("method", ADAPTERS)
def test_the_model_stays_as_it_was(method, name, tmp_path):
    model = tiny_model(name).train()
    model.config.pretraining_tp = 2  # which PEFT sets to 1
    next(model.parameters()).requires_grad_(False)
    before, random = state(model), torch.random.get_rng_state()
    layer = 1 if method == "lora" else None
    train_adapter(method, model, TOKENIZER, EXAMPLES, tmp_path / "a", layer, 0, 1)
    assert state(model) == before
    with pytest.raises(KeyboardInterrupt), _wrapped(locate(model), ADAPTERS[method](locate(model), layer), 0):
        raise KeyboardInterrupt
    assert state(model) == before
    assert torch.equal(torch.random.get_rng_state(), random)


def test_what_is_in_the_folder(adapters, saved):
    for method, folder in adapters.items():
        assert sorted(path.name for path in folder.iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
            "laai.json",
        ]
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]
        assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
        assert is_adapter(folder)
        for path in folder.glob("*.json"):
            assert str(saved) not in path.read_text()
        facts = json.loads((folder / "laai.json").read_text())
        assert facts["method"] == method and facts["base_model"] == saved.name
        assert facts["training"]["steps"] == STEPS and math.isfinite(facts["training"]["task_loss"])


def test_the_same_seed_gives_the_same_bytes(saved, adapters, tmp_path):
    weights = {}
    for name, seed in (("again", 0), ("other", 1)):
        train_adapter(
            "lora", loaded(saved), TOKENIZER, EXAMPLES, tmp_path / name, 1, seed, STEPS, "laai_lexicon_antonym"
        )
        weights[name] = (tmp_path / name / "adapter_model.safetensors").read_bytes()
    assert weights["again"] == (adapters["lora"] / "adapter_model.safetensors").read_bytes() != weights["other"]
    # A folder that is there is replaced whole.
    (tmp_path / "again" / "left.txt").touch()
    train_adapter("ia3", loaded(saved), TOKENIZER, EXAMPLES, tmp_path / "again", None, 0, 1)
    assert not (tmp_path / "again" / "left.txt").exists() and METHODS["lora"].record(tmp_path / "again")["steps"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "other"]


def test_the_name_of_the_configuration_is_pefts() -> None:
    assert ADAPTER_CONFIG == peft.utils.CONFIG_NAME
