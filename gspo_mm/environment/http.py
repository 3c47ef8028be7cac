"""`type: http`: a server of your own answers turns. For what has to remember more of an answer than its turns, or is no Python.

    POST url   {"session": str, "key": str, "task": str, "answer": ..., "meta": {...},
                "turns": [{"text": str, "observation": {"text": str, "images": int} | null}, ...]}
    reply      {"done": true}, or {"text": str, "images": [base64 of encoded pictures]}; either may be left out

`session` is one answer's. Pictures of the question are sent with its first turn if `send_images` says so: "images": [base64].
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, Any

import httpx
from pydantic import BaseModel, ConfigDict, Field, validate_call
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from gspo_mm.environment.base import Feedback, session
from gspo_mm.types import Prompt, Turn


class _Reply(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    done: bool = False
    text: str = ""
    images: list[str] = []


class HttpEnvironment:
    @validate_call
    def __init__(
        self,
        url: Annotated[str, Field(pattern="^https?://")],
        headers: dict[str, str] | None = None,
        send_images: bool = False,
        tools: list[dict[str, Any]] | None = None,
    ) -> None:
        """`tools`: JSON schemas of functions that models are told of. A server that cannot be reached is asked three times."""
        self._url, self._headers, self._send_images = url, headers or {}, send_images
        self.tools = tools or []

    async def step(self, prompt: Prompt, turns: Sequence[Turn]) -> Feedback | None:
        asked: dict[str, Any] = {
            "session": session(),
            "key": prompt.key,
            "task": prompt.task,
            "answer": prompt.answer,
            "meta": dict(prompt.meta),
            "turns": [_told(turn) for turn in turns],
        }
        if self._send_images and len(turns) == 1:
            asked["images"] = [base64.b64encode(image.data).decode() for image in prompt.images]
        async with httpx.AsyncClient(timeout=None, headers=self._headers) as client:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(httpx.TransportError),
                stop=stop_after_attempt(3),
                wait=wait_exponential(multiplier=0.5, max=5.0),
                reraise=True,
            ):
                with attempt:
                    response = await client.post(self._url, json=asked)
        response.raise_for_status()
        reply = _Reply.model_validate_json(response.content)
        if reply.done:
            return None
        return Feedback(
            text=reply.text, images=[base64.b64decode(image, validate=True) for image in reply.images]
        )


def _told(turn: Turn) -> dict[str, Any]:
    seen = turn.observation
    read = {"text": seen.text, "images": len(seen.images)} if seen else None
    return {"text": turn.text, "observation": read}
