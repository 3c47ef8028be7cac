"""Replies of servers: read without keeping the training thread waiting, and checked before anything is made of them.

A reply is about 50 bytes of JSON per sampled token, and turning them into Python objects and checking them takes about a
microsecond a token, during which no other thread of the process runs. A large fleet samples 100,000 tokens a second and
more: replies of more than a few thousand tokens are therefore read in a process of their own, which sends back arrays.

`compact` checks what every token has; `check` the answer as a whole, against its request; both there where it is read.
What does not pass is a ReplyError, and the request is sent again: training relies on each of these numbers.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
from array import array
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import orjson

from gspo_mm.runtime.parent import end_only_with_parent
from gspo_mm.types import Finish

logger = logging.getLogger(__name__)

_HERE = 64 * 1024  # bytes that are read at once, in about a millisecond
_DEATHS = 3  # of the reading process, before replies are read in the trainer
_ROUNDING = 1e-3  # nats that a log-prob may be above 0
_NAN = (
    "NaN happened"  # SGLang's `matched` when it drew no token of the vocabulary; it then writes a stop token
)

type Decode = Callable[[Iterable[int]], str]

_reading: list[Any] = []  # in the reading process, what it was begun with
_ASKED = ("sampling_params", "logprob_start_len")  # what `check` looks at of a request


class ReplyError(Exception):
    """A reply is not what was asked for; the message says in what."""


class ReplyReader:
    """Owns the reading process, which is started with the first large reply."""

    def __init__(self, decode: Decode, *, vocab_size: int | None = None) -> None:
        """`decode` is sent to the process; `vocab_size` None: ids are not compared with it."""
        self._reading = decode, vocab_size
        self._pool: ProcessPoolExecutor | None = None
        self._deaths = 0

    async def read(self, content: bytes, request: dict[str, Any]) -> list[dict[str, Any]]:
        """The answers in a reply to POST /generate with body `request`; see `answers`."""
        asked = {name: request[name] for name in _ASKED if name in request}  # not its images
        while len(content) > _HERE and self._deaths < _DEATHS:
            if self._pool is None:
                context = multiprocessing.get_context("spawn")
                self._pool = ProcessPoolExecutor(1, context, initializer=_begin, initargs=self._reading)
            pool, loop = self._pool, asyncio.get_running_loop()
            try:
                return await loop.run_in_executor(pool, _answers, content, asked)
            except BrokenProcessPool:
                if pool is self._pool:  # others that waited for it are told too
                    self._pool, self._deaths = None, self._deaths + 1
                    logger.warning(
                        "the process that reads replies has died (%d of at most %d times; then the trainer reads them)",
                        self._deaths,
                        _DEATHS,
                    )
        return answers(content, asked, *self._reading)

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)


def answers(
    content: bytes, asked: dict[str, Any], decode: Decode, vocab_size: int | None
) -> list[dict[str, Any]]:
    """The samples as `compact` gives them, each with its `finish` and `text`, that of a stop token left out.

    Raises ReplyError unless they are what was `asked`.
    """
    samples = compact(content)
    ends = check(samples, asked, vocab_size=vocab_size)
    for sample, finish in zip(samples, ends, strict=True):
        ids = sample["output_ids"]
        sample |= {"finish": finish, "text": decode(ids[:-1] if finish is Finish.STOP else ids)}
    return samples


def _begin(decode: Decode, vocab_size: int | None) -> None:
    """In the reading process."""
    end_only_with_parent()
    _reading[:] = decode, vocab_size


def _answers(content: bytes, asked: dict[str, Any]) -> list[dict[str, Any]]:
    return answers(content, asked, *_reading)


def compact(content: bytes) -> list[dict[str, Any]]:
    """The samples, with token ids as int64 arrays, and their log-probs as a float64 array, token by token.

    Raises ReplyError where there is no log-prob for each token, or one that no distribution gives.
    """
    try:
        samples = orjson.loads(content)
    except orjson.JSONDecodeError:
        raise ReplyError(f"it is no JSON: {content[:200]!r}") from None
    if not isinstance(samples, list):
        raise ReplyError(f"it is no list of answers: {content[:200]!r}")
    for number, sample in enumerate(samples):
        try:
            _compact(sample)
        except ReplyError as fault:
            raise ReplyError(f"answer {number}: {fault}") from None
    return samples


def check(
    samples: list[dict[str, Any]], request: dict[str, Any], *, vocab_size: int | None = None
) -> list[Finish]:
    """Why each sample ended. Raises ReplyError unless they are answers to `request`."""
    parameters = request["sampling_params"]
    each = parameters if isinstance(parameters, list) else [parameters] * parameters["n"]
    if len(samples) != len(each):
        raise ReplyError(f"it has {len(samples)} answers where {len(each)} were asked for")
    ends: list[Finish] = []
    for number, (sample, asked) in enumerate(zip(samples, each, strict=True)):
        try:
            ends.append(_check(sample, asked, vocab_size))
            if request.get("logprob_start_len") == 0:
                of_prompt = _list(sample["meta_info"], "input_token_logprobs")
                _check_logprobs([_entry(entry)[0] for entry in of_prompt[1:]])
                if len(of_prompt) != sample["meta_info"]["prompt_tokens"]:
                    raise ReplyError(f"it has {len(of_prompt)} log-probs of its prompt's tokens")
        except ReplyError as fault:
            raise ReplyError(f"answer {number}: {fault}") from None
    return ends


def versions_of(meta: dict[str, Any], count: int) -> tuple[int, ...]:
    """Weight version of each token, -1 where none is given."""
    versions = [-1] * count
    for span in meta["weight_versions"]:
        version = int(span["version"]) if str(span["version"]).isdecimal() else -1
        versions[span["start"] : span["end"]] = [version] * (span["end"] - span["start"])
    return tuple(versions[:count])


def _compact(sample: Any) -> None:
    if not isinstance(sample, dict) or not isinstance(meta := sample.get("meta_info"), dict):
        raise ReplyError(f"it has no meta_info: {str(sample)[:200]}")
    reason = meta.get("finish_reason")
    if isinstance(reason, dict) and reason.get("type") == "abort":
        raise ReplyError(f"the server gave it up: {reason}")
    ids = _list(sample, "output_ids")
    entries = [_entry(entry) for entry in _list(meta, "output_token_logprobs")]
    sample["output_ids"] = _ids(ids, "output_ids")
    if sample.get("prompt_token_ids") is not None:
        sample["prompt_token_ids"] = _ids(_list(sample, "prompt_token_ids"), "prompt_token_ids")
    if [entry[1] for entry in entries] != ids:
        raise ReplyError(f"its {len(entries)} log-probs are not those of its {len(ids)} tokens")
    meta["output_token_logprobs"] = _check_logprobs([entry[0] for entry in entries])
    sample.pop("text", None)


def _check(sample: dict[str, Any], asked: dict[str, Any], vocab_size: int | None) -> Finish:
    meta, ids = sample["meta_info"], sample["output_ids"]
    if type(meta.get("prompt_tokens")) is not int:
        raise ReplyError(f"prompt_tokens={meta.get('prompt_tokens')!r} is no number of tokens")
    finish = _finish(meta.get("finish_reason"), ids, asked["stop_token_ids"])
    if not 0 < len(ids) <= asked["max_new_tokens"]:
        raise ReplyError(f"it has {len(ids)} tokens, and max_new_tokens={asked['max_new_tokens']}")
    if min(ids) < 0 or (vocab_size is not None and max(ids) >= vocab_size):
        raise ReplyError(
            f"token ids {min(ids)} to {max(ids)} are not in the vocabulary of {vocab_size or 'any model'}"
        )
    try:
        versions = versions_of(meta, len(ids))
    except (KeyError, TypeError, ValueError, AttributeError):
        versions = ()
    if len(versions) != len(ids) or min(versions) < 0:
        given = meta.get("weight_versions")
        raise ReplyError(f"weight version {given!r} is none that the trainer brought, or not of all tokens")
    return finish


def _finish(reason: Any, ids: Sequence[int], stops: Sequence[int]) -> Finish:
    """An answer is stopped by one of our stop tokens, which is its last; or cut off."""
    kind, matched = (reason.get("type"), reason.get("matched")) if isinstance(reason, dict) else (None, None)
    if matched == _NAN:
        raise ReplyError(f"the server's logits are not finite: it drew no token ({reason})")
    early = set(ids[:-1]) & set(stops)
    if early:
        raise ReplyError(f"it goes on after the stop token {min(early)}")
    stopped = bool(ids) and ids[-1] in stops
    if kind == "length":
        return Finish.STOP if stopped else Finish.LENGTH
    if kind != "stop":
        raise ReplyError(f"finish_reason={reason!r} is none that is known")
    if type(matched) is not int or not stopped or matched != ids[-1]:
        last = ids[-1] if ids else None
        raise ReplyError(
            f"it was stopped by {matched!r} at token {last}, and the stop tokens of model.path are {sorted(stops)}"
        )
    return Finish.STOP


def _list(values: dict[str, Any], name: str) -> list[Any]:
    if not isinstance(value := values.get(name), list):
        raise ReplyError(f"{name} is {'missing' if name not in values else f'no list: {str(value)[:100]}'}")
    return value


def _entry(entry: Any) -> tuple[Any, Any]:
    if not isinstance(entry, list) or len(entry) < 2:
        raise ReplyError(f"{str(entry)[:100]} is no pair of a log-prob and a token id")
    return entry[0], entry[1]


def _ids(values: list[Any], name: str) -> array[int]:
    try:
        if set(map(type, values)) <= {int}:
            return array("q", values)
    except OverflowError:
        pass
    raise ReplyError(f"{name} has something else than token ids: {str(values)[:100]}")


def _check_logprobs(values: list[Any]) -> array[float]:
    for number, value in enumerate(values):
        if type(value) not in (int, float) or not -float("inf") < value <= _ROUNDING:
            raise ReplyError(f"the log-prob of token {number} is {'null' if value is None else value}")
    return array("d", values)
