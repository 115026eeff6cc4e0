"""Mutants of every file this project reads: each is a function of a random.Random, and returns the file's bytes.

Harm is done to bytes whatever they mean (`BYTES`), to the structure behind them, or by being another format altogether
(`FOREIGN`). A set of mutators is {name: function}.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

Draw = random.Random
Mutators = dict[str, Callable[[Draw], bytes]]


class Raw(str):
    """JSON text that goes into the file as it is, valid or not."""


class Pairs(list):
    """The members of a JSON object as a list, so that a key can come twice."""


def text(node: Any) -> str:
    """JSON, for trees that json.dumps would refuse."""
    if isinstance(node, Raw):
        return str(node)
    if isinstance(node, dict | Pairs):
        members = node.items() if isinstance(node, dict) else node
        return "{" + ", ".join(f"{json.dumps(key)}: {text(value)}" for key, value in members) + "}"
    if isinstance(node, list):
        return "[" + ", ".join(map(text, node)) + "]"
    return json.dumps(node)


def nested(depth: int, inside: str = "1", kind: int = 0) -> Raw:
    """Lists or objects in one another."""
    before, after = [("[", "]"), ('{"a": ', "}")][kind]
    return Raw(before * depth + inside + after * depth)


# In place of any value.
ODD_VALUES: list[Callable[[Draw], Any]] = [
    lambda draw: draw.choice([None, True, False, 0, -1, 1, 2, "", "0", [], {}, 0.5, -0.0, "heads", [1], {"a": 1}]),
    lambda draw: draw.choice([2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400, 1e308, 5e-324]),
    lambda draw: Raw(draw.choice(["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 5000, "1e-999", "-0"])),
    lambda draw: Raw(draw.choice(['"\\ud800"', '"\\udc00a"', '"\\u0000"', '"\x00"', '"\\n"', '"\x1b[2J"', "'", "{"])),
    lambda draw: draw.choice(["\n", "\r\n", "\u2028", "é", "e\u0301", "\U0001f600", "\u202e", "\x85", "\x7f", "|"]),
    lambda draw: draw.choice(["a" * 10**5, "../" * 20, "/dev/zero", "$(touch x)", "__import__('os')", "%s%n", "{0}"]),
    lambda draw: nested(draw.choice([2, 10, 50, 90, 200, 400, 700, 950, 1100, 5000, 100_000]), kind=draw.randrange(2)),
    lambda draw: [0] * draw.choice([3, 100, 10_000]),
]


def odd_value(draw: Draw) -> Any:
    return draw.choice(ODD_VALUES)(draw)


def harmed_tree(tree: Any, draw: Draw) -> Any:
    """The tree with one to three of its places replaced, left out, renamed or doubled."""
    for _ in range(draw.choice([1, 1, 2, 3])):
        tree = _harmed_once(tree, draw)
    return tree


def _harmed_once(node: Any, draw: Draw) -> Any:
    """Walks down a random way and harms what it ends at."""
    if isinstance(node, Raw) or not isinstance(node, dict | list) or not node or draw.random() < 0.15:
        return odd_value(draw)
    if isinstance(node, list) and not isinstance(node, Pairs):
        place = draw.randrange(len(node))
        action = draw.random()
        if action < 0.15:
            return node[:place] + node[place + 1 :]
        if action < 0.3:
            return node[:place] + [node[place]] * 2 + node[place + 1 :]
        return node[:place] + [_harmed_once(node[place], draw)] + node[place + 1 :]
    members = list(node.items()) if isinstance(node, dict) else list(node)
    place = draw.randrange(len(members))
    key, value = members[place]
    action = draw.random()
    if action < 0.12:
        del members[place]
    elif action < 0.24:
        members.insert(draw.randrange(len(members) + 1), (key, draw.choice([value, odd_value(draw)])))
    elif action < 0.36:
        members[place] = (draw.choice([key + " ", key.upper(), "", key[:-1], "\ud800", "__metadata__", "a\nb"]), value)
    else:
        members[place] = (key, _harmed_once(value, draw))
    return Pairs(members)


# --- harm to bytes, whatever they mean


def _flipped(content: bytes, draw: Draw) -> bytes:
    harmed = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 8, 64])):
        harmed[draw.randrange(len(harmed))] ^= 1 << draw.randrange(8)
    return bytes(harmed)


def _truncated(content: bytes, draw: Draw) -> bytes:
    return content[: draw.randrange(len(content))]


def _extended(content: bytes, draw: Draw) -> bytes:
    return content + draw.randbytes(draw.choice([1, 7, 8, 100, 5000]))


def _cut(content: bytes, draw: Draw) -> bytes:
    start = draw.randrange(len(content))
    return content[:start] + content[start + draw.choice([1, 4, 8, 50]) :]


def _inserted(content: bytes, draw: Draw) -> bytes:
    start = draw.randrange(len(content))
    odd = draw.choice([b"\0", b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"\n", b'"', b"}", b"\t", draw.randbytes(8)])
    return content[:start] + odd * draw.choice([1, 2, 100]) + content[start:]


def _moved(content: bytes, draw: Draw) -> bytes:
    one, two, three = sorted(draw.randrange(len(content)) for _ in range(3))
    return content[:one] + content[two:three] + content[one:two] + content[three:]


def _doubled(content: bytes, draw: Draw) -> bytes:
    start, end = sorted(draw.randrange(len(content)) for _ in range(2))
    return content[:end] + content[start:]


def _overwritten(content: bytes, draw: Draw) -> bytes:
    start = draw.randrange(len(content))
    length = min(draw.choice([1, 2, 4, 8, 40]), len(content) - start)
    return content[:start] + draw.randbytes(length) + content[start + length :]


BYTES = {
    "bits flipped": _flipped,
    "truncated": _truncated,
    "extended": _extended,
    "bytes cut out": _cut,
    "bytes inserted": _inserted,
    "bytes moved": _moved,
    "bytes doubled": _doubled,
    "bytes overwritten": _overwritten,
}


def _recoded(content: bytes, draw: Draw) -> bytes:
    decoded = content.decode("utf-8", "replace")
    encoding = draw.choice(["utf-8-sig", "utf-16", "utf-32", "latin-1", "cp037", "utf-7"])
    return decoded.encode(encoding, "replace")


# --- files of other formats


class _Payload:
    """What unpickling would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('unpickled')",)


