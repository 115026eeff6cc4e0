"""Hostile files and arguments: always an error in one line or something that works, within bounds, and nothing else.

A few hundred of what `benchmarks/reliability.py` reads; a fault is made again by `fuzzing.make(kind, seed, number)`.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import fuzzing
import mutants
import pytest
import strange
from fuzzing import Misbehaved, bad_message, fuzz, fuzz_arguments, watched
from lm_eval.utils import simple_parse_args_string

from laai_core import Intervention, LaaiError
from laai_core.data import read_pairs
from lm_eval_laai.routing import Routing

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals, links and devices")

COUNTS = {"intervention": 4 * len(mutants.INTERVENTION), "baseline": 2 * len(mutants.BASELINE)}  # elsewhere 60
CONTENT = mutants.good_intervention(random.Random(mutants.PLAIN))


@pytest.mark.parametrize("kind", fuzzing.KINDS)
def test_hostile_files(kind, tmp_path):
    tally = fuzz(kind, COUNTS.get(kind, 60), tmp_path)
    assert tally.faults == []
    assert min(tally.read, tally.refused) > 0  # neither harmless nor hopeless
    assert set(tally.mutators) == set(fuzzing.KINDS[kind].mutators)


def test_strange_arguments(tmp_path):
    tally = fuzz_arguments(60, tmp_path)
    assert tally.faults == []
    assert min(tally.read, tally.refused) > 0


# Faults that were found, one by one


def refused(content: bytes, path: Path) -> str:
    path.write_bytes(content)
    with pytest.raises(LaaiError) as error:
        fuzzing.KINDS["intervention"].use(path.parent)
    assert bad_message(str(error.value), [path.name]) is None
    return str(error.value)


def made(tmp_path: Path, data: bytes | None = None, **facts: object) -> str:
    """The refusal of a good file with these facts in its metadata, or this data."""
    laai, entries, good = mutants.parts(random.Random(mutants.PLAIN))
    header = mutants.header_text({**laai, **facts}, entries)
    return refused(mutants.joined(header, data or good), tmp_path / "x.safetensors")


@pytest.mark.parametrize("depth", [40, 450, 900, 100_000])
def test_deep_metadata(depth, tmp_path):
    """Copied, written and shown by recursion, all of which end before JSON's reader does."""
    assert "levels deep" in made(tmp_path, training=mutants.nested(depth, kind=1)) or depth > 450


def test_numbers_json_can_say_but_not_write(tmp_path):
    assert "JSON" in made(tmp_path, training={"objective": mutants.Raw("1e999")})


def test_text_that_is_no_unicode(tmp_path):
    assert "JSON" in made(tmp_path, task=mutants.Raw('"\\ud800"'))


def test_a_layer_that_the_file_itself_says_the_model_lacks(tmp_path):
    assert "out of range" in made(tmp_path, num_hidden_layers=1)


def test_a_scale_that_makes_a_vector_infinite(tmp_path):
    assert "scale 1e+300 makes" in made(tmp_path, scale=1e300)


def test_more_layers_than_any_model_has(tmp_path):
    shape = {"dtype": "F32", "shape": [8]}
    entries = {f"layers.{n}.mlp": {**shape, "data_offsets": [32 * n, 32 * n + 32]} for n in range(2000)}
    laai = mutants.facts(random.Random(0), "mlp")
    content = mutants.joined(mutants.header_text(laai, entries), bytes(32 * 2000))
    assert "2000 tensors" in refused(content, tmp_path / "x.safetensors")


def test_a_number_of_thousands_of_digits(tmp_path):
    (tmp_path / "antonym.json").write_text('[{"input": ' + "1" * 5000 + "}]")
    with pytest.raises(LaaiError, match="thousands of digits"):
        read_pairs(tmp_path / "antonym.json")


@pytest.mark.parametrize("text", ["a\nb" * 10**5, "\u0315\u0300" * 10**6, "\\ud800" * 10**5])
def test_a_word_that_is_a_book(text, tmp_path):
    (tmp_path / "antonym.json").write_text(mutants.text([{"input": mutants.Raw(f'"{text}"'), "output": "a"}]))
    with watched(), pytest.raises(LaaiError) as error:
        read_pairs(tmp_path / "antonym.json")
    assert bad_message(str(error.value), ["antonym.json"]) is None


# Arguments of hf-laai


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return strange.good_paths(tmp_path_factory.mktemp("paths") / "good", CONTENT)


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return strange.bad_paths(tmp_path_factory.mktemp("paths") / "bad", CONTENT)


def test_every_name_that_a_folder_may_have(good):
    for path in good.values():
        for source in (path, str(path)):
            routing = Routing(source)
            assert routing.get(strange.TASK) is not None
            (report,) = routing.report()
            assert report["source"].encode() and report["sha256"] == Intervention.load(good["link"]).sha256


