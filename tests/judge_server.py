"""A chat endpoint over real HTTP that answers, counts, and misbehaves as told. Shares no code with the packages."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Request(NamedTuple):
    """What was asked, when (time.monotonic()), and with which key."""

    body: dict[str, Any]
    moment: float
    key: str | None

    @property
    def question(self) -> str:
        return self.body["messages"][0]["content"]


# What a server can do with a request besides answering a text.
class Status(NamedTuple):
    """Refuse with this status."""

    code: int
    headers: dict[str, str] = {}
    error: dict[str, Any] = {"message": "broken"}


class Body(NamedTuple):
    """Answer 200 with these bytes."""

    content: bytes
    content_type: str = "application/json"


CLOSE = object()  # close the connection without an answer
CUT = object()  # close it in the middle of one

Deed = Any  # a text to answer, or one of the above


class JudgeServer:
    """`with JudgeServer(lambda request, number: "1") as server:` serves at `server.url`.

    `decide` gets each request and its number from 0, and may take its time. `server.paid` are the requests answered
    with a text: those a provider would charge for. Every one of them ends up there before its answer is sent.
    """

    def __init__(self, decide: Callable[[Request, int], Deed]):
        self.decide = decide
        self.requests: list[Request] = []
        self.paid: list[Request] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"judge": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> JudgeServer:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    judge: JudgeServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body leave apart: together with delayed ACKs that costs 40 ms

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        request = Request(body, time.monotonic(), self.headers.get("Authorization"))
        with self.judge.lock:
            number = len(self.judge.requests)
            self.judge.requests.append(request)
            self.judge.at_once += 1
            self.judge.most_at_once = max(self.judge.most_at_once, self.judge.at_once)
        assert self.path == "/v1/chat/completions"
        deed = self.judge.decide(request, number)
        with self.judge.lock:  # before the answer, upon which the client may ask again
            self.judge.at_once -= 1
            if deed is None or isinstance(deed, str):
                self.judge.paid.append(request)
        try:
            self._do(deed, request)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client is gone

    def _do(self, deed: Deed, request: Request) -> None:
        if deed is CLOSE:
            self.close_connection = True
        elif deed is CUT:
            self._send(200, b'{"id": "chat-1", "choi', "application/json", length=500)
            self.close_connection = True
        elif isinstance(deed, Status):
            self._send(deed.code, json.dumps({"error": deed.error}).encode(), "application/json", **deed.headers)
        elif isinstance(deed, Body):
            self._send(200, deed.content, deed.content_type)
        else:
            self._send(200, json.dumps(completion(request.body["model"], deed)).encode(), "application/json")

    def _send(self, code: int, body: bytes, kind: str, length: int | None = None, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Type": kind, "Content-Length": str(length or len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def completion(model: str, text: str | None) -> dict[str, Any]:
    """A chat completion as OpenAI's API reference has it."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": model,
        "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text, "refusal": None}}
        ],
        "usage": {"prompt_tokens": 30, "completion_tokens": 2, "total_tokens": 32},
    }
