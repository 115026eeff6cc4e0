"""vllm-laai against hf-laai on the two pretrained models of `laai models`, where they have been fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from alike import assert_scores_alike, assert_texts_alike, hf, vectors

from laai_core.errors import LaaiError
from lm_eval_laai.known_models.folder import pretrained

pytest_plugins = ["engines"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-270m"])
def test_pretrained_models(engine: Any, name: str, tmp_path: Path) -> None:
    try:
        model = pretrained(name)
    except LaaiError as error:
        pytest.skip(f"{name} is not here: {error}")
    folder = vectors(hf(model, None).model, tmp_path, strength=1.0)
    lm, reference = engine(model, folder, unrouted="none"), hf(model, folder, unrouted="none")
    # A float32 softmax over Gemma's 262,144 words rounds to 2.5e-4 (tests/test_real_models.py).
    assert_scores_alike(lm, reference, 3e-4 if name.startswith("gemma") else 1e-4)
    assert_texts_alike(lm, reference, tokens=8)
