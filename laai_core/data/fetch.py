"""`laai data fetch`: download the public word sets, resumably and checked, from their authors' repository."""

from __future__ import annotations

import hashlib
import http.client
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tqdm import tqdm

from laai_core.data.pairs import SETS_FOLDER, data_folder
from laai_core.errors import LaaiError, WorkFailed
from laai_core.files import unwritable

# Todd et al. 2024, MIT licence. Pinned to one commit, checked by SHA-256.
BASE_URL = (
    "https://raw.githubusercontent.com/ericwtodd/function_vectors/"
    "fb9eac7b6dc707ea1475a717379916007fe448d5/dataset_files/abstractive"
)
SHA256 = {
    "antonym.json": "ba66e8e399944b557251b11a37b11f9ba7a50f0a57286f7021a8a7b26b469e8d",
    "synonym.json": "dc0c79f94b70999236ec962465b21ab416074ea2969a980eafa85e9cb2702685",
    "english-french.json": "766fa28cc696f37b1009f36372372797be03444045c58bc554759f3e177638cc",
    "english-german.json": "9111e1ee296059761eeb0f8f43dc25f84983c2f14ce1081bc96f5698de4b98cd",
}
CHUNK = 1 << 16  # bytes
TIMEOUT = 30.0  # seconds without an answer


def fetch(
    destination: str | os.PathLike[str] | None = None, base_url: str = BASE_URL, progress: bool = True
) -> list[Path]:
    """Put the four sets into `<destination>/function_vectors` (or `destination`, if it has that name already).

    Without a destination they go where `load_task` looks by default. A file that is there with the right SHA-256 is
    left alone; a download that was cut is resumed by the next call from its `.part` file. Shows a bar on stderr.
    Returns the four paths. Raises LaaiError, one line, for every failure; a file in place is always a whole one.
    """
    folder = data_folder(destination)
    if folder.name != SETS_FOLDER:
        folder = folder / SETS_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaaiError(f"{folder}: cannot be made ({error.strerror}); expected a writable folder") from error
    with alone_in(folder):
        return [_fetch_one(name, folder / name, base_url.rstrip("/"), progress) for name in SHA256]


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Lock the folder within the block: two fetches would write into one `.part`. The lock ends with its process."""
    if os.name != "posix":
        yield
        return
    import fcntl  # POSIX only

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another fetch into {folder}", file=sys.stderr, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def _fetch_one(name: str, path: Path, base_url: str, progress: bool) -> Path:
    url = f"{base_url}/{name}"
    part = path.with_name(path.name + ".part")
    try:
        if path.is_file() and _sha256(path) == SHA256[name]:
            return path
        if not (part.is_file() and _sha256(part) == SHA256[name]):  # whole, if only the rename was missed
            _download(url, part, progress)
        found = _sha256(part)
        if found != SHA256[name]:
            part.unlink()
            raise WorkFailed(f"{url}: SHA-256 is {found}; expected {SHA256[name]}; it was deleted, try again")
        os.replace(part, path)
        sync_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error
    return path


def _download(url: str, part: Path, progress: bool) -> None:
    """Bring `part` to its full length, requesting only the missing bytes. Raises LaaiError; keeps what came."""
    have = part.stat().st_size if part.exists() else 0
    try:
        response = _open(url, have)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:  # range not satisfiable: the part is already as long as the file, or longer
            raise WorkFailed(f"{url}: the server answered {error.code} {error.reason}; expected the file") from error
        part.unlink()
        return _download(url, part, progress)
    except (OSError, http.client.HTTPException, ValueError) as error:  # URLError is an OSError
        raise WorkFailed(f"{url}: cannot be reached ({_reason(error)}); expected a server that answers") from error
    with response:
        # A server without ranges sends the whole file (200), which replaces the part.
        resumed = response.status == 206 and _range_start(response) == have
        if response.status == 206 and not resumed:
            raise WorkFailed(f"{url}: the server sent another range than bytes {have}-; expected that one or all")
        start = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length is not None and length.isdigit() else None
        with part.open("ab" if resumed else "wb") as out:
            got = start + _copy(response, out, url, start, total, progress)
    if total is not None and got < total:
        raise WorkFailed(
            f"{url}: the connection was cut after {got} bytes; expected {total}; run the same command again to resume"
        )


def _open(url: str, start: int) -> http.client.HTTPResponse:
    # `identity`: a compressed answer could be neither resumed nor checked against its length.
    headers = {"User-Agent": "laai", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    response: http.client.HTTPResponse = urllib.request.urlopen(
        urllib.request.Request(url, headers=headers), timeout=TIMEOUT
    )
    return response


def _range_start(response: http.client.HTTPResponse) -> int | None:
    """The first byte of a 206 answer, from `Content-Range: bytes first-last/size`; None when unreadable."""
    first = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    return int(first) if first.isdigit() else None


def _copy(
    response: http.client.HTTPResponse, out: IO[bytes], url: str, start: int, total: int | None, progress: bool
) -> int:
    """Copy the body to `out` and sync it; returns the number of bytes. A cut connection ends the copy quietly."""
    copied = 0
    name = url.rpartition("/")[2]
    with tqdm(
        total=total, initial=start, unit="B", unit_scale=True, desc=name, disable=not progress, file=sys.stderr
    ) as bar:
        while True:
            try:
                block = response.read(CHUNK)
            except (http.client.HTTPException, OSError):
                block = b""  # the caller sees that bytes are missing
            if not block:
                break
            out.write(block)
            copied += len(block)
            bar.update(len(block))
    out.flush()
    os.fsync(out.fileno())
    return copied


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the system can sync a folder at all."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: BaseException) -> str:
    reason = getattr(error, "reason", None) or error
    return getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
