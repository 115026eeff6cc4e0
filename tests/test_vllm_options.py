"""What an engine is told and where a step's rows are: the parts of `laai_core.vllm` that need no vLLM."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import laai_core as laai
from laai_core.errors import LaaiError
from laai_core.vllm.options import check_request, engine_arguments, load, paths, request_arguments
from laai_core.vllm.placing import Placed, place


@pytest.mark.parametrize("position", ["last", "generated", "all"])
def test_rows_are_those_of_single_tokens_however_the_steps_are_cut(position: str) -> None:
    draw = random.Random(position)
    for _ in range(200):
        tokens, prompt = draw.randint(1, 30), draw.randint(1, 30)
        prompt = min(prompt, tokens)
        want = [
            token == prompt - 1 if position == "last" else token >= prompt - 1 or position == "all"
            for token in range(tokens)
        ]
        got, done = [], draw.choice([0, 0, draw.randint(0, tokens - 1)])  # some begin behind a computed prefix
        want = want[done:]
        while done < tokens:
            step, start = draw.randint(1, tokens - done), draw.randint(0, 5)
            rows = np.zeros(64, dtype=np.int32)
            placed = place(rows, start, done, step, Placed(3, prompt - 1, position))
            assert placed == bool(rows.any()) and set(rows) <= {0, 3}
            assert not rows[:start].any() and not rows[start + step :].any()
            got += [bool(row) for row in rows[start : start + step]]
            done += step
        assert got == want


@pytest.fixture
def file(tmp_path: Path) -> Path:
    laai.Intervention({0: torch.ones(2, 4)}, scale=0.5).save(tmp_path / "antonym.safetensors")
    return tmp_path / "antonym.safetensors"


def test_a_folder_a_file_and_named_files(file: Path) -> None:
    for hidden in (
        "half.partial.safetensors",
        "._antonym.safetensors",
    ):  # the second is macOS's
        (file.parent / hidden).write_bytes(b"")
    identity = laai.Intervention.load(file).sha256
    given = engine_arguments({"antonym": {"path": str(file), "sha256": identity}}, scale=2.0)
    assert given["enable_prefix_caching"] is False
    for source, scale in [(str(file.parent), 0.5), (str(file), 0.5), (None, 1.0)]:
        config = given["additional_config"] if source is None else {"laai": {"interventions": source}}
        assert paths(config) == {"antonym": str(file)}
        assert load(config).interventions["antonym"].scale == scale


def test_faults_of_a_configuration(file: Path, tmp_path: Path) -> None:
    for config, words in [
        ({}, "has no interventions"),
        ({"laai": {"interventions": str(file), "scal": 1}}, "has scal: expected interventions, scale, projection"),
        ({"laai": {"interventions": str(tmp_path / "none")}}, "is no .safetensors file"),
        ({"laai": {"interventions": {"a": str(file)}}}, 'intervention a is .*: expected {"path"'),
        ({"laai": {"interventions": {"a": {"sha256": "00"}}}}, "intervention a is {'sha256': '00'}: expected"),
        ({"laai": {"interventions": str(file), "scale": "2"}}, "scale is '2': expected a finite number"),
        ({"laai": {"interventions": str(file), "scale": True}}, "scale is True: expected a finite number"),
        (engine_arguments({"a": {"path": str(file), "sha256": "00"}})["additional_config"], "expected 00"),
    ]:
        with pytest.raises(LaaiError, match=words):
            load(config)
    laai.Intervention({0: torch.ones(8)}, site="mlp", operation="icv").save(tmp_path / "icv" / "x.safetensors")
    with pytest.raises(LaaiError, match="operation 'icv' is refused"):
        load({"laai": {"interventions": str(tmp_path / "icv")}})


def test_faults_of_a_request() -> None:
    names = {"antonym": 1}
    for arguments in (None, {}, {"session_id": "x"}, request_arguments("antonym"), request_arguments("antonym", 3)):
        check_request(arguments, names, 3)
    assert request_arguments(None, 3) == {}
    for arguments in (
        {"laai": "synonym"},
        {"laai": None},
        {"laai": ["antonym"]},
        {"laai_prompt_length": 2},
        {"laai": "antonym", "laai_prompt_length": 0},
        {"laai": "antonym", "laai_prompt_length": 4},
        {"laai": "antonym", "laai_prompt_length": True},
        {"laai": "antonym", "laai_prompt_length": 1.5},
    ):
        with pytest.raises(LaaiError, match="expected"):
            check_request(arguments, names, 3)


def test_without_vllm_the_model_says_what_to_install() -> None:
    code = """
import sys
sys.modules["vllm"] = None
import torch
from lm_eval.api.registry import get_model
try:
    get_model("vllm-laai")
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("LaaiError vllm-laai needs vLLM") and "lm-eval-laai[vllm]" in done.stdout
