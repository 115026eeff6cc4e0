"""One entry for every method: where the result goes, defaults, refusals; and the same through `laai train`."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from test_cli import FILE, TASK, model  # noqa: F401 - a fixture
from tiny import LAYERS, default_dtype, tiny_model, tiny_tokenizer

import laai_core as laai
from laai_core.settings import Job, Settings
from lm_eval_laai.commands import cli
from lm_eval_laai.methods import METHODS, fit
from lm_eval_laai.methods.adapters import ADAPTERS
from lm_eval_laai.methods.method import middle_layer
from lm_eval_laai.methods.select import choose

SPLIT = laai.load_task(TASK, n_train=4)
TOKENIZER = tiny_tokenizer(bos=False)


def fitted(method: str, output: Path, llama=None, **options) -> Path:
    llama = tiny_model("Llama") if llama is None else llama
    return fit(method, llama, TOKENIZER, SPLIT, output=output, progress=False, **options)


def test_methods():
    assert tuple(METHODS) == ("laai", "fv", "icv", "lora", "ia3", "soft_prompt")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_what_it_should_where_it_should(method, tmp_path):
    llama = tiny_model("Llama")
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    steps = {"steps": 3} if method not in ("fv", "icv") else {}
    output = tmp_path / "new" / ("x" if method in ADAPTERS else "x.safetensors")
    assert fitted(method, output, llama, seed=5, **steps) == output
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    assert list(llama.state_dict()) == list(before)
    assert all(torch.equal(before[name], value) for name, value in llama.state_dict().items())
    if method in ADAPTERS:
        facts = json.loads((output / "laai.json").read_text())
        assert peft.PeftConfig.from_pretrained(str(output)).peft_type in ("LORA", "IA3", "PROMPT_TUNING")
    else:
        facts = laai.Intervention.load(output).metadata
    assert (facts["method"], facts["task"]) == (method, f"laai_{TASK}")
    assert (facts["training"]["seed"], facts["training"]["n_train"]) == (5, 4)


@pytest.mark.parametrize("method", ["laai", "fv"])
def test_the_default_dtype_changes_nothing(method, tmp_path):
    llama = tiny_model("Llama")
    first = fitted(method, tmp_path / "a.safetensors", llama)
    with default_dtype(torch.float64):
        again = fitted(method, tmp_path / "b.safetensors", llama)
    assert first.read_bytes() == again.read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_the_default_device_changes_nothing(method, tmp_path):
    llama, steps = tiny_model("Llama"), {} if method in ("fv", "icv") else {"steps": 3}
    outputs = [tmp_path / (name if method in ADAPTERS else f"{name}.safetensors") for name in "ab"]
    fitted(method, outputs[0], llama, **steps)
    with torch.device("meta"):
        fitted(method, outputs[1], llama, **steps)
    first, again = (path / "adapter_model.safetensors" if path.is_dir() else path for path in outputs)
    assert first.read_bytes() == again.read_bytes()


def test_default_layers(tmp_path):
    layers = {
        method: laai.Intervention.load(fitted(method, tmp_path / f"{method}.safetensors")).layers
        for method in ("laai", "fv", "icv")
    }
    chosen = choose(tiny_model("Llama"), TOKENIZER, SPLIT.train).layer
    assert layers == {"laai": [chosen], "fv": [1], "icv": list(range(LAYERS))}
    lora = peft.PeftConfig.from_pretrained(str(fitted("lora", tmp_path / "lora", steps=1)))
    assert lora.target_modules == {f"model.layers.{middle_layer(LAYERS)}.self_attn.{n}_proj" for n in "qv"}
    ia3 = peft.PeftConfig.from_pretrained(str(fitted("ia3", tmp_path / "ia3", steps=1, layer=-1)))
    assert {name.split(".")[2] for name in ia3.target_modules} == {str(LAYERS - 1)}


def test_laai_takes_every_setting_of_train(tmp_path):
    assert METHODS["laai"].options == tuple(f.name for k in (Job, Settings) for f in fields(k) if "help" in f.metadata)
    options = dict(optimizer="adam", lr=0.01, site="residual", stop="", whitespace="generation", forward="plain")
    options |= dict(l1=0.02, group=0.0, steps=3, start="zero", batch_size=2)
    path = fitted("laai", tmp_path / "x.safetensors", layer=0, **options)
    direct = laai.train(tiny_model("Llama"), TOKENIZER, SPLIT.train, 0, task=f"laai_{TASK}", **options)
    assert path.read_bytes() == direct.intervention.to_bytes()


def test_laai_is_train(tmp_path):
    path = fitted("laai", tmp_path / "x.safetensors", layer=0, l1=0.02, group=0.0, penalty_scale="absolute", steps=5)
    direct = laai.train(
        tiny_model("Llama"),
        TOKENIZER,
        SPLIT.train,
        0,
        0.02,
        0.0,
        penalty_scale="absolute",
        steps=5,
        task=f"laai_{TASK}",
    )
    assert path.read_bytes() == direct.intervention.to_bytes()


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("fvs", {}, "unknown method 'fvs': expected one of laai, fv, icv"),
        ("fv", {"l1": 0.1}, "the method fv has none"),
        ("icv", {"steps": 3}, "the method icv has none"),
        ("lora", {"heads": 3}, "the method lora has none"),
        ("lora", {"steps": 0}, "steps is 0"),
        ("lora", {"layer": 9}, "layer 9 is out of range"),
        ("soft_prompt", {"layer": 1}, "in no layer"),
    ],
)
def test_refusals(method, options, said, tmp_path):
    output = tmp_path / ("x" if method in ADAPTERS else "x.safetensors")
    with pytest.raises(laai.LaaiError, match=said):
        fitted(method, output, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", METHODS)
def test_a_tokenizer_of_another_model_is_refused(method, tmp_path):
    small = tiny_model("Llama")
    small.resize_token_embeddings(60)
    before = set(vars(small))
    with pytest.raises(laai.LaaiError, match=r"^the tokenizer gives token \d+, the model has 60: expected the"):
        fitted(method, tmp_path / ("x" if method in ADAPTERS else "x.safetensors"), small)
    assert list(tmp_path.iterdir()) == [] and set(vars(small)) == before


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("given", [SimpleNamespace(tokenizer=TOKENIZER), "gpt2", None])
def test_what_is_no_tokenizer_is_refused(method, given, tmp_path):
    output = tmp_path / ("x" if method in ADAPTERS else "x.safetensors")
    with pytest.raises(laai.LaaiError, match=rf"^the tokenizer is a {type(given).__name__}: expected the model's own"):
        fit(method, tiny_model("Llama"), given, SPLIT, output=output, progress=False)


def test_tokens_beyond_the_configuration_that_have_embeddings(tmp_path):
    llama, more = tiny_model("Llama"), tiny_model("Llama")
    more.resize_token_embeddings(len(llama.get_input_embeddings().weight) + 8)
    more.config.vocab_size = 60  # as where the embeddings were replaced by hand
    fitted("laai", tmp_path / "x.safetensors", more, steps=1, layer=1, l1=0.1, group=0.1, start="zero")


@pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning", "ignore:torch.quantize_per:UserWarning")
def test_a_function_vector_of_rounded_products(tmp_path):
    llama = torch.ao.quantization.quantize_dynamic(tiny_model("Llama"), {torch.nn.Linear})
    assert fitted("fv", tmp_path / "x.safetensors", llama).exists()


@pytest.mark.parametrize("method", ["laai", *ADAPTERS])
def test_inference_mode_is_refused(method, tmp_path):
    output, llama = tmp_path / ("x" if method in ADAPTERS else "x.safetensors"), tiny_model("Llama")
    with torch.inference_mode():
        made_within = tiny_model("Llama")
        with pytest.raises(laai.LaaiError, match=r"torch.inference_mode has not: expected a call outside of it$"):
            fitted(method, output, llama)
    with pytest.raises(laai.LaaiError, match="made within torch.inference_mode: expected one loaded outside of it$"):
        fitted(method, output, made_within)
    assert all(p.requires_grad for one in (llama, made_within) for p in one.parameters())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["fv", "icv"])
def test_methods_without_gradients_take_a_model_made_within_inference_mode(method, tmp_path):
    with torch.inference_mode():
        made_within = tiny_model("Llama")
    for name, llama in (("within", made_within), ("outside", tiny_model("Llama"))):
        fitted(method, tmp_path / f"{name}.safetensors", llama)
    vectors = [laai.Intervention.load(tmp_path / f"{name}.safetensors") for name in ("within", "outside")]
    assert torch.equal(*(iv.vector(iv.layers[0]) for iv in vectors))


def test_wrong_outputs_are_refused_and_nothing_is_lost(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(laai.LaaiError, match="exists and is no adapter"):
        fitted("lora", tmp_path / "mine", steps=1)
    (tmp_path / "mine" / "adapter_config.json").touch()  # a trainer's checkpoint has one, and more
    with pytest.raises(laai.LaaiError, match="exists and is no adapter of ours"):
        fitted("lora", tmp_path / "mine", steps=1)
    with pytest.raises(laai.LaaiError, match="expected a folder"):
        fitted("lora", tmp_path / "x.safetensors", steps=1)
    with pytest.raises(laai.LaaiError, match="ends in .safetensors"):
        fitted("fv", tmp_path / "x")
    under = peft.get_peft_model(tiny_model("Llama"), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(laai.LaaiError, match="under a PEFT adapter"):
        fitted("lora", tmp_path / "x", under, steps=1)
    sharded = tiny_model("Llama")
    sharded._tp_size = 2  # as transformers marks it
    with pytest.raises(laai.LaaiError, match="sharded by tensor parallelism: expected a whole one for the method fv"):
        fitted("fv", tmp_path / "x.safetensors", sharded)
    assert sorted(path.name for path in tmp_path.glob("**/*")) == ["adapter_config.json", "mine", "thesis.tex"]


# The command line.


@pytest.mark.parametrize("method", [m for m in METHODS if m != "laai"])
def test_train_a_baseline(method, model, tmp_path, capfd, facts_of):  # noqa: F811
    line = ["train", "--method", method, "--model", model, "--task", TASK, "--n-train", 4, "--seed", 2]
    line += ["--steps", 2] if method in ADAPTERS else ["--heads", 3] if method == "fv" else []
    facts = facts_of(*line, "--output", f"{tmp_path}/")
    path = tmp_path / (f"laai_{TASK}" if method in ADAPTERS else FILE)
    assert (facts["file"], facts["task"], facts["method"]) == (str(path), f"laai_{TASK}", method)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    record = METHODS[method].record(path)
    assert facts["training"] == record and record["seed"] == 2
    assert len(record.get("heads", [0] * 3)) == 3
    # Again, onto what is there; then as text.
    assert cli.main([*map(str, line), "--output", str(path)]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("file ") and "training.examples_sha256" in out
    assert "it/s" in err or "s/it" in err or " steps [" in err or method == "icv"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--method", "prompt"], "soft_prompt"),
        (["--method", "fv", "--steps", "3"], "the method fv has no --steps"),
        (["--method", "lora", "--l1", "0.1"], "the method lora has no --l1"),
        (["--method", "ia3", "--optimizer", "adam"], "the method ia3 has no --optimizer"),
        (["--method", "laai", "--heads", "3"], "the method laai has no --heads"),
        (["--method", "icv", "--start", "zero"], "the method icv has no --start"),
        (["--start", "auto"], "argument --start: invalid choice: 'auto'"),
        (["--method", "soft_prompt", "--layer", "1"], "in no layer"),
        (["--method", "lora", "--steps", "0"], "steps is 0"),
        (["--method", "lora", "--output", "x.safetensors"], "expected a folder"),
        (["--method", "fv", "--output", "x"], "ends in .safetensors"),
    ],
)
def test_refused_before_any_model_is_looked_for(flags, said, tmp_path, refused):  # noqa: F811
    line = ["train", "--model", tmp_path / "no" / "model", "--task", TASK, "--output", f"{tmp_path}/out/", *flags]
    assert said in refused(*line)
    assert list(tmp_path.iterdir()) == []
