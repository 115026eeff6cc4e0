"""The vectors in one model runner: tables in the modules, and the rows of every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from laai_core.locate import Layout, describe
from laai_core.vllm.options import LENGTH, NAME, Loaded, check_request
from laai_core.vllm.placing import Placed, place
from laai_core.vllm.sites import steer

PROBE = "\0probe"  # no file's name: `verify` asks with it for the last row of the tables


@dataclass(frozen=True)
class EngineLayout(Layout):
    """A Layout of vLLM's own module tree."""

    activations: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        return self.activations


@dataclass(frozen=True)
class Site:
    """One changed module: `table` [1 + interventions + 1, D of this rank]."""

    layer: int
    site: str
    module: nn.Module
    table: torch.Tensor


class Steering:
    """Puts every intervention's vectors into the model of a runner, and follows its steps.

    Args:
        runner: vLLM's model runner (the V1 class), its model loaded and not yet compiled.
        loaded: the interventions.

    Raises:
        LaaiError: when a vector does not fit the model.
    """

    def __init__(self, runner: Any, loaded: Loaded) -> None:
        self._runner = runner
        model, config = runner.get_model(), runner.model_config
        described = describe(model, config.hf_text_config, loaded.projection)
        layout = EngineLayout(model, virtual_tokens=0, activations=config.dtype, **described)
        self._names = {name: number for number, name in enumerate(loaded.interventions, 1)}
        self._positions = {name: iv.position for name, iv in loaded.interventions.items()}
        self.probe = len(self._names) + 1
        length = runner.input_ids.gpu.shape[0]
        self._rows = torch.zeros(length, dtype=torch.int32, device=runner.device)  # what the modules read
        self._staged = torch.zeros(length, dtype=torch.int32, pin_memory=runner.device.type != "cpu")
        self._written = 0  # rows beyond these are zero
        tables: dict[tuple[int, str], dict[int, torch.Tensor]] = {}
        for name, intervention in loaded.interventions.items():
            for layer, vector in intervention.for_model(layout).items():
                tables.setdefault((layer, intervention.site), {})[self._names[name]] = vector * intervention.scale
        self.sites = [self._steered(layout, *key, vectors) for key, vectors in sorted(tables.items())]
        self._follow(runner)

    def _steered(self, layout: Layout, layer: int, site: str, vectors: dict[int, torch.Tensor]) -> Site:
        module = layout.module(layer, site)
        width = next(iter(vectors.values())).numel()
        mine = _slice(module, width) if site == "heads" else slice(0, width)
        table = torch.zeros(self.probe + 1, mine.stop - mine.start, dtype=layout.dtype, device=self._rows.device)
        for number, vector in vectors.items():
            table[number] = vector[mine].to(table.dtype)
        steer(module, site, table, self._rows)
        return Site(layer, site, module, table)

    def _follow(self, runner: Any) -> None:
        """Set the rows after the inputs of every step, and none in the runner's dummy steps."""
        prepare, dummy = runner._prepare_inputs, runner._dummy_run

        def prepared(scheduler_output: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any) -> Any:
            result = prepare(scheduler_output, num_scheduled_tokens, *args, **kwargs)
            self._set(num_scheduled_tokens)
            return result

        def dummied(*args: Any, **kwargs: Any) -> Any:
            with torch.inference_mode():
                self._rows.zero_()
            return dummy(*args, **kwargs)

        runner._prepare_inputs, runner._dummy_run = prepared, dummied

    def _set(self, scheduled: Any) -> None:
        """The rows of one step: `scheduled` [requests] tokens of each request of the batch, in its order."""
        batch, requests = self._runner.input_batch, self._runner.requests
        staged = self._staged.numpy()
        staged[: self._written] = 0
        start, total = 0, 0
        for order, request_id in enumerate(batch.req_ids):
            count = int(scheduled[order])
            request = requests[request_id]
            arguments = request.sampling_params.extra_args
            if arguments and (NAME in arguments or LENGTH in arguments):
                placed = self._placed(arguments, request.num_prompt_tokens)
                if place(staged, start, int(batch.num_computed_tokens_cpu[order]), count, placed):
                    total = start + count
            start += count
        changed = max(total, self._written)
        self._written = total
        if changed:
            self._rows[:changed].copy_(self._staged[:changed], non_blocking=True)

    def _placed(self, arguments: dict[str, Any], tokens: int) -> Placed:
        if arguments.get(NAME) == PROBE:
            return Placed(self.probe, arguments[LENGTH] - 1, "generated")
        check_request(arguments, self._names, tokens)
        name, length = arguments[NAME], arguments.get(LENGTH)
        return Placed(self._names[name], (tokens if length is None else length) - 1, self._positions[name])


def _slice(module: Any, width: int) -> slice:
    """The part of an output projection's input that this rank of tensor parallelism has."""
    if getattr(module, "input_is_parallel", False):
        part = int(module.input_size_per_partition)
        return slice(module.tp_rank * part, (module.tp_rank + 1) * part)
    return slice(0, width)
