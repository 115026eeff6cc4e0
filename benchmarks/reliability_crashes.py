"""The parts `kills`, `interrupts` and `disks` of reliability.py."""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import crashing
from crashing import Command, Kills, interrupt_at_random_times, interrupt_imports, kill_at_lines, kill_at_random_times
from judge_server import JudgeServer
from tiny import small_model_folder
from tqdm import tqdm

from models import REFERENCE_MODEL
from reliability import Part, table

# --- kills

Plan = tuple[Command, int | None, int]  # what to kill, at how many lines (None: at each), at how many moments


def kills(quick: bool, folder: Path) -> Part:
    """SIGKILL of every command that writes: before lines of the code that writes (`files.write`, `data fetch`), and
    at moments spread evenly over its run.

    Every second run finds an older output there, where a command has one. Afterwards every output must be whole (the
    bytes of an undisturbed run, where runs do not differ) or as before; nothing else may be there that does not say it
    is unfinished; and the same command, run again, must end with everything whole.
    """
    part, rows = Part(), []
    with ExitStack() as stack:
        plans = _plans(quick, folder, stack)
        for name, (command, lines, moments) in plans.items():
            both = Kills(), Kills()
            if lines != 0:
                both = kill_at_lines(command, lines, folder / name / "lines", random.Random(0)), both[1]
            if moments:
                both = both[0], kill_at_random_times(command, moments, folder / name / "moments", random.Random(0))
            part.faults += [f"{name}, {fault}" for kind in both for fault in kind.faults]
            rows.append(
                [f"`laai {name}`", *(kind.kills for kind in both)]
                + [sum(getattr(kind, what) for kind in both) for what in ("whole", "absent", "litter")]
                + [sum(len(kind.faults) for kind in both)]
            )
            print(f"{name}: {rows[-1]}", file=sys.stderr, flush=True)
    total = ["all", *(sum(row[column] for row in rows) for column in range(1, 7))]
    columns = ["command", "killed at lines", "at moments", "whole", "as before", "unfinished files", "faults"]
    note = (
        "Outputs are counted after each kill, by file. Unfinished files are hidden ones with a random name, which a "
        "kill between making and renaming leaves behind, parts of downloads, which the next `fetch` goes on with, and "
        "journals of SQLite."
    )
    part.tables.append(table("Kills survived", columns, [*rows, total], note))
    return part


def _plans(quick: bool, folder: Path, stack: ExitStack) -> dict[str, Plan]:
    crashing.preload("lm_eval.evaluator", "lm_eval_laai.model", "matplotlib.figure", "peft")
    model = str(crashing.saved_model(folder / "model"))
    train = crashing.train(Path(model))
    old = folder / "old"
    assert crashing.run(crashing.train(Path(model), seed=1), old).code == 0
    before = {"x.safetensors": (old / "x.safetensors").read_bytes()}
    file = str(old / "x.safetensors")
    small = ["--limit", "2"]
    lexicon = ["--task", "lexicon_antonym"]
    larger = str(small_model_folder(folder / "larger"))  # with room for ten-shot prompts
    commands = {
        "train": train,
        "compose": ["compose", file, file, "--output", "x.safetensors"],
        "demo": ["demo", "--model", larger, "--tasks", "laai_lexicon_antonym", *small, "--output", "out"],
        "sweep": ["sweep", "--model", larger, *lexicon, *small, "--seeds", "1", "--layers", "0,1", "--output", "out"],
        "paper": ["paper", "--model", larger, "--data", "lexicon", "--tables", "1", "--figures", ""]
        + ["--seeds", "1", *small, "--quick", "--output", "out"],
    }
    if find_spec("openai"):
        commands["judge"] = _judge(folder, stack)
    learned = {name: crashing.learned(argv, folder / name / "learned") for name, argv in commands.items()}
    learned["data fetch"] = stack.enter_context(crashing.fetching())
    for name in ("train", "compose"):
        learned[name].old.update(before)
    few = {name: (2, 1) for name in learned}
    many: dict[str, tuple[int | None, int]] = {
        "train": (None, 25),
        "compose": (None, 10),
        "data fetch": (40, 25),
        "demo": (8, 8),
        "sweep": (8, 10),
        "paper": (4, 6),
        "judge": (None, 10),
    }
    return {name: (command, *(few if quick else many)[name]) for name, command in learned.items()}


