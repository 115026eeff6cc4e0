"""The bundled lexicon: one small table of our own, so that a run needs no network and no other data."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from laai_core.data.pairs import WordPair, check_side
from laai_core.data.reading import content, decoded
from laai_core.errors import LaaiError

COLUMNS = ("english", "french", "german", "antonym", "synonym")
LEXICON = Path(__file__).with_name("lexicon.tsv")


def read_lexicon(path: Path = LEXICON) -> tuple[list[dict[str, str]], str]:
    """The table's rows, each a dict with the keys of COLUMNS, and the file's SHA-256.

    Every antonym and every synonym is itself a row, so a composition never drops out.
    Raises LaaiError naming file and line when the table is missing or malformed.
    """
    expected = f"a table with columns {COLUMNS}"
    raw = content(path, expected)
    lines = decoded(raw, str(path), expected).splitlines()
    if not lines or tuple(lines[0].split("\t")) != COLUMNS:
        raise LaaiError(
            f"{path}: line 1 is {''.join(lines[:1])!r:.80}; expected the tab-separated header {' '.join(COLUMNS)}"
        )
    rows: list[dict[str, str]] = []
    for number, line in enumerate(lines[1:], start=2):
        cells = line.split("\t")
        if len(cells) != len(COLUMNS):
            raise LaaiError(f"{path}: line {number} has {len(cells)} cells; expected {len(COLUMNS)}, tab-separated")
        named = zip(COLUMNS, cells, strict=True)
        rows.append({name: check_side(cell, f"{path}: line {number}: {name}") for name, cell in named})
    if not rows:
        raise LaaiError(f"{path}: has a header and no row; expected at least one word")
    return rows, hashlib.sha256(raw).hexdigest()


@cache
def _bundled() -> tuple[list[dict[str, str]], str]:
    return read_lexicon()


def lexicon_pairs(column: str) -> tuple[list[WordPair], str]:
    """The bundled lexicon's pairs (english, `column`) in file order, and the table's SHA-256."""
    rows, digest = _bundled()
    return [WordPair(row["english"], row[column]) for row in rows], digest
