"""Waves of the American Trends Panel in OpinionQA's own layout: a folder with three CSV files each."""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from laai_core.data.opinion import Counts, Question, check_known, check_options, check_text
from laai_core.data.reading import content, decoded
from laai_core.errors import LaaiError

logger = logging.getLogger(__name__)

MAX_POSITION = 1e6  # largest position of an option on its scale; beyond is a mistake
MAX_WEIGHT = 1e12
_WAVE = "American_Trends_Panel_W"


def is_wave(path: Path) -> bool:
    """Whether this is the folder of a wave, by its name."""
    return path.is_dir() and path.name.startswith(_WAVE) and path.name.removeprefix(_WAVE).isdecimal()


def wave_number(folder: Path) -> int:
    """The n of American_Trends_Panel_W<n>."""
    return int(folder.name.removeprefix(_WAVE))


def counts_of_waves(
    waves: Sequence[Path], attribute: str, group: str
) -> tuple[list[tuple[Question, Counts]], dict[str, str]]:
    """Every question of the waves with the weighted answers of a group, and {file: SHA-256} of the files.

    Raises LaaiError with file, row (the header is row 1) and column.
    """
    counted: list[tuple[Question, Counts]] = []
    sources: dict[str, str] = {}
    people = 0
    for folder in waves:
        questions, sources[f"{folder.name}/info.csv"] = read_info(folder / "info.csv")
        sources[f"{folder.name}/metadata.csv"] = _check_group(folder / "metadata.csv", attribute, group)
        path = folder / "responses.csv"
        header, rows, sources[f"{folder.name}/responses.csv"] = _table(path)
        tally = _Tally(path, header, list(questions.values()), f"WEIGHT_W{wave_number(folder)}", attribute, group)
        for number, cells in rows:
            tally.add(number, cells)
        if tally.unweighted:
            logger.warning("%s: %d of %s=%s have no weight", path, tally.unweighted, attribute, group)
        counted += zip(tally.questions, tally.counts, strict=True)
        people += tally.people
    if not people:
        where = path if len(waves) == 1 else path.parent.parent
        raise LaaiError(f"{where}: no row has {group!r} in the column {attribute}; expected at least one person")
    return counted, sources


class _Tally:
    """The weighted answers of one group, from the rows of one responses.csv. Every row is checked, of any group."""

    def __init__(
        self, path: Path, header: list[str], questions: list[Question], weight: str, attribute: str, group: str
    ) -> None:
        self.questions = questions
        self.counts: list[Counts] = [dict.fromkeys((*q.options, *q.refusals), 0.0) for q in questions]
        self.people = 0  # in the group
        self.unweighted = 0  # people in the group without a weight
        self._path = path
        self._group = group
        self._weight_name = weight
        self._attribute, self._weight, *answers = (
            _column(path, header, name) for name in (attribute, weight, *(q.key for q in questions))
        )
        self._columns = list(zip(answers, self.counts, questions, strict=True))

    def add(self, number: int, cells: list[str]) -> None:
        """Count a row, the `number`th of the file."""
        weight = self._weight_of(number, cells[self._weight].strip())
        ours = cells[self._attribute].strip() == self._group
        self.people += ours
        self.unweighted += ours and weight is None
        for column, counts, question in self._columns:
            answer = cells[column].strip()
            if not answer:  # not asked
                continue
            if answer not in counts:
                check_known(answer, question, f"{self._path}: row {number}, column {question.key}")
            if ours and weight is not None:
                counts[answer] += weight

    def _weight_of(self, number: int, text: str) -> float | None:
        if not text:
            return None
        try:
            weight = float(text)
        except ValueError:
            weight = math.nan
        if not 0 <= weight <= MAX_WEIGHT:
            where = f"{self._path}: row {number}, column {self._weight_name}"
            raise LaaiError(f"{where} is {text!r:.60}; expected a number, 0 or above")
        return weight


