"""What an engine is told at its start and what a request names: plain JSON values that reach workers everywhere.

An engine gets `additional_config={"laai": {"interventions": ..., "scale": 1.0, "projection": None}}`; a request gets
`SamplingParams(extra_args={"laai": NAME, "laai_prompt_length": N})`. Imports no vLLM.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laai_core.errors import LaaiError
from laai_core.files import SUFFIX, vectors_in
from laai_core.intervention import Intervention

NAME = "laai"  # key of additional_config, and of extra_args for the intervention's name
LENGTH = "laai_prompt_length"  # key of extra_args: tokens of the prompt that the position counts from
WORKER = "laai_core.vllm.worker.Worker"
_WORDS = ("interventions", "scale", "projection")


@dataclass(frozen=True)
class Loaded:
    """The interventions of an engine, scaled, by the names that requests use."""

    interventions: dict[str, Intervention]
    projection: str | None


def engine_arguments(
    files: Mapping[str, Mapping[str, str]], scale: float = 1.0, projection: str | None = None
) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM` for an engine with these interventions.

    Args:
        files: name to {"path": file, "sha256": the intervention's identity}; every worker reads the files itself.
        scale: factor on every intervention's own scale.
        projection: module path of the attention output projection, see `laai_core.locate.locate`.
    """
    config = {"interventions": {name: dict(file) for name, file in files.items()}, "scale": scale}
    return {
        "worker_cls": WORKER,
        "additional_config": {NAME: {**config, "projection": projection}},
        "enable_prefix_caching": False,  # its keys do not say which intervention wrote a block
    }


def request_arguments(name: str | None, prompt_length: int | None = None) -> dict[str, Any]:
    """The `extra_args` of a request: intervention `name` (None: untouched), whose prompt has `prompt_length` tokens.

    Without `prompt_length` all tokens given to the engine are the prompt, as in generation.
    """
    if name is None:
        return {}
    return {NAME: name} if prompt_length is None else {NAME: name, LENGTH: prompt_length}


def paths(config: Any) -> dict[str, str]:
    """Name to file of every intervention that an engine's `additional_config` names; reads no file.

    `interventions` is a folder or one file (names are the files' without suffix), or {name: {"path", "sha256"}}.

    Raises:
        LaaiError: an unknown word, or no file.
    """
    given = config.get(NAME) if isinstance(config, Mapping) else None
    if not isinstance(given, Mapping) or "interventions" not in given:
        raise LaaiError(
            f'additional_config has no interventions: expected {{"{NAME}": {{"interventions": "vectors/"}}}}, '
            f"a folder or a file"
        )
    unknown = sorted(set(given) - set(_WORDS))
    if unknown:
        raise LaaiError(f"additional_config[{NAME!r}] has {', '.join(unknown)}: expected {', '.join(_WORDS)}")
    source = given["interventions"]
    if isinstance(source, Mapping):
        for name, file in source.items():
            if not isinstance(file, Mapping) or "path" not in file:
                raise LaaiError(f'intervention {name} is {file!r:.60}: expected {{"path": ..., "sha256": ...}}')
        return {str(name): str(file["path"]) for name, file in source.items()}
    path = Path(os.path.expanduser(str(source)))
    files = vectors_in(path) if path.is_dir() else [path]
    found = {file.stem: str(file) for file in files if file.suffix == SUFFIX}
    if not found:
        raise LaaiError(f"{path} is no {SUFFIX} file and no folder of such files")
    return found


def load(config: Any) -> Loaded:
    """Read and check every intervention of an engine's `additional_config`.

    Raises:
        LaaiError: a bad file, one whose SHA-256 is not the announced one, or what vLLM is not asked to do here.
    """
    files = paths(config)
    given = config[NAME]
    interventions = {}
    for name, path in files.items():
        intervention = Intervention.load(Path(path))
        expected = given["interventions"][name].get("sha256") if isinstance(given["interventions"], Mapping) else None
        if expected is not None and intervention.sha256 != expected:
            raise LaaiError(
                f"{path} has SHA-256 {intervention.sha256}, expected {expected}: it changed, or differs here"
            )
        refuse(intervention, path)
        interventions[name] = intervention.rescaled(given.get("scale", 1.0))
    return Loaded(interventions, given.get("projection"))


def refuse(intervention: Intervention, source: str) -> None:
    """LaaiError for an operation that the worker does not have."""
    if intervention.operation != "add":
        raise LaaiError(
            f"{source}: operation {intervention.operation!r} is refused in vLLM, expected 'add': use hf-laai"
        )


def check_request(arguments: Any, names: Mapping[str, Any], tokens: int | None = None) -> None:
    """LaaiError for a request's `extra_args` that name an unknown intervention or a prompt length that cannot be.

    Args:
        arguments: the request's extra_args, or None.
        names: the engine's interventions.
        tokens: of the request's prompt, where known.
    """
    if not arguments or (NAME not in arguments and LENGTH not in arguments):
        return
    name, length = arguments.get(NAME), arguments.get(LENGTH)
    if not isinstance(name, str) or name not in names:
        raise LaaiError(f"{NAME} is {name!r:.60}: expected one of {', '.join(names)}")
    if length is None:
        return
    if isinstance(length, bool) or not isinstance(length, int) or not 1 <= length <= (tokens or length):
        raise LaaiError(
            f"{LENGTH} is {length!r:.60}: expected a number of tokens from 1 to {tokens or 'those of the prompt'}"
        )
