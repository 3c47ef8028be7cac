"""What parts share that ask a service over HTTP: how many requests at a time, how fast, how often again."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Annotated, Any

import httpx
from pydantic import Field
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from gspo_mm.data.pictures import data_url
from gspo_mm.reward.part import Args
from gspo_mm.types import EncodedImage, Prompt

_RETRIED = {408, 409, 425, 429}  # and all 5xx
_LONGEST_WAIT = 60.0  # seconds between two tries
_SHOWN = 300  # characters of what a service answered, in an error


class EndpointArgs(Args):
    """Where the service is, and what it can bear."""

    url: str
    key_env: str | None = None  # environment variable that holds the key, sent as a bearer token
    images: bool = True  # send the prompt's images
    timeout: Annotated[float, Field(gt=0.0)] = 60.0  # seconds for one try
    retries: Annotated[int, Field(ge=0)] = 5  # after no connection, no answer in time, 429 and 5xx
    concurrency: Annotated[int, Field(ge=1)] = 16  # requests at a time
    per_minute: Annotated[float, Field(gt=0.0)] | None = None  # requests; null: no limit


class ServiceError(Exception):
    """A service did not answer as it should; the message says what it said."""


class Endpoint:
    """POSTs JSON to one service. Opens its connections in the event loop of the first request."""

    def __init__(self, args: EndpointArgs) -> None:
        """Raises ValueError for a url or key that cannot be used."""
        if not args.url.startswith(("http://", "https://")):
            raise ValueError(f"url={args.url!r} is no address; write http:// or https:// before it")
        key = os.environ.get(args.key_env) if args.key_env else ""
        if key is None:
            raise ValueError(
                f"key_env={args.key_env!r} names an environment variable that is not set; export it"
            )
        self._args = args
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.slots = asyncio.Semaphore(args.concurrency)  # to be held while asking
        self._next_start = 0.0
        self._client: httpx.AsyncClient | None = None

    async def post(self, url: str, body: dict[str, Any]) -> Any:
        """The JSON of the answer. Raises ServiceError when the service refuses, or fails too often."""
        tries = AsyncRetrying(
            retry=retry_if_exception(_may_pass),
            stop=stop_after_attempt(1 + self._args.retries),
            wait=wait_random_exponential(max=_LONGEST_WAIT),
            reraise=True,
        )
        try:
            return await tries(self._try, url, body)
        except httpx.HTTPStatusError as error:
            said = " ".join(error.response.text.split())[:_SHOWN]
            raise ServiceError(f"{url} answered {error.response.status_code}: {said}") from None
        except httpx.HTTPError as error:
            raise ServiceError(f"{url} cannot be asked: {type(error).__name__} {error}") from None

    async def close(self) -> None:
        if self._client:
            await self._client.aclose()

    async def _try(self, url: str, body: dict[str, Any]) -> Any:
        if self._client is None:
            self._client = httpx.AsyncClient(headers=self._headers, timeout=self._args.timeout)
        await self._keep_pace()
        response = await self._client.post(url, json=body)
        response.raise_for_status()
        try:
            return response.json()
        except ValueError:
            raise ServiceError(f"{url} answered no JSON: {response.text[:_SHOWN]}") from None

    async def _keep_pace(self) -> None:
        if self._args.per_minute is None:
            return
        now = time.monotonic()
        start = max(now, self._next_start)
        self._next_start = start + 60.0 / self._args.per_minute
        await asyncio.sleep(start - now)


def picture_url(image: EncodedImage) -> str:
    """The picture as a URL that holds it."""
    if not image.data:
        raise ValueError("the sample's picture is not at hand")
    return data_url(image.data)


def question_of(prompt: Prompt) -> str:
    """The text of the prompt's messages, with [image] where one stands; roles are named where there are several."""
    texts = []
    for message in prompt.messages:
        content = message["content"]
        parts = [content] if isinstance(content, str) else [p.get("text", "[image]") for p in content]
        texts.append((message["role"], "".join(parts)))
    if len(texts) == 1:
        return texts[0][1]
    return "\n\n".join(f"{role}: {text}" for role, text in texts)


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in _RETRIED or error.response.status_code >= 500
    return isinstance(error, httpx.TransportError)