def _judge(folder: Path, stack: ExitStack) -> list[str]:
    """A judge that always says yes, and the samples it is asked about."""
    os.environ["OPENAI_API_KEY"] = "none"
    server = stack.enter_context(JudgeServer(lambda request, number: "1"))
    samples = folder / "samples_laai_antonym_2026-01-01.jsonl"
    docs = [{"prompt": f"Q: w{number}\nA:", "target": " t"} for number in range(12)]
    rows = [{"doc_id": number, "doc": doc, "filtered_resps": ["p"]} for number, doc in enumerate(docs)]
    samples.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    where = ["--base-url", server.url, "--cache", "cache.sqlite", "--output", "verdicts.jsonl"]
    return ["judge", str(samples), "--judge-model", "m", *where]


# --- Ctrl-C


def interrupts(quick: bool, folder: Path) -> Part:
    """SIGINT of the commands that train, at moments spread evenly over their run, on the reference model (`paper`,
    which has eight trainings, on a tiny one); and of `laai` while it imports, in processes of its own.

    The command must end with exit code 130, no traceback and no report. Every output must be whole or as before;
    `train` may leave `x.partial.safetensors`, which says that it was interrupted; nothing else may be there, not even
    hidden. The same command, run again, must end with the bytes of an undisturbed run, where runs do not differ.
    """
    part, rows = Part(), []
    crashing.preload("lm_eval.evaluator", "lm_eval_laai.model", "matplotlib.figure", "peft")
    model = ["--model", str(REFERENCE_MODEL)]
    tiny = str(small_model_folder(folder / "tiny"))
    small = ["--limit", "2", "--output", "out"]
    old = folder / "old"
    assert crashing.run(crashing.train(REFERENCE_MODEL, seed=1), old).code == 0
    before = {"x.safetensors": (old / "x.safetensors").read_bytes()}
    commands = {
        "train": crashing.train(REFERENCE_MODEL, steps=40),
        "demo": ["demo", *model, "--tasks", "laai_lexicon_antonym", *small],
        "sweep": ["sweep", *model, "--task", "lexicon_antonym", "--seeds", "1", "--layers", "4", *small],
        "paper": [
            "paper",
            "--model",
            tiny,
            "--data",
            "lexicon",
            "--tables",
            "4",
            "--figures",
            "",
            "--seeds",
            "1",
            *small,
        ],
    }
    many = {"train": 24, "demo": 10, "sweep": 12, "paper": 8}
    for name, argv in commands.items():
        command = crashing.learned(argv, folder / name / "learned")
        if name == "train":
            command.old.update(before)
        rounds = 1 if quick else many[name]
        found = interrupt_at_random_times(command, rounds, folder / name / "rounds", random.Random(0))
        part.faults += [f"{name}, {fault}" for fault in found.faults]
        counts = [found.rounds, found.whole, found.absent, found.partial]
        rows.append([f"`laai {name}`", *counts, *_times(found.seconds), len(found.faults)])
        print(f"{name}: {rows[-1]}", file=sys.stderr, flush=True)
    found = interrupt_imports(2 if quick else 10, random.Random(0))
    part.faults += [f"imports, {fault}" for fault in found.faults]
    rows.append(["`laai`, importing", found.rounds, "-", "-", "-", *_times(found.seconds), len(found.faults)])
    columns = ["command", "interrupted", "outputs whole", "as before", "partial files", "median s to its end"]
    columns += ["longest", "over 1 s", "faults"]
    note = "Times are from the signal to the end of the process, on a machine that was doing other work too."
    part.tables.append(table("Interrupts survived", columns, rows, note))
    return part


def _times(seconds: list[float]) -> list[str | int]:
    return [f"{statistics.median(seconds):.2f}", f"{max(seconds):.2f}", sum(one > 1 for one in seconds)]


# --- full disks and two processes at once


