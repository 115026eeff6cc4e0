"""vllm-laai against hf-laai on the two pretrained models of `laai models`, where they have been fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from alike import assert_scores_alike, assert_texts_alike, here, hf, vectors

pytest_plugins = ["engines"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m"])
def test_pretrained_models(engine: Any, name: str, tmp_path: Path) -> None:
    model = here(name)
    folder = vectors(hf(model, None).model, tmp_path, strength=1.0)
    lm, reference = engine(model, folder, unrouted="none"), hf(model, folder, unrouted="none")
    assert_scores_alike(lm, reference)
    assert_texts_alike(lm, reference, tokens=8)