def test_what_is_no_file_and_no_folder(bad):
    for name, source in bad.items():
        with watched(), pytest.raises(LaaiError) as error:
            Routing(source)
        assert bad_message(str(error.value), [""]) is None, name


@pytest.mark.parametrize("scale", strange.SCALES, ids=lambda scale: ascii(scale)[:12])
def test_scales(scale, good):
    with pytest.raises(LaaiError) as error:
        fuzzing.use_arguments(good["folder plain"], scale=scale)
    assert str(error.value).startswith("scale ")


def test_names_that_come_through_the_harness(good):
    """It cuts its arguments at commas, strips them, and takes quotes for its own."""
    came = 0
    for path in map(str, good.values()):
        if "," not in path and path == path.strip():
            given = simple_parse_args_string(f"pretrained=x,intervention={path},scale=0.5,unrouted=none")
            assert Routing(given["intervention"], given["scale"], given["unrouted"]).get(strange.TASK) is not None
            came += 1
    assert came > len(strange.NAMES)


@pytest.mark.parametrize(
    "text",
    ["scale=nan", "scale=inf", "scale=-inf", "scale=abc", "scale=1e400", "scale=", "scale=true", "scale=None"]
    + ["scale=1" + "0" * 400, "unrouted=", "unrouted=0", "intervention=", "intervention=7", "intervention=true"]
    + ["intervention=1e5", "intervention=''", "intervention=a,b", "intervention=x\0y"],
)
def test_arguments_of_the_harness_that_are_refused(text, good):
    given = {"intervention": good["folder plain"], **simple_parse_args_string(text)}
    with pytest.raises(LaaiError) as error:
        Routing(
            **{("source" if name == "intervention" else name): value for name, value in given.items() if name != "b"}
        )
    assert bad_message(str(error.value), [""]) is None


@pytest.mark.parametrize("word", strange.WORDS, ids=lambda word: ascii(word)[:12])
def test_words_for_unrouted(word, good):
    with pytest.raises(LaaiError, match="unrouted is .*: expected one of error, none"):
        Routing(good["folder plain"], unrouted=word)


@pytest.mark.parametrize("projection", strange.PROJECTIONS, ids=lambda projection: ascii(projection)[:12])
def test_projections(projection, good):
    with watched(), pytest.raises(LaaiError) as error:
        fuzzing.use_arguments(good["folder plain"], projection=projection)
    assert bad_message(str(error.value), [""]) is None


@pytest.fixture
def nobody() -> Iterator[Path]:
    """A folder, and a user whom its permissions bind."""
    folder = Path(tempfile.mkdtemp())  # whose parents everybody may enter, which those of tmp_path need not be
    folder.chmod(0o755)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        shutil.rmtree(folder)


def test_what_may_not_be_read(nobody):
    effective = os.geteuid()
    os.seteuid(os.getuid())  # who makes the folder
    for name in ("folder", "closed"):
        (nobody / name).mkdir()
        (nobody / name / "x.safetensors").write_bytes(CONTENT)
    (nobody / "folder" / "x.safetensors").chmod(0)
    (nobody / "closed").chmod(0)
    os.seteuid(effective)
    try:
        for source in ("folder", "folder/x.safetensors", "closed", "closed/x.safetensors"):
            with pytest.raises(LaaiError, match="ermission"):
                Routing(str(nobody / source))
    finally:
        os.seteuid(os.getuid())
        (nobody / "closed").chmod(0o700)


# The frame notices what it is there for


def execute() -> None:
    exec("1")


def write() -> None:
    with open(os.devnull, "w"):
        pass


def loop() -> None:
    while True:
        pass


def warn() -> None:
    for number in range(5):
        warnings.warn(f"{number}", stacklevel=1)


def log() -> None:
    for number in range(5):
        logging.getLogger("some.where").warning("%d", number)


@pytest.mark.parametrize("misbehave", [execute, write, warn, log, loop])
def test_the_frame_notices(misbehave, monkeypatch):
    monkeypatch.setattr(fuzzing, "SECONDS", 0.05)
    with pytest.raises(Misbehaved), watched():
        misbehave()


def test_the_frame_notices_memory(tmp_path, monkeypatch):
    if not fuzzing.peak_memory(reset=True):
        pytest.skip("this system does not tell a process's peak memory")
    greedy = fuzzing.Kind(
        "x", {"x": lambda draw: b"x"}, lambda folder: bytearray(100 << 20) and None, {"x": lambda draw: b""}
    )
    monkeypatch.setitem(fuzzing.KINDS, "greedy", greedy)
    assert "took " in fuzz("greedy", 1, tmp_path).faults[0]


@pytest.mark.parametrize("message", ["file.json\nis bad", "file.json" * 200, "file.json\x1b[2J", "is bad"])
def test_bad_messages_are_noticed(message):
    assert bad_message(message, ["file.json"]) is not None
    assert bad_message("file.json is bad", ["file.json"]) is None
