"""The file: what is in it, that it is written whole or not at all, and every way in which one can be bad."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from laai_core import Intervention, LaaiError, files

MODEL = {
    "base_model": "some/model",
    "model_type": "llama",
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "head_dim": 3,
    "hidden_size": 6,
}


def example(site: str = "heads", **changes) -> Intervention:
    shape = (2, 3) if site == "heads" else (6,)
    generator = torch.Generator().manual_seed(0)
    vectors = {layer: torch.randn(shape, generator=generator) for layer in (0, 2, 3)}
    vectors[2].view(-1)[:4] = torch.tensor([0.0, -0.0, 1e-45, 3.4e38])
    arguments = dict(position="generated", scale=0.1, metadata={**MODEL, "task": "a", "training": {"b": 1, "a": None}})
    return Intervention(vectors, site, **{**arguments, **changes})


def build(
    laai: object = None, tensors: dict | None = None, header: str | None = None, data: bytes | None = None
) -> bytes:
    """A safetensors file made by hand, so that anything in it can be wrong."""
    facts = dict(format_version=1, site="heads", position="last", operation="add", scale=1.0)
    text = laai if isinstance(laai, str) else json.dumps(facts if laai is None else laai)
    if header is None:
        entries = tensors or {"layers.0.heads": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
        header = json.dumps({"__metadata__": {"laai": text}, **entries})
    encoded = header.encode()
    return struct.pack("<Q", len(encoded)) + encoded + (bytes(24) if data is None else data)


def facts(**changes) -> dict:
    return {**dict(format_version=1, site="heads", position="last", operation="add", scale=1.0), **changes}


def without(key: str) -> dict:
    return {k: v for k, v in facts().items() if k != key}


def tensor(name: str = "layers.0.heads", dtype: str = "F32", shape=(2, 3), offsets=(0, 24)) -> dict:
    return {name: {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


# --- round trip


@pytest.mark.parametrize("site", ["heads", "residual", "mlp"])
@pytest.mark.parametrize("operation", ["add", "icv"])
def test_round_trip_to_the_bit(site, operation, tmp_path):
    iv = example(site, operation=operation)
    iv.save(tmp_path / "x.safetensors")
    back = Intervention.load(tmp_path / "x.safetensors")
    for name in ("layers", "site", "position", "scale", "operation", "metadata"):
        assert getattr(back, name) == getattr(iv, name)
    for layer in iv.layers:
        assert back.vector(layer).numpy().tobytes() == iv.vector(layer).numpy().tobytes()
    assert back.to_bytes() == iv.to_bytes()


def test_saves_over_what_was_there_and_makes_folders(tmp_path):
    path = tmp_path / "new" / "folder" / "x.safetensors"
    example().save(path)
    example(scale=2.0).save(str(path))
    assert Intervention.load(str(path)).scale == 2.0
    assert os.listdir(path.parent) == ["x.safetensors"]


def test_hand_made_file_is_read(tmp_path):
    """Against the format's definition, not against our own writer."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(build(facts(scale=2, task="t"), data=struct.pack("<6f", *range(6))))
    iv = Intervention.load(path)
    assert iv.vector(0).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (iv.site, iv.position, iv.operation, iv.scale, iv.metadata) == ("heads", "last", "add", 2.0, {"task": "t"})