def _pickled(draw: Draw) -> bytes:
    return pickle.dumps(_Payload(), protocol=draw.randrange(5))


def _zipped(draw: Draw) -> bytes:
    """As torch.save writes it: a ZIP with a pickle inside."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", _pickled(draw))
        archive.writestr("archive/data/0", draw.randbytes(64))
    return buffer.getvalue()


FOREIGN: Mutators = {
    "empty": lambda draw: b"",
    "random bytes": lambda draw: draw.randbytes(draw.choice([1, 8, 9, 100, 10_000])),
    "pickle": _pickled,
    "pickle in a ZIP": _zipped,
    "gzip": lambda draw: gzip.compress(draw.randbytes(50)),
    "zeros": lambda draw: bytes(draw.choice([8, 16, 4096, 1 << 20])),
    "program": lambda draw: draw.choice([b"#!/bin/sh\ntouch x\n", b"import os; os.system('touch x')", b"\x7fELF\2\1"]),
    "deep JSON": lambda draw: nested(draw.choice([900, 5000, 200_000]), kind=draw.randrange(2)).encode(),
}


def of_bytes(good: Callable[[Draw], bytes]) -> Mutators:
    """The byte mutators over good files."""
    return {name: (lambda draw, harm=harm: harm(good(draw), draw)) for name, harm in BYTES.items()}


# --- intervention files

LAYERS = 4
SHAPES = {"heads": [2, 4], "residual": [8], "mlp": [8]}
_SIZE = 4 * 8  # bytes of a tensor


def facts(draw: Draw, site: str) -> dict[str, Any]:
    """What the `laai` key of a file holds, as `train` writes it."""
    return {
        "format_version": 1,
        "site": site,
        "position": draw.choice(["last", "generated", "all"]),
        "operation": draw.choice(["add", "icv"]),
        "scale": draw.choice([1.0, 0.5, -2, 0]),
        "base_model": draw.choice(["some/model", "model"]),
        "model_type": "llama",
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "head_dim": 4,
        "hidden_size": 8,
        "task": "laai_lexicon_antonym",
        "method": "laai",
        "training": {"l1": 0.01, "stop": "\n", "seed": 0, "dtype": "float32", "versions": {"torch": "2"}, "lr": None},
    }


def parts(draw: Draw) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Facts, tensor entries and data of a good file."""
    site = draw.choice(list(SHAPES))
    layers = draw.sample(range(LAYERS), draw.randrange(1, LAYERS))
    entries = {
        f"layers.{layer}.{site}": {
            "dtype": "F32",
            "shape": SHAPES[site],
            "data_offsets": [_SIZE * i, _SIZE * i + _SIZE],
        }
        for i, layer in enumerate(layers)
    }
    return facts(draw, site), entries, struct.pack(f"<{8 * len(layers)}f", *(draw.gauss(0, 1) for _ in layers * 8))


