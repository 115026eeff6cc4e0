"""One .safetensors file per intervention: encoding, decoding and checking.

Tensors `layers.{l}.{site}`, float32; one header key `laai` holds sorted JSON, because safetensors writes several
metadata keys in random order and the same training must give the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from laai_core.errors import LaaiError

FORMAT_VERSION = 1
# The entries of the header that say how a vector acts, and their types; the rest is an intervention's metadata.
ACT: dict[str, type | tuple[type, ...]] = {"site": str, "position": str, "operation": str, "scale": (int, float)}
_TENSOR_NAME = re.compile(r"layers\.(0|[1-9][0-9]{0,5})\.([a-z]+)")
# Limits far above any real file (a vector has kilobytes), low enough to bound the cost of a hostile one.
_MAX_HEADER_BYTES = 4 << 20
_MAX_FILE_BYTES = 1 << 28
_MAX_LAYERS = 1024
_MAX_NESTING = 32


def encode(vectors: Mapping[int, torch.Tensor], act: Mapping[str, Any], metadata: Mapping[str, Any]) -> bytes:
    """The bytes of {layer from 0: float32 [H, d] or [hidden]} with ACT's entries. LaaiError for other than JSON."""
    header = {**metadata, "format_version": FORMAT_VERSION, **act}
    _check_writable_as_json(header)
    text = json.dumps(header, sort_keys=True, allow_nan=False)
    tensors = {f"layers.{layer}.{act['site']}": vector.contiguous() for layer, vector in vectors.items()}
    return safetensors.torch.save(tensors, metadata={"laai": text})


def read(path: Path) -> dict[str, Any]:
    """The constructor arguments of the Intervention in a file. The constructor checks words, sizes and values.

    Raises:
        LaaiError: the file is missing, not safetensors, truncated, of another format version, or malformed.
    """
    content = _content(path)
    header = _header(content, path)
    facts = _facts(header.get("__metadata__"), path)
    names = [name for name in header if name != "__metadata__"]
    if not 1 <= len(names) <= _MAX_LAYERS:
        raise LaaiError(f"{path} has {len(names) or 'no'} tensors, expected one a layer, at most {_MAX_LAYERS}")
    site = facts["site"]
    for name in names:
        match = _TENSOR_NAME.fullmatch(name)
        if not match or match[2] != site:
            raise LaaiError(f"{path}: unexpected tensor {name!r:.60}, expected layers.<number>.{site:.60}")
        if not isinstance(header[name], dict) or header[name].get("dtype") != "F32":
            raise LaaiError(f"{path}: tensor {name} is not float32")
    try:
        tensors = safetensors.torch.load(content)
    except (SafetensorError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise LaaiError(f"{path}: a truncated or damaged safetensors file ({reason:.200})") from None
    arguments = {key: facts.pop(key) for key in ACT}
    facts.pop("format_version")
    vectors = {int(name.split(".")[1]): tensor for name, tensor in tensors.items()}
    return {"vectors": vectors, **arguments, "metadata": facts}


def _content(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise LaaiError(f"{path} is a folder, expected one .safetensors file")
        if not path.exists():
            raise LaaiError(f"no intervention file at {path}")
        if not path.is_file():
            raise LaaiError(f"{path} is not an ordinary file")
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise LaaiError(f"{path} has over {_MAX_FILE_BYTES} bytes: too large for an intervention")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise LaaiError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _header(content: bytes, path: Path) -> dict[str, Any]:
    """The safetensors header, checked before safetensors loads the file, so that messages name the fault."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 10 or content[8:9] != b"{" or length > _MAX_HEADER_BYTES:
        raise LaaiError(f"{path} is not a safetensors file")
    if 8 + length > len(content):
        raise LaaiError(f"{path} is truncated: its header says {length} bytes, {len(content) - 8} are there")
    try:
        return json.loads(content[8 : 8 + length].decode("utf-8"), object_pairs_hook=_no_duplicates)  # begins with {
    except (ValueError, RecursionError):
        raise LaaiError(f"{path} is not a safetensors file: its header is not valid JSON") from None


def _facts(metadata: Any, path: Path) -> dict[str, Any]:
    """The checked content of the `laai` key."""
    text = metadata.get("laai") if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise LaaiError(f"{path} is a safetensors file, but no intervention: it has no 'laai' metadata")
    try:
        facts = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise LaaiError(f"{path}: its 'laai' metadata is not valid JSON") from None
    if not isinstance(facts, dict):
        raise LaaiError(f"{path}: its 'laai' metadata is not a JSON object")
    version = facts.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise LaaiError(f"{path} has format version {version!r:.60}: this release reads version {FORMAT_VERSION}")
    for key, kind in ACT.items():
        if not isinstance(facts.get(key), kind) or isinstance(facts.get(key), bool):
            raise LaaiError(f"{path}: metadata {key!r} is {facts.get(key)!r:.60}")
    _check_writable_as_json(facts, f"{path}: ")
    return facts


def _check_writable_as_json(facts: Mapping[str, Any], where: str = "") -> None:
    """LaaiError for metadata that cannot be written as standard JSON in UTF-8.

    `json.loads` accepts 1e999 (infinity) and unpaired surrogates, which cannot be written back.
    """
    if _nests_deeper(facts, _MAX_NESTING):
        raise LaaiError(f"{where}the metadata nests more than {_MAX_NESTING} levels deep")
    try:
        json.dumps(facts, sort_keys=True, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise LaaiError(f"{where}the metadata cannot be written as JSON: {error}") from None


def _nests_deeper(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list | tuple):
        return False
    parts = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_nests_deeper(part, levels - 1) for part in parts)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
