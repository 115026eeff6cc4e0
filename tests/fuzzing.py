"""Reading hostile files, and the frame it has to stay in: what the file brings about, time, memory, messages.

A mutant follows from its kind, seed and number; a fault is reported with the three, and `make` makes its file again.
test_fuzz reads hundreds, benchmarks/reliability.py tens of thousands.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import mutants
import strange
import torch
from tiny import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from laai_core import Intervention, LaaiError
from laai_core.apply import Edit
from laai_core.data import read_lexicon, read_pairs
from laai_core.data.lexicon import LEXICON
from laai_core.data.opinionqa import load_opinionqa
from laai_core.errors import LONGEST
from laai_core.locate import Layout, locate
from lm_eval_laai.commands import cli
from lm_eval_laai.commands.cli import BAD_INPUT, DONE, FAILED
from lm_eval_laai.commands.inspect import describe
from lm_eval_laai.gate.baseline import Baseline, load_baseline
from lm_eval_laai.gate.check import compare, github, junit
from lm_eval_laai.gate.results_file import read_results
from lm_eval_laai.hub.card import model_card
from lm_eval_laai.model import HFLaai

SECONDS = 5.0  # of CPU for one file; whatever does not hang takes a fraction
BYTES = 64 << 20  # that one file may add to the process's peak; the largest mutants have 5 MiB
WARNINGS = 3  # from one file


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Args:
        file: the mutant's path in the folder that `use` gets.
        mutators: of its content.
        use: reads the file and checks what must be true of everything that is read without an error.
        good: the same path, and that of every file that must lie beside it, to content without faults.
        seconds: of CPU that one file may take.
        bytes: that one file may add to the process's peak.
    """

    file: str
    mutators: mutants.Mutators
    use: Callable[[Path], None]
    good: dict[str, Callable[[random.Random], bytes]]
    seconds: float = SECONDS
    bytes: int = BYTES


@dataclass
class Tally:
    """What became of the files; a fault is a file that did not end as it has to."""

    read: int = 0
    refused: int = 0
    faults: list[str] = field(default_factory=list)
    mutators: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0  # of CPU, the slowest file
    bytes: int = 0  # the most that one file added to the process's peak

    @property
    def files(self) -> int:
        return self.read + self.refused + len(self.faults)


def fuzz(kind: str, count: int, folder: Path, seed: int = 0, each: Callable[[], Any] = lambda: None) -> Tally:
    """Read `count` mutants, one after the other, all at one path in `folder`; `each` is called after each."""
    about, tally = KINDS[kind], Tally()
    path = folder / about.file
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, good in about.good.items():
        (folder / name).write_bytes(good(random.Random(seed)))
    names = [Path(name).name for name in about.good] + [str(folder)]  # of files that disagree any may be named
    about.use(folder)  # without faults it is read; and what is imported at first use is imported
    for number in range(count):
        mutator, content = make(kind, seed, number)
        path.write_bytes(content)
        tally.mutators[mutator] += 1
        name = f"{kind}, seed {seed}, number {number}, {mutator}"
        _try(lambda: about.use(folder), name, names, tally, about.seconds, about.bytes)
        each()
    return tally


def fuzz_arguments(count: int, folder: Path, seed: int = 0, each: Callable[[], Any] = lambda: None) -> Tally:
    """Give hf-laai `count` sets of strange arguments."""
    tally, content = Tally(), mutants.good_intervention(random.Random(mutants.PLAIN))
    bad, good = strange.bad_paths(folder / "bad", content), strange.good_paths(folder / "good", content)
    use_arguments(good["folder plain"])
    for number in range(count):
        arguments = strange.arguments(random.Random(f"arguments {seed} {number}"), bad, good)
        tally.mutators[", ".join(arguments)] += 1

        name = f"arguments, seed {seed}, number {number}, {arguments!a:.200}"
        _try(lambda arguments=arguments: use_arguments(**arguments), name, [""], tally, SECONDS, BYTES)
        each()
    return tally


def use_arguments(intervention: Any, **arguments: Any) -> None:
    """What is taken is in the harness's results file, which is JSON."""
    lm = HFLaai(model(), intervention, tokenizer=_tokenizer(), **arguments)
    json.dumps(lm.get_model_info()["interventions"], allow_nan=False, ensure_ascii=False).encode()


def _try(
    use: Callable[[], None], name: str, names: Iterable[str], tally: Tally, seconds: float, most_bytes: int
) -> None:
    fault = _fault(use, names, tally, seconds, most_bytes)
    if fault:
        tally.faults.append(f"{name}: {fault}")


