"""`laai export`: each file loaded by the library it is for, whose logits are ours; and what is refused, by name.

pyvene, steering-vectors and repeng pin other versions of numpy or transformers than this project runs with, and
llama-cpp-python compiles llama.cpp, so they are no part of the extra `test`:
`pip install --no-deps pyvene steering-vectors repeng llama-cpp-python diskcache` has them run here.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import ARCHITECTURES, BLOCK_PATHS, HEADS, HIDDEN, PROJECTION_PATHS, head_dim, tiny_model, tiny_tokenizer

import laai_core as laai
from laai_core.locate import locate
from lm_eval_laai.commands import cli
from lm_eval_laai.exports.expressible import attention_output

TOLERANCE = 1e-4
# Those that pyvene knows.
IN_PYVENE = ("Llama", "Mistral", "Gemma2", "Qwen2", "GPT2", "GPTNeoX")


def vector(name: str, site: str, position: str, layers: tuple[int, ...] = (1, 2), **more: Any) -> laai.Intervention:
    generator = torch.Generator().manual_seed(len(name))
    shape = (HEADS, head_dim(name)) if site == "heads" else (HIDDEN,)
    vectors = {layer: torch.randn(shape, generator=generator) for layer in layers}
    model_type = tiny_model(name).config.model_type
    return laai.Intervention(vectors, site, position, scale=0.5, metadata={"model_type": model_type}, **more)


def tokens(model: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (2, 9), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def export(intervention: laai.Intervention, to: str, folder: Path, *more: str) -> tuple[int, Path]:
    intervention.save(folder / "vector.safetensors")
    path = folder / f"out.{'gguf' if to == 'gguf' else 'safetensors'}"
    arguments = ["export", str(folder / "vector.safetensors"), "--to", to, "--output", str(path)]
    return cli.main([*arguments, *more]), path


def assert_ours(intervention: laai.Intervention, model: Any, theirs: torch.Tensor) -> None:
    """`theirs` are our logits, and not the untouched model's."""
    with torch.no_grad():
        untouched = model(**tokens(model)).logits
        with laai.apply(model, intervention):
            ours = model(**tokens(model)).logits
    torch.testing.assert_close(theirs, ours, atol=TOLERANCE, rtol=0)
    assert (ours - untouched).abs().max() > 0.1


def library(name: str) -> ModuleType:
    try:
        return __import__(name)
    except ImportError as error:
        pytest.skip(f"{name} is not installed: {error}")


def shown_code(text: str) -> str:
    """What `laai export` prints after its first line."""
    return text.split("\n", 2)[2]


# GGUF


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_control_vector_holds_what_is_added_at_a_blocks_output(name: str, tmp_path: Path) -> None:
    """Read with gguf and applied by hand, as llama.cpp does: every token, direction.N at the output of block N."""
    gguf = library("gguf")
    intervention, model = vector(name, "residual", "all"), tiny_model(name)
    code, path = export(intervention, "gguf", tmp_path)
    assert code == 0
    reader = gguf.GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == model.config.model_type
    assert reader.get_field("controlvector.layer_count").contents() == 2
    found = {tensor.name: torch.tensor(np.array(tensor.data)) for tensor in reader.tensors}
    assert set(found) == {"direction.1", "direction.2"}
    assert all(t.tensor_type == gguf.GGMLQuantizationType.F32 and list(t.shape) == [HIDDEN] for t in reader.tensors)

    def adding(direction: torch.Tensor) -> Any:
        return lambda module, args, out: (out[0] + direction, *out[1:]) if isinstance(out, tuple) else out + direction

    handles = [
        model.get_submodule(BLOCK_PATHS[name].format(layer)).register_forward_hook(adding(found[f"direction.{layer}"]))
        for layer in (1, 2)
    ]
    with torch.no_grad():
        theirs = model(**tokens(model)).logits
    for handle in handles:
        handle.remove()
    assert_ours(intervention, model, theirs)


