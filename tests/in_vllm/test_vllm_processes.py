"""Engines of several processes: tensor parallel over gloo, and a server over HTTP on loopback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alike import TASKS, TOLERANCE, assert_same_scores, here, hf, pairs, vectors
from test_hf_laai import requests
from tiny import REFERENCE

ROOT = Path(__file__).resolve().parents[2]

START = 240  # seconds an engine may take to start on a busy machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return vectors(hf(REFERENCE, None).model, tmp_path_factory.mktemp("vectors"))


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "in_vllm")])
    return {**os.environ, "PYTHONPATH": path, "VLLM_USE_V2_MODEL_RUNNER": "0", "OMP_NUM_THREADS": "1"}


PARALLEL = """
import json, sys
from alike import pairs
from test_hf_laai import requests
from lm_eval_laai.vllm_model import VLLMLaai

if __name__ == "__main__":
    model, folder, out = sys.argv[1:]
    lm = VLLMLaai(model, folder, unrouted="none", dtype="float32", max_model_len=256, block_size=32,
                  enforce_eager=True, tensor_parallel_size=%d)
    scores = lm.loglikelihood(requests("loglikelihood", *pairs()), disable_tqdm=True)
    how = {"until": ["\\n\\n"], "max_gen_toks": 12, "do_sample": False}
    texts = lm.generate_until(requests("generate_until", [("Q: hot\\nA:", how)] * 5, %r), disable_tqdm=True)
    json.dump([scores, texts], open(out, "w"))
"""


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("reference", 2),
        pytest.param("smollm2-135m", 3, marks=pytest.mark.slow),  # of 9 heads
        pytest.param("gemma-3-270m", 2, marks=pytest.mark.slow),  # one key-value head, which both have
    ],
)
def test_tensor_parallel(name: str, size: int, tmp_path: Path) -> None:
    model = str(REFERENCE) if name == "reference" else here(name)
    folder = vectors(hf(model, None).model, tmp_path / "vectors", strength=3.0 if name == "reference" else 1.0)
    script, out = tmp_path / "parallel.py", tmp_path / "out.json"
    script.write_text(PARALLEL % (size, TASKS))
    cpus = sorted(os.sched_getaffinity(0))
    bind = "|".join(str(cpus[rank % len(cpus)]) for rank in range(size))
    command = [sys.executable, str(script), model, folder, str(out)]
    more = {"VLLM_CPU_OMP_THREADS_BIND": bind, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = subprocess.run(command, env={**environment(), **more}, capture_output=True, text=True, timeout=2 * START)
    assert done.returncode == 0, done.stderr[-4000:]
    scores, texts = json.loads(out.read_text())
    reference = hf(model, folder, unrouted="none")
    want = reference.loglikelihood(requests("loglikelihood", *pairs()), disable_tqdm=True)
    assert_same_scores(scores, want)
    how = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    asked = requests("generate_until", [("Q: hot\nA:", how)] * 5, TASKS)
    assert texts == reference.generate_until(asked, disable_tqdm=True)


@pytest.fixture(scope="module")
def server(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`vllm serve` as docs/vllm.md has it; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    config = json.dumps({"laai": {"interventions": folder}})
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(REFERENCE), "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "256", "--block-size", "32"]
    command += ["--enforce-eager", "--no-enable-prefix-caching", "--worker-cls", "laai_core.vllm.worker.Worker"]
    command += ["--middleware", "laai_core.vllm.serving.check", "--additional-config", config]
    with log.open("w") as target:
        process = subprocess.Popen(command, env=environment(), stdout=target, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + START
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
                time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)


def post(address: str, **fields: Any) -> tuple[int, dict[str, Any]]:
    body = json.dumps({"model": str(REFERENCE), "temperature": 0, **fields}).encode()
    request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_a_request_names_its_intervention(server: str, folder: str) -> None:
    sys.path.insert(0, str(ROOT / "examples"))
    from vllm_client import answers

    found = answers(f"{server}/v1", "Q: hot\nA:", TASKS[:-1], tokens=12)
    how = {"until": ["\n"], "max_gen_toks": 12}
    asked = requests("generate_until", [("Q: hot\nA:", how)] * 5, TASKS)
    want = hf(REFERENCE, folder, unrouted="none").generate_until(asked, disable_tqdm=True)
    assert [*found.values()] == [want[-1], *want[:-1]]
    assert len(set(want)) > 1


def test_a_request_is_scored_as_in_the_harness(server: str, folder: str) -> None:
    reference = hf(REFERENCE, folder, unrouted="none")
    context, continuation = "Q: hot\nA:", " cold water"
    prompt, target = reference._encode_pair(context, continuation)
    extra = {"laai": "heads", "laai_prompt_length": len(prompt)}
    how = {"echo": True, "logprobs": 0, "max_tokens": 1, "vllm_xargs": extra}
    status, answer = post(server, prompt=prompt + target, **how)
    assert status == 200
    scores = answer["choices"][0]["logprobs"]["token_logprobs"][len(prompt) : len(prompt) + len(target)]
    ((want, _),) = reference.loglikelihood(requests("loglikelihood", [(context, continuation)], ["heads"]))
    assert sum(scores) == pytest.approx(want, abs=TOLERANCE)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"vllm_xargs": {"laai": "no such"}}, "laai is 'no such': expected one of heads, mlp, residual, several"),
        ({"vllm_xargs": {"laai": 7}}, "laai is 7"),
        ({"vllm_xargs": {"laai": "heads", "laai_prompt_length": 1}}, "expected one prompt of token ids"),
        ({"vllm_xargs": {"laai": "heads", "laai_prompt_length": 9}, "prompt": [5, 6]}, "from 1 to 2"),
        ({"vllm_xargs": {"laai_prompt_length": 1}, "prompt": [5, 6]}, "laai is None"),
    ],
)
def test_a_bad_request_is_refused_and_the_engine_lives(server: str, fields: dict[str, Any], words: str) -> None:
    status, answer = post(server, **{"prompt": "Q: hot", "max_tokens": 2, **fields})
    assert status == 400 and words in answer["error"]["message"]
    assert post(server, prompt="Q: hot", max_tokens=2)[0] == 200
