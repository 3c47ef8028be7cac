"""An HTTP server that speaks as much of SGLang's language as the client needs, and fails on request.

For faults that a real server cannot be made to have; what real servers answer is tested in tests/sglang.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.waiting import PATIENCE

type Action = Callable[["Handler"], None]


@dataclass(frozen=True, kw_only=True)
class Request:
    path: str
    headers: dict[str, str]  # names as in Content-Type; of several alike the first, as in SGLang
    raw: bytes

    @property
    def body(self) -> dict[str, Any]:
        return json.loads(self.raw)


class Handler(BaseHTTPRequestHandler):
    """One connection; HTTP/1.0, so that each request has its own."""

    server: _HttpServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._respond(b"")

    def do_POST(self) -> None:
        self._respond(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def do_DELETE(self) -> None:
        self._respond(b"")

    def say(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _respond(self, raw: bytes) -> None:
        headers = {name.title(): self.headers[name] for name in self.headers}
        self.server.fake.respond(self, Request(path=self.path, headers=headers, raw=raw))


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    fake: FakeServer


class FakeServer:
    """Answers every prompt with `answer`, unless `script` holds something else to do first."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.script: deque[Action] = deque()  # for the next POSTs to /generate
        self.answer: Callable[[dict[str, Any]], list[dict[str, Any]]] = answers
        self.said: dict[str, tuple[int, Any]] = {}  # status and body, by path
        self._lock = threading.Lock()
        self._http = _HttpServer(("127.0.0.1", 0), Handler)
        self._http.fake = self
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def prompts(self) -> list[Request]:
        return self.asked("/generate")

    def asked(self, path: str) -> list[Request]:
        return [request for request in self.requests if request.path == path]

    def respond(self, handler: Handler, request: Request) -> None:
        with self._lock:
            self.requests.append(request)
            generates = request.path == "/generate"
            action = self.script.popleft() if generates and self.script else None
        if action:
            action(handler)
        elif request.path in self.said:
            handler.say(*self.said[request.path])
        elif generates:
            handler.say(200, self.answer(request.body))
        else:
            handler.say(200, {"success": True})

    def close(self) -> None:
        """From now on nobody listens."""
        self._http.shutdown()
        self._http.server_close()


def answers(body: dict[str, Any]) -> list[dict[str, Any]]:
    """`n` replies to a batch of one prompt, as SGLang gives them."""
    return [reply(body["input_ids"][0], [10 + number]) for number in range(body["sampling_params"]["n"])]


def reply(
    prompt_ids: Iterable[int], output_ids: list[int], *, version: str = "0", **meta: Any
) -> dict[str, Any]:
    prompt_ids = list(prompt_ids)
    return {
        "text": "",
        "output_ids": output_ids,
        "prompt_token_ids": prompt_ids,
        "meta_info": {
            "id": "0",
            "finish_reason": {"type": "length", "length": len(output_ids)},
            "prompt_tokens": len(prompt_ids),
            "completion_tokens": len(output_ids),
            "weight_versions": [{"version": version, "start": 0, "end": len(output_ids)}],
            "output_token_logprobs": [[-0.5 - token, token, None] for token in output_ids],
        }
        | meta,
    }


def status(code: int, body: Any = "no") -> Action:
    """Answer with this status."""
    return lambda handler: handler.say(code, body)


def drop(handler: Handler) -> None:
    """Close the connection without an answer."""


class Hang:
    """Gives no answer; `begun` when the request has come, `gone` when the client has closed its end."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.gone = threading.Event()

    def __call__(self, handler: Handler) -> None:
        self.begun.set()
        handler.connection.settimeout(PATIENCE)
        if handler.connection.recv(1) == b"":
            self.gone.set()