def make(kind: str, seed: int, number: int) -> tuple[str, bytes]:
    """Mutator and content. The mutators take turns."""
    names = list(KINDS[kind].mutators)
    name = names[number % len(names)]
    return name, KINDS[kind].mutators[name](random.Random(f"{kind} {seed} {number}"))


def _fault(
    use: Callable[[], None], names: Iterable[str], tally: Tally, most_seconds: float, most_bytes: int
) -> str | None:
    """What was wrong with how one file ended, if anything; else counts it."""
    before, start = peak_memory(reset=True), time.process_time()
    refusal = None
    try:
        with watched(most_seconds):
            use()
    except LaaiError as error:
        refusal = str(error)
    except (Exception, Misbehaved) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error!s:.200} ({Path(place.filename).name}:{place.lineno})"
    seconds, grown = time.process_time() - start, peak_memory() - before
    tally.seconds, tally.bytes = max(tally.seconds, seconds), max(tally.bytes, grown)
    if grown > most_bytes:
        return f"took {grown >> 20} MiB"
    if refusal is None:
        tally.read += 1
        return None
    complaint = bad_message(refusal, names)
    tally.refused += not complaint
    return complaint


def bad_message(message: str, names: Iterable[str]) -> str | None:
    """What is wrong with an error's text: it has to be one printable line of bounded length that says where."""
    if not message.isprintable():
        return f"the message is not one printable line: {message!a:.200}"
    if len(message) > LONGEST:
        return f"the message has {len(message)} characters: {message[:100]}"
    return None if any(name in message for name in names) else f"the message does not say where: {message}"


# --- the frame


class Misbehaved(BaseException):
    """What a file brought about and must not. No `except Exception` may hide it."""


# Reading opens a file; it runs nothing, writes nothing, reaches for nothing. (`compile` alone runs nothing: literals
# are parsed with it.)
_FORBIDDEN = ("exec", "import", "marshal", "pickle", "ctypes", "code.", "subprocess", "socket", "shutil", "tempfile")
_FORBIDDEN += ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.remove", "os.rename", "os.mkdir")
_FORBIDDEN += ("os.chmod", "os.truncate", "os.symlink", "os.link", "os.rmdir", "urllib")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_events: list[str] | None = None  # a list while somebody watches


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _events is None:
        return
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
    if writes or event.startswith(_FORBIDDEN):
        _events.append(f"{event}{arguments!r:.100}")


sys.addaudithook(_audit)  # for ever: these hooks do not come off


class _Ear(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())


@contextmanager
def watched(seconds: float = SECONDS) -> Iterator[None]:
    """Misbehaved if what is inside executes or writes anything, takes over `seconds` of CPU, or warns without end."""
    global _events

    def late(*_: Any) -> None:
        raise Misbehaved(f"still busy after {seconds} s of CPU")

    ear, before = _Ear(), signal.signal(signal.SIGVTALRM, late)
    logging.getLogger().addHandler(ear)
    _events = events = []
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
            try:
                yield
            finally:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
                _events = None
    finally:
        logging.getLogger().removeHandler(ear)
        signal.signal(signal.SIGVTALRM, before)
    heard = [*ear.heard, *(str(warning.message) for warning in warned)]
    if len(heard) > WARNINGS or any(len(message) > LONGEST for message in heard):
        events.append(f"{len(heard)} warnings, the first: {heard[0]:.100}")
    if events:
        raise Misbehaved("; ".join(events[:3]))


