"""Word pairs: where the public sets lie, how they are read, and how two of them are composed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from laai_core.data.reading import content, decoded, parsed
from laai_core.data.split import check_unicode, item_key
from laai_core.errors import LaaiError

SETS_FOLDER = "function_vectors"
WORD_SETS = Path(__file__).with_name("word_sets")
LONGEST = 1000  # characters of a word: Unicode normalisation takes quadratic time on hostile ones


class WordPair(NamedTuple):
    """One item of a rule: `output` is the rule applied to `input`. Both are stripped and never empty."""

    input: str
    output: str


def data_folder(data: str | os.PathLike[str] | None = None) -> Path:
    """The data folder: the argument, else $LAAI_DATA, else a folder in the user's cache, for `fetch` too."""
    if data is not None:
        return Path(os.path.expanduser(data))
    if os.environ.get("LAAI_DATA"):
        return Path(os.path.expanduser(os.environ["LAAI_DATA"]))
    return user_cache()


def user_cache() -> Path:
    """This project's folder in the user's cache: $XDG_CACHE_HOME, or else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "laai"


def find_set(file_name: str, data: str | os.PathLike[str] | None = None) -> Path:
    """The path of a public set in `<data>/function_vectors`, or in `<data>` itself when that is the folder meant.

    Raises LaaiError naming the file and the two ways to get it.
    """
    folder = data_folder(data)
    candidates = [folder / SETS_FOLDER / file_name, folder / file_name]
    for path in candidates:
        if path.is_file():
            return path
    raise LaaiError(
        f"{candidates[0]}: no such file; expected the public word set {file_name}: get it with `laai data fetch`, "
        f"or point --data DIR (or LAAI_DATA) at a folder that has it"
    )


def word_set_names() -> list[str]:
    """The bundled sets of English word pairs, made by benchmarks/word_sets.py."""
    return sorted(path.stem for path in WORD_SETS.glob("*.json"))


def pairs_file(name: str) -> Path:
    """The file that `pairs:NAME` means: a path, or where nothing lies there the name of a bundled set."""
    path = Path(os.path.expanduser(name))
    return path if path.exists() or name not in word_set_names() else WORD_SETS / f"{name}.json"


def read_pairs(path: Path) -> tuple[list[WordPair], str]:
    """Read a JSON list of {"input": ..., "output": ...}; returns the pairs in file order and the file's SHA-256.

    Both sides are stripped: three targets of the public English-German set end in a newline. An input that comes again
    is dropped, the first output stays: one item, one answer. Raises LaaiError naming file, record and expectation.
    """
    expected = "a JSON list of input-output pairs"
    raw = content(path, expected)
    records = parsed(decoded(raw, str(path), expected), str(path), expected)
    if not isinstance(records, list):
        raise LaaiError(f"{path}: holds a JSON {type(records).__name__}; expected a list of input-output pairs")
    if not records:
        raise LaaiError(f"{path}: the list is empty; expected at least one input-output pair")
    pairs = [_read_record(record, f"{path}: record {n}") for n, record in enumerate(records, start=1)]
    return first_of_each(pairs), hashlib.sha256(raw).hexdigest()


def _read_record(record: Any, where: str) -> WordPair:
    if not isinstance(record, dict):
        raise LaaiError(f'{where} is a {type(record).__name__}; expected {{"input": ..., "output": ...}}')
    for side in ("input", "output"):
        if side not in record:
            raise LaaiError(f'{where} has no "{side}"; expected {{"input": ..., "output": ...}}')
    return WordPair(*(check_side(record[side], f"{where}: {side}") for side in ("input", "output")))


def check_side(text: Any, where: str) -> str:
    """One side of a pair, stripped. Raises LaaiError, starting with `where`, for text that no answer could match."""
    if not isinstance(text, str):
        raise LaaiError(f"{where} is a {type(text).__name__}; expected text")
    text = text.strip()
    if not text:
        raise LaaiError(f"{where} is empty; expected a word")
    # An answer ends at the first line break, so one with a break inside could never be matched.
    if len(text.splitlines()) > 1:
        raise LaaiError(f"{where} is {text!r:.60}, which has a line break inside; expected one line")
    if len(text) > LONGEST:
        raise LaaiError(f"{where} has {len(text)} characters; expected a word or a phrase, at most {LONGEST}")
    check_unicode(text, where)
    return text


def first_of_each(pairs: Iterable[WordPair]) -> list[WordPair]:
    """The pairs in order, keeping the first of those that share an input."""
    first: dict[str, WordPair] = {}
    for pair in pairs:
        first.setdefault(item_key(pair.input), pair)
    return list(first.values())


def join_pairs(first: Iterable[WordPair], second: Iterable[WordPair]) -> list[WordPair]:
    """The composition: w -> second(first(w)), in the order of `first`; drops w where `second` lacks first(w)."""
    onward: dict[str, str] = {}
    for pair in second:
        onward.setdefault(item_key(pair.input), pair.output)
    joined = ((pair.input, onward.get(item_key(pair.output))) for pair in first)
    return [WordPair(word, output) for word, output in joined if output is not None]
