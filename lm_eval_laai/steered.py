"""What model classes with interventions share, whatever runs the model: routing, warnings, refusals, report."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from laai_core.errors import LaaiError
from laai_core.intervention import Intervention
from lm_eval_laai.chats import Chats, check_chat_template
from lm_eval_laai.rendering import ChatTemplate
from lm_eval_laai.routing import Routing

logger = logging.getLogger(__name__)


class Steered(TemplateLM):
    """Comes before a model class of the harness among the bases; without routing everything is that class's own."""

    _routing: Routing | None
    _chats: Chats
    _routed_rows: list[Any] | None = None  # of the loglikelihood call in progress
    _window_reserve = 0  # by so many tokens a rolling window is shorter than max_length
    # What the class that runs the model has.
    _routed: Any  # (requests): what it must know of each, the intervention first
    _window_row: Any  # (prompt, continuation, one of _routed, whether it acts on every token): what _score takes
    _score: Any  # (rows, kind of request, disable_tqdm): log-probability and is_greedy of each

    def _route(self, intervention: str | Path | Intervention | None, scale: float, unrouted: str) -> None:
        """Read the interventions: the first thing to do, before the model loads."""
        if intervention is None and scale != 1:
            raise LaaiError(f"scale is {scale!r:.60} without an intervention: expected intervention=FILE")
        self._routing = None if intervention is None else Routing(intervention, scale, unrouted)
        self._chats = Chats(lambda *chat: ChatTemplate(self.tokenizer)(*chat))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The harness's; records the context, to warn of a vector that was trained on prompts rendered otherwise.

        Raises:
            LaaiError: for a tokenizer without a chat template.
        """
        try:
            text: str = super().apply_chat_template(chat_history, add_generation_prompt)
        except ValueError:  # of transformers, for a tokenizer without one
            check_chat_template(self.tokenizer)
            raise
        if self._routing is not None:
            self._chats.note(text, chat_history, add_generation_prompt)
        return text

    def set_cache_hook(self, cache_hook: Any) -> None:
        """LaaiError for a response cache: its keys are texts, so it would answer for another intervention."""
        if self._routing is not None and cache_hook.dbdict is not None:
            raise LaaiError("--use_cache is refused with an intervention: its keys do not say which one was applied")
        super().set_cache_hook(cache_hook)

    def get_model_info(self) -> dict[str, Any]:
        """The harness's facts on the model, and the identity of every intervention."""
        info: dict[str, Any] = getattr(super(), "get_model_info", dict)()
        if self._routing is not None:
            info["interventions"] = self._routing.report()
        return info

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Exact per request: its own intervention, where its own context ends."""
        if self._routing is not None:
            self._routed_rows = self._routed(requests)
        try:
            return super().loglikelihood(requests, disable_tqdm)
        finally:
            self._routed_rows = None

    def _rows_in_progress(self) -> list[Any]:
        """What `_routed` gave for the requests of the loglikelihood call in progress."""
        if self._routed_rows is None:
            raise LaaiError("_loglikelihood_tokens takes tokens without their task: expected a call of loglikelihood")
        return self._routed_rows

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The prefix token is the prompt: position `last` acts on it in a text's first window only.

        For `generated` and `all` every later token of the text counts, so later windows are written to throughout.
        """
        if self._routing is None:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        rows, counts = [], []
        for request, routed in zip(requests, self._routed(requests), strict=True):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - self._window_reserve,
                context_len=1,
            )
            parts = [*map(make_disjoint_window, windows)]
            iv = self._routing.get(request.task_name)
            later = (None, *routed[1:]) if iv is None or iv.position == "last" else routed
            rows += [self._window_row(*one, routed, False) for one in parts[:1]]
            rows += [self._window_row(*one, later, True) for one in parts[1:]]
            counts.append(len(parts))
        scored = iter(self._score(rows, "loglikelihood_rolling", disable_tqdm))
        return [sum(next(scored)[0] for _ in range(count)) for count in counts]

    def _routed_interventions(self, requests: Sequence[Instance]) -> list[Intervention | None]:
        """The intervention of each request (by task), with a warning where its training prompts looked different.

        Raises:
            LaaiError: for tasks without an intervention, before any request runs.
        """
        assert self._routing is not None
        self._routing.require(request.task_name for request in requests)
        interventions = [self._routing.get(request.task_name) for request in requests]
        for iv, request in zip(interventions, requests, strict=True):
            if iv is not None and (different := self._chats.difference(iv, request.args[0], self.tokenizer)):
                logger.warning("%s: %s", request.task_name, different)
        return interventions

    def _warn_if_made_elsewhere(self, used_on: str, dtype: torch.dtype) -> None:
        """Warn of vectors trained on another model of the same shape, or in another dtype."""
        assert self._routing is not None
        for name, route in self._routing.routes.items():
            made_for = route.loaded.metadata.get("base_model")
            if isinstance(made_for, str) and _name(made_for) != _name(used_on):
                logger.warning(
                    "%s: the intervention was made for %.200r and is applied to %s", name, made_for, used_on
                )
            training = route.loaded.metadata.get("training")
            trained_in = training.get("dtype") if isinstance(training, dict) else None
            if trained_in is not None and trained_in != str(dtype).removeprefix("torch."):
                logger.warning(
                    "%s: the intervention was trained in %.200s, the model runs in %s", name, trained_in, dtype
                )


def _name(model: str) -> str:
    return os.path.basename(os.path.realpath(model))