def test_repeng_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "float_", np.float64, raising=False)  # an annotation of repeng 0.4.0, from numpy 1
    repeng = library("repeng")
    intervention, model = vector("Mistral", "residual", "all"), tiny_model("Mistral")
    _, path = export(intervention, "gguf", tmp_path)
    control = repeng.ControlVector.import_gguf(path)
    assert control.model_type == "mistral"
    other = tiny_model("Mistral")  # repeng changes the model it wraps
    controlled = repeng.ControlModel(other, [1, 2])
    controlled.set_control(control)
    with torch.no_grad():
        # repeng wants a row of positions for each row of tokens.
        given = {**tokens(other), "position_ids": torch.arange(9).expand(2, -1)}
        assert_ours(intervention, model, controlled(**given).logits)


def test_llama_cpp_runs_it(tmp_path: Path) -> None:
    library("gguf")
    llama_cpp = library("llama_cpp")
    import gguf
    from tiny_gguf import write_tiny_gguf

    intervention, model = vector("Llama", "residual", "all"), tiny_model("Llama")
    _, path = export(intervention, "gguf", tmp_path)
    layers = model.config.num_hidden_layers
    directions = np.zeros((layers, HIDDEN), np.float32)  # from layer 1 on, as llama.cpp's command line passes them
    for tensor in gguf.GGUFReader(path).tensors:
        directions[int(tensor.name.removeprefix("direction.")) - 1] = tensor.data
    write_tiny_gguf(tmp_path / "model.gguf")
    precision = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    llama = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=32, logits_all=True, verbose=False, **precision)
    data = directions.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    assert llama_cpp.llama_set_adapter_cvec(llama.ctx, data, directions.size, HIDDEN, 1, layers) == 0
    rows = []
    for row in tokens(model)["input_ids"].tolist():
        llama.reset()
        llama.eval(row)
        rows.append(llama.scores[: len(row)].copy())
    assert_ours(intervention, model, torch.tensor(np.stack(rows)))


