"""In-context vectors against NumPy: hidden states of single rows, joint SVD, mean, the rule they are applied by."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from test_hf_laai import requests
from tiny import BLOCK_PATHS, LAYERS, MLP_PATHS, tiny_model, tiny_tokenizer

import laai_core as laai
from lm_eval_laai.model import HFLaai

icv = importlib.import_module("lm_eval_laai.methods.in_context_vector")  # the package has a function of that name

TOKENIZER = tiny_tokenizer(bos=True)
WORDS = [("hot", "cold"), ("a wall", "the floor"), ("in", "out"), ("it's", "its!")]
EXAMPLES = [laai.Example(f"Q: {word}\nA:", f" {answer}") for word, answer in WORDS]
BARE = [("hot", "cold"), ("a wall", "the floor"), ("in", "out"), ("its", "its")]


@torch.no_grad()
def last_states(model, name: str, text: str) -> np.ndarray:
    """Embedding and block outputs at the last token of one text, in one vector."""
    seen = []
    modules = [
        model.get_input_embeddings(),
        *(model.get_submodule(BLOCK_PATHS[name].format(i)) for i in range(LAYERS)),
    ]
    handles = [
        m.register_forward_hook(lambda m, a, out: seen.append((out[0] if isinstance(out, tuple) else out)[0, -1]))
        for m in modules
    ]
    model(input_ids=torch.tensor([TOKENIZER.encode(text)]), use_cache=False)
    for handle in handles:
        handle.remove()
    return np.concatenate([state.numpy() for state in seen]).astype(np.float64)


def direction(model, name: str) -> np.ndarray:
    """[LAYERS + 1, hidden]"""
    rows = np.stack([last_states(model, name, f" {y}") - last_states(model, name, f" {x}") for x, y in BARE])
    mean = rows.mean(axis=0)
    u, _, vt = np.linalg.svd(rows - mean)
    first = vt[0] * np.sign(u[np.argmax(np.abs(u[:, 0])), 0])
    return (mean + first).reshape(LAYERS + 1, -1)


@pytest.mark.parametrize("name", ["Llama", "GPT2", "GPTNeoX", "Gemma2", "OPT", "Falcon"])
def test_equals_numpy(name):
    model = tiny_model(name)
    made = icv.in_context_vector(model, TOKENIZER, EXAMPLES, seed=4, task="laai_words")
    assert (made.site, made.position, made.operation, made.scale) == ("mlp", "all", "icv", 0.1)
    assert made.layers == list(range(LAYERS))
    want = direction(model, name)
    for layer in made.layers:
        assert np.allclose(made.vector(layer).numpy(), want[layer + 1], atol=1e-4)
    assert made.metadata["method"] == "icv" and made.metadata["training"]["n_train"] == 4
    one = icv.in_context_vector(model, TOKENIZER, EXAMPLES, layer=-1)
    assert one.layers == [LAYERS - 1]
    assert torch.equal(one.vector(LAYERS - 1), made.vector(LAYERS - 1))


def step(x: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Liu et al.'s rule on one activation, as their code has it."""
    unit = v / np.linalg.norm(v)
    cosine = -(x @ v) / (np.linalg.norm(x) * np.linalg.norm(v))
    moved = x / np.linalg.norm(x) + 0.1 * (1 + max(0.0, cosine)) * unit
    return np.linalg.norm(x) * moved / np.linalg.norm(moved)


def test_hf_laai_gives_what_numpy_hooks_give(tmp_path):
    model = tiny_model("Llama")
    icv.in_context_vector(model, TOKENIZER, EXAMPLES).save(tmp_path / "icv.safetensors")
    want = direction(model, "Llama")
    lm = HFLaai(tiny_model("Llama"), str(tmp_path / "icv.safetensors"), tokenizer=TOKENIZER, batch_size=3)
    pairs = [(example.prompt, str(example.target)) for example in EXAMPLES]
    got = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)

    def hook(layer):
        def change(module, args, output):
            rows = [step(row, want[layer + 1]) for row in output[0].double().numpy()]
            return torch.tensor(np.stack(rows)).to(output).unsqueeze(0)

        return change

    for (prompt, target), (score, _) in zip(pairs, got, strict=True):
        context, continuation = lm._encode_pair(prompt, target)
        scores = []
        for steered in (True, False):
            handles = [
                model.get_submodule(MLP_PATHS["Llama"].format(layer)).register_forward_hook(hook(layer))
                for layer in range(LAYERS if steered else 0)
            ]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([context + continuation[:-1]]), use_cache=False).logits[0]
            for handle in handles:
                handle.remove()
            logprobs = logits[len(context) - 1 :].log_softmax(-1)
            scores.append(float(sum(logprobs[i, token] for i, token in enumerate(continuation))))
        assert score == pytest.approx(scores[0], abs=1e-4)
        assert abs(scores[0] - scores[1]) > 1e-3


def test_texts_are_bare_words_and_whole_prompts_elsewhere():
    assert icv.input_text(laai.Example("Q: well-known\nA:", " x")) == " wellknown"
    assert icv.input_text(laai.Example("Say: no", " x")) == " Say no"
    assert icv.output_text(laai.Example("q", " ?!")) == " ?!"


def test_the_model_stays_as_it_was():
    model = tiny_model("Llama").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    icv.in_context_vector(model, TOKENIZER, EXAMPLES)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("examples", "said"),
    [
        (EXAMPLES[:1], "two examples or more"),
        ([laai.Example("x", options=[" a", " b"], distribution=[0.5, 0.5])] * 4, "have answer options"),
    ],
)
def test_refusals(examples, said):
    with pytest.raises(laai.LaaiError, match=said):
        icv.in_context_vector(tiny_model("Llama"), TOKENIZER, examples)
