"""What a vector writes: against formulas written out by hand, and against the model with all else held still."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_apply import intervention, vector_at
from tiny import (
    ARCHITECTURES,
    BLOCK_PATHS,
    HEADS,
    HIDDEN,
    LAYERS,
    MLP_PATHS,
    PROJECTION_PATHS,
    VOCABULARY,
    default_dtype,
    head_dim,
    tiny_model,
    tiny_tokenizer,
)

import laai_core as laai
from laai_core.apply import Edit
from laai_core.data.examples import read_examples
from laai_core.locate import locate
from lm_eval_laai.commands import cli, inspect
from lm_eval_laai.inspection.vocabulary import written

PROMPTS = [[2, 7, 30], [5], [9, 8, 41, 3, 77]]
SITES = {"heads": PROJECTION_PATHS, "residual": BLOCK_PATHS, "mlp": MLP_PATHS}


def first(value: Any) -> torch.Tensor:
    return value[0] if isinstance(value, tuple) else value


def end(value: Any) -> torch.Tensor:
    """The last token's row of one prompt's activation, float64."""
    return first(value).detach().reshape(-1, first(value).shape[-1])[-1].double()


@contextmanager
def hook(module: Any, run: Callable[..., Any], before: bool = False) -> Iterator[None]:
    handle = module.register_forward_pre_hook(run) if before else module.register_forward_hook(run)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def seen(model: Any, path: str, prompt: list[int], entering: bool = False) -> torch.Tensor:
    """What enters or leaves a module at the prompt's last token."""
    kept: list[torch.Tensor] = []
    module = model.get_submodule(path)
    run = (lambda m, args: kept.append(end(args[0]))) if entering else (lambda m, args, out: kept.append(end(out)))
    with hook(module, run, before=entering):
        model(input_ids=torch.tensor([prompt]), use_cache=False)
    return kept[0]


# By hand: one line a model for the projection, the way into the residual stream, and the way out of it.


def rms_norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean() + eps).sqrt() * gain


def layer_norm(x: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + eps).sqrt() * gain + bias


def slope(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor, along: torch.Tensor) -> torch.Tensor:
    step = 1e-5 * float(at.norm() / along.norm())
    return (function(at + step * along) - function(at - step * along)) / (2 * step)


def llama(model: Any, layer: int, prompt: list[int], part: torch.Tensor) -> torch.Tensor:
    w = {name: value.double() for name, value in model.state_dict().items()}
    direction = w[f"model.layers.{layer}.self_attn.o_proj.weight"] @ part
    eps = model.config.rms_norm_eps

    def out(r: torch.Tensor) -> torch.Tensor:
        return w["lm_head.weight"] @ rms_norm(r, w["model.norm.weight"], eps)

    return slope(out, seen(model, "model.norm", prompt, entering=True), direction)


def gpt2(model: Any, layer: int, prompt: list[int], part: torch.Tensor) -> torch.Tensor:
    w = {name: value.double() for name, value in model.state_dict().items()}
    direction = part @ w[f"transformer.h.{layer}.attn.c_proj.weight"]  # Conv1D: [in, out]
    eps = model.config.layer_norm_epsilon

    def out(r: torch.Tensor) -> torch.Tensor:
        normed = layer_norm(r, w["transformer.ln_f.weight"], w["transformer.ln_f.bias"], eps)
        return w["transformer.wte.weight"] @ normed

    return slope(out, seen(model, "transformer.ln_f", prompt, entering=True), direction)


def gemma2(model: Any, layer: int, prompt: list[int], part: torch.Tensor) -> torch.Tensor:
    w = {name: value.double() for name, value in model.state_dict().items()}
    eps, cap = model.config.rms_norm_eps, model.config.final_logit_softcapping
    path = f"model.layers.{layer}.post_attention_layernorm"
    attention = seen(model, path, prompt, entering=True)
    direction = w[f"model.layers.{layer}.self_attn.o_proj.weight"] @ part
    direction = slope(lambda a: rms_norm(a, 1 + w[f"{path}.weight"], eps), attention, direction)

    def out(r: torch.Tensor) -> torch.Tensor:
        logits = w["model.embed_tokens.weight"] @ rms_norm(r, 1 + w["model.norm.weight"], eps)
        return cap * torch.tanh(logits / cap)

    return slope(out, seen(model, "model.norm", prompt, entering=True), direction)


