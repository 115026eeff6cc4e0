"""Function vectors: heads, effects and vector against full forwards with hooks by hand; a planted head is found."""

from __future__ import annotations

import importlib
import random

import pytest
import slow_reference
import torch
from test_hf_laai import harness_model, requests
from tiny import BLOCK_PATHS, HEADS, LAYERS, PROJECTION_PATHS, head_dim, tiny_model, tiny_tokenizer
from tqdm import tqdm

import laai_core as laai
from laai_core.locate import locate

fv = importlib.import_module("lm_eval_laai.methods.function_vector")  # the package has a function of that name

TOKENIZER = tiny_tokenizer(bos=True)
WORDS = [("hot", " cold"), ("wall", " floor"), ("in", " out"), ("the", " a"), ("q", " z")]
EXAMPLES = [laai.Example(f"Q: {word}\nA:", answer) for word, answer in WORDS]


def prompts(lengths: list[int], seed: int) -> list:
    draw = random.Random(seed)
    return [fv.Prompt([draw.randint(3, 299) for _ in range(length)], draw.randint(3, 299)) for length in lengths]


@torch.no_grad()
def run(model, ids: list[int], path: str, replace=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Last logits of one unpadded row, and the input of the module at `path` at its last token."""
    seen = []

    def hook(module, args):
        x = args[0].clone()
        if replace is not None:
            place, value = replace
            x[0, -1, place] = value
        seen.append(x[0, -1])
        return (x, *args[1:])

    handle = model.get_submodule(path).register_forward_pre_hook(hook)
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    handle.remove()
    return logits, seen[0]


# Fused and unfused, wide heads, learnt positions, windows shorter than a prompt.
@pytest.mark.parametrize("name", ["Llama", "GPT2", "GPTNeoX", "Gemma2", "OPT", "Falcon", "Gemma3TextWindow"])
def test_means_and_effects_equal_full_forwards(name):
    model, d = tiny_model(name), head_dim(name)
    layout = locate(model)
    shown, asked = prompts([4, 14, 9], seed=1), prompts([20, 2], seed=2)
    with torch.no_grad(), tqdm(disable=True) as bar:
        means = fv.mean_head_outputs(layout, shown, bar)
        effects = fv.indirect_effects(layout, asked, means, bar)
    assert len(effects) == LAYERS * HEADS
    largest = 0.0
    for layer in range(LAYERS):
        path = PROJECTION_PATHS[name].format(layer)
        mean = torch.stack([run(model, prompt.ids, path)[1] for prompt in shown]).mean(0)
        assert torch.allclose(means[layer].flatten(), mean, atol=1e-5)
        for head in range(HEADS):
            place = slice(head * d, (head + 1) * d)
            rises = []
            for prompt in asked:
                clean = run(model, prompt.ids, path)[0].softmax(-1)[prompt.answer]
                patched = run(model, prompt.ids, path, (place, mean[place]))[0].softmax(-1)[prompt.answer]
                rises.append(float(patched - clean))
            assert effects[layer, head] == pytest.approx(sum(rises) / len(rises), abs=1e-6, rel=1e-3)
            largest = max(largest, max(map(abs, rises)))
    assert largest > 1e-4, "no head had an effect to compare"


def planted(layer: int, head: int, marker: int, answer: int):
    """A model one of whose heads tells the last token whether `marker` came before, by writing `answer`; the others
    read and write at random, far weaker."""
    model, d = tiny_model("Llama"), head_dim("Llama")
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.mul_(0.05)
            block.mlp.down_proj.weight.zero_()
        attention = model.model.layers[layer].self_attn
        place = slice(head * d, (head + 1) * d)
        attention.q_proj.weight[place] = 0  # attends to all tokens alike
        group = head // 2  # two query heads share a value head
        direction = torch.nn.functional.normalize(model.model.embed_tokens.weight[marker], dim=0)
        attention.v_proj.weight[group * d] = 30 * direction
        attention.o_proj.weight[:, place] = 0
        attention.o_proj.weight[:, head * d] = 3 * torch.nn.functional.normalize(model.lm_head.weight[answer], dim=0)
    return model


@pytest.mark.parametrize("place", [(0, 3), (1, 2), (2, 0)])
def test_a_planted_head_is_found(place):
    marker, answer = 17, 42
    model = planted(*place, marker, answer)
    layout = locate(model)
    draw = random.Random(0)
    plain = [[draw.choice([t for t in range(3, 299) if t != marker]) for _ in range(12)] for _ in range(8)]
    showing = [fv.Prompt([t if i % 4 else marker for i, t in enumerate(ids[:-1])] + ids[-1:], answer) for ids in plain]
    hiding = [fv.Prompt(ids, answer) for ids in plain]
    with torch.no_grad(), tqdm(disable=True) as bar:
        effects = fv.indirect_effects(layout, hiding, fv.mean_head_outputs(layout, showing, bar), bar)
    first, second = sorted(effects, key=lambda where: -effects[where])[:2]
    assert first == place
    assert effects[first] > 0.1 and effects[first] > 10 * abs(effects[second])


def test_dropout_is_off_while_padding_is_tried():
    model = tiny_model("GPT2")
    want = fv.function_vector(model, TOKENIZER, EXAMPLES)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    made = fv.function_vector(model.train(), TOKENIZER, EXAMPLES)
    assert torch.equal(made.vector(1), want.vector(1)) and model.training


@pytest.mark.parametrize("name", ["Llama", "GPT2", "GPTNeoX", "Gemma2", "Gemma3Text", "Olmo2", "Granite"])
def test_the_vector_is_what_the_chosen_heads_write(name, monkeypatch):
    """With the scale of the norm behind attention, if the block has one: that of the mean output of all heads."""
    monkeypatch.setattr(fv, "PROMPTS", 9)
    model = tiny_model(name)
    for block in model.model.layers if name == "Granite" else []:
        block.residual_multiplier = 3
    made = fv.function_vector(model, TOKENIZER, EXAMPLES, heads=5, task="laai_words")
    facts = made.metadata["training"]
    assert (made.site, made.position, made.operation, made.layers) == ("residual", "last", "add", [1])
    assert made.metadata["method"] == "fv" and facts["shots"] == 4 and len(facts["heads"]) == 5
    effects = [effect for *_, effect in facts["heads"]]
    assert effects == sorted(effects, reverse=True)
    # The same prompts, each run alone.
    draw = random.Random(0)
    shown = fv.few_shot_prompts(TOKENIZER, EXAMPLES, fv.PROMPTS, False, draw)
    total = torch.zeros_like(made.vector(1))
    for layer, head, _ in facts["heads"]:
        path = PROJECTION_PATHS[name].format(layer)
        mean = torch.stack([run(model, prompt.ids, path)[1] for prompt in shown]).mean(0)
        place = slice(head * head_dim(name), (head + 1) * head_dim(name))
        weight = model.get_submodule(path).weight.detach()
        weight = weight.T if name == "GPT2" else weight  # [hidden, D]
        part = weight[:, place] @ mean[place]
        if name in ("Gemma2", "Gemma3Text", "Olmo2"):
            norm = model.get_submodule(f"model.layers.{layer}.post_attention_layernorm")
            part = part * (norm.weight + (name != "Olmo2")) / (weight @ mean).square().mean().sqrt()
        total += part * (3 if name == "Granite" else 1)
    assert torch.allclose(made.vector(1), total, atol=1e-4)
    assert made.vector(1).norm() > 0.1


def test_prompts_show_the_others_and_never_their_own_answer():
    for shuffled in (False, True):
        draw = random.Random(3)
        made = fv.few_shot_prompts(TOKENIZER, EXAMPLES, 10, shuffled, draw)
        paired = 0
        for number, prompt in enumerate(made):
            asked = EXAMPLES[number % 5]
            text = TOKENIZER.decode(prompt.ids, skip_special_tokens=True)
            *shots, question = text.split("\n\n")
            assert question == asked.prompt and len(shots) == 4
            others = [e for e in EXAMPLES if e is not asked]
            assert sorted(s.split("\nA:")[0] for s in shots) == sorted(e.prompt.split("\nA:")[0] for e in others)
            assert sorted(s.split("\nA:")[1] for s in shots) == sorted(e.target for e in others)
            assert prompt.answer == TOKENIZER.encode(text + asked.target)[len(prompt.ids)]
            paired += sum(f"{e.prompt}{e.target}" in shots for e in others)
        assert paired < 25 if shuffled else paired == 40
        assert len({tuple(p.ids) for p in made}) > 5  # orders are drawn


def test_the_same_seed_gives_the_same_file_and_the_model_stays(monkeypatch):
    monkeypatch.setattr(fv, "PROMPTS", 9)
    model = tiny_model("Llama").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, again, other = (fv.function_vector(model, TOKENIZER, EXAMPLES, seed=seed) for seed in (0, 0, 1))
    assert first.sha256 == again.sha256 != other.sha256
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_default_counts():
    assert len(fv.function_vector(tiny_model("Llama"), TOKENIZER, EXAMPLES).metadata["training"]["heads"]) == 10
    for heads, expected in ((48, 10), (448, 10), (1024, 20), (5120, 100)):
        assert fv.default_heads(heads) == expected
    assert fv.default_heads(4) == 4


def test_hf_laai_gives_what_a_slow_hook_gives(tmp_path):
    made = fv.function_vector(tiny_model("Llama"), TOKENIZER, EXAMPLES)
    made.save(tmp_path / "task.safetensors")
    lm = harness_model(iv=str(tmp_path / "task.safetensors"), batch_size=4)
    (layer,) = made.layers
    path = BLOCK_PATHS["Llama"].format(layer)
    spec = {"path": path, "vector": made.vector(layer), "site": "residual", "position": "last"}
    zero_shot = [(example.prompt, f"{example.target}\n") for example in EXAMPLES]
    many_shot = [(example.behind(EXAMPLES[:3]), f"{example.target}\n") for example in EXAMPLES]
    got = lm.loglikelihood(requests("loglikelihood", zero_shot + many_shot), disable_tqdm=True)
    moved = []
    for (prompt, target), (score, greedy) in zip(zero_shot + many_shot, got, strict=True):
        want = slow_reference.loglikelihood(lm.model, *lm._encode_pair(prompt, target), spec)
        assert (score, greedy) == (pytest.approx(want[0], abs=1e-4), want[1])
        untouched = slow_reference.loglikelihood(lm.model, *lm._encode_pair(prompt, target), None)
        moved.append(abs(untouched[0] - want[0]))
    assert max(moved) > 1e-1


@pytest.mark.parametrize(
    ("examples", "options", "said"),
    [
        (EXAMPLES[:2], {}, "three examples or more"),
        ([laai.Example("x", options=[" a", " b"], distribution=[0.5, 0.5])] * 4, {}, "have answer options"),
        (EXAMPLES, {"heads": 13}, "1 to 12"),
        (EXAMPLES, {"heads": 0}, "1 to 12"),
        (EXAMPLES, {"layer": 3}, "layer 3 is out of range"),
        ([laai.Example(f"{e.prompt}{'x' * 40}", e.target) for e in EXAMPLES], {}, "the model takes 128"),
    ],
)
def test_refusals(examples, options, said):
    with pytest.raises(laai.LaaiError, match=said):
        fv.function_vector(tiny_model("Llama"), TOKENIZER, examples, **options)