def disks(quick: bool, folder: Path) -> Part:
    """A disk on which nothing more fits (a 64 KiB file system in memory, where one may be mounted, and a limit on the
    size of files), and several processes that write the same output at once.

    A full disk must be one line on stderr and exit code 1, leave the old file as it was and nothing else, and the same
    command must succeed once there is room. Of several writers each must succeed, and leave what one of them wrote.
    """
    part, rounds = Part(), 1 if quick else 10
    model = crashing.saved_model(folder / "model")
    contents = []
    for seed in (0, 1):
        assert crashing.run(crashing.train(model, seed), folder / f"seed {seed}").code == 0
        contents.append((folder / f"seed {seed}" / "x.safetensors").read_bytes())
    counts = {"train, file size limited": 0, "train, disk full": 0, "data fetch, file size limited": 0}
    counts |= {"four `train` into one file": 0, "three `data fetch` into one folder": 0}
    with crashing.fetching() as fetching:
        for number in tqdm(range(rounds), desc="disks", file=sys.stderr):
            room = folder / f"room {number}"
            room.mkdir()
            faults = {
                "train, file size limited": _refused(
                    room / "limited", model, contents, {"file_size": len(contents[0]) * (10 + number) // 20}
                ),
                "train, disk full": _full(room / "full", model, contents),
                "data fetch, file size limited": _fetch_limited(room / "fetch", fetching, 2000 + 9000 * number),
                "four `train` into one file": _at_once(room / "trains", model, contents),
                "three `data fetch` into one folder": _fetches_at_once(room / "fetches", fetching),
            }
            for name, fault in faults.items():
                if isinstance(fault, str):
                    part.faults.append(f"{name}, round {number}: {fault}")
                elif fault is not None:
                    counts[name] += 1
    rows = [[name, done, sum(fault.startswith(name) for fault in part.faults)] for name, done in counts.items()]
    part.tables.append(table("Full disks, and several writers", ["what", "times as it should be", "faults"], rows))
    return part


def _refused(folder: Path, model: Path, contents: list[bytes], how: dict[str, int]) -> str | bool:
    """Train over an older file where nothing can be written."""
    folder.mkdir(exist_ok=True)
    path = folder / "x.safetensors"
    if not path.exists():
        path.write_bytes(contents[1])
    ended = crashing.run(crashing.train(model), folder, **how)
    if ended.code != 1 or not ended.complaint.startswith("laai: error: cannot write x.safetensors: "):
        return f"exit {ended.code}, {ended.complaint}"
    if path.read_bytes() != contents[1]:
        return "the old file is damaged"
    left = set(os.listdir(folder)) - {"x.safetensors", "filler"}
    return f"left {left}" if left else True


def _full(folder: Path, model: Path, contents: list[bytes]) -> str | bool | None:
    """None where no file system can be mounted."""
    with ExitStack() as stack:
        try:
            stack.enter_context(crashing.small_disk(folder, 1 << 16))
        except OSError:
            return None
        (folder / "x.safetensors").write_bytes(contents[1])
        crashing.fill(folder / "filler")
        fault = _refused(folder, model, contents, {})
        (folder / "filler").unlink()
        ended = crashing.run(crashing.train(model), folder)
        if ended.code != 0 or (folder / "x.safetensors").read_bytes() != contents[0]:
            return f"with room again: exit {ended.code}, {ended.complaint}"
        return fault


def _fetch_limited(folder: Path, fetching: Command, size: int) -> str | bool:
    ended = crashing.run(fetching.argv, folder, file_size=size, sums=fetching.sums)
    if ended.code != 1 or "cannot write" not in ended.complaint:
        return f"exit {ended.code}, {ended.complaint}"
    ended = crashing.run(fetching.argv, folder, sums=fetching.sums)
    return True if ended.code == 0 and _all_whole(folder, fetching) else f"again: exit {ended.code}, {ended.complaint}"


def _at_once(folder: Path, model: Path, contents: list[bytes]) -> str | bool:
    running = [crashing.Running(crashing.train(model, seed), folder) for seed in (0, 1, 0, 1)]
    codes = [one.wait().code for one in running]
    if any(codes) or os.listdir(folder) != ["x.safetensors"]:
        return f"exits {codes}, left {os.listdir(folder)}"
    return True if (folder / "x.safetensors").read_bytes() in contents else "the file is no writer's"


def _fetches_at_once(folder: Path, fetching: Command) -> str | bool:
    running = [crashing.Running(fetching.argv, folder, sums=fetching.sums) for _ in range(3)]
    ended = [one.wait() for one in running]
    if any(one.code for one in ended):
        return f"exits {[one.code for one in ended]}, {ended[0].complaint}"
    return True if _all_whole(folder, fetching) else "a file is damaged"


def _all_whole(folder: Path, command: Command) -> bool:
    return all(whole((folder / name).read_bytes()) for name, whole in command.whole.items())
