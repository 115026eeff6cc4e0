"""Engines of other shapes: chunked prefill, preemption, compiled graphs, other architectures; and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from alike import assert_scores_alike, assert_texts_alike, assert_tokens_alike, hf, vectors
from tiny import REFERENCE

import laai_core as laai
from laai_core.errors import LaaiError
from laai_core.vllm import sites, steering, worker

pytest_plugins = ["engines"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return vectors(hf(REFERENCE, None).model, tmp_path_factory.mktemp("vectors"))


def test_chunks_and_preemption(engine: Any, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step has 32 tokens, and the cache room for a third of what is asked: requests are preempted and begin anew."""
    tight = {"max_num_batched_tokens": 32, "max_num_seqs": 16, "num_gpu_blocks_override": 10}
    lm, reference = engine(REFERENCE, folder, unrouted="none", **tight), hf(REFERENCE, folder, unrouted="none")
    scheduler = lm.model.llm_engine.engine_core.engine_core.scheduler
    preempt, preempted = scheduler._preempt_request, []
    monkeypatch.setattr(
        scheduler, "_preempt_request", lambda r, *a, **k: (preempted.append(r), preempt(r, *a, **k))[1]
    )
    assert_scores_alike(lm, reference)
    assert_tokens_alike(lm, reference, tokens=80)
    assert preempted


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled(engine: Any, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice: the second engine loads the first one's graphs from the cache, and an untouched one's are not taken."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    reference = hf(REFERENCE, folder, unrouted="none")
    for _ in range(2):
        lm = engine(REFERENCE, folder, unrouted="none", compilation_config={"mode": 3})
        assert lm.model.llm_engine.vllm_config.compilation_config.mode > 0
        assert_scores_alike(lm, reference)
        assert_texts_alike(lm, reference)


def architecture(name: str, folder: Path) -> Any:
    """A random model of heads as wide as vLLM's kernels for CPUs take them, with a tokenizer, saved in a folder."""
    width = {"hidden_size": 128, "n_embd": 128, "head_dim": 32, "word_embed_proj_dim": 128}
    config = tiny.tiny_config(name)
    for key, value in width.items():
        if hasattr(config, key) and getattr(config, key) is not None:
            setattr(config, key, value)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.12)
    model.save_pretrained(folder)
    tiny.tiny_tokenizer(bos=True).save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("name", ["GPT2", "OPT", "Qwen2", "Gemma3Text"])
def test_architectures(engine: Any, name: str, tmp_path: Path) -> None:
    folder = vectors(architecture(name, tmp_path / "model"), tmp_path / "vectors")
    lm = engine(tmp_path / "model", folder, unrouted="none", max_model_len=128)
    reference = hf(tmp_path / "model", folder, unrouted="none")
    assert_scores_alike(lm, reference)
    assert_tokens_alike(lm, reference, tokens=6)


def test_an_ignored_change_is_an_error(engine: Any, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steering, "steer", lambda *_: None)
    with pytest.raises(LaaiError, match="layer 1, site heads: vLLM runs something else"):
        engine(REFERENCE, folder)


def test_a_misplaced_vector_is_an_error(engine: Any, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = steering.place
    monkeypatch.setattr(steering, "place", lambda rows, start, *rest: place(rows, start + 1, *rest))
    with pytest.raises(LaaiError, match="vLLM runs something else"):
        engine(REFERENCE, folder)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size is refused"),
        ({"data_parallel_size": 2}, "data_parallel_size is refused"),
        ({"enable_prefix_caching": True}, "enable_prefix_caching is refused"),
        ({"worker_cls": "a.B"}, "worker_cls is refused"),
        ({"lora_local_path": "adapter"}, "lora_local_path is refused"),
        ({"speculative_config": {"method": "ngram"}}, "speculative_config is refused"),
        ({"unrouted": "maybe"}, "unrouted is 'maybe'"),
        ({"scale": "much"}, "scale is 'much'"),
        ({"projection": "no.such.{}.module"}, "the model has no module"),
    ],
)
def test_settings_are_refused_in_one_line(engine: Any, folder: str, more: dict[str, Any], words: str) -> None:
    with pytest.raises(LaaiError, match=words):
        engine(REFERENCE, folder, **more)


def test_vectors_are_refused_in_one_line(engine: Any, tmp_path: Path) -> None:
    with pytest.raises(LaaiError, match=r"shape \(4, 4\), this model expects \(8, 32\)"):
        engine(REFERENCE, laai.Intervention({0: torch.ones(4, 4)}))
    with pytest.raises(LaaiError, match="operation 'icv' is refused"):
        engine(REFERENCE, laai.Intervention({0: torch.ones(256)}, site="mlp", operation="icv"))


def test_an_engine_without_interventions_is_refused() -> None:
    """As under `vllm serve`, where no class of the harness looks at the arguments."""
    from vllm import LLM

    from laai_core.vllm.options import WORKER

    given = {"enable_prefix_caching": False, "distributed_executor_backend": "uni", "worker_cls": WORKER}
    with pytest.raises(LaaiError, match="additional_config has no interventions"):
        LLM(str(REFERENCE), enforce_eager=True, **given)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"enable_prefix_caching": True}, "prefix caching"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"data_parallel_size": 2}, "data parallelism"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative decoding"),
        ({"enable_lora": True}, "LoRA adapters"),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}}, "a KV transfer"),
        ({"enable_prompt_embeds": True}, "prompts given as embeddings"),
        ({"runner": "pooling"}, "a model that does not generate"),
    ],
)
def test_a_worker_refuses_where_a_vector_could_go_astray(more: dict[str, Any], words: str) -> None:
    with pytest.raises(LaaiError, match=f"interventions in vLLM are refused with {words}"):
        worker.refuse(engine_config(**more))


def test_a_worker_refuses_what_only_gpus_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM itself makes no such engine on a CPU."""
    config = engine_config()
    worker.refuse(config)
    for name, value, words in [
        ("enable_dbo", True, "micro-batching"),
        ("ubatch_size", 2, "micro-batching"),
        ("decode_context_parallel_size", 2, "context parallelism"),
        ("prefill_context_parallel_size", 2, "context parallelism"),
    ]:
        with monkeypatch.context() as changed, pytest.raises(LaaiError, match=f"refused with {words}"):
            changed.setattr(config.parallel_config, name, value)
            worker.refuse(config)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(LaaiError, match="refused with the V2 model runner"):
        worker.refuse(config)


def engine_config(**more: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    given = {"dtype": "float32", "enforce_eager": True, "enable_prefix_caching": False, **more}
    return EngineArgs(str(REFERENCE), **given).create_engine_config()


def test_a_changed_module_keeps_its_name_and_type() -> None:
    module = torch.nn.Linear(4, 4)
    sites.steer(module, "heads", torch.zeros(2, 4), torch.zeros(8, dtype=torch.int32))
    assert isinstance(module, torch.nn.Linear) and type(module).__name__ == "Linear"
    assert set(module.state_dict()) == {"weight", "bias"}