def joined(header: str, data: bytes, length: int | None = None) -> bytes:
    encoded = header.encode("utf-8", "surrogatepass")
    length = len(encoded) if length is None else length
    return struct.pack("<Q", length % 2**64) + encoded + data


def header_text(laai: Any, entries: Any) -> str:
    """`entries` may be an object of any kind, `laai` any tree."""
    members = list(entries.items()) if isinstance(entries, dict) else list(entries)
    return text(Pairs([("__metadata__", {"laai": text(laai)}), *members]))


PLAIN = 8  # a seed for which the next is at site heads, position last, operation add, scale 1


def good_intervention(draw: Draw) -> bytes:
    laai, entries, data = parts(draw)
    return joined(header_text(laai, entries), data)


def _header_length(draw: Draw) -> bytes:
    laai, entries, data = parts(draw)
    header = header_text(laai, entries)
    true = len(header.encode())
    lies = [0, 1, 2, true - 1, true + 1, true + len(data), true + len(data) + 1, 4 << 20, 2**31, 2**32 + true, 2**63]
    return joined(header, data, draw.choice([*lies, 2**64 - 1, draw.randrange(true), draw.getrandbits(64)]))


def _odd_facts(draw: Draw) -> bytes:
    laai, entries, data = parts(draw)
    return joined(header_text(harmed_tree(laai, draw), entries), data)


def _odd_entries(draw: Draw) -> bytes:
    laai, entries, data = parts(draw)
    harmed = harmed_tree(entries, draw)
    return joined(header_text(laai, harmed) if isinstance(harmed, dict | Pairs) else text(harmed), data)


def _odd_header(draw: Draw) -> bytes:
    laai, entries, data = parts(draw)
    return joined(text(harmed_tree({"__metadata__": {"laai": text(laai)}, **entries}, draw)), data)


def _odd_shape(draw: Draw) -> bytes:
    laai, entries, data = parts(draw)
    sizes = [0, 1, 2, 4, 8, -1, -8, 2**31, 2**32 + 8, 2**62, 2**63, 2**64, 2**64 + 8, True, 1.0, "8", None, [8]]
    entry = entries[draw.choice(list(entries))]
    entry["shape"] = draw.choice([[draw.choice(sizes) for _ in range(draw.randrange(5))], [1] * 10_000, [2**20] * 3])
    return joined(header_text(laai, entries), data)


