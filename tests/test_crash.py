"""Killed at any moment, on a full disk, or in two processes at once: what is there is whole, and a rerun succeeds.

A few of the kills and interrupts of `benchmarks/reliability.py`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import crashing
import pytest
from crashing import Command, Kills, interrupt_at_random_times, kill_at_lines, kill_at_random_times, run

from laai_core import Intervention
from laai_core.errors import WorkFailed

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="commands are forked from a server")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return crashing.saved_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def trained(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """What trainings with the seeds 0 and 1 write."""
    contents = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp("trained")
        assert run(crashing.train(model, seed), folder).code == 0
        contents.append((folder / "x.safetensors").read_bytes())
    assert contents[0] != contents[1]
    return contents


@pytest.fixture(scope="module")
def training(model: Path, trained: list[bytes]) -> Command:
    return Command(crashing.train(model), {"x.safetensors": trained[0].__eq__}, {"x.safetensors": trained[1]})


@pytest.fixture
def fetching() -> Iterator[Command]:
    with crashing.fetching() as command:
        yield command


# Kills


@pytest.mark.parametrize("how", [kill_at_lines, kill_at_random_times])
def test_killed_training(how, training, tmp_path):
    kills = how(training, 3, tmp_path, random.Random(0))
    assert kills.faults == []
    assert kills.kills == kills.absent + kills.whole == 3


@pytest.mark.parametrize("how", [kill_at_lines, kill_at_random_times])
def test_killed_fetch(how, fetching, tmp_path):
    kills = how(fetching, 4, tmp_path, random.Random(0))
    assert kills.faults == []
    assert kills.absent + kills.whole == 4 * len(fetching.whole)


# Ctrl-C


def test_interrupted_training(training, tmp_path):
    interrupts = interrupt_at_random_times(training, 3, tmp_path, random.Random(0))
    assert interrupts.faults == []
    assert interrupts.rounds == interrupts.absent + interrupts.whole == 3


@pytest.mark.parametrize(
    "argv",
    [
        ["sweep", "--task", "lexicon_antonym", "--seeds", "1", "--layers", "0"],
        ["demo", "--tasks", "laai_lexicon_antonym"],
        # Slow: its cells are computed and stored by the code of sweep's, and there are eight times as many.
        pytest.param(
            ["paper", "--data", "lexicon", "--tables", "4", "--figures", "", "--seeds", "1", "--quick"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda argv: argv[0],
)
def test_interrupted(argv, small, tmp_path):
    crashing.preload(f"lm_eval_laai.commands.{argv[0]}", "lm_eval_laai.experiments.harness", "matplotlib.figure")
    command = crashing.learned([*argv, "--model", str(small), "--limit", "2", "--output", "out"], tmp_path / "learned")
    interrupts = interrupt_at_random_times(command, 1, tmp_path / "rounds", random.Random(0))
    assert interrupts.faults == []


def test_what_is_half_or_gone_or_left_would_be_noticed(training, trained, tmp_path):
    def found(content: bytes | None, old: dict[str, bytes], *more: str) -> list[str]:
        for path in tmp_path.iterdir():
            path.unlink()
        if content is not None:
            (tmp_path / "x.safetensors").write_bytes(content)
        for name in more:
            (tmp_path / name).touch()
        return list(crashing.judged(training, tmp_path, Kills(), old))

    new, old = trained
    for fine in (
        found(new, {}),
        found(None, {}),
        found(old, training.old),
        found(new, training.old, ".x.1", "y.part"),
    ):
        assert fine == []
    assert found(new[:-1], {}) == ["x.safetensors is damaged"]
    assert found(old[:-1], training.old) == ["x.safetensors is damaged"]
    assert found(old, {}) == ["x.safetensors is damaged"]
    assert found(None, training.old) == ["x.safetensors is gone"]
    assert found(new, {}, "temporary") == ["temporary was left"]


# A full disk


def test_training_onto_a_full_disk(training, trained, tmp_path):
    (tmp_path / "work").mkdir()
    path = tmp_path / "work" / "x.safetensors"
    path.write_bytes(trained[1])
    ended = run(training.argv, path.parent, file_size=len(trained[1]) - 1)
    assert (ended.code, ended.complaint) == (1, "laai: error: cannot write x.safetensors: File too large")
    assert path.read_bytes() == trained[1]
    assert os.listdir(path.parent) == ["x.safetensors"]


def test_fetching_onto_a_full_disk(fetching, tmp_path):
    ended = run(fetching.argv, tmp_path / "work", file_size=50_000, sums=fetching.sums)
    assert ended.code == 1
    assert ended.complaint.startswith("laai: error: cannot write ") and ended.complaint.endswith(": File too large")
    assert os.listdir(tmp_path / "work" / "function_vectors") == ["antonym.json.part"]
    assert run(fetching.argv, tmp_path / "work", sums=fetching.sums).code == 0
    assert all(whole((tmp_path / "work" / name).read_bytes()) for name, whole in fetching.whole.items())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with ExitStack() as stack:
        try:
            stack.enter_context(crashing.small_disk(tmp_path / "disk", 1 << 16))
        except OSError as error:
            pytest.skip(f"no file system can be mounted here: {error}")
        yield tmp_path / "disk"


def test_a_disk_that_is_really_full(trained, tmp_path, small_disk):
    path = small_disk / "x.safetensors"
    path.write_bytes(trained[0])
    (tmp_path / "other.safetensors").write_bytes(trained[1])
    other = Intervention.load(tmp_path / "other.safetensors")
    crashing.fill(small_disk / "filler")
    with pytest.raises(WorkFailed, match="cannot write .*: No space left on device"):
        other.save(path)
    assert path.read_bytes() == trained[0]
    assert sorted(os.listdir(small_disk)) == ["filler", "x.safetensors"]
    (small_disk / "filler").unlink()
    other.save(path)
    assert path.read_bytes() == trained[1]


# Two at once


def test_trainings_into_one_file(model, trained, tmp_path):
    folder = tmp_path / "work"
    both = [crashing.Running(crashing.train(model, seed), folder) for seed in (0, 1) * 2]
    assert [one.wait().code for one in both] == [0] * 4
    assert (folder / "x.safetensors").read_bytes() in trained
    assert os.listdir(folder) == ["x.safetensors"]


def test_fetches_into_one_folder(fetching, tmp_path):
    """Without a lock they write into one part, and each finds a sum that is wrong."""
    folder = tmp_path / "work"
    both = [crashing.Running(fetching.argv, folder, sums=fetching.sums) for _ in range(3)]
    ended = [one.wait() for one in both]
    assert [one.code for one in ended] == [0] * 3, [one.complaint for one in ended]
    assert any("waiting for another fetch" in one.err for one in ended)
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == set(fetching.whole)
    assert all(whole((folder / name).read_bytes()) for name, whole in fetching.whole.items())
