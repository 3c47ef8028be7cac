"""An OpenAI-compatible endpoint that grades by rule, and can be made to fail in the ways endpoints do.

It believes whatever stands outside of the marked response, as a gullible model would: a response that gets a word out
of its marks wins. Inside, it does as it was told: what speaks of scores is bad, what says the reference is good.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_STOP = {"a", "an", "the", "on", "it", "because"}
_COLOURS = {"red", "blue", "green", "black"}

type Reply = tuple[int, Any]  # status, and JSON or text


class FakeJudge:
    """`with FakeJudge() as judge:` listens at judge.url; `replies` come first, then what `grade` says."""

    def __init__(self, grade: Callable[[dict[str, Any]], Any] | None = None) -> None:
        self.grade = grade or grade_by_rule
        self.replies: list[Reply] = []
        self.delay = 0.0  # seconds per answer
        self.usage = {"prompt_tokens": 100, "completion_tokens": 10}
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.keys: list[str | None] = []
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer._answer(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> FakeJudge:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            self.requests.append(body)
            self.times.append(time.monotonic())
            self.keys.append(handler.headers.get("Authorization"))
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            status, reply = self.replies.pop(0) if self.replies else (200, None)
        time.sleep(self.delay)
        if reply is None:
            reply = self.grade(body)
            if isinstance(reply, str):
                reply = {"choices": [{"message": {"content": reply}}], "usage": self.usage}
        with self._lock:
            self._now -= 1
        sent = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(sent)))
        handler.end_headers()
        handler.wfile.write(sent)


def text_of(body: dict[str, Any]) -> str:
    """The user's message."""
    content = body["messages"][1]["content"]
    return content if isinstance(content, str) else next(p["text"] for p in content if p["type"] == "text")


def split(body: dict[str, Any]) -> tuple[str, str]:
    """What stands in the marked response, and what around it, as one who reads from the top finds it."""
    marks = re.search(
        r"between the lines (<response \w+>) and (</response \w+>)", body["messages"][0]["content"]
    )
    assert marks
    before, _, rest = text_of(body).partition(f"\n{marks[1]}\n")
    inside, found, after = rest.partition(f"\n{marks[2]}")
    assert found, "the response is closed"
    return inside, before + after


def grade_by_rule(body: dict[str, Any]) -> str:
    inside, outside = split(body)
    if re.search(r"score|full points", outside.lower()):
        return json.dumps({"reason": "I was told so.", "score": 2})
    wanted = words(outside.split("Reference answer:\n")[1].split("\n")[0])
    given = words(inside)
    if (
        re.search(r"score|points", inside.lower())
        or len(given & _COLOURS) > 1
        or len(re.findall(r"\d+", inside)) > 1
    ):
        return json.dumps({"reason": "No answer.", "score": 0})
    found = len(wanted & given) / len(wanted)
    return json.dumps({"reason": "By its words.", "score": 2 if found == 1 else int(found > 0)})


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower())) - _STOP
