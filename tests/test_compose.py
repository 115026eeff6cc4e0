"""Composing interventions: every method against its definition in plain Python, the fit against slow full forwards."""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import slow_reference
import torch
from tiny import HEADS, HIDDEN, LAYERS, PROJECTION_PATHS, default_dtype, tiny_model, tiny_tokenizer

import laai_core as laai
from laai_core import Example, Intervention, LaaiError
from lm_eval_laai.commands import cli
from lm_eval_laai.methods.compose import METHODS, compose

CLOSED = [method for method in METHODS if method != "fit"]


def random_vector(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heads(*seeds: int, scale: float = 1.0, task: str | None = None, **more: Any) -> Intervention:
    """Random vectors [4, 8] at layer 0 (first seed), 1 (second), ...; a seed of -1 leaves its layer out."""
    vectors = {layer: random_vector(seed, HEADS, HIDDEN // HEADS) for layer, seed in enumerate(seeds) if seed >= 0}
    return Intervention(vectors, scale=scale, metadata={"task": task, "base_model": "m", **more})


# What each method means, on lists of numbers.


def slow_sum(vectors: list[list[float]], weights: list[float]) -> list[float]:
    return [sum(w * v[i] for w, v in zip(weights, vectors, strict=True)) for i in range(len(vectors[0]))]


def slow_mean(vectors: list[list[float]], weights: list[float]) -> list[float]:
    return [x / sum(weights) for x in slow_sum(vectors, weights)]


def slow_normalised(vectors: list[list[float]], weights: list[float]) -> list[float]:
    norms = [sum(x * x for x in v) ** 0.5 for v in vectors]
    living = [norm for norm in norms if norm]
    common = sum(living) / len(living) if living else 0.0
    same = [[x * common / norm for x in v] if norm else v for v, norm in zip(vectors, norms, strict=True)]
    return slow_sum(same, weights)


def slow_ties(vectors: list[list[float]], weights: list[float]) -> list[float]:
    trimmed = []
    for weight, vector in zip(weights, vectors, strict=True):
        weighted = [weight * x for x in vector]
        smallest = sorted(map(abs, weighted), reverse=True)[: int(0.2 * len(weighted))][-1]
        trimmed.append([x if abs(x) >= smallest else 0.0 for x in weighted])
    merged = []
    for column in zip(*trimmed, strict=True):
        sign = 1 if sum(column) >= 0 else -1
        kept = [x for x in column if x * sign > 0]
        merged.append(sum(kept) / len(kept) if kept else 0.0)
    return merged


SLOW = {"sum": slow_sum, "mean": slow_mean, "normalised": slow_normalised, "ties": slow_ties}


@pytest.mark.parametrize("weights", [None, (1.5, 0.25, 0.5), (1.0, -0.5, 2.0)])
@pytest.mark.parametrize("method", CLOSED)
def test_methods_mean_what_they_say(method: str, weights: tuple[float, ...] | None) -> None:
    # Scales count; the first has layers 0 and 1, the second 0 and 2, the third all, and is zero at layer 2.
    parents = [heads(1, 2, -1, scale=2.0), heads(3, -1, 4), heads(5, 6, -1, scale=-0.5)]
    parents[2] += Intervention({2: torch.zeros(HEADS, HIDDEN // HEADS)})
    result = compose(parents, method, weights)
    assert result.layers == [0, 1, 2]
    assert result.scale == 1.0
    for layer in result.layers:
        vectors = [
            [p.scale * x for x in p.vector(layer).flatten().tolist()] if layer in p.layers else [0.0] * HIDDEN
            for p in parents
        ]
        expected = SLOW[method](vectors, list(weights or [1.0] * 3))
        assert result.vector(layer).flatten().tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_sum_is_the_algebras() -> None:
    a, b = heads(1, 2, scale=0.7), heads(3, -1, 4)
    total = a + b
    assert all(torch.equal(compose([a, b]).vector(layer), total.vector(layer)) for layer in total.layers)


def test_an_all_zero_layer_stays_zero() -> None:
    none = Intervention({0: torch.zeros(2, 2)})
    for method in CLOSED:
        assert torch.equal(compose([none, none], method).vector(0), torch.zeros(2, 2))


def test_what_is_recorded(tmp_path: Path) -> None:
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path, parent in zip(paths, (heads(1, task="laai_x", head_dim=8), heads(2, head_dim=9)), strict=True):
        parent.save(path)
    parents = [Intervention.load(path) for path in paths]
    result = compose(parents, "ties", [1.0, 0.1], task="laai_z")
    assert result.metadata == {
        "base_model": "m",  # what the parents agree on; on head_dim they do not
        "task": "laai_z",
        "method": "compose",
        "composition": {
            "method": "ties",
            "density": 0.2,
            "parents": [
                {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "task": task, "weight": weight}
                for path, task, weight in zip(paths, ("laai_x", None), (1.0, 0.1), strict=True)
            ],
        },
    }
    assert result.to_bytes() == compose(parents, "ties", [1.0, 0.1], task="laai_z").to_bytes()
    result.save(tmp_path / "c.safetensors")
    again = Intervention.load(tmp_path / "c.safetensors")
    assert again.metadata == {**result.metadata}
    assert again.sha256 == result.sha256


def test_parents_of_different_models_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    compose([heads(1), heads(2)])
    assert not caplog.records
    compose([heads(1), Intervention({0: torch.ones(HEADS, 8)}, metadata={"base_model": "other"})])
    assert "different models" in caplog.text
    with pytest.raises(LaaiError, match=r"models of num_attention_heads \[4, 8\]"):
        compose(
            [Intervention({at: torch.ones(n, 8)}, metadata={"num_attention_heads": n}) for at, n in ((0, 4), (1, 8))]
        )


@pytest.mark.parametrize(
    ("parents", "arguments", "message"),
    [
        ([heads(1)], {}, "1 intervention to compose: expected at least two"),
        ([heads(1), heads(2)], {"method": "add"}, "unknown method 'add'"),
        ([heads(1), Intervention({0: torch.ones(32)}, "mlp")], {}, "different site"),
        ([heads(1), Intervention({0: torch.ones(4, 8)}, position="all")], {}, "different position"),
        ([heads(1), Intervention({0: torch.ones(4, 8)}, operation="icv")], {}, "operation"),
        ([Intervention({0: torch.ones(4)}, "mlp", operation="icv")] * 2, {}, "not linear"),
        ([heads(1), Intervention({0: torch.ones(2, 16)})], {}, "different shapes at layer 0"),
        ([heads(1), heads(2)], {"weights": [1.0]}, "1 weights for 2 interventions"),
        ([heads(1), heads(2)], {"weights": [1.0, float("nan")]}, "expected finite numbers"),
        ([heads(1), heads(2)], {"weights": [1.0, -1.0], "method": "mean"}, "sum to 0"),
        ([heads(1), heads(2)], {"weights": [1.0, 1.0], "method": "fit"}, "finds the weights itself"),
        ([heads(1), heads(2)], {"method": "fit"}, "needs a model, its tokenizer and examples"),
        ([heads(1), heads(2)], {"examples": [Example("a", " b")]}, "only fit does"),
    ],
)
def test_refusals(parents: list[Intervention], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(LaaiError, match=message) as caught:
        compose(parents, **arguments)
    assert "\n" not in str(caught.value)


# fit

WORDS = [Example("Q: hot\nA:", " cold"), Example("Q: in the morning\nA:", " le"), Example("Q: there\nA:", " here on")]
OPINIONS = [
    Example("Q: and then\nA:", options=(" A", " B", " C"), distribution=(0.6, 0.1, 0.3)),
    Example("Q: there\nA:", options=(" on", " in"), distribution=(0.2, 0.8)),
]


def slow_loss(
    model: Any, tokenizer: Any, examples: list[Example], vectors: dict[int, torch.Tensor], where: str
) -> float:
    """Mean task loss by one full forward per continuation, in float64, without smoothing of more than the KL's."""

    def logprob(prompt: str, target: str) -> float:
        prompt_ids = tokenizer(prompt).input_ids
        target_ids = tokenizer(prompt + target).input_ids[len(prompt_ids) :]
        with ExitStack() as stack:
            for layer, vector in vectors.items():
                path = PROJECTION_PATHS["Llama"].format(layer)
                stack.enter_context(slow_reference.AddByIndex(model, path, vector, "heads", where, len(prompt_ids)))
            return slow_reference.loglikelihood(model, prompt_ids, target_ids, None)[0]

    losses = []
    for example in examples:
        if example.target is not None:
            losses.append(-logprob(example.prompt, example.target + "\n"))
            continue
        scores = torch.tensor([logprob(example.prompt, option) for option in example.options or ()]).double()
        p = scores.softmax(0)
        pi = torch.tensor(example.distribution).double() * (1 - 1e-4) + 1e-4 / len(p)
        losses.append(float((p * (p / pi).log()).sum()))
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    ("examples", "position", "batch_size"), [(WORDS, "last", None), (WORDS, "generated", 2), (OPINIONS, "last", None)]
)
def test_fit_finds_weights_that_nothing_near_beats(
    examples: list[Example], position: str, batch_size: int | None
) -> None:
    model, tokenizer = tiny_model("Llama"), tiny_tokenizer(bos=True)
    a = Intervention({0: random_vector(1, HEADS, 8), 2: random_vector(2, HEADS, 8)}, position=position, scale=0.5)
    b = Intervention({0: random_vector(3, HEADS, 8), 1: random_vector(4, HEADS, 8)}, position=position)
    result = compose(
        [a, b], "fit", task="laai_z", model=model, tokenizer=tokenizer, examples=examples, batch_size=batch_size
    )
    found = [parent["weight"] for parent in result.metadata["composition"]["parents"]]
    assert all(p.requires_grad for p in model.parameters())  # left as it was

    def loss(weights: list[float]) -> float:
        mixed = weights[0] * a + weights[1] * b
        vectors = {layer: mixed.vector(layer) for layer in mixed.layers}
        return slow_loss(model, tokenizer, examples, vectors, position)

    training = result.metadata["training"]
    assert training["task_loss"] == pytest.approx(loss(found), abs=2e-5)
    assert training["task_loss_before"] == pytest.approx(loss([1.0, 1.0]), abs=2e-5)
    assert training["n_train"] == len(examples)
    for place in range(2):
        for step in (-0.05, 0.05):
            near = list(found)
            near[place] += step
            assert loss(near) > loss(found) - 1e-5
    assert loss(found) < loss([1.0, 1.0]) - 0.01
    mixed = found[0] * a + found[1] * b
    for layer in mixed.layers:
        assert torch.allclose(result.vector(layer), mixed.vector(layer), atol=1e-5)


def test_fit_refuses_what_does_not_fit_the_model() -> None:
    wide = Intervention({0: torch.ones(2, 16)})
    with pytest.raises(LaaiError, match="this model expects"):
        compose([wide, wide], "fit", model=tiny_model("Llama"), tokenizer=tiny_tokenizer(bos=True), examples=WORDS)


@pytest.mark.parametrize("method", METHODS)
def test_the_default_dtype_changes_nothing(method: str) -> None:
    fit = {"model": tiny_model("Llama"), "tokenizer": tiny_tokenizer(bos=True), "examples": WORDS}
    data = fit if method == "fit" else {}
    parents = [heads(1), heads(3)]
    expected = compose(parents, method, **data).to_bytes()
    with default_dtype(torch.float64):
        assert compose(parents, method, **data).to_bytes() == expected


def test_fit_refuses_inference_mode() -> None:
    data = {"model": tiny_model("Llama"), "tokenizer": tiny_tokenizer(bos=True), "examples": WORDS}
    with torch.inference_mode(), pytest.raises(LaaiError, match="expected a call outside"):
        compose([heads(1), heads(3)], "fit", **data)


# The command line


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two interventions for a tiny model, and the model."""
    folder = tmp_path_factory.mktemp("parents")
    paths = {"a": folder / "a.safetensors", "b": folder / "b.safetensors", "model": folder / "model"}
    heads(1, -1, 2, task="laai_lexicon_antonym").save(paths["a"])
    heads(3, task="laai_lexicon_en_fr").save(paths["b"])
    tiny_model("Llama").save_pretrained(paths["model"])
    tiny_tokenizer(bos=True).save_pretrained(paths["model"])
    return paths


def run(*argv: object) -> int:
    return cli.main([str(a) for a in argv])


def test_compose_on_the_command_line(
    files: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "c.safetensors"
    line = ["compose", files["a"], files["b"], "-o", out, "--method", "mean", "--weights", "2,-0.5"]
    assert run(*line, "--json") == 0
    facts = json.loads(capfd.readouterr().out)
    parents = [Intervention.load(files["a"]), Intervention.load(files["b"])]
    assert out.read_bytes() == compose(parents, "mean", [2.0, -0.5]).to_bytes()
    assert [p.name for p in out.parent.iterdir()] == ["c.safetensors"]
    assert facts["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert [parent["sha256"] for parent in facts["parents"]] == [parent.sha256 for parent in parents]
    assert [parent["file"] for parent in facts["parents"]] == [str(files["a"]), str(files["b"])]

    assert run(*line) == 0
    text = capfd.readouterr().out
    assert "-0.5" in text and "laai_lexicon_en_fr" in text and facts["sha256"] in text
    assert run("inspect", out) == 0
    shown = capfd.readouterr().out
    assert parents[0].sha256 in shown and "composition.parents.1.weight" in shown


def test_fit_on_the_command_line_names_the_file_for_the_harness(
    files: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    task = "lexicon_en_fr_antonym"
    line = ["compose", files["a"], files["b"], "-o", f"{tmp_path}/", "--method", "fit", "--task", task]
    assert run(*line, "--model", files["model"], "--seed", 2, "--n-train", 4, "--json") == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["file"] == str(tmp_path / f"laai_{task}.safetensors")
    iv = Intervention.load(facts["file"])
    assert iv.metadata["task"] == f"laai_{task}"
    training = iv.metadata["training"]
    assert training == facts["training"]
    assert training["task_loss"] < training["task_loss_before"]
    assert (training["seed"], training["n_train"]) == (2, 4)
    direct = compose(
        [Intervention.load(files["a"]), Intervention.load(files["b"])],
        "fit",
        task=f"laai_{task}",
        model=tiny_model("Llama"),
        tokenizer=tiny_tokenizer(bos=True),
        examples=laai.load_task(task, seed=2, n_train=4).train,
        seed=2,
    )
    assert direct.sha256 == facts["sha256"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["-o", "{out}.pt"], "ends in .safetensors"),
        (["-o", "{out}/"], "--task is needed"),
        (["-o", "{out}.safetensors", "--weights", "1"], "1 weights for 2"),
        (["-o", "{out}.safetensors", "--weights", "1,x"], "--weights"),
        (["-o", "{out}.safetensors", "--method", "fit", "--task", "lexicon_antonym"], "fit needs --model"),
        (["-o", "{out}.safetensors", "--method", "fit", "--model", "{model}"], "fit needs --task"),
        (["-o", "{out}.safetensors", "--model", "{model}"], "--model: --method sum uses no model and no examples"),
        (["-o", "{out}.safetensors", "--seed", "1"], "--seed: --method sum uses no model and no examples, only fit"),
        (["-o", "{out}.safetensors", "--method", "mean", "--data", "{out}"], "--data: --method mean uses"),
        (["-o", "{out}.safetensors", "--n-train", "4"], "--n-train: --method"),
        (["-o", "{out}.safetensors", "--batch-size", "4"], "--batch-size: --method"),
        (["-o", "{out}.safetensors", "--revision", "main"], "--revision: --method"),
        (["-o", "{out}.safetensors", "--projection", "o_proj"], "--projection: --method"),
        (["-o", "{out}.safetensors", "--whitespace", "generation"], "--whitespace: --method"),
        (["-o", "{out}.safetensors", "--examples", "{out}.jsonl"], "--examples: --method"),
        (["-o", "{out}.safetensors", "--prompt-template", "say"], "--prompt-template: --method"),
        (["-o", "{out}.safetensors", "--method", "fit", "--model", "{model}", "--task", "antonim"], "no task named"),
        (["{out}.missing.safetensors", "-o", "{out}.safetensors"], "no intervention file"),
        (["{mlp}", "-o", "{out}.safetensors"], "different site"),
        ([], "-o/--output"),
    ],
)
def test_bad_lines(
    more: list[str], message: str, files: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mlp = tmp_path / "mlp.safetensors"
    Intervention({LAYERS - 1: torch.ones(HIDDEN)}, "mlp").save(mlp)
    names = {"out": tmp_path / "out", "model": files["model"], "mlp": mlp}
    assert run("compose", files["a"], files["b"], *(part.format(**names) for part in more)) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("laai: error: ") and err.count("\n") == 1 and message in err
    assert list(tmp_path.iterdir()) == [mlp]
