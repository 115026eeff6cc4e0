"""Two processes on CPUs, started by torchrun: each runs about half of the requests, together they give the results of
one. (`accelerate launch --cpu --num_processes 2` starts a single process.)"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import launched
import pytest
from test_apply import intervention
from tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent


def requests_of(counts: dict[str, int]) -> list[int]:
    return [counts[kind] for kind in launched.KINDS]


@pytest.mark.slow
@pytest.mark.parametrize("steered", [True, False], ids=["interventions", "none"])
def test_two_processes_share_the_work_of_one(tmp_path, steered):
    model, folder = tmp_path / "model", tmp_path / "interventions"
    tiny_model("Llama").save_pretrained(model)
    tiny_tokenizer(bos=True).save_pretrained(model)
    for seed, name in enumerate(launched.NAMES):
        intervention("Llama", seed=seed).save(folder / f"{name}.safetensors")
    arguments = [str(model), str(folder) if steered else ""]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", launched.__file__]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command, *arguments, str(tmp_path)], env=environment, check=True, timeout=300)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    alone = launched.evaluate(*[a or None for a in arguments])

    assert [(f["rank"], f["world_size"]) for f in (first, second, alone)] == [(0, 2), (1, 2), (0, 1)]
    # Seven documents, three options each: four and three documents, and the harness evens the last batch out.
    assert requests_of(alone["ran"]) == [21, 7, 7]
    assert requests_of(first["ran"]) == requests_of(second["ran"]) == [12, 4, 4]
    assert "answers" not in second
    for name in launched.NAMES:
        for mine, whole in zip(flat(first["answers"][name]), flat(alone["answers"][name]), strict=True):
            assert mine == (pytest.approx(whole, abs=1e-4) if isinstance(whole, float) else whole)
        for metric, value in alone["metrics"][name].items():
            assert first["metrics"][name][metric] == (pytest.approx(value) if isinstance(value, float) else value)


def flat(answers: object) -> list[object]:
    if isinstance(answers, list | tuple):
        return [leaf for answer in answers for leaf in flat(answer)]
    return [answers]