@pytest.mark.parametrize(("name", "by_hand"), [("Llama", llama), ("GPT2", gpt2), ("Gemma2", gemma2)])
@pytest.mark.parametrize("layer", [1, LAYERS - 1])
def test_equals_the_formula(name: str, by_hand: Any, layer: int) -> None:
    model = tiny_model(name)
    if name == "Gemma2":
        model.config.final_logit_softcapping = 2.0  # low enough to bend these logits
    iv = intervention(name, layer=layer, scale=0.5)
    layout = locate(model)
    found = written(layout, Edit.of(iv, layout), PROMPTS)[layer]
    width = head_dim(name)
    for head in range(HEADS):
        part = torch.zeros(HEADS, width, dtype=torch.float64)
        part[head] = 0.5 * iv.vector(layer)[head].double()  # the scale is in
        want = torch.stack([by_hand(model, layer, prompt, part.flatten()) for prompt in PROMPTS]).mean(0)
        assert want.abs().max() > 0.01
        torch.testing.assert_close(found.effects[head].double(), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
    sites = [seen(model, PROJECTION_PATHS[name].format(layer), prompt, entering=True) for prompt in PROMPTS]
    assert found.activation_rms == pytest.approx(float(torch.stack(sites).square().mean().sqrt()), rel=1e-5)


# On every architecture: Δ is really added, and all that could react to it is held at what it was without.

STEP = 1e-2


@torch.no_grad()
def direct_logits(model: Any, name: str, site: str, layer: int, vector: torch.Tensor, prompt: list[int]) -> Any:
    ids = torch.tensor([prompt])
    blocks = [model.get_submodule(BLOCK_PATHS[name].format(n)) for n in range(LAYERS)]
    mlp = model.get_submodule(MLP_PATHS[name].format(layer))
    clean: dict[str, Any] = {}

    def kept(key: str) -> Any:
        def run(module: Any, args: Any, output: Any) -> None:
            clean[key] = first(output).clone()

        return run

    with hook(blocks[layer], kept("block")), hook(mlp, kept("mlp")), hook(blocks[-1], kept("last")):
        model(input_ids=ids, use_cache=False)

    def plus(value: torch.Tensor) -> torch.Tensor:
        rows = value.clone().reshape(-1, value.shape[-1])
        rows[-1] += vector.flatten()
        return rows.view(value.shape)

    def swapped(output: Any, value: torch.Tensor) -> Any:
        return (value, *output[1:]) if isinstance(output, tuple) else value

    written_by_block: list[torch.Tensor] = []
    module = model.get_submodule(SITES[site][name].format(layer))
    if site == "heads":
        adding = hook(module, lambda m, args: (plus(args[0]), *args[1:]), before=True)
        holding = hook(mlp, lambda m, args, output: swapped(output, clean["mlp"]))
    else:
        adding = hook(module, lambda m, args, output: swapped(output, plus(first(output))))
        holding = hook(mlp, lambda m, args, output: None)
    with adding, holding, hook(blocks[layer], lambda m, a, out: written_by_block.append(first(out) - clean["block"])):
        model(input_ids=ids, use_cache=False)
    moved = clean["last"] + written_by_block[0]
    with hook(blocks[-1], lambda m, a, output: swapped(output, moved)):
        return model(input_ids=ids, use_cache=False).logits[0, -1].double()


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("site", SITES)
def test_equals_the_model_with_all_else_held_still(name: str, site: str) -> None:
    model, prompt = tiny_model(name), PROMPTS[0]
    layout = locate(model)
    vector = vector_at(name, site, 0)
    found = written(layout, Edit.of(laai.Intervention({1: vector}, site=site), layout), [prompt])[1].effects
    ends = [direct_logits(model, name, site, 1, sign * STEP * vector, prompt) for sign in (1, -1)]
    want = (ends[0] - ends[1]) / (2 * STEP)
    assert found.shape == ((HEADS if site == "heads" else 1), VOCABULARY)
    # The models' own norms are float32: their rounding, over the step.
    torch.testing.assert_close(found.sum(0).double(), want, rtol=5e-3, atol=5e-3 * float(want.abs().max()))


class Packed(torch.nn.Module):
    """A linear layer without a weight to read: int8 and scales, as quantised layers have them."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        self.scales = weight.abs().amax(1, keepdim=True) / 127
        self.codes = (weight / self.scales).round().to(torch.int8)
        self.offset = torch.randn(self.out_features, generator=torch.Generator().manual_seed(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.codes.to(x) * self.scales, self.offset)


def test_a_projection_is_run_not_read_and_its_bias_is_nobodys_effect() -> None:
    model = tiny_model("Llama")
    attention = model.model.layers[1].self_attn
    attention.o_proj = Packed(attention.o_proj)
    layout = locate(model)
    vector = vector_at("Llama", "heads", 0)
    vector[2] = 0
    found = written(layout, Edit.of(laai.Intervention({1: vector}), layout), PROMPTS[:1])[1].effects
    unpacked = tiny_model("Llama")
    unpacked.model.layers[1].self_attn.o_proj.weight.data = attention.o_proj.codes * attention.o_proj.scales
    at = seen(model, "model.norm", PROMPTS[0], entering=True)
    w = {name: value.double() for name, value in unpacked.state_dict().items()}
    direction = w["model.layers.1.self_attn.o_proj.weight"] @ vector.flatten().double()
    eps = model.config.rms_norm_eps
    want = slope(lambda r: w["lm_head.weight"] @ rms_norm(r, w["model.norm.weight"], eps), at, direction)
    torch.testing.assert_close(found.sum(0).double(), want, rtol=1e-4, atol=1e-4)
    assert found[2].abs().max() == 0


def test_the_default_dtype_changes_nothing() -> None:
    layout, iv = locate(tiny_model("Llama")), intervention("Llama", "heads", "last")
    expected = written(layout, Edit.of(iv, layout), PROMPTS)
    with default_dtype(torch.bfloat16):
        found = written(layout, Edit.of(iv, layout), PROMPTS)
    for layer, one in expected.items():
        assert found[layer].effects.dtype == torch.float32 and torch.equal(found[layer].effects, one.effects)


def test_layers_add_up_and_nothing_is_left_behind() -> None:
    model = tiny_model("Llama").train()
    layout = locate(model)
    vectors = {layer: torch.randn(HIDDEN, generator=torch.Generator().manual_seed(layer)) for layer in range(LAYERS)}
    both = written(layout, Edit.of(laai.Intervention(vectors, site="mlp"), layout), PROMPTS)
    for layer, vector in vectors.items():
        alone = written(layout, Edit.of(laai.Intervention({layer: vector}, site="mlp"), layout), PROMPTS)[layer]
        torch.testing.assert_close(both[layer].effects, alone.effects)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


# The command


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_model("Llama").save_pretrained(folder)
    tiny_tokenizer(bos=True).save_pretrained(folder)
    return folder


def saved(path: Path, size: float, **arguments: Any) -> str:
    """A vector `size` times the site's activation at layer 1 under the antonym prompts."""
    model, tokenizer = tiny_model("Llama"), tiny_tokenizer(bos=True)
    examples = laai.load_task("lexicon_antonym").train
    prompts = [tokenizer.encode(example.prompt) for example in examples]
    sites = [seen(model, PROJECTION_PATHS["Llama"].format(1), prompt, entering=True) for prompt in prompts]
    vector = vector_at("Llama", "heads", 0)
    vector *= size * float(torch.stack(sites).square().mean().sqrt() / vector.square().mean().sqrt())
    laai.Intervention({1: vector}, **arguments).save(path)
    return str(path)


def test_inspect_shows_what_is_written(model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = saved(tmp_path / "x.safetensors", 8.0, scale=0.5, metadata={"task": "laai_lexicon_antonym"})
    assert cli.main(["inspect", file, "--model", str(model_folder), "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)["writes"]
    assert (facts["task"], facts["prompts"], facts["warnings"]) == ("lexicon_antonym", 10, [])
    layer = facts["layers"]["1"]
    assert layer["relative_size"] == pytest.approx(4.0, rel=1e-4)
    model, tokenizer = tiny_model("Llama"), tiny_tokenizer(bos=True)
    prompts = [tokenizer.encode(example.prompt) for example in laai.load_task("lexicon_antonym").train]
    part = 0.5 * laai.Intervention.load(file).vector(1).flatten().double()
    want = torch.stack([llama(model, 1, prompt, part) for prompt in prompts]).mean(0)
    for end_of_list, values in (("promotes", want), ("suppresses", -want)):
        shown = facts["total"][end_of_list]
        assert [one["id"] for one in shown] == values.topk(inspect.SHOWN).indices.tolist()
        for one in shown:
            assert one["logits"] == pytest.approx(float(want[one["id"]]), rel=1e-3)
            assert one["text"] == tokenizer.decode([one["id"]])
    assert len(layer["groups"]) == HEADS

    assert cli.main(["inspect", file, "--model", str(model_folder)]) == 0
    text = capfd.readouterr().out
    best = facts["total"]["promotes"][0]
    for part_of_text in (
        "4 times the typical activation",
        f"{best['text']!r} {best['logits']:+.2f}",
        "lexicon_antonym",
    ):
        assert part_of_text in text
    assert "warning" not in text


@pytest.mark.parametrize(("known", "drawn_from_all"), [(60, False), (8, True)])
@pytest.mark.parametrize("chat", [False, True])
def test_rows_of_ones_own_are_shown_as_they_were_trained_on(
    known: int, drawn_from_all: bool, chat: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the recorded template, chat, number and seed; too few in the training pool are taken from all rows."""
    model, tokenizer = tiny_model("Llama"), tiny_tokenizer(bos=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }} {% endfor %}a:"
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    rows = tmp_path / "antonym.jsonl"
    rows.write_text("".join(json.dumps({"input": f"word{n}", "output": "x"}) + "\n" for n in range(known)))
    rendering = {"prompt_template": "say {input}:"} | ({"chat_template_sha256": "", "system": "s"} if chat else {})
    training = {"seed": 3, "n_train": 6, "rendering": rendering}
    file = saved(tmp_path / "x.safetensors", 3.0, metadata={"task": "antonym", "training": training})
    line = ["inspect", file, "--model", str(tmp_path / "model"), "--json"]
    assert cli.main([*line, "--task", f"examples:{rows}"]) == 0
    facts = json.loads(capfd.readouterr().out)["writes"]
    assert facts["prompts"] == 6
    drawn = read_examples(rows, "say {input}:").split(3, 6, drawn_from_all).train
    texts = [f"s: s u: {example.prompt} a:" if chat else example.prompt for example in drawn]
    part = laai.Intervention.load(file).vector(1).flatten().double()
    want = torch.stack([llama(model, 1, tokenizer.encode(text), part) for text in texts]).mean(0)
    for one in facts["total"]["promotes"]:
        assert one["logits"] == pytest.approx(float(want[one["id"]]), rel=1e-3)

    # `antonym` may be a file's name, `laai_antonym` is ours.
    assert cli.main(line) == 2
    assert "'antonym': expected --task with one of `laai tasks`" in capfd.readouterr().err
    assert cli.main([*line, "--task", "laai_lexicon_antonym"]) == 0
    assert json.loads(capfd.readouterr().out)["writes"]["task"] == "lexicon_antonym"


@pytest.mark.parametrize(
    ("factor", "said"), [(0.9, "too weak"), (1.1, ""), (None, ""), (-0.9, ""), (-1.1, "so strong")]
)
def test_an_unusual_size_is_told(
    factor: float | None, said: str, model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    low, high = inspect.USUAL_SIZE
    size = 3.0 if factor is None else factor * low if factor > 0 else -factor * high
    file = saved(tmp_path / "x.safetensors", size)
    assert cli.main(["inspect", file, "--model", str(model_folder), "--task", "lexicon_antonym"]) == 0
    text = capfd.readouterr().out
    assert ("warning: layer 1: " in text) == bool(said) and said in text


def test_inspect_refusals(model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = saved(tmp_path / "x.safetensors", 1.0)
    other = tmp_path / "other.safetensors"
    laai.Intervention({1: torch.ones(2, 3)}).save(other)
    chat = saved(tmp_path / "c.safetensors", 1.0, metadata={"training": {"rendering": {"chat_template_sha256": ""}}})
    swept = saved(tmp_path / "s.safetensors", 1.0, metadata={"task": "laai_examples:words.jsonl"})
    for argv, said in [
        ([file, "--model", str(model_folder)], "expected --task"),
        ([swept, "--model", str(model_folder)], "expected --task"),
        ([chat, "--model", str(model_folder), "--task", "lexicon_antonym"], "has no chat template"),
        ([file, "--task", "lexicon_antonym"], "--task: it is for a run of the model: expected --model with it"),
        ([file, "--data", str(tmp_path)], "--data: it is for a run of the model: expected --model"),
        ([file, "--revision", "main"], "--revision: it is"),
        ([file, "--device", "cpu"], "--device: it is"),
        ([file, "--projection", "o_proj"], "--projection: it is"),
        ([str(other), "--model", str(model_folder), "--task", "lexicon_antonym"], "has shape (2, 3)"),
        ([file, "--model", str(model_folder), "--task", "lexicon_antonim"], "did you mean lexicon_antonym"),
    ]:
        assert cli.main(["inspect", *argv]) == 2
        assert said in capfd.readouterr().err
