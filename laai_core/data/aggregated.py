"""Opinions in aggregated form: {question key: {"MC_options", "question_text", group: {option: count}}}."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from laai_core.data.opinion import Counts, Question, check_known, check_options, check_text
from laai_core.data.panel import read_info
from laai_core.data.reading import content, decoded, parsed
from laai_core.errors import LaaiError

REFUSED = "refused"  # compared in lower case
MAX_COUNT = 1e12  # people
_NOT_GROUPS = ("MC_options", "question_text")


def counts_of_file(path: Path, group: str) -> tuple[list[tuple[Question, Counts]], dict[str, str]]:
    """Every question of a JSON file with a group's counts, and {file: SHA-256} of it and of the info.csv beside it."""
    expected = "{question key: ...} in JSON"
    raw = content(path, expected)
    sources = {path.name: hashlib.sha256(raw).hexdigest()}
    records = parsed(decoded(raw, str(path), expected), str(path), expected)
    info = None
    if (path.parent / "info.csv").is_file():
        info, sources["info.csv"] = read_info(path.parent / "info.csv")
    return counts_of_records(records, group, str(path), info), sources


def counts_of_records(
    records: Any, group: str, where: str, info: Mapping[str, Question] | None = None
) -> list[tuple[Question, Counts]]:
    """The questions of the aggregated form and a group's counts; a question the group was not asked has none.

    `info` has the questions; without `info` each record's MC_options are the options, in order, less `Refused`.
    Raises LaaiError, starting with `where`, question key and group.
    """
    if not isinstance(records, dict) or not records:
        raise LaaiError(f"{where}: holds no questions; expected {{question key: {{group: {{option: count}}}}}}")
    counted = []
    groups: dict[str, None] = {}  # an ordered set
    for key, record in records.items():
        here = f"{where}: question {key:.60}"
        check_text(key, here)
        if not isinstance(record, dict):
            raise LaaiError(f'{here} is a {type(record).__name__}; expected {{"MC_options": ..., group: ...}}')
        groups |= dict.fromkeys(name for name in record if name not in _NOT_GROUPS)
        if info is None:
            question = _question_of_record(key, record, here)
        elif key in info:
            question = info[key]
        else:
            raise LaaiError(f"{here}: is not in info.csv; expected a row with that key")
        counted.append((question, _counts(record.get(group, {}), question, f"{here}, {group}")))
    if group not in groups:
        raise LaaiError(f"{where}: no question has the group {group!r}; expected one of {', '.join(groups)}")
    return counted


def _question_of_record(key: str, record: dict[str, Any], where: str) -> Question:
    text, listed = check_text(record.get("question_text"), f"{where}: question_text"), record.get("MC_options")
    if not isinstance(listed, list):
        raise LaaiError(f"{where}: MC_options is a {type(listed).__name__}; expected a list of texts")
    options = [check_text(option, f"{where}: MC_options: an option") for option in listed]
    refusals = tuple(option for option in options if option.lower() == REFUSED)
    options = [option for option in options if option not in refusals]
    check_options(options, f"{where}: MC_options")
    return Question(key, text, tuple(options), tuple(map(float, range(len(options)))), refusals)


def _counts(found: Any, question: Question, where: str) -> Counts:
    if not isinstance(found, dict):
        raise LaaiError(f"{where}: is a {type(found).__name__}; expected {{option: count}}")
    counts: Counts = {}
    for option, count in found.items():
        check_known(option.strip(), question, where)
        if isinstance(count, bool) or not isinstance(count, int | float) or not 0 <= count <= MAX_COUNT:
            raise LaaiError(f"{where}: {option!r:.60} has the count {count!r:.60}; expected a number, 0 or above")
        counts[option.strip()] = counts.get(option.strip(), 0.0) + float(count)
    return counts
