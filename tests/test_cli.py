"""The command lines: what is printed where, exit codes, one line for every bad input, nothing left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import LAYERS, VOCABULARY, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

import laai_core as laai
from laai_core.data import load_task
from lm_eval_laai.commands import cli, demo, options
from lm_eval_laai.known_models import folder
from lm_eval_laai.methods.select import train_chosen
from lm_eval_laai.tasks import include_path, list_tasks

TASK = "lexicon_antonym"
FILE = "laai_lexicon_antonym.safetensors"
needs_matplotlib = pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is not installed")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and its tokenizer in a folder."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_model("Llama").save_pretrained(folder)
    tiny_tokenizer(bos=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as `train` writes it."""
    path = tmp_path_factory.mktemp("trained") / FILE
    assert cli.main(["train", "--model", str(model), "--task", TASK, "--steps", "8", "--output", str(path)]) == 0
    return path


# train and inspect


def test_train_then_inspect(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], facts_of: Callable[..., dict[str, Any]]
) -> None:
    line = ["train", "--model", model, "--task", TASK, "--steps", 12, "--layer", -1, "--l1", 0.02, "--seed", 3]
    facts = facts_of(*line, "--output", f"{tmp_path}/new/folder/")
    path = tmp_path / "new" / "folder" / FILE
    assert facts["file"] == str(path)
    assert [p.name for p in path.parent.iterdir()] == [FILE]

    iv = laai.Intervention.load(path)
    assert iv.layers == [LAYERS - 1] == [facts["layer"]]
    assert iv.metadata["task"] == "laai_lexicon_antonym"
    assert iv.metadata["training"]["seed"] == 3
    assert iv.metadata["training"]["l1"] == 0.02
    assert facts["evaluations"] == 12
    assert facts["task_loss"] < facts["task_loss_before"]
    assert facts["task_loss"] <= facts["objective"] == iv.metadata["training"]["objective"]

    vector = iv.vector(LAYERS - 1)
    shown = facts_of("inspect", path)
    assert shown["sha256"] == facts["sha256"] == iv.sha256
    assert shown["metadata"] == iv.metadata
    layer = shown["layers"][str(LAYERS - 1)]
    assert layer["norms"] == pytest.approx([float(row.square().sum().sqrt()) for row in vector])
    assert layer["nonzero"] == [int((row != 0).sum()) for row in vector]
    assert layer["zero_share"] == pytest.approx(float((vector == 0).float().mean()))
    assert 1 - layer["zero_share"] == pytest.approx(facts["nonzero_share"])
    assert layer["active_heads"] == facts["active_heads"]

    assert cli.main(["inspect", str(path)]) == 0
    text = capfd.readouterr().out
    for part in (iv.sha256, "heads", "last", "training.objective", r"'\n'", f"{layer['norms'][0]:.4f}"):
        assert part in text


def test_train_logs_every_evaluation_to_a_file(
    model: Path, tmp_path: Path, facts_of: Callable[..., dict[str, Any]], refused: Callable[..., str]
) -> None:
    line = ["train", "--model", model, "--task", TASK, "--layer", 1, "--l1", 0.02, "--group", 0.01]
    log, plain, logged = tmp_path / "new" / "log.jsonl", tmp_path / "plain", tmp_path / "logged"
    facts_of(*line, "--steps", 7, "--output", f"{plain}/")
    facts = facts_of(*line, "--steps", 7, "--output", f"{logged}/", "--log-to", log)
    assert (plain / FILE).read_bytes() == (logged / FILE).read_bytes()

    steps = [json.loads(text) for text in log.read_text(encoding="utf-8").splitlines()]
    assert [step["evaluation"] for step in steps] == list(range(1, 8))
    for step in steps:
        assert step["objective"] == pytest.approx(step["loss"] + step["penalty"])
    best = min(steps, key=lambda step: step["objective"])
    assert (best["objective"], best["active_heads"]) == (facts["objective"], facts["active_heads"])
    assert best["nonzero"] == int((laai.Intervention.load(logged / FILE).vector(1) != 0).sum())

    facts_of(*line, "--steps", 2, "--output", f"{logged}/", "--log-to", log)  # in the place of the old lines
    assert len(log.read_text(encoding="utf-8").splitlines()) == 2
    kept = log.read_bytes()
    assert "has no --log-to" in refused(*line[:5], "--method", "icv", "--log-to", log, "--output", f"{logged}/")
    assert "is a folder: expected a file" in refused(*line, "--log-to", tmp_path)
    assert "cannot write to" in refused(*line, "--log-to", log / "x")
    assert log.read_bytes() == kept


