"""The part that asks a reward service of the user's own: http."""

from __future__ import annotations

import base64
from typing import Any

from pydantic import Field

from gspo_mm.data.pictures import shown
from gspo_mm.reward.endpoint import Endpoint, EndpointArgs, ServiceError, question_of
from gspo_mm.types import Completion, Prompt


class HttpArgs(EndpointArgs):
    images: bool = False
    extra: dict[str, Any] = Field(default={})  # sent with every request, as `args`


class Http:
    """POSTs one JSON object per completion to `url`, which answers {"score": value from 0 to 1}.

    The object has `key`, `task`, `question`, `answer` and `meta` of the prompt, `text` (the extracted answer),
    `response` (the whole text), `args`, and where asked for `images`, a list of base64.
    """

    def __init__(self, args: HttpArgs) -> None:
        self._args = args
        self._endpoint = Endpoint(args)

    async def judge(self, text: str, prompt: Prompt, completion: Completion) -> float:
        body = {
            "key": prompt.key,
            "task": prompt.task,
            "question": question_of(prompt),
            "answer": prompt.answer,
            "meta": dict(prompt.meta),
            "text": text,
            "response": completion.text,
            "args": self._args.extra,
        }
        if self._args.images:
            body["images"] = [base64.b64encode(shown(image.data)[1]).decode() for image in prompt.images]
        async with self._endpoint.slots:
            reply = await self._endpoint.post(self._args.url, body)
        score = reply.get("score") if isinstance(reply, dict) else None
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise ServiceError(
                f"{self._args.url} answered {str(reply)[:100]!r}, which has no number as score"
            )
        return float(score)

    async def close(self) -> None:
        await self._endpoint.close()
