"""Replies of servers, read without keeping the training thread waiting.

A reply is about 50 bytes of JSON per sampled token, and turning them into Python objects takes about a microsecond a
token, during which no other thread of the process runs. A large fleet samples 100,000 tokens a second and more:
replies of more than a few thousand tokens are therefore read in a process of their own, which sends back plain arrays.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
from array import array
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import orjson

from gspo_mm.runtime.guard import end_only_with_parent

logger = logging.getLogger(__name__)

_HERE = 64 * 1024  # bytes that are read at once, in about a millisecond


class ReplyReader:
    """Owns the reading process, which is started with the first large reply."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._fell_back = False

    async def read(self, content: bytes) -> list[dict[str, Any]]:
        """The samples of a reply to POST /generate; see `compact`."""
        if len(content) <= _HERE or self._fell_back:
            return compact(content)
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                1, mp_context=multiprocessing.get_context("spawn"), initializer=end_only_with_parent
            )
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, compact, content)
        except BrokenProcessPool:
            logger.warning(
                "the process that reads replies has died; they are read in the trainer from now on"
            )
            self._fell_back = True
            return compact(content)

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)


def compact(content: bytes) -> list[dict[str, Any]]:
    """The samples, with token ids as int64 arrays, and their log-probs as a float64 array, token by token."""
    samples = orjson.loads(content)
    for sample in samples:
        sample["output_ids"] = array("q", sample["output_ids"])
        if sample.get("prompt_token_ids") is not None:
            sample["prompt_token_ids"] = array("q", sample["prompt_token_ids"])
        meta = sample["meta_info"]
        meta["output_token_logprobs"] = array("d", (entry[0] for entry in meta["output_token_logprobs"]))
        sample.pop("text", None)
    return samples
