"""One answer from an OpenAI-compatible endpoint, however often that takes.

The client's own retries are switched off: they sleep where Ctrl-C cannot end them, know nothing of one another in
several threads, and do not cover a body that is no chat completion.
"""

from __future__ import annotations

import json
import logging
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

logger = logging.getLogger(__name__)

OPENAI_URL = "https://api.openai.com/v1"
KEY_VARIABLE = "OPENAI_API_KEY"
# Tokens of the answer, one digit. No temperature: the paper gives none, and its five queries are five draws.
REQUEST: Mapping[str, Any] = MappingProxyType({"max_tokens": 16})
_OURS = ("model", "messages", "stream", "n")

ATTEMPTS = 8  # a query: with the waits between them about a minute and a half
_LONGEST_BACKOFF = 30.0  # seconds
_LARGEST_REPLY = 1 << 20  # bytes; the answer is one digit, and a reasoning model's thoughts some hundred kilobytes
_MOST_TOKENS = 10**9  # of one reply: Python refuses to print the longest numbers that JSON can say
_OF_THE_TRANSFER = (
    "content-encoding",
    "content-length",
    "transfer-encoding",
)  # headers that a body read does not have
_LONGEST_WAIT = 120.0  # seconds a server may ask for; longer, and the run is better resumed later


@dataclass(frozen=True)
class Judge:
    """The judge: a model, its endpoint, and the fields of the request besides model and message.

    Raises:
        LaaiError: for an address that is malformed or holds a secret, and for fields that are not the user's to set.
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
            # The address is stored in the cache, and shown in errors.
            raise LaaiError(f"base_url holds more than an address; expected the key in {KEY_VARIABLE} alone")
        taken = sorted(set(_OURS).intersection(self.request))
        if taken:
            raise LaaiError(f"request sets {', '.join(taken)}; expected fields other than {', '.join(_OURS)}")
        try:
            json.dumps(dict(self.request), allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise LaaiError(f"request is no JSON ({error}); expected finite numbers and Unicode text") from None

    @property
    def identity(self) -> tuple[str, str, str]:
        """Address, model and fields, which with the question identify an answer in the cache."""
        request = json.dumps(dict(self.request), sort_keys=True, ensure_ascii=True)
        return self.base_url.rstrip("/"), self.model, request


class Answer(NamedTuple):
    """The judge's text, and the tokens that the server counts (0 where it reports none)."""

    text: str
    prompt_tokens: int
    completion_tokens: int


class _ReplyTooLarge(Exception):
    """A reply of over `_LARGEST_REPLY` bytes, of which no more was read."""


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
        judge: the model and its endpoint.
        timeout: seconds without a byte from the server.
        backoff: seconds before the second attempt, doubled for each further one.

    Raises:
        LaaiError: as `package_and_key`.
    """

    def __init__(self, judge: Judge, timeout: float, backoff: float) -> None:
        openai, self._key = package_and_key(judge)
        self._openai = openai
        base_url, self._model, _ = judge.identity
        self._client = openai.OpenAI(
            base_url=base_url,
            api_key=self._key or "none",  # local servers need no key, the client requires one
            timeout=timeout,
            max_retries=0,
            default_headers={"Accept-Encoding": "identity"},  # a few compressed bytes can be a large reply
            http_client=_bounded_client(openai),
        )
        self._url, self._request, self._backoff = base_url, dict(judge.request), backoff
        self._warned = False  # of an unreadable usage
        self._closed_until = 0.0  # time.monotonic(); shared by all threads, as a rate limit is

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
        except (_ReplyTooLarge, openai.APIConnectionError) as error:
            if _ReplyTooLarge in (type(error), type(error.__cause__)):  # bare, or wrapped by older clients
                # The reply was charged, and the next attempt would be too.
                told = f"{self._url}: answered more than {_LARGEST_REPLY} bytes; expected a chat completion"
                raise WorkFailed(told) from None
            raise _Trouble(self._one_line(f"connection failed ({error.__cause__ or error})")) from None
        except (openai.OpenAIError, ValueError) as error:  # ValueError: a body that is not JSON
            raise _Trouble(self._one_line(f"answered no chat completion ({error})")) from None
        usage = getattr(completion, "usage", None)
        counts = [self._count(usage, name) for name in ("prompt_tokens", "completion_tokens")]
        return Answer(_text(completion), *counts)

    def _count(self, usage: Any, name: str) -> int:
        """A number of tokens; 0 and a warning where unreadable: the answer is valid without the count."""
        value = getattr(usage, name, None)
        if value is None:
            return 0
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_TOKENS:
            return value
        if not self._warned:
            self._warned = True
            shown = self._one_line(ascii(value)) if isinstance(value, str | float) else type(value).__name__
            logger.warning(
                "%s: usage.%s is %.60s; expected a whole number: the tokens reported are too few",
                self._url,
                name,
                shown,
            )
        return 0

    def _one_line(self, text: str) -> str:
        """Short, and without the key, which a server may have put into its message."""
        text = " ".join(text.split())
        return (text.replace(self._key, "***") if self._key else text)[:300]


def package_and_key(judge: Judge) -> tuple[Any, str]:
    """The openai package and the key, empty where none is set: what asking needs besides a server that answers.

    Raises:
        LaaiError: without the package, without a key for OpenAI's own address, and for a key that no header can hold.
    """
    try:
        import openai  # here and not above: only asking needs the extra
    except ImportError:
        raise LaaiError('judging needs the openai package: pip install "lm-eval-laai[judge]"') from None
    key = os.environ.get(KEY_VARIABLE, "").strip()
    # Others cannot be in a header, and the client's error would show the key.
    if not all("!" <= character <= "~" for character in key):
        raise LaaiError(f"{KEY_VARIABLE} has characters that no key has; expected printable ASCII without spaces")
    base_url, _, _ = judge.identity
    if not key and base_url == OPENAI_URL:
        raise LaaiError(f"{KEY_VARIABLE} is not set; expected the key of {base_url}, or another --base-url")
    return openai, key


def _bounded_client(openai: Any) -> Any:
    """The HTTP client that `openai` would make, but for replies that are too large."""

    class Bounded(openai.DefaultHttpxClient):
        def send(self, request: Any, **options: Any) -> Any:
            response = super().send(request, **{**options, "stream": True})
            body = bytearray()
            try:
                for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) > _LARGEST_REPLY:
                        raise _ReplyTooLarge
            finally:
                response.close()
            return type(response)(
                response.status_code,
                headers=[(name, value) for name, value in response.headers.items() if name not in _OF_THE_TRANSFER],
                content=bytes(body),
                request=response.request,
            )

    return Bounded()


def _text(completion: Any) -> str:
    """The answer's text. An empty one was charged too: a refusal, or a limit used up by reasoning."""
    try:
        text = completion.choices[0].message.content
    except (AttributeError, LookupError, TypeError):
        raise _Trouble("answered no chat completion") from None
    return text.encode("utf-8", "replace").decode("utf-8") if isinstance(text, str) else ""


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
