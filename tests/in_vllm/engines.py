"""A pytest plugin: engines, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def engine() -> Iterator[Callable[..., Any]]:
    """Makes vllm-laai models in float32, and takes the last one down when the next one comes."""
    from lm_eval_laai.vllm_model import VLLMLaai

    running: list[Any] = []

    def make(pretrained: str | Path, intervention: Any, **more: Any) -> Any:
        stop(running)
        eager = {"enforce_eager": True} if "compilation_config" not in more else {}
        settings = {"dtype": "float32", "block_size": 32, "distributed_executor_backend": "uni", **eager}
        lm = VLLMLaai(str(pretrained), intervention, **{"max_model_len": 256, **settings, **more})
        running.append(lm)
        return lm

    yield make
    stop(running)


def stop(running: list[Any]) -> None:
    """Free an engine's memory and its process group."""
    from vllm.distributed import cleanup_dist_env_and_memory

    for lm in running:
        lm.model.llm_engine.engine_core.shutdown()
    running.clear()
    cleanup_dist_env_and_memory()