@pytest.mark.parametrize(("site", "shape"), [("heads", [2, 3]), ("residual", [6]), ("mlp", [6])])
def test_content_by_plain_safetensors(site, shape, tmp_path):
    iv = example(site)
    iv.save(tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert sorted(file.keys()) == [f"layers.{layer}.{site}" for layer in (0, 2, 3)]
        for layer in (0, 2, 3):
            part = file.get_slice(f"layers.{layer}.{site}")
            assert (part.get_dtype(), part.get_shape()) == ("F32", shape)
            assert torch.equal(file.get_tensor(f"layers.{layer}.{site}"), iv.vector(layer))
        metadata = file.metadata()
    assert list(metadata) == ["laai"]
    written = json.loads(metadata["laai"])
    assert metadata["laai"] == json.dumps(written, sort_keys=True)
    assert written == {
        **MODEL,
        "format_version": 1,
        "site": site,
        "position": "generated",
        "operation": "add",
        "scale": 0.1,
        "task": "a",
        "training": {"a": None, "b": 1},
    }


def test_metadata_cannot_overrule_what_the_file_says_of_itself(tmp_path):
    example(metadata={"site": "mlp", "scale": 9, "format_version": 7}).save(tmp_path / "x.safetensors")
    back = Intervention.load(tmp_path / "x.safetensors")
    assert (back.site, back.scale, back.metadata) == ("heads", 0.1, {})


@pytest.mark.parametrize("value", [torch.ones(1), {1, 2}, float("nan"), b"bytes"])
def test_metadata_that_is_no_json_is_refused(value, tmp_path):
    with pytest.raises(LaaiError, match="metadata"):
        example(metadata={"task": value}).save(tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


# --- same content, same bytes


def test_same_content_same_bytes():
    shuffled = dict(reversed(example().metadata.items()))
    other = example(metadata=shuffled)
    other = Intervention({i: other.vector(i) for i in (3, 0, 2)}, "heads", "generated", scale=0.1, metadata=shuffled)
    assert other.to_bytes() == example().to_bytes()
    assert example().sha256 == hashlib.sha256(example().to_bytes()).hexdigest()
    assert example(scale=0.2).sha256 != example().sha256


def test_same_bytes_in_a_fresh_process():
    """safetensors writes several metadata keys in random order."""
    code = "import sys; from test_storage import example; sys.stdout.write(example().sha256)"
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here.parent}{os.pathsep}{here}", "PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == example().sha256


# --- atomic writes


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_failing_write_leaves_the_old_file_and_nothing_else(function, tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    example().save(path)
    before = path.read_bytes()

    def fail(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(LaaiError, match=r"cannot write .*x\.safetensors: No space left"):
            example(scale=3).save(path)
        with pytest.raises(LaaiError):
            example().save(tmp_path / "new.safetensors")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        example().save(tmp_path / "x.safetensors")
    assert os.listdir(tmp_path) == []


def test_the_file_is_whole_before_it_appears(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    seen = []
    replace = os.replace

    def watched(source, target):
        seen.append((Path(source).read_bytes() == example().to_bytes(), Path(source).parent, path.exists()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    example().save(path)
    assert seen == [(True, tmp_path, False)]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(LaaiError, match="cannot write"):
            example().save(tmp_path / "x.safetensors")
    finally:
        tmp_path.chmod(0o700)
    assert os.listdir(tmp_path) == []


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LaaiError, match="cannot write"):
        example().save(tmp_path / "file" / "x.safetensors")
    with pytest.raises(LaaiError, match="cannot write"):
        example().save(tmp_path)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
def test_permissions_are_those_of_an_ordinary_file(tmp_path):
    example().save(tmp_path / "x.safetensors")
    (tmp_path / "ordinary").write_text("")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("x.safetensors", "ordinary")}
    assert len(modes) == 1


# --- bad files

NAN = struct.pack("<6f", 0, 1, float("nan"), 3, 4, 5)
INFINITE = struct.pack("<6f", 0, 1, float("inf"), 3, 4, 5)
TWICE = (
    json.dumps({"__metadata__": {"laai": json.dumps(facts())}, **tensor()})[:-1]
    + ", "
    + json.dumps(tensor(offsets=(24, 48)))[1:]
)
DEEP = "[" * 100_000 + "]" * 100_000
BAD_FILES = {
    "empty": (b"", "not a safetensors file"),
    "text": (b"this is no safetensors file at all", "not a safetensors file"),
    "pickle": (b"\x80\x02}q\x00." * 10, "not a safetensors file"),
    "zip": (b"PK\x03\x04" + bytes(60), "not a safetensors file"),
    "header length beyond any file": (b"\xff" * 8 + b"{}", "not a safetensors file"),
    "truncated in the length": (build()[:5], "not a safetensors file"),
    "truncated in the header": (build()[:60], "truncated"),
    "truncated in the data": (build()[:-1], "truncated"),
    "without data": (build()[:-24], "truncated"),
    "trailing bytes": (build() + b"\0", "damaged"),
    "header is no JSON": (build(header="{" + "x" * 50), "not valid JSON"),
    "header is deep JSON": (build(header='{"a":' + DEEP + "}"), "not valid JSON"),
    "header is no UTF-8": (struct.pack("<Q", 6) + b'{"\xff":1}', "not valid JSON"),
    "no tensor": (build(header=json.dumps({"__metadata__": {"laai": json.dumps(facts())}})), "no tensor"),
    "no metadata": (build(header=json.dumps(tensor())), "no 'laai' metadata"),
    "other metadata": (build(header=json.dumps({"__metadata__": {"format": "pt"}, **tensor()})), "no 'laai' metadata"),
    "laai is no JSON": (build("{site: heads}"), "not valid JSON"),
    "laai is deep JSON": (build(DEEP), "not valid JSON"),
    "laai is a list": (build([1]), "not a JSON object"),
    "laai with a key twice": (build('{"format_version": 1, "scale": 1, "scale": 2}'), "not valid JSON"),
    "laai with NaN": (build(json.dumps(facts(scale=float("nan")))), "not valid JSON"),
    "newer version": (build(facts(format_version=2)), "format version 2"),
    "version as text": (build(facts(format_version="1")), "format version '1'"),
    "version as bool": (build(facts(format_version=True)), "format version True"),
    "no version": (build(without("format_version")), "format version None"),
    "no site": (build(without("site")), "site"),
    "no position": (build(without("position")), "position"),
    "no operation": (build(without("operation")), "operation"),
    "no scale": (build(without("scale")), "scale"),
    "scale as text": (build(facts(scale="1")), "scale"),
    "scale beyond floats": (build(json.dumps(facts()).replace("1.0", "1" + "0" * 400)), "scale"),
    "scale reads as infinite": (build(json.dumps(facts()).replace("1.0", "1e999")), "scale"),
    "scale of too many digits": (build(json.dumps(facts()).replace("1.0", "1" * 10_000)), "not valid JSON"),
    "unknown site": (build(facts(site="nose"), tensor("layers.0.nose", shape=[6])), "nose"),
    "unknown position": (build(facts(position="first")), "first"),
    "unknown operation": (build(facts(operation="mul")), "mul"),
    "tensor of another site": (build(tensors=tensor("layers.0.mlp")), "layers.0.mlp"),
    "tensor of another name": (build(tensors=tensor("model.embed_tokens.weight")), "model.embed_tokens.weight"),
    "negative layer": (build(tensors=tensor("layers.-1.heads")), "layers.-1.heads"),
    "layer with a leading zero": (build(tensors=tensor("layers.00.heads")), "layers.00.heads"),
    "layer beyond any model": (build(tensors=tensor("layers." + "9" * 30 + ".heads")), "unexpected tensor"),
    "layer twice": (build(header=TWICE, data=bytes(48)), "not valid JSON"),
    "float16": (build(tensors=tensor(dtype="F16", offsets=(0, 12)), data=bytes(12)), "float32"),
    "bfloat16": (build(tensors=tensor(dtype="BF16", offsets=(0, 12)), data=bytes(12)), "float32"),
    "float64": (build(tensors=tensor(dtype="F64", offsets=(0, 48)), data=bytes(48)), "float32"),
    "int32": (build(tensors=tensor(dtype="I32")), "float32"),
    "unknown dtype": (build(tensors=tensor(dtype="F33")), "float32"),
    "NaN": (build(data=NAN), "NaN"),
    "infinite": (build(data=INFINITE), "infinite"),
    "flat at heads": (build(tensors=tensor(shape=[6])), "give it as [H, d]"),
    "three dimensions": (build(tensors=tensor(shape=[1, 2, 3])), "expected [H, d] at site heads, got [1, 2, 3]"),
    "two dimensions at residual": (build(facts(site="residual"), tensor("layers.0.residual")), "expected [hidden]"),
    "empty tensor": (build(tensors=tensor(shape=[0, 3], offsets=(0, 0)), data=b""), "empty"),
    "shape that does not fit the bytes": (build(tensors=tensor(shape=[2, 4])), "damaged"),
    "shape that overflows": (build(tensors=tensor(shape=[2**63, 2**63])), "damaged"),
    "offsets that run backwards": (build(tensors=tensor(offsets=(24, 0))), "damaged"),
    "negative offsets": (build(tensors=tensor(offsets=(-24, 0))), "damaged"),
    "offsets beyond the file": (build(tensors=tensor(offsets=(0, 2**62))), "truncated"),
    "tensor entry is a number": (build(tensors={**tensor(), "layers.1.heads": 3}), "float32"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(case, tmp_path):
    content, words = BAD_FILES[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(LaaiError) as error:
        Intervention.load(path)
    message = str(error.value)
    assert words in message
    assert "bad.safetensors" in message
    assert "\n" not in message
    assert len(message) < 1000


def test_the_hand_made_file_is_good_but_for_what_each_case_breaks(tmp_path):
    (tmp_path / "good.safetensors").write_bytes(build())
    assert Intervention.load(tmp_path / "good.safetensors").layers == [0]


def test_long_values_do_not_flood_the_message(tmp_path):
    for laai in (facts(scale="x" * 100_000), facts(format_version=list(range(50_000))), facts(site="s" * 100_000)):
        (tmp_path / "bad.safetensors").write_bytes(build(laai))
        with pytest.raises(LaaiError) as error:
            Intervention.load(tmp_path / "bad.safetensors")
        assert len(str(error.value)) < 1000


def test_missing_and_folder(tmp_path):
    with pytest.raises(LaaiError, match="no intervention file"):
        Intervention.load(tmp_path / "missing.safetensors")
    with pytest.raises(LaaiError, match="folder"):
        Intervention.load(tmp_path)
    with pytest.raises(LaaiError):
        Intervention.load("\0")
    for nothing in (None, 7, "", " "):
        with pytest.raises(LaaiError, match=f"^{nothing!r} is no intervention: expected a file, or a name"):
            Intervention.load(nothing)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LaaiError, match="not an ordinary file"):
        Intervention.load(tmp_path / "pipe")


GOOD = example().to_bytes()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=6),
    length=st.one_of(st.just(len(GOOD)), st.integers(0, len(GOOD))),
)
def test_any_damage_gives_an_intervention_or_one_line(tmp_path, changes, length):
    content = bytearray(GOOD)
    for place, value in changes:
        content[place] = value
    path = tmp_path / "x.safetensors"
    path.write_bytes(content[:length])
    try:
        loaded = Intervention.load(path)
    except LaaiError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert length == len(GOOD)  # nothing shorter may pass
        assert all(torch.isfinite(loaded.vector(layer)).all() for layer in loaded.layers)


def test_a_pipe_gets_what_is_written(tmp_path):
    """A device or a pipe must not be replaced by a file."""
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    files.write(pipe, b"content")
    reader.join(60)
    assert found == [b"content"] and pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]