def read_info(path: Path) -> tuple[dict[str, Question], str]:
    """The questions of an info.csv by key, in its order, and the file's SHA-256.

    The options are the first of `references`, as many as `option_ordinal` has numbers; the others are refusals. A
    repeated key is one question in other words for other people: its first row stays.
    Raises LaaiError naming file, row (the header is row 1) and column.
    """
    header, rows, digest = _table(path)
    columns = {name: _column(path, header, name) for name in ("key", "question", "references", "option_ordinal")}
    questions: dict[str, Question] = {}
    for number, cells in rows:
        where = {name: f"{path}: row {number}, column {name}" for name in columns}
        cell = {name: check_text(cells[column], where[name]) for name, column in columns.items()}
        listed = _literal(cell["references"], str, "option texts", where["references"])
        references = [check_text(text, where["references"]) for text in listed]
        positions = _literal(cell["option_ordinal"], (int, float), "numbers", where["option_ordinal"])
        if len(positions) > len(references) or not all(abs(position) <= MAX_POSITION for position in positions):
            expected = f"at most {len(references)} finite numbers, the number of references"
            raise LaaiError(f"{where['option_ordinal']} is {cell['option_ordinal']!r:.60}; expected {expected}")
        options, refusals = references[: len(positions)], references[len(positions) :]
        check_options(options, where["references"])
        scale = tuple(map(float, positions))
        question = Question(cell["key"], cell["question"], tuple(options), scale, tuple(refusals))
        questions.setdefault(question.key, question)
    if not questions:
        raise LaaiError(f"{path}: has a header and no row; expected at least one question")
    return questions, digest


def _check_group(path: Path, attribute: str, group: str) -> str:
    """LaaiError unless metadata.csv knows the attribute and, among its options, the group. Returns its SHA-256."""
    header, rows, digest = _table(path)
    key, options = (_column(path, header, name) for name in ("key", "options"))
    known = {
        cells[key].strip(): _literal(cells[options], str, "groups", f"{path}: row {number}, column options")
        for number, cells in rows
    }
    if attribute not in known:
        raise LaaiError(f"{path}: column key has no attribute {attribute!r}; expected one of {', '.join(known)}")
    if group not in known[attribute]:
        raise LaaiError(f"{path}: {attribute} has no group {group!r}; expected one of {', '.join(known[attribute])}")
    return digest


def _table(path: Path) -> tuple[list[str], Iterator[tuple[int, list[str]]], str]:
    """Header, numbered rows (the header is row 1) and SHA-256 of a CSV file."""
    raw = content(path, "a CSV table")
    rows = _rows(path, decoded(raw, str(path), "a CSV table"))
    try:
        _, header = next(rows)
    except StopIteration:
        raise LaaiError(f"{path}: is empty; expected a CSV table with a header") from None
    return header, rows, hashlib.sha256(raw).hexdigest()


def _rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    width, number = None, 0
    try:
        for number, cells in enumerate(csv.reader(io.StringIO(text, newline=""), strict=True), start=1):
            width = width or len(cells)
            if cells and len(cells) != width:
                raise LaaiError(f"{path}: row {number} has {len(cells)} cells; expected {width}, as the header has")
            if cells:
                yield number, cells
    except csv.Error as error:
        raise LaaiError(f"{path}: row {number + 1} is not valid CSV ({error})") from error


def _column(path: Path, header: list[str], name: str) -> int:
    try:
        return header.index(name)
    except ValueError:
        raise LaaiError(f"{path}: row 1 has no column {name}; expected it in the header") from None


def _literal(text: str, kind: type | tuple[type, ...], what: str, where: str) -> list[Any]:
    """A Python list literal whose items are all of one kind. The text is parsed, never evaluated."""
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(x, kind) and not isinstance(x, bool) for x in found):
        raise LaaiError(f"{where} is {text!r:.60}; expected a Python list of {what}")
    return found
