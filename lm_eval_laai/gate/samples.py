"""The harness's samples files, `samples_<task>_<date>.jsonl`, as far as a paired comparison of two runs reads them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from laai_core.errors import LaaiError
from lm_eval_laai.gate.results_file import check_name

# Above any run of the harness; a hostile line is refused before it fills the memory.
_LONGEST_LINE = 64 << 20  # bytes
_MOST_ITEMS = 2_000_000  # of a file, all filters together
_MOST_METRICS = 100  # of an item


@dataclass(frozen=True)
class Item:
    """One document under one filter: hashes of the document and of its target, and its value of every metric.

    A value is None where the item has no number of its own: metrics such as BLEU, F1 or perplexity log what they are
    computed from, over all items at once.
    """

    doc_hash: str
    target_hash: str
    values: dict[str, float | None]


Items = dict[int, Item]  # by the harness's doc_id, its index in the evaluated split


def samples_file(results: Path, task: str) -> Path | None:
    """The samples file that the harness wrote beside the results file for a task, if there is one.

    Both names end in the date of the run: `results_<date>.json`, `samples_<task>_<date>.jsonl`.
    """
    date = results.stem.rpartition("_")[2]
    path = results.parent / f"samples_{task}_{date}.jsonl"
    return path if path.is_file() else None


def read_samples(path: Path) -> dict[str, Items]:
    """Every item of a samples file, by filter and doc_id. Line by line: only hashes and numbers are kept.

    Raises:
        LaaiError: no samples file of lm-eval 0.4.13, an item that is there twice, or a value that is NaN or infinite.
    """
    filters: dict[str, Items] = {}
    count = 0
    try:
        with path.open("rb") as file:
            for number, line in _lines(file, path):
                count += 1
                if count > _MOST_ITEMS:
                    raise LaaiError(f"{path} has over {_MOST_ITEMS} items: too large to be compared")
                where = f"{path}, line {number}"
                name, doc_id, item = _item(line, where)
                items = filters.setdefault(name, {})
                if doc_id in items:
                    raise LaaiError(f"{where}: item {doc_id} is there twice under filter {name!r:.60}: expected once")
                items[doc_id] = item
    except OSError as error:
        raise LaaiError(f"cannot read {path}: {error.strerror}") from None
    if not filters:
        raise LaaiError(f"{path} has no items: expected a line for each")
    return filters


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and content of every line that is not empty."""
    number = 0
    while line := file.readline(_LONGEST_LINE + 1):
        number += 1
        if len(line) > _LONGEST_LINE:
            raise LaaiError(f"{path}, line {number} has over {_LONGEST_LINE} bytes: too large to be compared")
        if line.strip():
            yield number, line


def _item(line: bytes, where: str) -> tuple[str, int, Item]:
    """Filter, doc_id and item of one line."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise LaaiError(f"{where} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise LaaiError(f"{where} is a {type(content).__name__}: expected the object that --log_samples writes")
    doc_id = content.get("doc_id")
    if isinstance(doc_id, bool) or not isinstance(doc_id, int):
        raise LaaiError(f"{where}: doc_id is {doc_id!r:.60}: expected the item's number")
    texts = {}
    for key in ("filter", "doc_hash", "target_hash"):
        value = content.get(key)
        if not isinstance(value, str):
            raise LaaiError(
                f"{where}: {key} is {value!r:.60}: expected a text, as --log_samples of lm-eval 0.4.13 writes"
            )
        check_name(value, where)
        texts[key] = value
    names = content.get("metrics")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) > _MOST_METRICS:
        raise LaaiError(f"{where}: metrics is {names!r:.60}: expected a list of at most {_MOST_METRICS} names")
    values = {}
    for name in names:
        check_name(name, where)
        values[name] = _value(content.get(name), f"{where}: {name!r:.60} of item {doc_id}")
    return texts["filter"], doc_id, Item(texts["doc_hash"], texts["target_hash"], values)


def _value(value: Any, where: str) -> float | None:
    if not isinstance(value, int | float):
        return None
    try:
        number = float(value)  # True and False of a metric are 1 and 0
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise LaaiError(f"{where} is {number}: expected a finite number")
    return number