# steering-vectors


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("site", ["residual", "mlp", "heads"])
def test_steering_vectors_runs_the_printed_code(
    name: str, site: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library("steering_vectors")
    if (name, site) == ("OPT", "mlp"):
        pytest.skip("steering-vectors finds no module named mlp in OPT")
    intervention, model = vector(name, site, "all"), tiny_model(name)
    more = []
    if site == "heads":
        model.save_pretrained(tmp_path / "model")
        tiny_tokenizer(bos=True).save_pretrained(tmp_path / "model")
        more = ["--model", str(tmp_path / "model"), "--device", "cpu"]
    capsys.readouterr()
    code, _ = export(intervention, "steering-vectors", tmp_path, *more)
    assert code == 0
    names: dict[str, Any] = {"model": model, "tokens": tokens(model)}
    with torch.no_grad():
        exec(shown_code(capsys.readouterr().out), names)
    assert_ours(intervention, model, names["output"].logits)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Qwen3", "GPT2"])
def test_w_o_times_the_vector_is_what_the_projection_adds(name: str, tmp_path: Path) -> None:
    """By the projection itself, where the library is not installed too: Gemma-2's and Qwen3's heads are wider."""
    intervention, model = vector(name, "heads", "all", layers=(1,)), tiny_model(name)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer(bos=True).save_pretrained(tmp_path / "model")
    code, path = export(intervention, "steering-vectors", tmp_path, "--model", str(tmp_path / "model"))
    assert code == 0
    projection = model.get_submodule(PROJECTION_PATHS[name].format(1))
    delta = 0.5 * intervention.vector(1).flatten()
    with torch.no_grad():
        expected = projection(delta[None, None]) - projection(torch.zeros_like(delta)[None, None])
    torch.testing.assert_close(load_file(path), {"1": expected.flatten()}, atol=1e-5, rtol=1e-5)


# pyvene


@pytest.mark.parametrize("name", IN_PYVENE)
@pytest.mark.parametrize("site", ["residual", "mlp", "heads"])
def test_pyvene_runs_the_printed_code(
    name: str, site: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library("pyvene")
    intervention, model = vector(name, site, "last"), tiny_model(name)
    code, _ = export(intervention, "pyvene", tmp_path)
    assert code == 0
    names: dict[str, Any] = {"model": model, "tokens": tokens(model)}
    with torch.no_grad():
        exec(shown_code(capsys.readouterr().out), names)
    assert_ours(intervention, tiny_model(name), names["output"].logits)


# What cannot be said


HEADS_AT_BLOCK = "nor can W_o·Δ, which enters before the block's feed-forward and is no vector at the block's output"


@pytest.mark.parametrize(
    ("to", "arguments", "said"),
    [
        ("gguf", ("heads", "all"), HEADS_AT_BLOCK),
        ("gguf", ("mlp", "all"), "a GGUF control vector has no site 'mlp': expected residual"),
        ("gguf", ("residual", "last"), "cannot act at position 'last' alone: expected all"),
        ("gguf", ("residual", "generated"), "cannot act at position 'generated' alone: expected all"),
        ("gguf", ("residual", "all", (0, 1)), "cannot act at layer 0: llama.cpp begins at layer 1"),
        ("steering-vectors", ("residual", "last"), "steering-vectors cannot act at position 'last' alone"),
        ("steering-vectors", ("heads", "generated"), "steering-vectors cannot act at position 'generated' alone"),
        ("steering-vectors", ("heads", "all"), "expected --model, whose W_o that is"),
        ("pyvene", ("heads", "all"), "pyvene cannot act at position 'all' alone: expected last"),
        ("pyvene", ("residual", "generated"), "pyvene cannot act at position 'generated' alone: expected last"),
    ],
)
def test_what_another_tool_cannot_say_is_refused_by_name(
    to: str, arguments: tuple[Any, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, path = export(vector("Llama", *arguments), to, tmp_path)
    error = capsys.readouterr().err
    assert code == 2 and said in error and error.count("\n") == 1 and not path.exists()


@pytest.mark.parametrize("to", ["gguf", "steering-vectors", "pyvene"])
def test_the_rule_of_in_context_vectors_is_no_addition(
    to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    position = "last" if to == "pyvene" else "all"
    code, path = export(vector("Llama", "residual", position, operation="icv"), to, tmp_path)
    assert code == 2 and "operation 'icv' cannot be exported" in capsys.readouterr().err and not path.exists()


@pytest.mark.parametrize(("to", "site", "position"), [("pyvene", "heads", "last"), ("steering-vectors", "mlp", "all")])
@pytest.mark.parametrize(
    "flags", [["--model", "reference"], ["--device", "cpu"], ["--dtype", "float32"], ["--trust-remote-code"]]
)
def test_flags_of_a_model_that_is_not_used(
    flags: list[str], to: str, site: str, position: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, path = export(vector("Llama", site, position), to, tmp_path, *flags)
    said = f"laai: error: {flags[0]}: --to {to} at site {site} uses no model, only steering-vectors at heads does\n"
    assert code == 2 and capsys.readouterr().err == said and not path.exists()


def test_a_control_vector_names_a_model_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = export(laai.Intervention({1: torch.ones(4)}, "residual", "all"), "gguf", tmp_path)
    assert code == 2 and "does not say its model_type" in capsys.readouterr().err


def test_a_quantised_projection_is_refused() -> None:
    model = tiny_model("Llama")
    layout = locate(model)
    projection: Any = layout.module(1, "heads")
    projection.weight = torch.nn.Parameter(projection.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(laai.LaaiError, match="layer 1: .* is a Linear, torch.int8, expected a plain linear layer"):
        attention_output({1: torch.ones(HIDDEN)}, layout)


def test_another_models_width_and_a_wrong_name_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("Qwen3").save_pretrained(tmp_path / "model")
    tiny_tokenizer(bos=True).save_pretrained(tmp_path / "model")
    more = ["--model", str(tmp_path / "model")]
    code, _ = export(vector("Llama", "heads", "all"), "steering-vectors", tmp_path, *more)
    assert code == 2 and "has 32 entries, this model expects 64" in capsys.readouterr().err
    arguments = ["export", str(tmp_path / "vector.safetensors"), "--to", "gguf", "--output", str(tmp_path / "x.bin")]
    assert cli.main(arguments) == 2
    assert "expected a name that ends in .gguf" in capsys.readouterr().err
