"""Two processes on CPUs, started by torchrun, each with half of every layer: they give the numbers of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import launched
import pytest
import sharded
import torch
from test_apply import intervention
from test_data_parallel import flat, requests_of
from tiny import REFERENCE, tiny_model, tiny_tokenizer
from transformers import AutoConfig

import laai_core as laai

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("Llama", "Qwen3", "Gemma2", "Phi3", "GPTNeoX", "Mixtral")


def in_two_processes(script: str, folder: Path, *arguments: str) -> tuple[dict[str, Any], dict[str, Any]]:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command], env=environment, check=True, timeout=300)
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1))
    return first, second


@pytest.mark.slow
def test_applied_and_trained_on_every_kind_of_plan(tmp_path: Path) -> None:
    """Sites, positions and rows without an intervention; a prompt's replay and full forwards."""
    for name in ARCHITECTURES:
        tiny_model(name).save_pretrained(tmp_path / name)
    for found in in_two_processes(sharded.__file__, tmp_path, str(tmp_path), *ARCHITECTURES):
        for name in ARCHITECTURES:
            facts = found[name]
            assert facts["sharded"] == 2 and facts["effect"] > 0.1
            assert facts["logprobs"] < 1e-4 and facts["same_text"], name
            for kind, (vector, losses, _) in facts["trained"].items():
                assert vector < 1e-3 and losses < 1e-4, (name, kind)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny", "reference"])
def test_the_harness_gives_the_table_of_one_process(tmp_path: Path, model: str) -> None:
    """Every request type under its own vector. Both processes run all requests, and the first has the results."""
    folder = tmp_path / "interventions"
    if model == "tiny":
        saved = tmp_path / "model"
        tiny_model("Llama").save_pretrained(saved)
        tiny_tokenizer(bos=True).save_pretrained(saved)
        vectors = [intervention("Llama", seed=seed) for seed in range(len(launched.NAMES))]
    else:
        saved = REFERENCE
        heads = AutoConfig.from_pretrained(saved).num_attention_heads
        draw = torch.Generator().manual_seed(0)
        vectors = [laai.Intervention({3: 5 * torch.randn(heads, 32, generator=draw)}) for _ in launched.NAMES]
    for name, vector in zip(launched.NAMES, vectors, strict=True):
        vector.save(folder / f"{name}.safetensors")
    arguments = [str(saved), str(folder)]
    first, second = in_two_processes(launched.__file__, tmp_path, *arguments, str(tmp_path), "auto")
    alone = launched.evaluate(*arguments)
    untouched = launched.evaluate(str(saved), None)
    assert requests_of(first["ran"]) == requests_of(second["ran"]) == requests_of(alone["ran"]) == [21, 7, 7]
    for name in launched.NAMES:
        for mine, whole in zip(flat(first["answers"][name]), flat(alone["answers"][name]), strict=True):
            assert mine == (pytest.approx(whole, abs=1e-4) if isinstance(whole, float) else whole)
        for metric, value in alone["metrics"][name].items():
            assert first["metrics"][name][metric] == (pytest.approx(value) if isinstance(value, float) else value)
    steered, plain = (flat(found["answers"]["choice"])[::2] for found in (alone, untouched))
    assert max(abs(one - other) for one, other in zip(steered, plain, strict=True)) > 0.1
