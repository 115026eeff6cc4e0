"""Ctrl-C and losses that are not finite: what a training had come to is no result, and no store keeps it.

SIGINT is real, and comes at an evaluation that a test names; test_crash has it at random moments.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import crashing
import pytest
import torch
from tiny import HEADS, head_dim, tiny_model, tiny_tokenizer
from tqdm import tqdm

import laai_core as laai
from laai_core.data import load_task
from laai_core.errors import Interrupted, NotFinite, Unfinished
from laai_core.forward import Forward
from laai_core.optimize import Step
from lm_eval_laai.commands import cli, entry
from lm_eval_laai.methods import METHODS, fit, select
from lm_eval_laai.methods.compose import compose
from lm_eval_laai.routing import Routing

TASK = "lexicon_antonym"
TOKENIZER = tiny_tokenizer(bos=True)
FIXED = ["--layer", "1", "--l1", "0.0001", "--group", "0.0001", "--steps", "30"]  # nothing is left to choose
TRAIN = ["train", "--task", TASK, "--output", "x.safetensors"]
COMMANDS = {
    "sweep": ["sweep", "--task", TASK, "--seeds", "2", "--layers", "0,1", "--limit", "2"],
    "paper": [
        "paper",
        "--data",
        "lexicon",
        "--tables",
        "4",
        "--figures",
        "",
        "--seeds",
        "1",
        "--limit",
        "2",
        "--quick",
    ],
    "demo": ["demo", "--tasks", f"laai_{TASK}", "--limit", "2"],
}


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Also where a shell runs the tests in background, with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextmanager
def changed(change: Callable[[int, Any], Any]) -> Iterator[None]:
    """`change` gets the number and the answer of every evaluation of a loss, and says what it is."""
    original, count = Forward.loss_and_gradient, 0

    def counted(self, *arguments):
        nonlocal count
        count += 1
        return change(count, original(self, *arguments))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Forward, "loss_and_gradient", counted)
        yield


def ctrl_c(number: int, answer: Any) -> Any:
    """At the tenth evaluation."""
    if number == 10:
        signal.raise_signal(signal.SIGINT)
    return answer


def nan_in_the_first_run(number: int, answer: Any) -> Any:
    """At the fifth evaluation."""
    losses, gradients, per_example = answer
    if number == 5:
        losses = torch.where(torch.arange(len(losses)) == 0, math.nan, losses)
    return losses, gradients, per_example


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, empty."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def last_line(capfd: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr, behind the bar; nothing on stdout."""
    out, err = capfd.readouterr()
    assert out == "" and "Traceback" not in err
    return err[err.rfind("\r") + 1 :].strip()


@pytest.mark.parametrize(
    ("change", "code", "why"),
    [
        (ctrl_c, 130, "interrupted after 9 evaluations"),
        (nan_in_the_first_run, 1, "loss or gradient not finite at evaluation 5"),
    ],
)
def test_train_keeps_its_best_so_far_in_another_file(change, code, why, small, folder, capfd):
    line = [*TRAIN, *FIXED, "--model", str(small)]
    assert cli.main([*line, "--seed", "1"]) == 0
    old = files(folder)
    capfd.readouterr()
    with changed(change):
        assert cli.main(line) == code
    told = last_line(capfd)
    assert told == f"laai: error: {why}: the best so far is in x.partial.safetensors, x.safetensors was not written"
    left = files(folder)
    assert set(left) == {"x.safetensors", "x.partial.safetensors"} and left.items() >= old.items()
    training = laai.Intervention.load("x.partial.safetensors").metadata["training"]
    assert training["stopped"] == why and training["steps"] == (9 if change is ctrl_c else 4)
    assert cli.main(line) == 0
    again = Path("x.safetensors").read_bytes()
    assert laai.Intervention.load("x.safetensors").metadata["training"]["stopped"] is None
    Path("x.safetensors").unlink()
    assert cli.main(line) == 0
    assert Path("x.safetensors").read_bytes() == again


def test_the_best_so_far_of_a_chosen_training_says_where_it_began():
    """The choice is made before; its training gets the in-context starts as vectors."""
    model, choice = tiny_model("Llama"), select.choose(tiny_model("Llama"), TOKENIZER, examples())

    def interrupt(step: Step) -> None:
        if step.evaluation == 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as stopped:
        select.trained(model, TOKENIZER, examples(), replace(choice, steps=5), on_step=interrupt)
    assert len(choice.starts) == len(stopped.value.results) > 1
    training = stopped.value.results[0].intervention.metadata["training"]
    assert (training["start"], training["steps"], "mean_of" in training) == ("icl", 2, False)


