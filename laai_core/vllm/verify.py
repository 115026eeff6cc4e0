"""The check at an engine's start: a probe through everything that requests go through, against a plain forward.

An ignored change (a compiled graph from a cache, a captured graph, a layer that is fused away) would give the
untouched model's numbers without an error. So every worker runs a probe prompt at each changed module:

    base    the plain forward, untouched
    plain   the plain forward: no compiled or captured graph; an ordinary hook adds a strong vector
    real    as requests run, in two steps, the second of one token; the table has that vector

and compares the last hidden states, from which the logits are a fixed map: real - plain must be small beside
plain - base.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate, pairwise
from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from laai_core.errors import LaaiError
from laai_core.hooks import attached, hidden_of, shadowed, with_hidden
from laai_core.vllm.options import LENGTH, NAME
from laai_core.vllm.steering import PROBE, Site, Steering

_TOKENS = 8
_STRENGTH = 3.0  # of the probe's vector, in root mean squares of the activation
_TOLERANCE = 0.1  # |real - plain| / |plain - base|: an ignored or misplaced vector gives about 1, rounding far less


def verify(worker: Any, steering: Steering) -> None:
    """LaaiError when a changed module does not change the model's output as a plain forward says."""
    count = min(_TOKENS, worker.model_config.max_model_len - 1, worker.scheduler_config.max_num_batched_tokens)
    prober = _Prober(worker, count)
    for site in steering.sites:
        seen: list[torch.Tensor] = []
        base = prober.plain(site, lambda x, seen=seen: seen.append(x.clone()) or x)
        x = seen[0][prober.first :].float()
        site.table[steering.probe] = _STRENGTH * x.square().mean().sqrt() * _signs(x.shape[1], x.device)
        vector = site.table[steering.probe].clone()
        plain = prober.plain(site, lambda x, vector=vector: _plus(x, vector, prober.first))
        real = prober.real()
        site.table[steering.probe] = 0
        effect, error = float((plain - base).norm()), float((real - plain).norm())
        if not effect > 1e-3 * float(base.norm()):
            raise LaaiError(
                f"layer {site.layer}, site {site.site}: a probe vector there does not change the model's output "
                f"in vLLM ({type(site.module).__name__}); expected a module that the output depends on"
            )
        if not error <= _TOLERANCE * effect:
            raise LaaiError(
                f"layer {site.layer}, site {site.site}: vLLM runs something else than the changed module: the probe's "
                f"effect is off by {error / effect:.2f} of itself, expected at most {_TOLERANCE}; "
                f"try enforce_eager=True, or an empty compile cache (VLLM_CACHE_ROOT)"
            )


class _Prober:
    """Runs the probe prompt in a worker whose scheduler does not run yet: any block of the KV cache is free."""

    def __init__(self, worker: Any, count: int) -> None:
        self._worker, self._runner, self._count = worker, worker.model_runner, count
        self._tokens = [(1 + 7919 * i) % worker.vocab_size for i in range(count)]
        self.first = count // 2  # the probe acts on this token and all after it

    def plain(self, site: Site, change: Any) -> torch.Tensor:
        """Hidden states [tokens, hidden] of a plain forward in one step; a hook passes the site through `change`."""
        with _uncompiled(self._runner), attached([_hook(site, change)]):
            return self._run(None, [self._count])

    def real(self) -> torch.Tensor:
        """Hidden states [tokens, hidden] as requests run, under the probe."""
        return self._run({NAME: PROBE, LENGTH: self.first + 1}, [self._count - 1, 1])

    def _run(self, arguments: dict[str, Any] | None, steps: list[int]) -> torch.Tensor:
        hidden, done = [], 0
        for step in steps:
            output = SchedulerOutput.make_empty()
            if done == 0:
                output.scheduled_new_reqs = [self._request(arguments)]
            else:
                output.scheduled_cached_reqs = CachedRequestData(
                    req_ids=[PROBE],
                    resumed_req_ids=set(),
                    new_token_ids=[],
                    all_token_ids={},
                    new_block_ids=[None],
                    num_computed_tokens=[done],
                    num_output_tokens=[0],
                )
            output.num_scheduled_tokens = {PROBE: step}
            output.total_num_scheduled_tokens = step
            self._worker.execute_model(output)
            state, self._runner.execute_model_state = self._runner.execute_model_state, None
            hidden.append(state.hidden_states[:step].float().clone())
            done += step
        end = SchedulerOutput.make_empty()
        end.finished_req_ids = {PROBE}
        self._worker.execute_model(end)
        return torch.cat(hidden)

    def _request(self, arguments: dict[str, Any] | None) -> NewRequestData:
        # Blocks of the groups of layers are blocks of one pool.
        groups = self._runner.kv_cache_config.kv_cache_groups
        sizes = [1 + self._count // group.kv_cache_spec.block_size for group in groups]
        ends = [1, *(1 + total for total in accumulate(sizes))]
        return NewRequestData(
            req_id=PROBE,
            prompt_token_ids=self._tokens,
            mm_features=[],
            sampling_params=SamplingParams(temperature=0.0, extra_args=arguments),
            pooling_params=None,
            block_ids=tuple([*range(start, end)] for start, end in pairwise(ends)),
            num_computed_tokens=0,
            lora_request=None,
        )


@contextmanager
def _uncompiled(runner: Any) -> Iterator[None]:
    """Within the block, the runner's model runs neither compiled nor captured."""
    eager = functools.partial(runner._determine_batch_execution_and_padding, force_eager=True)
    with ExitStack() as stack:
        for module in runner.get_model().modules():
            if getattr(module, "do_not_compile", True) is False:
                stack.enter_context(shadowed(module, "do_not_compile", True))
        runner._determine_batch_execution_and_padding = eager
        stack.callback(runner.__dict__.pop, "_determine_batch_execution_and_padding")
        yield


def _hook(site: Site, change: Any) -> Any:
    if site.site == "heads":
        return site.module.register_forward_pre_hook(lambda module, args: (change(args[0]), *args[1:]))
    return site.module.register_forward_hook(
        lambda module, args, output: with_hidden(output, change(hidden_of(output)))
    )


def _plus(x: torch.Tensor, vector: torch.Tensor, first: int) -> torch.Tensor:
    x = x.clone()
    x[first:] += vector
    return x


def _signs(width: int, device: torch.device) -> torch.Tensor:
    """+1 and -1, the same on every rank."""
    generator = torch.Generator().manual_seed(width)
    return (torch.randint(0, 2, (width,), generator=generator) * 2 - 1).to(device)
