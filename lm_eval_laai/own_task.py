"""A harness task of one's own examples: the folder that `laai task` writes, and what its YAML calls.

The folder is complete and may be moved: NAME.yaml, the YAML it includes, the rows, and a utils.py of three lines.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from laai_core import files
from laai_core.data.examples import OwnData, as_lines, check_one_line, read_examples
from laai_core.data.reading import content
from laai_core.data.split import Split
from laai_core.errors import LaaiError
from laai_core.example import Example
from lm_eval_laai import metrics
from lm_eval_laai.tasks import include_path, read_yaml

ROWS = "examples.jsonl"
SHOTS = 10  # training examples, if there are as many
_MARK = "ritten by `laai task`."  # in the first lines of the YAML and of utils.py
_UTILS = '''"""What the YAML beside this file calls. Written by `laai task`."""

from pathlib import Path

from lm_eval_laai.own_task import exact_match, load_beside, opinion_metrics  # noqa: F401


def load(**metadata):
    return load_beside(Path(__file__), **metadata)


load_opinions = load
'''


def write(data: OwnData, folder: Path, name: str | None = None, max_gen_toks: int | None = None) -> Path:
    """Write `folder`/NAME/, the task NAME (default: the data's name); returns its YAML.

    Args:
        max_gen_toks: tokens to generate at most. Default: `enough_tokens`.

    Raises:
        LaaiError: for a name that the harness or a file cannot have, a file there that this function did not write,
            examples that cannot be evaluated (a target of several lines), or too few of them: there must be some to
            train on and some to test on.
    """
    name = data.name if name is None else name
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise LaaiError(f"task name {name!r:.60}: expected letters, digits, - and _")
    pool, count = data.pool_size, len(data.items)
    if not 0 < pool < count:
        part = "test" if pool else "training"
        raise LaaiError(
            f"{', '.join(data.sources)}: none of the {count} rows is in the {part} part, "
            f"which the text of a row decides; expected more rows"
        )
    for item in data.items:
        check_one_line(item.example, item.where)
    shared = _shared(data)
    generation = "" if data.has_options else _generation(data, max_gen_toks)
    folder = folder / name
    path, utils, rows, included = (folder / each for each in (f"{name}.yaml", "utils.py", ROWS, shared))
    for each in (path, utils, rows, included):
        _check_replaceable(each, each if each in (path, utils) else utils)
    yaml = _yaml(name, shared, delimiter(data), generation, min(SHOTS, pool), data).encode()
    files.write(utils, _UTILS.encode())  # the first, because it tells whose the folder is
    files.write(included, (include_path() / shared).read_bytes())
    files.write(rows, as_lines(data))
    files.write(path, yaml)
    return path


def _check_replaceable(path: Path, marked: Path) -> None:
    """LaaiError for an existing file of another origin than `write`, whose mark is in the first line of `marked`."""
    if not os.path.exists(path):  # unlike Path's, False for a name that is too long: writing says so
        return
    first = content(marked, "a text file").partition(b"\n")[0] if marked.exists() else b""
    if _MARK not in first.decode(errors="replace"):
        raise LaaiError(f"{path} was not written by `laai task`: expected another --name or --output")


def _shared(data: OwnData) -> str:
    """The name of the YAML that the task's YAML includes."""
    return "_opinion_task_yaml" if data.has_options else "_word_task_yaml"


def _yaml(name: str, shared: str, between: str, generation: str, n_train: int, data: OwnData) -> str:
    # JSON's escapes of letters beyond 16 bits are no YAML, and names of files need not be Unicode.
    sources = ", ".join(data.sources).encode(errors="backslashreplace").decode()
    return (
        f"# {sources} as a task, written by `laai task`. Needs lm-eval-laai to be installed.\n"
        f"include: {shared}\ntask: {json.dumps(name)}\ntarget_delimiter: {json.dumps(between)}\n{generation}"
        f"metadata:\n  source: {json.dumps(sources, ensure_ascii=False)}\n"
        f"  seed: 0\n  n_train: {n_train}\n  version: 1.0\n"
    )


def enough_tokens(data: OwnData) -> int:
    """Tokens that any target fits into, whatever the tokenizer: one for each byte of the longest, 16 at least."""
    return max(16, *(len(str(item.example.target).encode()) for item in data.items))


def _generation(data: OwnData, max_gen_toks: int | None) -> str:
    count = enough_tokens(data) if max_gen_toks is None else max_gen_toks
    if count < 1:
        raise LaaiError(f"max_gen_toks is {count}: expected at least one")
    return f'generation_kwargs:\n  until: ["\\n"]\n  max_gen_toks: {count}\n  do_sample: false\n'


def delimiter(data: OwnData) -> str:
    """The harness's text between prompt and answer: a space where every answer begins with one.

    In a chat the harness leaves the delimiter out: an answer begins its turn with its own first letter.
    """
    texts = [text for item in data.items for text in (item.example.options or [str(item.example.target)])]
    return " " if all(text.startswith(" ") and not text[1].isspace() for text in texts) else ""


def task_of(data: OwnData, split: Split) -> ConfigurableTask:
    """The task that `write` would write of the data, with the documents of a split, and without a file.

    Without test examples, the training documents serve as test documents, because the harness reads one.
    """
    docs = documents(split, delimiter(data))
    docs = docs if split.test else {name: docs["train"] for name in docs}
    config = {
        **read_yaml(include_path() / _shared(data)),
        "task": data.name,
        "target_delimiter": delimiter(data),
        "custom_dataset": lambda **_: docs,
        "process_results": opinion_metrics if data.has_options else exact_match,
    }
    return ConfigurableTask(config=config)


def load_beside(file: Path, /, seed: int = 0, n_train: int = SHOTS, **_: Any) -> dict[str, Dataset]:
    """The splits `train` (the few-shot examples: what an intervention is trained on) and `test` of a written task.

    `file` lies in the task's folder. `**_` because the harness passes model arguments and other tasks' metadata.
    """
    data = read_examples(file.with_name(ROWS))
    return documents(data.split(seed, n_train), delimiter(data))


def documents(split: Split, between: str = "") -> dict[str, Dataset]:
    """A split as the harness holds it, with `between` taken off the answers."""
    parts = (("train", split.train), ("test", split.test))
    return {name: Dataset.from_list([document(example, between) for example in part]) for name, part in parts}


def document(example: Example, between: str = "") -> dict[str, Any]:
    """The columns of `_word_task_yaml`, or those of `_opinion_task_yaml`; options have no order."""
    if example.target is not None:
        return {"prompt": example.prompt, "target": example.target.removeprefix(between)}
    assert example.options is not None and example.distribution is not None
    return {
        "prompt": example.prompt,
        "choices": [option.removeprefix(between) for option in example.options],
        "target": example.options.index(example.answer),
        "distribution": list(example.distribution),
        "positions": [0] * len(example.options),
    }


def exact_match(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """Whether the first line generated is the target."""
    return {"exact_match": metrics.exact_match(results[0], doc["target"])}


def opinion_metrics(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """Distances of the model's distribution over the answers from the group's."""
    return metrics.opinion_metrics([score for score, _ in results], doc["distribution"], doc["positions"])