def test_train_prints_a_summary_and_logs_to_stderr(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("laai_core.products.SMALLEST", 0)
    fixed = ["--layer", "1", "--l1", "0.01", "--group", "0", "--steps", "3"]
    assert cli.main(["train", "--model", str(model), "--task", TASK, *fixed, "--output", f"{tmp_path}/"]) == 0
    out, err = capfd.readouterr()
    assert [line.split("  ")[0] for line in out.splitlines()] == [
        *(
            "file",
            "sha256",
            "layer",
            "l1, group",
            "objective",
            "task loss",
            "stationarity",
            "active heads",
            "non-zero",
        ),
        "evaluations",
    ]
    assert "3/3" in err  # the bar
    assert re.search(r"(?m)^training takes up to \d+ MB more for packed weights", err)


def test_defaults_are_those_of_train_chosen(model: Path, tmp_path: Path) -> None:
    assert cli.main(["train", "--model", str(model), "--task", TASK, "--output", str(tmp_path)]) == 0
    written = laai.Intervention.load(tmp_path / FILE)
    split = load_task(TASK)
    direct, choice = train_chosen(tiny_model("Llama"), tiny_tokenizer(bos=True), split.train)
    assert written.layers == [choice.layer]
    assert torch.equal(written.vector(choice.layer), direct.intervention.vector(choice.layer))
    assert written.metadata["training"]["start"] == "icl"


def test_a_layer_is_checked_against_the_configuration() -> None:
    config = BertConfig(num_hidden_layers=5)
    assert [options.checked_layer(layer, config) for layer in (None, 0, 4, -1, -5)] == [None, 0, 4, 4, 0]
    for layer in (5, -6):
        with pytest.raises(laai.LaaiError, match="this model has layers 0 to 4"):
            options.checked_layer(layer, config)


@needs_matplotlib
@pytest.mark.parametrize("site", ["heads", "mlp"])
def test_plot(site: str, tmp_path: Path) -> None:
    shape = (4, 8) if site == "heads" else (32,)
    laai.Intervention({1: torch.randn(shape), 2: torch.zeros(shape)}, site=site).save(tmp_path / "x.safetensors")
    plot = tmp_path / "new" / "x.png"
    assert cli.main(["inspect", str(tmp_path / "x.safetensors"), "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in plot.parent.iterdir()] == ["x.png"]


def test_plot_refusals(
    trained: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ".png" in refused("inspect", trained, "--plot", tmp_path / "x.bmp")
    (tmp_path / "file").touch()
    if find_spec("matplotlib"):
        assert "cannot write" in refused("inspect", trained, "--plot", tmp_path / "file" / "x.png")
    monkeypatch.setattr("lm_eval_laai.inspection.plot.find_spec", lambda name: None)
    assert 'pip install "lm-eval-laai[plot]"' in refused("inspect", trained, "--plot", tmp_path / "x.png")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# Bad input


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--task", "lexicon_antonim"], "did you mean lexicon_antonym"),
        (["--n-train", "10000"], "training pool"),
        (["--n-train", "0"], "n_train is 0"),
        (["--n-train", "ten"], "--n-train"),
        (["--steps", "0"], "steps is 0"),
        (["--l1", "-1"], "l1 is -1"),
        (["--group", "nan"], "group is nan"),
        (["--lr", "0"], "lr is 0"),
        (["--tolerance", "-1"], "tolerance is -1"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--optimizer", "sgd"], "prox"),
        (["--device", "abacus"], "abacus"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--task", "antonym"], "laai data fetch"),
        (["--output", "no-suffix"], ".safetensors"),
        (["--output", ""], "--output '': expected a path"),
        (["--output", "a\nb.safetensors"], "--output 'a\\nb.safetensors': expected a path"),
        (["--output", "a.safetensors\n"], "expected a path"),
        (["--method", "lora", "--output", " "], "expected a path"),
        (["--seed", "-1"], "seed is -1; expected a whole number, 0 or above"),
        (["--unknown"], "--unknown"),
        ([], "no model folder"),
    ],
)
def test_refused_before_any_model_is_looked_for(
    flags: list[str], said: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    line = ["train", "--model", tmp_path / "no" / "model", "--task", TASK, "--data", tmp_path / "no" / "data"]
    error = refused(*line, "--output", f"{tmp_path}/out/", *flags)
    assert said in error
    assert flags == [] or "no model" not in error
    assert list(tmp_path.iterdir()) == []


def encoder(folder: Path, _: Path) -> None:
    """BERT: AutoModelForCausalLM takes it."""
    size = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    config = BertConfig(vocab_size=VOCABULARY, initializer_range=0.5, **size)
    BertForMaskedLM(config).save_pretrained(folder)
    tiny_tokenizer(bos=True).save_pretrained(folder)


def encoder_decoder(folder: Path, _: Path) -> None:
    config = T5Config(vocab_size=VOCABULARY, d_model=16, num_layers=2, num_heads=2, d_ff=16, d_kv=8)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tiny_tokenizer(bos=True).save_pretrained(folder)


def wordless(folder: Path, model: Path) -> None:
    """A tokenizer that knows none of the prompts' letters, and drops what it does not know."""
    shutil.copytree(model, folder)
    tokenizer = Tokenizer(models.BPE({"<eos>": 0, "x": 1}, []))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def no_tokenizer(folder: Path, model: Path) -> None:
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("tokenizer*"))


def truncated_weights(folder: Path, model: Path) -> None:
    shutil.copytree(model, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def empty_folder(folder: Path, _: Path) -> None:
    folder.mkdir()


@pytest.mark.parametrize(
    ("make", "flags", "said"),
    [
        (encoder, [], "expected a causal language model"),
        (encoder_decoder, [], "encoder-decoder"),
        (wordless, [], "has no tokens"),
        (no_tokenizer, [], "cannot load the tokenizer"),
        (truncated_weights, [], "cannot load the model"),
        (empty_folder, [], "cannot load the"),
        (shutil.copytree, ["--layer", "3"], "layers 0 to 2"),
        (shutil.copytree, ["--layer", "-4"], "layers 0 to 2"),
        (shutil.copytree, ["--projection", "no.{}.module"], "no.0.module"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_bad_models(
    make: Any, flags: list[str], said: str, model: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder, output = tmp_path / "model", tmp_path / "output"
    if make is shutil.copytree:
        folder = model
    else:
        make(folder, model)
    output.mkdir()
    assert said in refused("train", "--model", folder, "--task", TASK, "--output", output, *flags)
    assert list(output.iterdir()) == []


@pytest.mark.parametrize("name", ["~nobody-of-that-name/x", "x" * 300])
def test_paths_that_the_system_refuses(name: str, refused: Callable[..., str]) -> None:
    assert "traceback" not in refused("check", name, "--against", name).lower()
    refused("train", "--model", "reference", "--task", TASK, "--output", f"{name}/")


def test_unwritable_output(model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "file").touch()
    error = refused("train", "--model", "/no/model", "--task", TASK, "--output", f"{tmp_path}/file/under/")
    assert "cannot write" in error and "no model" not in error
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def not_safetensors(path: Path) -> None:
    path.write_text("Q: hot\nA: cold\n")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def nan_vector(path: Path) -> None:
    laai_key = json.dumps({"format_version": 1, "site": "heads", "position": "last", "operation": "add", "scale": 1})
    save_file({"layers.1.heads": torch.full((4, 8), float("nan"))}, path, metadata={"laai": laai_key})


def of_something_else(path: Path) -> None:
    save_file({"weight": torch.ones(2)}, path)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (not_safetensors, "not a safetensors file"),
        (truncated, "truncated"),
        (nan_vector, "NaN"),
        (of_something_else, "no intervention"),
        (Path.unlink, "no intervention file"),
    ],
)
def test_bad_files(spoil: Any, said: str, trained: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    path = tmp_path / FILE
    shutil.copy(trained, path)
    spoil(path)
    error = refused("inspect", path)
    assert said in error and str(path) in error


def test_flags_are_not_abbreviated(tmp_path: Path, refused: Callable[..., str]) -> None:
    """`--seed` of a sweep would mean `--seeds`."""
    line = ["sweep", "--model", tmp_path, "--task", TASK, "--layers", "1", "--seed", "3"]
    assert "unrecognized arguments: --seed 3" in refused(*line)


def test_no_folder_of_data(tmp_path: Path, refused: Callable[..., str]) -> None:
    assert f"--data {tmp_path}/no: no such folder" in refused("data", "--data", tmp_path / "no")


def test_an_output_that_is_an_input(trained: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    vector, rows = tmp_path / "x.safetensors", tmp_path / "words.jsonl"
    shutil.copy(trained, vector)
    rows.write_text("".join(json.dumps({"input": f"w{n}", "output": "x"}) + "\n" for n in range(80)))
    kept = vector.read_bytes(), rows.read_bytes()
    for line in (
        ["export", vector, "--to", "pyvene", "--output", vector],
        ["compose", vector, trained, "--output", vector],
    ):
        assert "is what this command reads: expected another file to write" in refused(*line)
    train = ["train", "--model", "/no/model", "--examples", rows, "--output", f"{tmp_path}/"]
    assert "exists and is no such log" in refused(*train, "--log-to", rows)
    assert (vector.read_bytes(), rows.read_bytes()) == kept


def test_names_with_laai_and_values_that_begin_with_a_minus(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["train", "--model", str(model), "--task", f"laai_{TASK}", "--steps", "2", "--layer", "1"]
    assert cli.main([*line, "--l1", "9", "--group", "9", "--start", "zero", "--output", f"{tmp_path}/"]) == 0
    assert "the vector is zero: the penalties are too strong" in capsys.readouterr().err
    line = ["generate", "--model", str(model), "--intervention", str(tmp_path / FILE), "hot", "--scale", "-1,2"]
    assert cli.main(line) == 0
    assert "-1 · Δ" in capsys.readouterr().out


def test_too_many_new_tokens(model: Path, trained: Path, refused: Callable[..., str]) -> None:
    line = ["generate", "--model", model, "--intervention", trained, "hot", "--max-new-tokens", 100_000]
    assert "--max-new-tokens is 100000: expected fewer than the model's" in refused(*line)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_standard_output_that_cannot_be_written_to() -> None:
    line = [
        sys.executable,
        "-c",
        "import sys; from lm_eval_laai.commands.entry import main; sys.exit(main())",
        "tasks",
    ]
    with open("/dev/full", "w") as full:
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "laai: error: cannot write to standard output: No space left on device\n"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_command(refused: Callable[..., str]) -> None:
    assert "--help" in refused()
    assert "train" in refused("trane")


def test_failed_work_is_not_bad_input(
    model: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing listens on port 9 of this machine.
    assert "127.0.0.1:9" in refused(
        "data", "fetch", "--output", tmp_path / "data", "--base-url", "http://127.0.0.1:9", code=1
    )

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", full)
    line = ["train", "--model", model, "--task", TASK, "--output", f"{tmp_path}/out/"]
    assert "out of memory" in refused(*line, code=1)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite(tmp_path: Path, refused: Callable[..., str]) -> None:
    broken = tiny_model("Llama")
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    broken.save_pretrained(tmp_path / "model")
    tiny_tokenizer(bos=True).save_pretrained(tmp_path / "model")
    line = ["train", "--model", tmp_path / "model", "--task", TASK, "--output", f"{tmp_path}/out/"]
    assert "not finite" in refused(*line, code=1)
    assert not (tmp_path / "out").exists()


def test_missing_weights_are_told(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # A checkpoint without its head: transformers makes one up.
    tiny_model("Llama").model.save_pretrained(tmp_path)
    shutil.copy(model / "tokenizer.json", tmp_path)
    shutil.copy(model / "tokenizer_config.json", tmp_path)
    line = ["train", "--model", str(tmp_path), "--task", TASK, "--steps", "1", "--output", f"{tmp_path}/out/"]
    assert cli.main(line) == 0
    assert "lm_head.weight" in caplog.text


# data, tasks


def test_data(tmp_path: Path, capfd: pytest.CaptureFixture[str], facts_of: Callable[..., dict[str, Any]]) -> None:
    (tmp_path / "antonym.json").write_text('[{"input": "hot", "output": "cold"}]')
    (tmp_path / "synonym.json").write_text("[]")
    facts = facts_of("data", "--data", tmp_path)
    assert facts["lexicon"]["rows"] >= 500
    assert facts["folder"] == str(tmp_path)
    states = {s["file"]: (s["state"], s["rows"]) for s in facts["sets"]}
    assert states == {
        "antonym.json": ("changed", 1),
        "synonym.json": ("malformed", None),
        "english-french.json": ("missing", None),
        "english-german.json": ("missing", None),
    }
    assert cli.main(["data", "--data", str(tmp_path)]) == 0
    text = capfd.readouterr().out
    for part in (
        "changed",
        "malformed",
        "missing",
        str(tmp_path),
        "laai data fetch",
        "LAAI_DATA",
        "the list is empty",
    ):
        assert part in text


def test_public_data(
    public_data: Path, capfd: pytest.CaptureFixture[str], facts_of: Callable[..., dict[str, Any]]
) -> None:
    facts = facts_of("data", "--data", public_data)
    assert {s["state"] for s in facts["sets"]} == {"ok"}
    assert cli.main(["data", "--data", str(public_data)]) == 0
    assert "laai data fetch" not in capfd.readouterr().out


def test_tasks(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tasks"]) == 0
    out = capfd.readouterr().out
    assert f"--include_path {include_path()}" in out
    for task in list_tasks():
        assert any(line.split()[:3] == [task.name, task.group, task.data_set] for line in out.splitlines())
    assert cli.main(["tasks", "--json"]) == 0
    assert len(json.loads(capfd.readouterr().out)["tasks"]) == len(list_tasks())


# demo


def test_demo(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "demo"
    tasks = [task.name for task in list_tasks() if task.group == "laai_lexicon"]
    line = ["demo", "--model", str(model), "--output", str(output), "--limit", "3", "--seed", "2", "--json"]
    assert cli.main([*line, "--tasks", "laai_lexicon"]) == 0
    facts = json.loads(capfd.readouterr().out)
    plots = {f"{task}.png" for task in tasks} if find_spec("matplotlib") else set()
    files = {"zero_shot.json", "ten_shot.json", "delta.json", *(f"{task}.safetensors" for task in tasks), *plots}
    assert {path.name for path in output.iterdir()} == files
    for setting, shots in (("zero_shot", 0), ("ten_shot", 10), ("delta", 0)):
        results = json.loads((output / f"{setting}.json").read_text())
        assert "samples" not in results
        assert set(results["n-shot"].values()) == {shots}
        assert {config["metadata"]["seed"] for config in results["configs"].values()} == {2}
        for task in tasks:
            scores = results["results"][task]
            assert facts["scores"][setting][task] == [scores["exact_match,none"], scores["exact_match_stderr,none"]]
        applied = {i["sha256"] for i in results["config"].get("interventions", [])}
        assert applied == ({t["sha256"] for t in facts["trained"].values()} if setting == "delta" else set())
    # What the demo trains is what `laai train` trains.
    line = ["train", "--model", str(model), "--task", TASK, "--seed", "2", "--output", str(tmp_path)]
    assert cli.main(line) == 0
    assert (tmp_path / FILE).read_bytes() == (output / FILE).read_bytes()


def test_demo_table() -> None:
    task = next(task for task in list_tasks() if task.name == "laai_lexicon_antonym")
    scores = {"zero_shot": (0.125, 0.01), "ten_shot": (0.5, 0.02), "delta": (0.75, 0.03)}
    facts = {
        "model": "some/model",
        "seed": 4,
        "output": "runs/demo",
        "answers": {
            "zero_shot": {task.name: [("Q: hot\nA:", "the"), ("Q: up\nA:", "")]},
            "delta": {task.name: [("Q: hot\nA:", "cold"), ("Q: up\nA:", "down")]},
        },
        "scores": {name: {task.name: score} for name, score in scores.items()},
        "average": {name: demo._average([score, score, score, score]) for name, score in scores.items()},
    }
    rows = [re.split(" {2,}", line) for line in demo._text(facts, [task]).splitlines()]
    assert rows[0] == ["rule", "zero-shot", "ten-shot", "Δ"]
    assert rows[1][-3:] == ["0.125 ± 0.010", "0.500 ± 0.020", "0.750 ± 0.030"]
    assert rows[2][-3:] == ["0.125 ± 0.005", "0.500 ± 0.010", "0.750 ± 0.015"]
    assert [row[-3:] for row in rows if row[0] == task.name][1:] == [
        ["hot", "the", "cold"],
        ["up", "(nothing)", "down"],
    ]
    pairs = next(task for task in list_tasks() if task.name == "laai_pairs")
    assert demo._title(pairs._replace(data_set="pairs:past_tense")) == "laai_pairs:past_tense"


def test_demo_refusals(
    model: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*flags: object) -> str:
        return refused("demo", "--output", tmp_path / "out", *flags)

    assert "laai tasks" in run("--model", model, "--tasks", "laai_antonim")
    assert "laai data fetch" in run("--model", "/no/model", "--tasks", "laai_rule", "--data", tmp_path / "nowhere")
    assert "limit is 1" in run("--model", model, "--limit", 1)
    assert "layers 0 to 2" in run("--model", model, "--layer", 3)
    monkeypatch.setattr(folder, "REFERENCE_FOLDER", Path("nowhere", "weights"))
    assert "--model" in run("--model", "reference")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert "smollm2-135m is not on this machine yet" in run()
    assert list(tmp_path.iterdir()) == []
    laai.Intervention({0: torch.ones(4, 8)}).save(tmp_path / "out" / "other.safetensors")
    assert "has other.safetensors: expected a folder without" in run("--model", model)


def test_what_is_not_given_is_cross_validated_and_shown(model: Path, tmp_path: Path, capfd: Any) -> None:
    flags = ["--group", "0.01", "--steps", "5", "--n-train", "4", "--json"]
    assert cli.main(["train", "--model", str(model), "--task", TASK, "--output", f"{tmp_path}/", *flags]) == 0
    facts = json.loads(capfd.readouterr().out)
    layers = [one["layer"] for one in facts["tried"]]
    assert len(set(layers)) > 1 and facts["layer"] in layers and facts["evaluations"] == 5
    assert facts["l1"] in [one["l1"] for one in facts["tried"]] and facts["group"] == 0.01