def test_ctrl_c_while_the_mean_is_measured_loses_no_training(monkeypatch):
    model, choice = tiny_model("Llama"), select.choose(tiny_model("Llama"), TOKENIZER, examples())
    train_many, calls = select.train_many, []

    def interrupted_at_the_mean(*args, **options):
        calls.append(options)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train_many(*args, **options)

    monkeypatch.setattr(select, "train_many", interrupted_at_the_mean)
    with pytest.raises(Interrupted) as stopped:
        select.trained(model, TOKENIZER, examples(), replace(choice, steps=3, further=[]))
    assert len(stopped.value.results) == len(choice.starts) > 1
    assert stopped.value.results[0].intervention.metadata["training"]["steps"] == 3


def test_the_log_of_an_interrupted_training_has_what_it_came_to(small, folder):
    with changed(ctrl_c):
        assert cli.main([*TRAIN, *FIXED, "--model", str(small), "--log-to", "log.jsonl"]) == 130
    steps = [json.loads(line) for line in Path("log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [step["evaluation"] for step in steps] == list(range(1, 10))
    best = laai.Intervention.load("x.partial.safetensors").metadata["training"]["objective"]
    assert min(step["objective"] for step in steps) == best


@pytest.mark.parametrize(
    ("change", "code", "why"),
    [
        (ctrl_c, 130, r"layer \d: interrupted after \d evaluations"),
        (nan_in_the_first_run, 1, r"layer \d: loss or gradient not finite at evaluation 5"),
    ],
)
def test_train_keeps_nothing_of_a_cross_validation(change, code, why, small, folder, capfd):
    with changed(change):
        assert cli.main([*TRAIN, "--model", str(small)]) == code
    said = f"laai: error: cross-validation at {why}: x.safetensors was not written"
    assert re.fullmatch(said, last_line(capfd))
    assert files(folder) == {}


def report(argv: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[str, dict[str, bytes]]:
    """What a command prints, and the files that have no times in them."""
    capfd.readouterr()
    assert cli.main(argv) == 0
    return capfd.readouterr().out, {n: c for n, c in files(Path("out")).items() if n.endswith((".md", ".safetensors"))}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_interrupted_command_stores_no_fit_and_goes_on_to_the_same_report(name, small, folder, capfd):
    line = [*COMMANDS[name], "--model", str(small), "--output", "out", "--json"]
    with changed(lambda number, answer: ctrl_c(number + 5, answer)):  # so that no fit is finished
        assert cli.main(line) == 130
    said = r"laai: error: (cross-validation at layer \d: )?interrupted after \d evaluations"
    assert re.fullmatch(said, last_line(capfd).splitlines()[-1])
    # Files that several processes lock stay, empty.
    assert all(name.startswith("out/locks/") and not content for name, content in files(folder).items())
    resumed = report(line, capfd)
    os.rename("out", "resumed")
    assert report(line, capfd) == resumed


def test_a_store_keeps_the_finished_fits_of_a_batch(small, folder, capfd, caplog):
    line = [*COMMANDS["sweep"], "--model", str(small), "--output", "out", "--layers", "0", "--json"]
    whole = report(line, capfd)
    os.rename("out", "whole")
    with changed(nan_in_the_first_run):
        assert cli.main(line) == 1
    (unfinished,) = [record.message for record in caplog.records if "not finite at" in record.message]
    assert "seed 0" in unfinished and "not finite at evaluation 5" in unfinished
    missing = [score for score in json.loads(capfd.readouterr().out)["scores"] if score["mean"] is None]
    assert len(missing) == 1
    fits = {name: content for name, content in files(Path("out")).items() if name.startswith("fits")}
    assert len(fits) == len(list(Path("whole/fits").iterdir())) - 1
    assert whole[1].items() >= fits.items()
    assert report(line, capfd) == whole


# From Python


def examples() -> list[laai.Example]:
    return load_task(TASK).train


def test_jobs_that_are_not_finite_do_not_stop_the_others():
    model = tiny_model("Llama")
    jobs = [laai.Job(examples(), layer) for layer in (2, 0, 1)]
    alone = [laai.train_many(model, TOKENIZER, [job], steps=8)[0] for job in jobs]
    with changed(nan_in_the_first_run), pytest.raises(NotFinite) as stopped:  # at the lowest layer
        laai.train_many(model, TOKENIZER, jobs, steps=8)
    results = stopped.value.results
    assert [result.finished for result in results] == [True, False, True]
    assert [len(result.history) for result in results] == [8, 4, 8]
    for result, other in zip(results, alone, strict=True):
        if result.finished:
            assert result.intervention.sha256 == other.intervention.sha256


@pytest.mark.parametrize("kind", [Unfinished, NotFinite, Interrupted])
def test_another_process_gets_message_and_results(kind):
    found = pickle.loads(pickle.dumps(kind("the end", [laai.Intervention({1: torch.ones(2, 2)})])))
    assert type(found) is kind and str(found) == "the end"
    assert [one.vector(1).tolist() for one in found.results] == [[[1, 1], [1, 1]]]


def test_an_interrupted_training_leaves_the_model_as_it_was():
    model = tiny_model("Llama")
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    with changed(ctrl_c), pytest.raises(Interrupted) as stopped:
        laai.train(model, TOKENIZER, examples(), 1)
    (result,) = stopped.value.results
    assert not result.finished and len(result.history) == 9
    assert all(p.requires_grad for p in model.parameters())
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


@pytest.mark.parametrize("change", [ctrl_c, nan_in_the_first_run])
def test_cross_validation_chooses_nothing_from_unfinished_folds(change):
    with changed(change), pytest.raises((Interrupted, NotFinite), match="^cross-validation at layer") as stopped:
        select.choose(tiny_model("Llama"), TOKENIZER, examples())
    assert stopped.value.results == []


def test_an_interrupted_composition_is_none():
    ivs = [laai.Intervention({1: torch.full((HEADS, head_dim("Llama")), value)}) for value in (0.1, -0.2)]
    stop = {"model": tiny_model("Llama"), "tokenizer": TOKENIZER, "examples": examples()}
    with changed(lambda number, answer: ctrl_c(number + 8, answer)), pytest.raises(KeyboardInterrupt):
        compose(ivs, "fit", **stop)


@pytest.mark.parametrize("method", ["laai", "icv", "fv", "lora"])
def test_every_file_says_how_it_ended(method, tmp_path):
    path = tmp_path / ("x" if method == "lora" else "x.safetensors")
    steps = {} if method in ("icv", "fv") else {"steps": 2}
    fit(method, tiny_model("Llama"), TOKENIZER, load_task(TASK, n_train=3), output=path, progress=False, **steps)
    training = METHODS[method].record(path)
    assert training["stopped"] is None


def test_an_end_before_the_budget_is_recorded():
    result = laai.train(tiny_model("Llama"), TOKENIZER, examples(), 1, tolerance=0.5)
    assert result.finished and result.stopped.startswith("stationary after ")
    assert result.intervention.metadata["training"]["stopped"] == result.stopped


@pytest.mark.parametrize("number", [1, 2])
def test_an_adapter_interrupted_while_it_is_put_in_place(number, tmp_path, monkeypatch):
    """In the moment when the old one is out of the way, or the new one in its place."""
    split, folder = load_task(TASK, n_train=1), tmp_path / "a"
    fit("ia3", tiny_model("Llama"), TOKENIZER, split, output=folder, steps=1, progress=False)
    before, replace, moved = files(folder), os.replace, []

    def interrupted(source, target):
        replace(source, target)
        moved.append(source)
        if len(moved) == number:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit("ia3", tiny_model("Llama"), TOKENIZER, split, output=folder, steps=2, progress=False)
    assert os.listdir(tmp_path) == ["a"]
    assert (files(folder) == before) == (number == 1)
    assert METHODS["ia3"].record(folder)["steps"] == number


def test_a_folder_of_interventions_does_not_count_what_was_stopped(tmp_path):
    iv = laai.Intervention({1: torch.ones(HEADS, head_dim("Llama"))})
    for name in ("laai_a", "laai_a.partial"):
        iv.save(tmp_path / f"{name}.safetensors")
    assert len(Routing(str(tmp_path)).report()) == 1


# The console script


def test_the_line_comes_behind_the_bars_of_what_was_stopped(capfd):
    def command(arguments):
        bar = tqdm(total=2)  # as the harness draws its own
        bar.update()
        raise KeyboardInterrupt

    parser = cli.Parser(prog="laai")
    parser.set_defaults(command=command)
    assert cli.run(parser, []) == 130
    out, err = capfd.readouterr()
    assert out == "" and err.splitlines()[-1] == "laai: error: interrupted"


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to another process")
def test_ctrl_c_during_the_imports():
    assert crashing.interrupt_imports(3, random.Random(0)).faults == []


def test_the_handlers_of_a_caller_stay(monkeypatch):
    monkeypatch.setattr(cli, "main", lambda argv: signal.getsignal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert entry.main([]) == signal.SIG_IGN == signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        assert entry.main([]) is signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # its work is done
    finally:
        signal.signal(signal.SIGINT, before)
