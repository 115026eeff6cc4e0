"""Examples of one's own: rows of a JSON Lines, CSV or JSON file, or of standard input.

A row has a prompt and an answer:
  - the prompt: "prompt", or the template with the row's columns in it, as in 'Q: {input}\\nA:';
  - the answer: "target" (the text that continues the prompt), or "output" (behind one space), or "options" with a
    "distribution" over them.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from laai_core.data.reading import content, decoded, parsed
from laai_core.data.split import Split, check_unicode, draw, in_training_pool, item_key
from laai_core.errors import LaaiError
from laai_core.example import Example

STDIN = "-"
DEFAULT_TEMPLATE = "Q: {input}\nA:"  # of rows with an "input", as the word tasks have it
_COLUMN = re.compile(r"\{(\w[^{}\n]*)\}")  # a brace before anything but a letter or digit, as in JSON, is text
_ROWS = '{"prompt", "target"}, {"input", "output"} or {"prompt", "options", "distribution"}'
_Row = tuple[str, Any]  # where the row is, for messages, and its JSON value


class Item(NamedTuple):
    """An example, and `key`, the text by which the split sorts it: the row's input, or its prompt if that is empty.

    `where` names file and row, for messages.
    """

    key: str
    example: Example
    where: str


class OwnData(NamedTuple):
    """The items of one file in file order, one for each prompt, all with targets or all with options.

    `name`, the task's in the harness, is the file's name without its ending and with nothing but letters, digits, -
    and _ (and a hash, where other letters are left out). `sources` is {file name: SHA-256 of its bytes}. `repeated`
    rows showed a prompt again and were left out.
    """

    items: list[Item]
    name: str
    sources: dict[str, str]
    repeated: int

    @property
    def has_options(self) -> bool:
        """Whether the examples are options with a distribution."""
        return self.items[0].example.options is not None

    @property
    def pool_size(self) -> int:
        """The number of rows in the training pool; the others are test items."""
        return sum(in_training_pool(item.key) for item in self.items)

    def split(self, seed: int, n_train: int, train_on_all: bool = False) -> Split:
        """`n_train` examples drawn by `seed` from the training pool, and all test examples. Errors of `draw`.

        With `train_on_all` they are drawn from all rows, and there is no test example.
        """
        sides = [train_on_all or in_training_pool(item.key) for item in self.items]
        # Prompts sort the rows of one key, which are all on one side.
        pool = {(item_key(i.key), i.example.prompt): i for i, side in zip(self.items, sides, strict=True) if side}
        if not train_on_all and isinstance(n_train, int) and len(pool) < n_train:  # what is no number, `draw` refuses
            raise LaaiError(
                f"{self.name}: {len(pool)} of the {len(self.items)} rows are for training (about three in ten, the "
                f"others are test items), expected {n_train}: bring more rows"
                f"{f', or n_train {len(pool)}' if pool else ''}, or `laai train --split all` and test elsewhere"
            )
        drawn = [item.example for item in draw(pool, seed, n_train, self.name)]
        test = [item.example for item, side in zip(self.items, sides, strict=True) if not side]
        return Split(drawn, test, self.name, seed, self.sources)


def load_examples(source: str | os.PathLike[str], prompt_template: str | None = None) -> list[Example]:
    """The examples of a file in file order; of rows with equal prompts the first.

    Args:
        source: a file whose name ends in .jsonl, .csv or .json (a list of rows); `-` is JSON Lines on standard input.
            In a CSV file "options" and "distribution" are JSON lists.
        prompt_template: text in which {column} stands for that column of the row. Default: the row's "prompt", or
            'Q: {input}\\nA:' where it has an "input".

    Raises:
        LaaiError: one line with the file and the row: the line of the file, or of a .json file the n-th row.
    """
    return [item.example for item in read_examples(source, prompt_template).items]


def read_examples(source: str | os.PathLike[str], prompt_template: str | None = None) -> OwnData:
    """`load_examples`, with the keys that a split needs, and the name and SHA-256 for a harness task."""
    name = os.fspath(source)
    path = Path(os.path.expanduser(name))
    raw = sys.stdin.buffer.read() if name == STDIN else content(path, f"a file of rows {_ROWS}")
    label = "standard input" if name == STDIN else str(path)
    items: list[Item] = []
    shown: set[str] = set()
    repeated = 0
    kinds: dict[bool, str] = {}
    for where, row in _rows(raw, label, ".jsonl" if name == STDIN else path.suffix.lower()):
        item = _item(row, prompt_template, where)
        kinds.setdefault(item.example.target is None, where)
        if len(kinds) > 1:
            first, other = (("options" if kind else "a target", at) for kind, at in kinds.items())
            raise LaaiError(f"{other[1]} has {other[0]}, but {first[1]} {first[0]}; expected one kind in a file")
        prompts = _prompts(item, row)
        if prompts & shown:
            repeated += 1
        else:
            items.append(item)
        shown |= prompts
    if not items:
        raise LaaiError(f"{label} has no row; expected at least one {_ROWS}")
    stem = "examples" if name == STDIN else _task_name(path.stem)
    return OwnData(items, stem, {path.name: hashlib.sha256(raw).hexdigest()}, repeated)


def _task_name(stem: str) -> str:
    """A file's name as a task's; where letters are left out, their hash tells names apart that are alike without."""
    name = re.sub(r"[^\w-]+", "_", stem, flags=re.ASCII).strip("_")
    if not stem.isascii():
        name += "_" + hashlib.sha256(os.fsencode(stem)).hexdigest()[:8]
    return name.strip("_") or "examples"


def as_lines(data: OwnData) -> bytes:
    """JSON lines that `read_examples` reads as the same items, without a template."""
    rows = []
    for key, example, _ in data.items:
        names = ("prompt", "target", "options", "distribution")
        given = {name: getattr(example, name) for name in names}
        own = {} if key == example.prompt else {"input": key}
        rows.append(own | {name: value for name, value in given.items() if value is not None})
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _rows(raw: bytes, label: str, suffix: str) -> Iterator[_Row]:
    text = decoded(raw, label, f"rows {_ROWS}")
    if suffix == ".csv":
        return _csv_rows(text, label)
    if suffix == ".json":
        return _json_rows(text, label)
    if suffix in (".jsonl", ".ndjson"):
        return _jsonl_rows(text, label)
    raise LaaiError(f"{label}: expected a name that ends in .jsonl, .csv or .json, or - for standard input")


def _jsonl_rows(text: str, label: str) -> Iterator[_Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{label}: row {number}"
            yield where, parsed(line, where, _ROWS)


def _json_rows(text: str, label: str) -> Iterator[_Row]:
    rows = parsed(text, label, f"a list of rows {_ROWS}")
    if not isinstance(rows, list):
        raise LaaiError(f"{label}: holds a JSON {type(rows).__name__}; expected a list of rows {_ROWS}")
    for number, row in enumerate(rows, start=1):
        yield f"{label}: row {number}", row


def _csv_rows(text: str, label: str) -> Iterator[_Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    begin = 1
    try:
        for cells in reader:
            where, begin = f"{label}: row {begin}", reader.line_num + 1
            if not cells:
                continue  # an empty line
            if not header:
                if len(set(cells)) < len(cells):
                    raise LaaiError(f"{where} names a column twice ({', '.join(cells)}); expected distinct names")
                header = cells
                continue
            if len(cells) != len(header):
                raise LaaiError(f"{where} has more or fewer cells than the header; expected one for each column")
            row = dict(zip(header, cells, strict=True))
            lists = {
                name: parsed(row[name], f"{where}: {name}", "a JSON list")
                for name in ("options", "distribution")
                if name in row
            }
            yield where, {**row, **lists}
    except csv.Error as error:
        raise LaaiError(f"{label}: row {begin} is not valid CSV ({error})") from error


def _item(row: Any, template: str | None, where: str) -> Item:
    if not isinstance(row, dict):
        raise LaaiError(f"{where} is a {type(row).__name__}; expected {_ROWS}")
    if template is None and "prompt" not in row:
        template = DEFAULT_TEMPLATE
        if "input" not in row:
            raise LaaiError(f'{where} has no "prompt" and no "input"; expected {_ROWS}')
    prompt = _text(row, "prompt", where) if template is None else filled(template, row, where)
    if "options" in row or "distribution" in row:
        answer = {"options": row.get("options"), "distribution": row.get("distribution")}
        for name, value in answer.items():
            if not isinstance(value, list):
                raise LaaiError(f'{where}: "{name}" is {_kind(value)}; expected a list, beside the other one')
            for text in value:
                check_unicode(str(text), f'{where}: "{name}"')
    elif "target" in row:
        answer = {"target": _text(row, "target", where).rstrip()}
    elif "output" in row:
        answer = {"target": f" {_text(row, 'output', where).strip()}"}
    else:
        raise LaaiError(f'{where} has no "target", no "output" and no "options"; expected {_ROWS}')
    key = prompt if _is_empty(row.get("input")) else _text(row, "input", where)
    rendering = None if template is None else {"prompt_template": template}
    try:
        return Item(key, Example(prompt, **answer, rendering=rendering), where)
    except LaaiError as error:
        raise LaaiError(f"{where}: {error}") from None


def _prompts(item: Item, row: dict[str, Any]) -> set[str]:
    """The identities of an item's prompt: as it is, and with the row's columns stripped before they were put in."""
    identities = {item_key(item.example.prompt)}
    if item.example.rendering is not None:
        template = item.example.rendering["prompt_template"]
        bare = {name: item_key(row[name]) for name in columns(template)}
        identities.add(item_key(filled(template, bare, item.where)))
    return identities


def columns(template: str) -> list[str]:
    """The columns a template names, each once."""
    return list(dict.fromkeys(_COLUMN.findall(template)))


def check_one_line(example: Example, where: str) -> None:
    """LaaiError for a target of several lines."""
    if example.target is not None and len(example.target.strip().splitlines()) > 1:
        raise LaaiError(
            f"{where}: target {example.target!r:.60} has a line break inside; "
            f"expected one line, which exact match compares"
        )


def is_filled(template: str, text: str) -> bool:
    """Whether a text begins and ends as the template does, white space at its ends left aside."""
    parts = _COLUMN.split(template)
    return text.lstrip().startswith(parts[0].lstrip()) and text.rstrip().endswith(parts[-1].rstrip())


def filled(template: str, row: dict[str, Any], where: str) -> str:
    """The template with each {column} replaced by the row's text. LaaiError for a column the row lacks."""
    if not _COLUMN.search(template):
        raise LaaiError(f"prompt template {template!r:.80} names no column; expected one, as in 'Q: {{input}}\\nA:'")
    return _COLUMN.sub(lambda found: _text(row, found[1], where), template)


def _text(row: dict[str, Any], name: str, where: str) -> str:
    if name not in row:
        raise LaaiError(f'{where} has no "{name}"; its columns are {", ".join(map(str, row))}')
    value = row[name]
    if not isinstance(value, str) or _is_empty(value):
        raise LaaiError(f'{where}: "{name}" is {_kind(value)}; expected text')
    check_unicode(value, f'{where}: "{name}"')
    return value


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "empty" if _is_empty(value) else f"the text {value!r:.40}"
    return "missing" if value is None else f"a {type(value).__name__}"