def peak_memory(reset: bool = False) -> int:
    """The process's highest resident bytes, since the last reset; 0 where the system does not say."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


# --- what is read, and what must be true of it then


def _use_intervention(folder: Path) -> None:
    """What loads can be written again, named, shown and put on a model card; and what fits the model is finite."""
    iv = Intervention.load(folder / "x.safetensors")
    assert iv.sha256 and repr(iv).isprintable()
    json.dumps(describe(iv), allow_nan=False, ensure_ascii=False).encode()
    model_card(iv, "some/name", "x.safetensors").encode()
    try:
        edit = Edit.of(iv, _layout())
    except LaaiError as error:
        raise LaaiError(f"x.safetensors: {error}") from None  # what applies it no longer knows the file
    assert all(bool(torch.isfinite(vector).all()) for vector in edit.vectors.values())
    assert math.isfinite(edit.step)


@cache
def model() -> LlamaForCausalLM:
    """One that good files fit."""
    heads, width = mutants.SHAPES["heads"]
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=heads * width,
        intermediate_size=8,
        num_hidden_layers=mutants.LAYERS,
        num_attention_heads=heads,
    )
    return LlamaForCausalLM(config).eval()


@cache
def _tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer(bos=True)


@cache
def _layout() -> Layout:
    return locate(model())


def _use_pairs(folder: Path) -> None:
    pairs, _ = read_pairs(folder / "antonym.json")
    assert pairs
    for side in (side for pair in pairs for side in pair):
        assert side.strip() == side != "" and side.encode()


def _use_lexicon(folder: Path) -> None:
    rows, _ = read_lexicon(folder / "lexicon.tsv")
    assert rows
    for cell in (cell for row in rows for cell in row.values()):
        assert cell.strip() == cell != "" and cell.encode()


def _use_opinions(folder: Path) -> None:
    opinions, _ = load_opinionqa(*mutants.GROUP, folder)
    assert opinions
    for opinion in opinions:
        assert opinion.example().prompt.encode()
        assert abs(sum(opinion.distribution) - 1) < 1e-6


def _use_check(folder: Path) -> None:
    """`laai check` prints a verdict or one line; the other forms of its verdict, and --update, take the same input."""
    paths = folder / "results.json", folder / "baseline.yaml"
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = cli.main(["check", str(paths[0]), "--against", str(paths[1])])
    if code == BAD_INPUT:
        (line,) = err.getvalue().splitlines()
        assert out.getvalue() == "" and line.startswith("laai: error: ")
        raise LaaiError(line)
    assert code in (DONE, FAILED) and err.getvalue() == "" and len(out.getvalue()) < 20 << 20
    lines = out.getvalue().splitlines()
    assert "checks failed: " in out.getvalue() if code else "checks passed: " in out.getvalue()
    assert not any(line.strip().startswith("::") or "##[" in line for line in lines)
    results, baseline = read_results(paths[0]), load_baseline(paths[1])
    findings = compare(results, baseline)
    assert all(line.isprintable() and line.startswith("::error title=laai check::") for line in github(findings))
    ElementTree.fromstring(junit(findings))
    if sum(path.stat().st_size for path in paths) > 64 << 10:
        return  # PyYAML writes some hundred kilobytes a second, which is the time of --update, not of the check
    try:
        updated = Baseline.of(results, baseline)
    except LaaiError as error:
        raise LaaiError(f"results.json: {error}") from None  # a metric that cannot be expected, of a file already read
    assert Baseline.parse(updated.dump(), "results.json").tasks.keys() == updated.tasks.keys()


def _word_pairs(draw: random.Random) -> bytes:
    return mutants.text(mutants.word_pairs(draw)).encode()


def _lexicon(draw: random.Random) -> bytes:
    """The bundled table's header and some of its rows."""
    header, *rows = LEXICON.read_bytes().splitlines(keepends=True)
    return header + b"".join(draw.sample(rows, 5))


def _opinion_records(draw: random.Random) -> bytes:
    return mutants.text(mutants.opinion_records(draw)).encode()


_WAVE = "human_resp/American_Trends_Panel_W1"
_WAVE_FILES = {f"{_WAVE}/{name}": good for name, good in mutants.OPINION_TABLES.items()}

CHECKED = ("baseline", "results")  # the kinds that `laai check` compares
_CHECKED_FILES = {"baseline.yaml": mutants.good_baseline, "results.json": mutants.good_results}
_CHECK_SECONDS, _CHECK_BYTES = 2.0, 200 << 20

KINDS = {
    "intervention": Kind(
        "x.safetensors",
        mutants.INTERVENTION,
        _use_intervention,
        {"x.safetensors": mutants.good_intervention},
    ),
    "word pairs": Kind("antonym.json", mutants.WORD_PAIRS, _use_pairs, {"antonym.json": _word_pairs}),
    "lexicon": Kind("lexicon.tsv", mutants.of_table(_lexicon, b"\t"), _use_lexicon, {"lexicon.tsv": _lexicon}),
    "OpinionQA JSON": Kind(
        "SEX_data.json",
        mutants.of_json(mutants.opinion_records),
        _use_opinions,
        {"SEX_data.json": _opinion_records},
    ),
    **{
        f"OpinionQA {name}": Kind(f"{_WAVE}/{name}", mutants.opinion_table(name), _use_opinions, _WAVE_FILES)
        for name in mutants.OPINION_TABLES
    },
    "baseline": Kind(
        "baseline.yaml", mutants.BASELINE, _use_check, _CHECKED_FILES, seconds=_CHECK_SECONDS, bytes=_CHECK_BYTES
    ),
    "results": Kind(
        "results.json", mutants.RESULTS, _use_check, _CHECKED_FILES, seconds=_CHECK_SECONDS, bytes=_CHECK_BYTES
    ),
}
