"""Word tasks' predictions, as the harness logs them: `lm_eval run --log_samples --output_path ...`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from laai_core.data.reading import content, decoded
from laai_core.data.tasks import rule_prompt
from laai_core.errors import LaaiError
from lm_eval_laai.metrics import first_line

_BEFORE, _AFTER = rule_prompt("\0").split("\0")


class Sample(NamedTuple):
    """One pair to judge. `prediction` may be empty."""

    doc_id: Any  # the item's number in its task
    input: str
    prediction: str

    @classmethod
    def of(cls, doc_id: Any, prompt: str, generated: str) -> Sample:
        """The word in a prompt of `rule_prompt`, and the first line generated."""
        return cls(doc_id, prompt.removeprefix(_BEFORE).removesuffix(_AFTER), first_line(generated))


def task_of(path: Path) -> str:
    """The harness task in the name the harness gives a file: `samples_<task>_<date>.jsonl`."""
    task = path.name.removeprefix("samples_").rpartition("_")[0]
    if not path.name.startswith("samples_") or not task:
        raise LaaiError(f"{path}: its name does not say the task; expected samples_<task>_<date>.jsonl, or --task")
    return task


def read_samples(path: Path) -> list[Sample]:
    """The input and the first line generated, stripped, of every line of a file: what exact match compares.

    Raises:
        LaaiError: naming file and line, for anything but a word task's samples, one per item.
    """
    expected = "the harness's samples"
    text = decoded(content(path, expected), str(path), expected)
    # Not splitlines: a prediction may hold a line separator that JSON leaves as it is.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    samples: dict[Any, Sample] = {}
    for number, line in lines:
        sample = _read_line(line, f"{path}: line {number}")
        if sample.doc_id in samples:  # the harness writes an item once for every filter
            raise LaaiError(
                f"{path}: line {number}: doc_id {sample.doc_id} comes again; expected one filter's samples"
            )
        samples[sample.doc_id] = sample
    if not samples:
        raise LaaiError(f"{path}: holds no samples; expected at least one")
    return list(samples.values())


def _read_line(line: str, where: str) -> Sample:
    try:
        row = json.loads(line)
        prompt, answer, doc_id = row["doc"]["prompt"], row["filtered_resps"][0], row["doc_id"]
    except (ValueError, RecursionError):
        raise LaaiError(f"{where} is not valid JSON; expected one sample") from None
    except (KeyError, IndexError, TypeError):
        raise LaaiError(
            f"{where} is no sample of a word task; expected doc_id, doc with prompt, and filtered_resps"
        ) from None
    if not isinstance(prompt, str) or not (prompt.startswith(_BEFORE) and prompt.endswith(_AFTER)):
        raise LaaiError(f"{where}: doc.prompt is {prompt!r:.60}; expected {rule_prompt('<input>')!r}")
    if not isinstance(answer, str) or not isinstance(doc_id, int):
        raise LaaiError(f"{where}: expected text in filtered_resps and a number as doc_id")
    return Sample.of(doc_id, prompt, answer)
