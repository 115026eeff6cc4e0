"""`hf-laai`: the harness's HFLM with interventions, exact for every request type at any batch size."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache
from transformers.generation import GenerationMode

from laai_core.apply import Edit, hooked
from laai_core.devices import cpu_by_default
from laai_core.errors import LaaiError
from laai_core.hooks import refuse_applied
from laai_core.intervention import Intervention
from laai_core.locate import locate, verify_causal
from lm_eval_laai.finite import named, watched
from lm_eval_laai.known_models.folder import pretrained as known_or_as_is
from lm_eval_laai.prefixes import SharedPrefixes, common_prefixes, takes_prefixes
from lm_eval_laai.routing import Route
from lm_eval_laai.scoring import Row, Scorer
from lm_eval_laai.steered import Steered

_Routed = tuple[Edit | None, str, str | None]  # a request's edit, its name in errors, and its task

# Arguments under which greedy search may begin in the middle of a prompt.
_GREEDY = {"attention_mask", "max_length", "stop", "do_sample", "temperature", "top_p", "top_k", "repetition_penalty"}


class _RoutedText(str):
    """A context that remembers its edit, its request and its task's prefix while the harness batches contexts."""

    edit: Edit | None = None
    name: str = ""
    prefix: tuple[int, ...] = ()


