"""One answer from an OpenAI-compatible endpoint, however often that takes.

The client's own retries are switched off: they sleep where Ctrl-C cannot end them, know nothing of one another in
several threads, and do not cover a body that is no chat completion.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from laai_core.errors import LaaiError, WorkFailed

OPENAI_URL = "https://api.openai.com/v1"
KEY_VARIABLE = "OPENAI_API_KEY"
# Of the answer, which is one digit. No temperature: the paper's five queries are five draws, and it gives none.
REQUEST: Mapping[str, Any] = MappingProxyType({"max_tokens": 16})
_OURS = ("model", "messages", "stream", "n")

ATTEMPTS = 8  # a query: with the waits between them about a minute and a half
_LONGEST_BACKOFF = 30.0  # seconds
_LONGEST_WAIT = 120.0  # seconds a server may ask for; longer, and the run is better resumed later


@dataclass(frozen=True)
class Judge:
    """Which model is asked, where, and with which fields of the request besides the model and the message.

    Raises:
        LaaiError: for an address that is none or holds a secret, and for fields that are not the user's to set.
    """

    model: str
    base_url: str = OPENAI_URL
    request: Mapping[str, Any] = field(default_factory=lambda: REQUEST)

    def __post_init__(self) -> None:
        try:
            address = urlsplit(self.base_url)
            known = address.scheme in ("http", "https") and bool(address.hostname)
        except ValueError:
            known = False
        if not known:
            raise LaaiError(f"base_url is {self.base_url!r:.80}; expected an address such as {OPENAI_URL}")
        if "@" in address.netloc or address.query or address.fragment:
            # It is kept in the cache, and shown in errors.
            raise LaaiError(f"base_url holds more than an address; expected the key in {KEY_VARIABLE} alone")
        taken = sorted(set(_OURS).intersection(self.request))
        if taken:
            raise LaaiError(f"request sets {', '.join(taken)}; expected fields other than {', '.join(_OURS)}")

    @property
    def identity(self) -> tuple[str, str, str]:
        """What defines the judge's answer to a question."""
        request = json.dumps(dict(self.request), sort_keys=True, ensure_ascii=True)
        return self.base_url.rstrip("/"), self.model, request


class Answer(NamedTuple):
    """What the judge said, and what the server says that it cost (0 where it does not)."""

    text: str
    prompt_tokens: int
    completion_tokens: int


class Stopped(Exception):
    """The run was stopped while a query waited for its turn."""


class _Trouble(Exception):
    """A failure that may pass. `retry_after`: seconds the server asked for."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class Endpoint:
    """A judge that can be asked, from any thread.

    Args:
        judge: who.
        timeout: seconds without a byte from the server.
        backoff: seconds before the second attempt, doubled for each further one.

    Raises:
        LaaiError: without the openai package, or without a key for OpenAI's own address.
    """

    def __init__(self, judge: Judge, timeout: float, backoff: float) -> None:
        try:
            import openai  # here and not above: only asking needs the extra
        except ImportError:
            raise LaaiError('judging needs the openai package: pip install "laai[judge]"') from None
        self._openai = openai
        self._key = _key()
        base_url, self._model, _ = judge.identity
        if not self._key and base_url == OPENAI_URL:
            raise LaaiError(f"{KEY_VARIABLE} is not set; expected the key of {base_url}, or another --base-url")
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=self._key or "none",  # a local server wants none, the client wants some
            timeout=timeout,
            max_retries=0,
        )
        self._url, self._request, self._backoff = base_url, dict(judge.request), backoff
        self._closed_until = 0.0  # time.monotonic(); for all threads alike, since a rate limit is theirs together

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    def ask(self, question: str, stop: threading.Event) -> Answer:
        """The answer to a question.

        Raises:
            LaaiError: a request the endpoint will never take: a wrong key, model or field.
            WorkFailed: an endpoint that still fails after all attempts.
            Stopped: `stop` was set during a wait.
        """
        for attempt in range(1, ATTEMPTS + 1):
            if stop.wait(max(0.0, self._closed_until - time.monotonic())):
                raise Stopped
            try:
                return self._ask_once(question)
            except _Trouble as trouble:
                if attempt == ATTEMPTS or trouble.retry_after > _LONGEST_WAIT:
                    wish = f", asking for {trouble.retry_after:.0f} s" if trouble.retry_after else ""
                    raise WorkFailed(
                        f"{self._url}: {trouble}{wish} (attempt {attempt} of {ATTEMPTS}); "
                        f"the same command goes on from here, and pays for no answer twice"
                    ) from None
                self._closed_until = max(self._closed_until, time.monotonic() + trouble.retry_after)
                backoff = min(self._backoff * 2 ** (attempt - 1), _LONGEST_BACKOFF)
                if stop.wait(backoff * random.uniform(0.75, 1.0)):
                    raise Stopped from None
        raise AssertionError("not reached")

    def _ask_once(self, question: str) -> Answer:
        openai = self._openai
        try:
            completion = self._client.chat.completions.create(
                model=self._model, messages=[{"role": "user", "content": question}], extra_body=self._request
            )
        except openai.APIStatusError as error:
            told = error.body.get("message") if isinstance(error.body, dict) else None
            reason = self._one_line(f"{error.status_code} {told or error.message}")
            passing = error.status_code in (408, 409, 425, 429) or error.status_code >= 500
            if error.code == "insufficient_quota":
                raise WorkFailed(f"{self._url}: {reason}; expected an account with credit") from None
            if not passing:
                raise LaaiError(f"{self._url}: {reason}; expected an endpoint that takes this request") from None
            raise _Trouble(reason, _retry_after(error.response.headers.get("retry-after"))) from None
        except openai.APITimeoutError:
            raise _Trouble("no answer in time") from None
        except openai.APIConnectionError as error:
            raise _Trouble(self._one_line(f"connection failed ({error.__cause__ or error})")) from None
        except (openai.OpenAIError, ValueError) as error:  # ValueError: a body that is not JSON
            raise _Trouble(self._one_line(f"answered no chat completion ({error})")) from None
        return _content(completion)

    def _one_line(self, text: str) -> str:
        """Short, and without the key, which a server may have put into its message."""
        text = " ".join(text.split())
        return (text.replace(self._key, "***") if self._key else text)[:300]


def _key() -> str:
    key = os.environ.get(KEY_VARIABLE, "").strip()
    # Others cannot be in a header, and the client's error would show the key.
    if not all("!" <= character <= "~" for character in key):
        raise LaaiError(f"{KEY_VARIABLE} has characters that no key has; expected printable ASCII without spaces")
    return key


def _content(completion: Any) -> Answer:
    try:
        text = completion.choices[0].message.content
    except (AttributeError, IndexError, TypeError):
        raise _Trouble("answered no chat completion") from None
    usage = getattr(completion, "usage", None)
    # No text at all is an answer too, and a paid one: a refusal, or a limit used up by reasoning.
    text = text.encode("utf-8", "replace").decode("utf-8") if isinstance(text, str) else ""
    return Answer(text, getattr(usage, "prompt_tokens", 0) or 0, getattr(usage, "completion_tokens", 0) or 0)


def _retry_after(value: str | None) -> float:
    """Seconds from a Retry-After header: a number or a date (RFC 9110, 10.2.3); 0 for none."""
    if value is None:
        return 0.0
    try:
        return max(0.0, float(value)) if value.strip().isdecimal() else _until(parsedate_to_datetime(value))
    except (ValueError, TypeError):
        return 0.0


def _until(moment: datetime) -> float:
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    return max(0.0, (moment - datetime.now(timezone.utc)).total_seconds())