def _odd_offsets(draw: Draw) -> bytes:
    laai, entries, data = parts(draw)
    ends = [0, 1, 32, 33, 64, -1, -32, 2**31, 2**62, 2**63, 2**64, 2**64 + 32, 10**40, True, 32.0, "32", None]
    entry = entries[draw.choice(list(entries))]
    entry["data_offsets"] = [draw.choice(ends) for _ in range(draw.choice([0, 1, 2, 2, 2, 2, 3]))]
    return joined(header_text(laai, entries), data)


def _odd_dtype(draw: Draw) -> bytes:
    laai, entries, data = parts(draw)
    kinds = ["F64", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "F4", "f32", "", "O", None, ["F32"]]
    entries[draw.choice(list(entries))]["dtype"] = draw.choice(kinds)
    return joined(header_text(laai, entries), data)


def _odd_numbers(draw: Draw) -> bytes:
    """NaN payloads (quiet, signalling, with bits set), infinities, denormal and the largest numbers."""
    laai, entries, data = parts(draw)
    words = [0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x7FA5A5A5, 0x7F800000, 0xFF800000, 1, 0x80000000, 0x7F7FFFFF]
    place = 4 * draw.randrange(len(data) // 4)
    laai["scale"] = draw.choice([1.0, 2.0, 1e-30, 1e30, 1e300])
    return joined(header_text(laai, entries), data[:place] + struct.pack("<I", draw.choice(words)) + data[place + 4 :])


def _twice(draw: Draw) -> bytes:
    """A key twice: a tensor, the metadata, or one of the facts."""
    laai, entries, data = parts(draw)
    facts_twice = Pairs([*laai.items(), draw.choice(list(laai.items()))])
    entries_twice = Pairs([*entries.items(), draw.choice(list(entries.items()))])
    metadata = ("__metadata__", {"laai": text(laai)})
    two_metadata = Pairs([metadata, ("laai", {}), *entries.items(), metadata])
    two_laai = Pairs([("__metadata__", Pairs([*metadata[1].items()] * 2)), *entries.items()])
    headers = [header_text(facts_twice, entries), header_text(laai, entries_twice), text(two_metadata), text(two_laai)]
    return joined(draw.choice(headers), data)


def _no_utf8(draw: Draw) -> bytes:
    laai, entries, data = parts(draw)
    header = header_text(laai, entries).encode()
    place = header.index(b"some") if b"some" in header else header.index(b"model")
    odd = draw.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xc0\xaf", b"\x80"])
    header = header[:place] + odd + header[place + len(odd) :]
    return struct.pack("<Q", len(header)) + header + data


def _deep(draw: Draw) -> bytes:
    laai, entries, data = parts(draw)
    depth = draw.choice([20, 30, 40, 100, 300, 450, 600, 900, 1000, 1500, 20_000, 300_000])
    deep = nested(depth, draw.choice(["1", '"a"', "null", ""]), draw.randrange(2))
    place = draw.randrange(4)
    if place == 0:
        return joined(header_text(deep, entries), data)
    if place == 1:
        laai[draw.choice(["training", "task", "scale", "extra"])] = deep
    elif place == 2:
        entries["extra"] = deep
    else:
        entries[next(iter(entries))]["shape"] = deep
    return joined(header_text(laai, entries), data)


def _wide(draw: Draw) -> bytes:
    """Very many of something, up to the largest header that is read."""
    laai, entries, data = parts(draw)
    what = draw.randrange(5)
    if what == 0:
        laai["task"] = draw.choice(["x", "\n", "é", "\ud800", "\\"]) * draw.choice([10**4, 10**6])
    elif what == 1:
        laai["training"] = {f"key {n}": n for n in range(draw.choice([1000, 50_000]))}
    elif what == 2:
        entries.update({f"layers.{n}.{laai['site']}": next(iter(entries.values())) for n in range(LAYERS, 30_000)})
    elif what == 3:
        count = draw.choice([100, 1000, 20_000])
        shape, site = SHAPES[laai["site"]], laai["site"]
        entries = {
            f"layers.{n}.{site}": {"dtype": "F32", "shape": shape, "data_offsets": [_SIZE * n, _SIZE * n + _SIZE]}
            for n in range(count)
        }
        laai["num_hidden_layers"] = draw.choice([LAYERS, count, None])
        data = bytes(_SIZE * count)
    else:
        return joined(header_text(laai, entries) + " " * draw.choice([8, (4 << 20) - 2000, 5 << 20]), data)
    return joined(header_text(laai, entries), data)


def _odd_layers(draw: Draw) -> bytes:
    laai, entries, data = parts(draw)
    name = draw.choice(["-1", "00", "+1", "1.0", "9" * 30, "", "４", "1e3", "0x1", " 1", "999999", "1000000", "3"])
    site = draw.choice([laai["site"], "heads", "HEADS", "nose", "", "mlp\n"])
    renamed = {f"layers.{name}.{site}": next(iter(entries.values()))}
    laai["num_hidden_layers"] = draw.choice([LAYERS, 1, 0, -1, True, "4", None, 1e9, 2**70])
    return joined(header_text(laai, draw.choice([renamed, {**entries, **renamed}])), data)


INTERVENTION: Mutators = {
    **of_bytes(good_intervention),
    "header length": _header_length,
    "facts": _odd_facts,
    "tensor entries": _odd_entries,
    "header": _odd_header,
    "shapes": _odd_shape,
    "offsets": _odd_offsets,
    "dtypes": _odd_dtype,
    "numbers": _odd_numbers,
    "duplicate keys": _twice,
    "no UTF-8": _no_utf8,
    "deep JSON in it": _deep,
    "very many": _wide,
    "layers": _odd_layers,
    **FOREIGN,
}


# --- data files


def of_json(good: Callable[[Draw], Any]) -> Mutators:
    """Every harm to a JSON file that holds such a tree."""

    def encoded(draw: Draw) -> bytes:
        return text(good(draw)).encode()

    return {
        **of_bytes(encoded),
        "structure": lambda draw: text(harmed_tree(good(draw), draw)).encode("utf-8", "surrogatepass"),
        "encoding": lambda draw: _recoded(encoded(draw), draw),
        **FOREIGN,
    }


def word_pairs(draw: Draw) -> list[dict[str, str]]:
    words = ["hot", "cold", "été", "in the morning", "ß", "naïve", "up"]
    return [{"input": word, "output": draw.choice(words)} for word in draw.sample(words, draw.randrange(1, 7))]


def _long_words(draw: Draw) -> bytes:
    """Words that cost more than linear time to normalise, or fill the screen."""
    long = draw.choice(["a", "\u0315\u0300", "e\u0301", "\ufdfa", "a b ", "a\n", "\ud800", "\U0001f468\u200d"])
    records = word_pairs(draw)
    records[0][draw.choice(["input", "output"])] = "a" + long * draw.choice([100, 30_000, 300_000])
    return text(records).encode()


WORD_PAIRS: Mutators = {**of_json(word_pairs), "long words": _long_words}


def of_table(good: Callable[[Draw], bytes], separator: bytes) -> Mutators:
    """Every harm to a table of lines of cells."""

    def cells(draw: Draw) -> bytes:
        lines = [line.split(separator) for line in good(draw).split(b"\n")]
        for _ in range(draw.choice([1, 1, 3])):
            line = draw.choice(lines)
            if not line:
                continue
            place, action = draw.randrange(len(line)), draw.random()
            if action < 0.25:
                del line[place]
            elif action < 0.5:
                line.insert(place, line[place])
            else:
                odd = ["", " ", "\u00a0", '"', "a\x0bb", "a\u2028b", "\ufeff", "=1+1", "\0", "x" * 200_000, "e\u0301"]
                line[place] = draw.choice([*odd, "\r", "NaN", "1e999", "-1", "[" * 5000]).encode()
        return b"\n".join(separator.join(line) for line in lines)

    def line_ends(draw: Draw) -> bytes:
        return good(draw).replace(b"\n", draw.choice([b"\r\n", b"\r", b"\n\n", b"\x0b", b"\xe2\x80\xa8", b"\0"]))

    return {
        **of_bytes(good),
        "cells": cells,
        "line ends": line_ends,
        "header alone": lambda draw: good(draw).split(b"\n")[0] + draw.choice([b"", b"\n"]),
        "encoding": lambda draw: _recoded(good(draw), draw),
        **FOREIGN,
    }


# --- what `laai check` compares

_TASKS = ["laai_lexicon", "laai_lexicon_antonym", "group::task"]
_METRICS = ["exact_match,none", "kl,none"]


def _applied(draw: Draw) -> dict[str, Any]:
    layers = [draw.randrange(4)]
    return {
        "sha256": "0" * 64,
        "layers": layers,
        "site": "heads",
        "position": "last",
        "operation": "add",
        "scale": 1.0,
    }


def baseline(draw: Draw) -> dict[str, Any]:
    """The tree of a baseline, which `results` passes, fails or betters."""
    metric = {"value": 0.5, "stderr": 0.01, "tolerance": {"standard_errors": 2.0}}
    task = {"version": "1.0", "shots": 0, "samples": 100, "data": "0" * 64, "metrics": dict.fromkeys(_METRICS, metric)}
    return {"tasks": dict.fromkeys(_TASKS, task), "interventions": {"laai_lexicon_antonym": _applied(draw)}}


def results(draw: Draw) -> dict[str, Any]:
    """The tree of a results file, as the harness writes it."""
    scores = {"alias": " - task", "sample_len": 100}
    for metric in _METRICS:
        scores |= {metric: draw.choice([0.4, 0.5, 0.6]), metric.replace(",", "_stderr,"): 0.01}
    applied = {"source": "vectors/laai_lexicon_antonym.safetensors", **_applied(draw)}
    return {
        "results": dict.fromkeys(_TASKS, scores),
        "higher_is_better": dict.fromkeys(_TASKS, {"exact_match": True, "kl": False}),
        "versions": dict.fromkeys(_TASKS, 1.0),
        "n-shot": dict.fromkeys(_TASKS, 0),
        "task_hashes": dict.fromkeys(_TASKS, "0" * 64),
        "config": {"model": "hf-laai", "interventions": [applied]},
    }


def good_baseline(draw: Draw) -> bytes:
    return text(baseline(draw)).encode()


def good_results(draw: Draw) -> bytes:
    return text(results(draw)).encode()


def _aliases(draw: Draw) -> bytes:
    """Aliases of aliases, one inside its own anchor, and ones that nobody minds."""
    width, depth = draw.choice([(9, 9), (2, 40), (1, 300), (300, 2), (2, 3), (5000, 1)])
    kind = draw.choice(["[{}]", "{{{}}}"])
    lines = ["a0: &a0 " + draw.choice(["1", "[1, 1]", "{b: 1}", '"' + "x" * 50_000 + '"', "*a0", "[*a0]"])]
    for n in range(1, depth + 1):
        members = [f"{'' if kind[0] == '[' else f'k{m}: '}*a{n - 1} " for m in range(width)]
        lines.append(f"a{n}: &a{n} " + kind.format(", ".join(members)))
    place = draw.choice(["interventions: {x: {", "tasks: {t: {", "tasks: {t: {metrics: {", "{", "more: {"])
    closing = "}" * place.count("{")
    return (place + ", ".join(lines) + closing + "\ntasks: {t: {}}\n").encode()


def _numbers(draw: Draw) -> bytes:
    """Numbers that Python does not convert, does not print, or takes for text."""
    digits = draw.choice([30, 33, 400, 4301, 20_000, 400_000])
    number = draw.choice(
        ["1" * digits, "-" + "9" * digits, "0x" + "F" * digits, "0b" + "1" * digits, "0" + "7" * digits]
        + ["1:" + "59:" * digits + "1", "1:" + "59:" * digits + "1.5", "1_" * digits, "1" * digits + ".5", "1.0e+999"]
        + [".inf", "-.INF", ".nan", "2020-01-01", "2020-99-99", "!!int 'x'", "!!int [1]", "!!float {}", "!!binary '%'"]
        + [
            "!!timestamp x",
            "!!set {a, b}",
            "!!omap [a: 1]",
            "!!null 1",
            "!!bool maybe",
            "!!str 1",
            "!!python/name:os.system",
        ]
    )
    place = draw.choice(
        ["tasks: {t: {samples: NUMBER}}", "tasks: {t: {metrics: {'a,b': {value: NUMBER, tolerance: {absolute: 0}}}}}"]
        + ["tasks: {t: {metrics: {'a,b': {value: 0, stderr: 1, tolerance: {standard_errors: NUMBER}}}}}"]
        + ["tasks: {t: {}}\ninterventions: {x: {scale: NUMBER}}", "tasks: {NUMBER: {}}", "NUMBER"]
    )
    return place.replace("NUMBER", number).encode()


def _large(draw: Draw) -> bytes:
    """Very many of something, or something very long, at and above what is read."""
    size = draw.choice([1000, 60_000, 400_000, 600_000])
    unit = draw.choice(
        ["[", "{a: ", "- ", "? ", "&a ", "!!str ", "a ", "a, ", "#", "\n", "'", "a:\n", "x: [1]\n", "---\n", "é"]
    )
    before = draw.choice(["", "tasks: ", "tasks: {", "tasks: [", 'tasks: "', "tasks: {t: {}}\n", "tasks: |\n  "])
    return (before + unit * (size // len(unit))).encode()


def _many_tasks(draw: Draw) -> bytes:
    """As many tasks as fit, with names that a table would have to be padded for."""
    task = {"metrics": {"acc,none": {"value": 0.5, "tolerance": {"absolute": 0.1}}}}
    count, length = draw.choice([(2000, 10), (3500, 4), (1000, 280), (10, 20_000), (300, 300), (6000, 60)])
    return text({"tasks": {f"{n}" + "x" * length: task for n in range(count)}}).encode()


# Names that a runner of GitHub would obey, and ones that a terminal or XML does not take.
_COMMANDS = [
    "::error::x",
    "  ::add-mask::y",
    "##[add-mask]y",
    "\n::error::x",
    "\r::x::",
    "\u2028::x::",
    "\x1b[2J",
    "\0",
    "]]>",
]


def _named(tree: dict[str, Any], draw: Draw) -> bytes:
    """The tree with one of its names replaced wherever it stands."""
    old = draw.choice([*_TASKS, *_METRICS, "version", "sha256", "0" * 64])
    new = draw.choice([*_COMMANDS, "\ud800", "x" * 299, "x" * 301, "x" * 10**5, "", "a,b,c", ",", "null", "é"])
    new = new + ",none" if old in _METRICS and draw.random() < 0.7 else new
    return text(tree).replace(json.dumps(old), json.dumps(new)).encode()


def _wide_results(draw: Draw) -> bytes:
    """Very many of something in a results file, and a file larger than is read."""
    tree, count = results(draw), draw.choice([1000, 30_000, 200_000])
    what = draw.randrange(6)
    if what == 0:
        tree["results"] = {f"task {n}": {"acc,none": 0.5} for n in range(draw.choice([1000, 9000, 30_000]))}
    elif what == 1:
        tree["results"][_TASKS[0]] = {f"metric {n},none": 0.5 for n in range(draw.choice([900, count]))}
    elif what == 2:
        tree["config"]["interventions"] *= min(count, 20_000)
    elif what == 3:
        tree["config"]["interventions"][0]["layers"] = list(range(count))
    elif what == 4:
        tree["config"]["gen_kwargs"] = [{}] * count
    else:
        tree["config"]["model"] = draw.choice(["x", "é", "\U0001f600", "\\"]) * draw.choice([10**6, 9 << 20])
    return json.dumps(tree, ensure_ascii=draw.random() < 0.5).encode()


BASELINE: Mutators = {
    **of_json(baseline),
    "aliases": _aliases,
    "numbers": _numbers,
    "large": _large,
    "many tasks": _many_tasks,
    "names": lambda draw: _named(baseline(draw), draw),
}
RESULTS: Mutators = {
    **of_json(results),
    "wide": _wide_results,
    "names": lambda draw: _named(results(draw), draw),
}


# --- OpinionQA's files

GROUP = ("SEX", "Female")
_OPTIONS = ["A lot", "Some", 'None, or "almost" none']


def opinion_records(draw: Draw) -> dict[str, Any]:
    """The aggregated form."""
    return {
        f"Q{number}": {
            "MC_options": [*_OPTIONS, "Refused"],
            "question_text": f"How much of {draw.choice(['it', 'été', 'x, y'])}?",
            "Female": {option: draw.randrange(50) + 1.0 for option in [*_OPTIONS, "Refused"]},
            "Male": {option: draw.randrange(50) for option in _OPTIONS},
        }
        for number in range(draw.randrange(1, 4))
    }


def _table(rows: list[list[Any]]) -> bytes:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue().encode()


def _opinion_info(draw: Draw) -> bytes:
    rows = [[f"Q{n}", f"How much of {n}?", repr([*_OPTIONS, "Refused"]), "[1.0, 2.0, 3.0]"] for n in range(2)]
    return _table([["key", "question", "references", "option_ordinal"], *rows])


def _opinion_metadata(draw: Draw) -> bytes:
    return _table([["key", "options"], ["SEX", "['Male', 'Female', 'Refused']"], ["RACE", "['White', 'Black']"]])


def _opinion_responses(draw: Draw) -> bytes:
    answers = [*_OPTIONS, "Refused", ""]
    people = [
        [draw.choice(answers), draw.choice(_OPTIONS), draw.choice(["Male", "Female"]), f"{draw.random():.3f}"]
        for _ in range(6)
    ]
    return _table([["Q0", "Q1", "SEX", "WEIGHT_W1"], *people, [_OPTIONS[0], _OPTIONS[1], "Female", "1.0"]])


OPINION_TABLES = {"info.csv": _opinion_info, "metadata.csv": _opinion_metadata, "responses.csv": _opinion_responses}


def _literals(draw: Draw) -> bytes:
    """Cells that hold more than a literal: nothing of it may be evaluated, nor complained of by the compiler."""
    odd = ["__import__('os').system('touch x')", "[1]*10**9", "['\\d']", "[1 is 1]", "(" * 300, "9" * 5000, "[1e999]"]
    odd += [
        "{}",
        "[None]",
        "['a', 'a']",
        "['" + "a" * 10**5 + "']",
        "[" * 5000,
        "-" * 5000 + "1",
        "[nan]",
        "'\\ud800'",
        "\0",
    ]
    odd += ["['\\ud800', 'b']", "['a', 'b', 'c', 'd'" + ", 'x'" * 5000 + "]", "[" + "1" * 4301 + "]", "[True, 1]"]
    return _opinion_info(draw).replace(draw.choice([b"[1.0, 2.0, 3.0]", b"A lot"]), draw.choice(odd).encode(), 1)


def opinion_table(name: str) -> Mutators:
    """Mutators of one of the tables of the authors' layout."""
    more = {"literals": _literals} if name == "info.csv" else {}
    return {**of_table(OPINION_TABLES[name], b","), **more}
