"""What may be given to hf-laai as `intervention=` and as its other arguments: good, odd and hostile."""

from __future__ import annotations

import os
import random
import socket
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

TASK = "laai_antonym"
# Names a folder may have. The harness cuts its arguments at commas; from Python all of them work.
NAMES = [
    "plain",
    "with space",
    " leading and trailing ",
    "a,b",
    "a=b",
    "éß漢字😀",
    unicodedata.normalize("NFD", "été"),
    "new\nline",
    "tab\there",
    "\x1b[2Jescape",
    "'quoted'",
    '"quoted"',
    "$HOME",
    "~",
    "%s{0}",
    "*?[a]",
    "-dash",
    ".hidden",
    "a.safetensors",
    "7",
    "1e5",
    "true",
    "None",
    "C:\\x",
    "\u202egnp",
    "x" * 255,
    os.fsdecode(b"\xff\xfe"),
]


def good_paths(folder: Path, content: bytes) -> dict[str, Path]:
    """Folders and files that work, under every one of NAMES that this system allows, and through links."""
    folder.mkdir(parents=True)
    found = {}
    for number, name in enumerate(NAMES):
        try:
            (folder / str(number) / name).mkdir(parents=True)
        except OSError:  # other systems allow fewer names
            continue
        found[f"folder {name}"] = folder / str(number) / name
        (folder / str(number) / name / f"{TASK}.safetensors").write_bytes(content)
        found[f"file in {name}"] = folder / str(number) / name / f"{TASK}.safetensors"
    outside = folder / "outside"
    outside.mkdir()
    (outside / "y").write_bytes(content)
    (folder / "link.safetensors").symlink_to(outside / "y")
    (folder / "linked").symlink_to(found["folder plain"])
    (folder / "of links").mkdir()
    (folder / "of links" / f"{TASK}.safetensors").symlink_to("../outside/y")  # as in the Hub's cache
    more = {
        "link": folder / "link.safetensors",
        "linked folder": folder / "linked",
        "links in it": folder / "of links",
    }
    return {**found, **more}


def bad_paths(folder: Path, content: bytes) -> dict[str, Any]:
    """Everything else that may be given."""
    folder.mkdir(parents=True)
    (folder / "good.safetensors").write_bytes(content)
    (folder / "half.safetensors").write_bytes(content[:-1])
    (folder / "dangling.safetensors").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("a")
    os.mkfifo(folder / "fifo.safetensors")
    with socket.socket(socket.AF_UNIX) as one, suppress(OSError):  # its name may be too long for a socket
        one.bind(str(folder / "socket"))
    for name, inside in {
        "empty folder": None,
        "folder in folder": lambda path: path.mkdir(),
        "dangling in folder": lambda path: path.symlink_to("nowhere"),
        "loop in folder": lambda path: path.symlink_to(path.name),
        "fifo in folder": os.mkfifo,
        "device in folder": lambda path: path.symlink_to("/dev/zero"),
        "half in folder": lambda path: path.write_bytes(content[:-1]),
    }.items():
        (folder / name).mkdir()
        if inside is not None:
            inside(folder / name / f"{TASK}.safetensors")
    names = sorted(os.listdir(folder))
    return {
        **{name: folder / name for name in names if name != "good.safetensors"},
        **{f"{name} as text": str(folder / name) for name in names if name != "good.safetensors"},
        **{name: name for name in ("/dev/null", "/dev/zero", "/dev/full", "/dev/stdin", "/proc/self/mem", "/")},
        "below a file": folder / "good.safetensors" / "x.safetensors",
        "through a loop": folder / "loop" / "x.safetensors",
        "name too long": folder / ("x" * 256),
        "path too long": "x/" * 5000,
        "zero byte": str(folder / "x\0y"),
        "zero byte in a Path": folder / "x\0y",
        "nothing": "",
        "spaces": "  ",
        "a number": 7,
        "a float": 1e5,
        "true": True,
        "bytes": os.fsencode(folder / "good.safetensors"),
        "a list": [str(folder / "good.safetensors")],
        "a Hub name of nonsense": "a/b:c:d@e@f",
        "surrogate": "\ud800",
    }


SCALES: list[Any] = [float("nan"), float("inf"), -float("inf"), 1e39, 1e308, 10**400, -(10**400), "abc", "1", "nan"]
SCALES += [True, None, [], {}, 1j, b"1", "", "1,0"]
WORDS: list[Any] = ["Error", "NONE", "", True, 0, "error ", [], {}, "\n", "x" * 10_000]
PROJECTIONS: list[Any] = [
    "",
    "{}",
    "{",
    "{0.__class__}",
    "{0",
    "{:>99999999999}",
    "model.layers.{}.mlp",
    "a.{}.b",
    "{x}",
]
PROJECTIONS += ["\n", "model.layers.{}.self_attn.o_proj.weight", "model..{}", 7, True, [], "{!r:>10}", "x" * 10_000]


def arguments(draw: random.Random, bad: dict[str, Any], good: dict[str, Path]) -> dict[str, Any]:
    """Of hf-laai: one or two of them wrong, or none."""
    sources: list[Callable[[], Any]] = [
        lambda: draw.choice(list(bad.values())),
        lambda: draw.choice(list(good.values())),
        lambda: str(draw.choice(list(good.values()))),
    ]
    found: dict[str, Any] = {"intervention": draw.choice(sources)()}
    if draw.random() < 0.4:
        found["scale"] = draw.choice([*SCALES, 0.5, -1, 0, 1e30])
    if draw.random() < 0.3:
        found["unrouted"] = draw.choice([*WORDS, "error", "none"])
    if draw.random() < 0.3:
        found["projection"] = draw.choice([*PROJECTIONS, "model.layers.{}.self_attn.o_proj"])
    return found
