"""The folders of the known models on this machine, and the records of their origin."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from laai_core.data.pairs import user_cache
from laai_core.errors import LaaiError
from lm_eval_laai.known_models.table import KNOWN, REFERENCE, known

RECORD = "laai_model.json"  # in the model's folder: which weights it holds, and where they are from
REFERENCE_FOLDER = Path("reference_model", "weights")


def models_folder() -> Path:
    """The folder of the fetched models, each in a folder of its name: in the user's cache ($XDG_CACHE_HOME)."""
    return user_cache() / "models"


def record_of(name: str) -> dict[str, Any] | None:
    """The recorded origin of a known model's folder; None when the model has not been fetched.

    Raises LaaiError for a folder without a readable record: it was not made by `laai models fetch`.
    """
    folder = models_folder() / name
    if not folder.exists():
        return None
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record["name"] != name or not {"source", "weights", "licence"} <= {*record}:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise LaaiError(f"{folder} has no {RECORD} of {name}: delete it, and `laai models fetch {name}`") from None
    return dict(record)


def pretrained(name: str) -> str:
    """The argument of `from_pretrained` for `--model NAME`: a known model's folder, or the name as it is.

    A model's folder of that name in the current one comes first; one of results, as `lm_eval --output_path .` makes
    for a model, does not. Raises LaaiError for a known model that is not fetched yet.
    """
    if name.startswith("~"):  # the shell leaves it alone in --model=~/NAME
        name = os.path.expanduser(name)
    here = Path(name)
    no_model = name in {*KNOWN, REFERENCE} and not [*here.glob("config.json"), *here.glob("*.gguf")]
    if here.is_dir() and not no_model:
        return name
    if name == REFERENCE:
        return reference_model()
    if name not in KNOWN:
        return name
    if record_of(name) is None:
        accept = " --accept-licence" if known(name).terms else ""
        raise LaaiError(f"{name} is not on this machine yet: `laai models fetch {name}{accept}` gets it")
    return str(models_folder() / name)


def reference_model() -> str:
    """The repository's model: from the current folder, or from the clone this package is run from."""
    clone = Path(__file__).resolve().parents[2]
    for path in (REFERENCE_FOLDER, clone / REFERENCE_FOLDER):
        if (path / "config.json").is_file():
            return str(path)
    raise LaaiError(
        f"no {REFERENCE_FOLDER} here: the reference model is in the repository, not in the package; "
        f"run this in a clone, or point --model at a model folder"
    )