class HFLaai(Steered, HFLM):
    """HFLM that applies interventions. Without `intervention` everything is HFLM's own.

    Args:
        pretrained: as HFLM's, or a short name of `laai models`.
        intervention: a file, `org/repo[:file][@revision]` on the Hugging Face Hub, a folder of
            `<harness task name>.safetensors` that routes by task, or an Intervention.
        scale: factor on every intervention's own scale.
        unrouted: a task without a file in the folder: `error` (refuse before any request runs) or `none`.
        projection: module path of the attention output projection, see `laai_core.locate.locate`.
        **kwargs: every argument of HFLM.

    Raises:
        LaaiError: one line, before the model loads where that is possible.
    """

    def __init__(
        self,
        pretrained: Any,
        intervention: str | Path | Intervention | None = None,
        scale: float = 1.0,
        unrouted: str = "error",
        projection: str | None = None,
        **kwargs: Any,
    ) -> None:
        self._route(intervention, scale, unrouted)
        if isinstance(pretrained, str):
            pretrained = known_or_as_is(pretrained)
        if self._routing is not None:
            _refuse_unseen_tensor_parallel(kwargs)
        if isinstance(pretrained, str) and kwargs.get("tp_plan") is None:
            _join_cpu_launch()
        super().__init__(pretrained, **kwargs)
        self._share_requests_between_processes()
        self._routed_contexts: list[_RoutedText] | None = None  # of the generation batch in progress
        if self._routing is None:
            return
        if self.backend != "causal":
            raise LaaiError("an intervention needs a decoder-only (causal) model, this one is sequence-to-sequence")
        self._layout = locate(self.model, projection)
        verify_causal(self._layout)
        self._prefixes = SharedPrefixes(self._layout)
        self._throughout: dict[Edit, Edit] = {}  # of rolling windows: at every token
        self._edits = {id(route.scaled): self._edit(route) for route in self._routing.routes.values()}
        used_on = self.pretrained if isinstance(self.pretrained, str) else self.config._name_or_path
        used_on = used_on or type(self.model).__name__
        self._warn_if_made_elsewhere(used_on, self.mixed_precision_dtype or self.model.dtype)

    def _edit(self, route: Route) -> Edit:
        try:
            return Edit.of(route.scaled, self._layout)
        except LaaiError as error:
            raise LaaiError(f"{error} ({route.file})" if route.file else str(error)) from None

    def _share_requests_between_processes(self) -> None:
        """Rank and world size of a launch of several processes, which HFLM sets only where it sees several GPUs."""
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None and self.world_size == 1:
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    # Log-likelihoods: the harness tokenises, `Scorer` groups and runs.

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self._routing is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        routed = self._rows_in_progress()
        tasks, prompts = [task for _, _, task in routed], [prompt for _, prompt, _ in requests]
        prefixes = common_prefixes(tasks, prompts, tuple)
        rows = [
            Row(prompt, continuation, edit, name, prefix)
            for (_, prompt, continuation), (edit, name, _), prefix in zip(requests, routed, prefixes, strict=True)
        ]
        return self._score(rows, "loglikelihood", disable_tqdm)

    def _window_row(self, prompt: list[int], continuation: list[int], routed: _Routed, throughout: bool) -> Row:
        edit, name, _ = routed
        if edit is not None and throughout and edit.position != "all":
            # One for each edit: rows that share it share its indices.
            edit = self._throughout.setdefault(edit, dataclasses.replace(edit, position="all"))
        return Row(prompt, continuation, edit, name)

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self.model, self._layout, self.max_length, self.softmax_dtype, self._prefixes)

    @cpu_by_default
    def _score(self, rows: list[Row], name: str, disable_tqdm: bool) -> list[tuple[float, bool]]:
        bar = tqdm(total=len(rows), disable=disable_tqdm or self.rank != 0, desc=f"Running {name} requests")
        with bar, torch.no_grad(), self._autocast(), closing(self._prefixes):
            return self._scorer.score(rows, self._batch_rows(rows), bar.update)

    def _batch_rows(self, rows: list[Row]) -> int:
        if self.batch_size != "auto":
            return int(self.batch_size)
        requests = sorted(((None, r.prompt, r.continuation) for r in rows), key=lambda r: -len(r[1]) - len(r[2]))
        size = self._detect_batch_size(requests, 0)
        self.batch_sizes[0] = size
        return size

    def _autocast(self) -> Any:
        dtype = self.mixed_precision_dtype
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    # Generation: the harness batches contexts; every context carries its edit along.

    @cpu_by_default
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """One batch may hold contexts of several tasks, each under its own intervention."""
        if self._routing is None:
            return super().generate_until(requests, disable_tqdm)
        routed = self._routed(requests)
        self._check_room_for_prompts(requests)
        contexts = [request.args[0] for request in requests]
        prefixes = common_prefixes([task for _, _, task in routed], contexts, self.tok_encode)
        marked = []
        for request, (edit, name, _), prefix in zip(requests, routed, prefixes, strict=True):
            context, *rest = request.args
            text = _RoutedText(context)
            text.edit, text.name, text.prefix = edit, name, prefix
            marked.append(copy.copy(request))
            marked[-1].arguments = (text, *rest)
        with closing(self._prefixes):
            return super().generate_until(marked, disable_tqdm)

    def _check_room_for_prompts(self, requests: Sequence[Instance]) -> None:
        """LaaiError, before any request runs, for one whose answer may take the model's whole window."""
        for request in requests:
            count = normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"]
            if count >= self.max_length:
                raise LaaiError(
                    f"{named(request)}: max_gen_toks is {count}, which leaves no room for a prompt in the model's "
                    f"window of {self.max_length} tokens; expected fewer"
                )

    def tok_batch_encode(self, strings: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """HFLM's, noting the contexts' edits for the `_model_generate` that follows."""
        if self._routing is not None:
            self._routed_contexts = [s if isinstance(s, _RoutedText) else _RoutedText(s) for s in strings]
        return super().tok_batch_encode([str(s) for s in strings], *args, **kwargs)

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        routed, self._routed_contexts = self._routed_contexts, None
        if self._routing is None:
            return super()._model_generate(context, *args, **kwargs)
        assert routed is not None and len(routed) == len(context), "the harness batched contexts behind our back"
        if self._layout.virtual_tokens:
            return self._generate_behind_soft_prompt(context, routed, *args, **kwargs)
        if (cache := self._cached_prefixes(context, routed, kwargs)) is not None:
            kwargs["past_key_values"] = cache
        with self._steered(routed):
            return super()._model_generate(context, *args, **kwargs)

    def _cached_prefixes(
        self, context: torch.Tensor, routed: Sequence[_RoutedText], arguments: Mapping[str, Any]
    ) -> DynamicCache | None:
        """The cache of the contexts' first columns; None where the arguments ask for anything but greedy search."""
        config = copy.copy(self._layout.model.generation_config)
        config.do_sample = arguments.get("do_sample")
        if (
            not set(arguments) <= _GREEDY
            or config.get_generation_mode() != GenerationMode.GREEDY_SEARCH
            or not takes_prefixes(config)
        ):
            return None
        lengths = arguments["attention_mask"].sum(1).tolist()
        prompts = [row[len(row) - length :] for row, length in zip(context.tolist(), lengths, strict=True)]
        with self._autocast():
            return self._prefixes.cache(prompts, [r.edit for r in routed], [r.prefix for r in routed], left=True)

    @contextmanager
    def _steered(self, routed: Sequence[_RoutedText]) -> Iterator[None]:
        """Generation of these contexts under their edits."""
        names = [None if one.edit is None else one.name for one in routed]
        with hooked(self._layout, [one.edit for one in routed]), watched(self._layout.model, names):
            yield

    def _generate_behind_soft_prompt(
        self,
        context: torch.Tensor,
        routed: list[_RoutedText],
        max_length: int,
        attention_mask: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Contexts of one length at a time, without padding.

        PEFT puts padding between the soft prompt and the text and counts padding as positions: in `hf` an answer
        depends on the other rows of its batch.
        """
        width, lengths = context.shape[1], attention_mask.sum(1)
        answers: list[torch.Tensor] = [context] * len(context)
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero().squeeze(1)
            with self._steered([routed[row] for row in rows.tolist()]):
                tokens = super()._model_generate(
                    context[rows, width - length :],
                    max_length=max_length - width + length,
                    attention_mask=attention_mask[rows, width - length :],
                    **kwargs,
                )
            for row, answer in zip(rows.tolist(), tokens[:, length:], strict=True):
                answers[row] = answer
        padding = float(self.tokenizer.pad_token_id)
        return torch.cat([context, pad_sequence(answers, batch_first=True, padding_value=padding)], dim=1)

    def _routed(self, requests: Sequence[Instance]) -> list[_Routed]:
        """The edit (by task), the name and the task of each request."""
        refuse_applied(self._layout.model, "hf-laai with an intervention")
        interventions = self._routed_interventions(requests)
        return [
            (None if iv is None else self._edits[id(iv)], named(request), request.task_name)
            for iv, request in zip(interventions, requests, strict=True)
        ]


def _join_cpu_launch() -> None:
    """Join torchrun's process group on a machine without an accelerator: accelerate does so only for `cpu=True`."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        state = PartialState(cpu=True, timeout=timedelta(weeks=52))  # HFLM's: processes may wait long for a slow one
        state.device = torch.device("cpu")  # accelerate says cpu:0, which safetensors before 0.8 refuses


def _refuse_unseen_tensor_parallel(arguments: dict[str, Any]) -> None:
    """LaaiError, before the model loads, for tensor parallelism that HFLM takes for data parallelism: its processes
    would wait for each other, each with other requests.
    """
    for name in ("tp_size", "distributed_config"):
        if arguments.get(name) is not None:
            raise LaaiError(f"{name} is refused with an intervention, the harness does not know it: use tp_plan=auto")
