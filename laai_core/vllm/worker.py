"""The worker: vLLM's own, whose model adds each request's vector. Named by a string, so it reaches remote workers."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from laai_core.errors import LaaiError
from laai_core.vllm.options import NAME, load
from laai_core.vllm.steering import Steering
from laai_core.vllm.verify import verify

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as _Base
else:
    from vllm.v1.worker.gpu_worker import Worker as _Base


class Worker(_Base):
    """A worker of an engine whose `additional_config` names interventions.

    Raises:
        LaaiError: at the start: a setting in which rows would go astray, a bad file, a vector that does not fit the
            model, or a model that does not do what its vectors say (`laai_core.vllm.verify`).
    """

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        refuse(vllm_config)
        self._loaded = load(vllm_config.additional_config)
        # The hash of the configuration is the name of the compiled graphs: other files, other layers, other graphs.
        facts = {name: [iv.sha256, iv.site, *iv.layers] for name, iv in sorted(self._loaded.interventions.items())}
        vllm_config.additional_config = {**vllm_config.additional_config, f"{NAME}_loaded": facts}
        super().__init__(vllm_config, *args, **kwargs)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the weights, then put the vectors in."""
        super().load_model(*args, **kwargs)
        self._steering = Steering(self.model_runner, self._loaded)

    def compile_or_warm_up_model(self) -> Any:
        """Compile and capture, then check that what runs adds the vectors."""
        times = super().compile_or_warm_up_model()
        with torch.inference_mode():
            verify(self, self._steering)
        return times


def refuse(config: VllmConfig) -> None:
    """LaaiError for a setting in which this worker is not tested: a vector must not go astray silently."""
    parallel = config.parallel_config
    faults = {
        "the V2 model runner (set VLLM_USE_V2_MODEL_RUNNER=0)": config.use_v2_model_runner,
        "prefix caching, whose keys do not name interventions (--no-enable-prefix-caching)": (
            config.cache_config.enable_prefix_caching
        ),
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "data parallelism inside vLLM (start one engine a replica)": parallel.data_parallel_size > 1,
        "context parallelism": (
            parallel.prefill_context_parallel_size > 1 or parallel.decode_context_parallel_size > 1
        ),
        "micro-batching": parallel.use_ubatching,
        "speculative decoding": config.speculative_config is not None,
        "LoRA adapters": config.lora_config is not None,
        "a KV transfer, whose other end knows no interventions": config.kv_transfer_config is not None,
        "prompts given as embeddings": config.model_config.enable_prompt_embeds,
        "a model that does not generate": config.model_config.runner_type != "generate",
        "an encoder-decoder model": config.model_config.is_encoder_decoder,
    }
    found = [name for name, is_on in faults.items() if is_on]
    if found:
        raise LaaiError(f"interventions in vLLM are refused with {'; with '.join(found)}")
