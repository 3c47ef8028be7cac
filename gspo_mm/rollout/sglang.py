"""The rollout engine of real runs: asks SGLang servers over HTTP, from an event loop beside the training thread.

One request asks for all answers of a group, so that an image is sent, decoded and prefilled once; only to a server whose
draws are decided by seeds (deterministic inference) the prompt is sent once for each of them. Later turns are asked for one by
one, where the first was answered. A request is sent again when the connection or the server fails, never when the server refuses
it (4xx).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_exponential, wait_random

from gspo_mm.config import Config
from gspo_mm.data.processor import Processor
from gspo_mm.environment.conversation import Conversation, Conversations, conversations_of
from gspo_mm.rollout.engine import TokenSide
from gspo_mm.rollout.replies import ReplyError, ReplyReader
from gspo_mm.rollout.requests import (
    RetokenizedError,
    check_kept,
    check_prompt,
    completion_of,
    request_of,
    with_seeds,
)
from gspo_mm.runtime.background import Background
from gspo_mm.runtime.phases import Busy
from gspo_mm.runtime.preempt import StopRequest
from gspo_mm.runtime.seeds import derive_seed
from gspo_mm.runtime.watchdog import beat
from gspo_mm.serving.fleet import Fleet
from gspo_mm.serving.host import ServerHost, host_of_other_machine
from gspo_mm.serving.inspection import inspect_servers
from gspo_mm.serving.router import GROUP
from gspo_mm.serving.served import check_served, served
from gspo_mm.serving.server import Server, ServerError, bearer
from gspo_mm.types import Completion, EncodedPrompt, GspoError, SamplingParams

logger = logging.getLogger(__name__)

# how often one request is sent again before it is given up, of servers that
_REFUSALS = 5  # did not do it: 5xx, an answer broken off, a reply that cannot be used
_LOSSES = 50  # closed the connection, and are there all the same


class _RetryError(Exception):
    """The request may be sent again; `answered`: the server is there, and did not do it."""

    def __init__(self, reason: str, *, answered: bool = False) -> None:
        super().__init__(reason)
        self.answered = answered


class SGLangOpening:
    """Opening of servers: on rank 0 the fleet, on another machine of the trainer those that it starts there."""

    def __init__(self, config: Config, stop: StopRequest, *, main: bool) -> None:
        check_served(config)
        self._config = config
        self._fleet: Fleet | None = None
        self._host: ServerHost | None = None
        if main:
            self._fleet = Fleet(served(config), stop)
        else:
            self._host = host_of_other_machine(config)

    def open(self, processor: Processor) -> SGLangEngine | None:
        if self._host:
            self._host.start()
        if self._fleet is None:
            return None
        return SGLangEngine(
            self._config,
            processor,
            self._fleet,
            vocab_size=vocab_size(self._config.model.path),
            conversations=conversations_of(self._config.rollout, processor),
        )

    def close(self, reason: str) -> None:
        if self._host:
            self._host.stop(reason)


class SGLangEngine:
    """ServingEngine over the run's fleet of servers; `sync/` brings them the weights."""

    def __init__(
        self,
        config: Config,
        processor: TokenSide,
        fleet: Fleet,
        *,
        vocab_size: int | None = None,
        conversations: Conversations | None = None,
    ) -> None:
        """Starts the servers, or finds them, and waits until they are ready. Raises ServerError when they do not come.

        `vocab_size`: rows of the model's embeddings; None: token ids of answers are not compared with it.
        """
        self._processor = processor
        self._conversations = conversations
        self._deadline = config.rollout.sglang.request_timeout
        # by priority: evaluation does not queue behind what is sampled for training
        self._slots = [asyncio.Semaphore(config.rollout.max_in_flight) for _ in range(2)]
        self._busy = Busy()  # while servers have something to answer
        self._background = Background("rollouts")
        self._replies = ReplyReader(processor.decode, vocab_size=vocab_size)
        self._again = 0  # requests sent again
        self._known = self._cached = (
            0  # tokens of earlier turns that later ones go on from; those that servers had
        )
        self._name = secrets.token_hex(4)  # servers of rollout.sglang.urls may have answered another run
        self._closed = False
        self._client = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=10.0), limits=httpx.Limits(max_connections=None)
        )
        self._seed, self._sampled = config.run.seed, 0
        self.fleet = fleet
        try:
            self.run(self.fleet.open())
            # servers that draw by the seeds of requests alone give all samples of one seed the same answer
            self._seeded = inspect_servers(self.fleet.up(), config)
        except BaseException:
            self.close("servers did not come up")
            raise

    @property
    def version(self) -> int:
        return self.fleet.version

    def run(self, work: Any) -> Any:
        """Run a coroutine on the engine's loop and wait for it."""
        return self._background.run(work)

    async def hold(self, version: int, servers: list[Server]) -> None:
        """From now on ask `servers`, which have the weights of `version`: each is looked at once before answers in turns.

        Raises RetokenizedError for one that cannot have them, ServerError for one that does not answer.
        """
        new = [server for server in servers if not self.fleet.holding(server).keeps_ids]
        if new and self._conversations and (probe := self._conversations.probe()):
            for server in new:
                await self._check_keeps_ids(server, probe)
                self.fleet.holding(server).keeps_ids = True
        await self.fleet.hold(version, servers)

    def generate(
        self, prompts: list[EncodedPrompt], *, group_size: int, sampling: SamplingParams, seed: int
    ) -> list[list[Completion]]:
        """See RolloutEngine. Served before what `start` has begun: somebody waits for it.

        `seed` is not used: servers draw from their own streams, seeded by run.seed when they were started, or by seeds of
        `sample`.
        """

        async def everything() -> list[list[Completion]]:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self.sample(p, group_size, sampling, priority=1)) for p in prompts]
            return [task.result() for task in tasks]

        try:
            return self.run(everything())
        except* GspoError as faults:
            raise _first(faults) from None

    def start(
        self, prompt: EncodedPrompt, group_size: int, sampling: SamplingParams
    ) -> Future[list[Completion]]:
        """See ServingEngine."""
        return self._background.start(self.sample(prompt, group_size, sampling))

    def wants_weights(self) -> bool:
        """See ServingEngine."""
        return bool(self.fleet.stale())

    def logprobs_of(self, prompt: EncodedPrompt, *, tokens: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """See ServingEngine. Raises PromptMismatchError like `sample`."""
        sampling = SamplingParams(temperature=0.0, max_new_tokens=tokens)
        request = request_of(prompt, self._processor, sampling, 1) | {
            "logprob_start_len": 0,
            "extra_key": f"parity {self.version}",  # no prefix from a cache that older weights filled
        }
        (reply,) = self.run(self.ask(request))
        check_prompt(reply, prompt)
        meta: dict[str, Any] = reply["meta_info"]
        of_prompt = (entry[0] for entry in meta["input_token_logprobs"][1:])
        return tuple(reply["output_ids"]), (*of_prompt, *meta["output_token_logprobs"])

    def take_busy(self) -> float:
        """See ServingEngine."""
        return self._busy.take()

    def take_counts(self) -> dict[str, float]:
        """Requests sent again since the last call, and the fleet's counts."""
        again, self._again = self._again, 0
        known, cached, self._known, self._cached = self._known, self._cached, 0, 0
        of_cache = {"turns/cached_fraction": cached / known} if known else {}
        return {"rollout/asked_again": float(again)} | of_cache | self.fleet.take_counts()

    async def sample(
        self, prompt: EncodedPrompt, group_size: int, sampling: SamplingParams, *, priority: int = 0
    ) -> list[Completion]:
        """One group. Raises PromptMismatchError, or ServerError past rollout.sglang.request_timeout."""
        # all turns of a group are asked for where its first was answered: that server has its prompt and answers in its cache
        turn = partial(self._sample_turn, priority=priority, group=secrets.token_hex(8))
        async with self._slots[priority]:
            answers = await turn(prompt, group_size, sampling)
            if conversations := self._conversations:
                led = (
                    self._lead(conversations, Conversation.of(prompt, answer), sampling, turn)
                    for answer in answers
                )
                answers = await asyncio.gather(*led)
        return answers

    async def _sample_turn(
        self,
        prompt: EncodedPrompt,
        count: int,
        sampling: SamplingParams,
        *,
        priority: int,
        group: str,
        known: int = 0,
    ) -> list[Completion]:
        """`known`: how many tokens of the prompt are those of the turn before, which a server has read or sampled."""
        with self._busy:
            # pictures are decoded and encoded there, which must not hold up the loop
            request = await asyncio.to_thread(request_of, prompt, self._processor, sampling, count)
            # `extra_key`: prefixes are shared only with prompts of the same weights. A server that keeps answers under
            # way through an update (rollout.on_update=in_place) cannot forget those that it has.
            request |= {"priority": priority, "extra_key": f"{self._name} {self.version}"}
            if self._seeded:
                self._sampled += 1
                labels = ("sample", self.version, self._sampled)
                request = with_seeds(request, [derive_seed(self._seed, *labels, i) for i in range(count)])
            replies = await self.ask(request, group=group)
        beat()
        if known:
            self._known += known * count
            self._cached += sum(min(known, reply["meta_info"].get("cached_tokens", 0)) for reply in replies)
        return [completion_of(reply, prompt) for reply in replies]

    async def _lead(
        self,
        conversations: Conversations,
        led: Conversation,
        sampling: SamplingParams,
        turn: Callable[..., Awaitable[list[Completion]]],
    ) -> Completion:
        """The answer with all of its turns."""
        while isinstance(found := await conversations.follow(led), Conversation):
            limited = replace(sampling, max_new_tokens=found.most)
            known = len(led.read.token_ids) + len(led.answer.turns[-1].token_ids)
            (new,) = await turn(found.read, 1, limited, known=known)
            led = found.with_turn(new)
        return found

    async def ask(self, request: dict[str, Any], *, group: str | None = None) -> list[dict[str, Any]]:
        """POST /generate until it is answered; one reply per sample, as `replies.answers` makes them.

        Requests of one `group` go to the same server. Raises ServerError when servers cannot answer it.
        """
        headers = {GROUP: group or secrets.token_hex(8)}
        async for attempt in self._attempts():
            with attempt:
                return await self._post(*await self.fleet.url(), request, headers)
        raise AssertionError

    def close(self, reason: str = "the run has ended") -> None:
        """End the servers that were started here. May be called again."""
        if self._closed:
            return
        self._closed = True
        if self._conversations:
            self._conversations.close()
        self.fleet.close(reason)
        self._replies.close()
        self._background.run(self._client.aclose())
        self._background.close()

    async def _check_keeps_ids(self, server: Server, probe: EncodedPrompt) -> None:
        request = request_of(probe, self._processor, SamplingParams(max_new_tokens=1), 1)
        try:
            (reply,) = await self._post(server.url, server.api_key, request, {})
        except _RetryError as fault:
            if fault.answered:  # a processor that takes the ids for those of their text may fail over them
                raise RetokenizedError(f"{fault}, to a probe of ids that it would not make itself") from None
            raise ServerError(f"a probe was not answered: {fault}") from None
        check_kept(reply, probe, who=f"server {server.name} at {server.url}")

    async def _post(self, url: str, key: str, request: dict[str, Any], headers: dict[str, str]) -> Any:
        try:
            async with asyncio.timeout(self._deadline):
                response = await self._client.post(
                    f"{url}/generate", json=request, headers=headers | bearer(key)
                )
        except TimeoutError:
            raise ServerError(
                f"a prompt was not answered within rollout.sglang.request_timeout={self._deadline} s; raise it, or "
                "lower rollout.sampling.max_new_tokens or rollout.max_in_flight"
            ) from None
        except httpx.RequestError as error:
            who = self.fleet.name_of(url)
            await self.fleet.suspect(url)
            raise _RetryError(
                f"{who}: {error!r}", answered=not isinstance(error, httpx.TransportError)
            ) from None
        who = self.fleet.name_of(url)
        if response.status_code >= 500:
            await self.fleet.suspect(url)
            raise _RetryError(f"{who} answered {response.status_code}: {response.text[:300]}", answered=True)
        if response.status_code >= 400:
            raise ServerError(
                f"{who} refused a prompt with status {response.status_code}: {response.text[:300]}"
            )
        try:
            return await self._replies.read(response.content, request)
        except ReplyError as fault:
            raise _RetryError(f"{who} gave a reply that cannot be used: {fault}", answered=True) from None

    def _attempts(self) -> AsyncRetrying:
        refusals = losses = 0

        def note(state: RetryCallState) -> None:
            nonlocal refusals, losses
            assert state.outcome
            error = state.outcome.exception()
            assert isinstance(error, _RetryError)
            refusals, losses = refusals + error.answered, losses + (not error.answered)
            if refusals > _REFUSALS:
                raise ServerError(f"a prompt was refused {refusals} times; {error}")
            if losses > _LOSSES:
                raise ServerError(f"the connection was lost {losses} times over a prompt; {error}")
            self._again += 1
            logger.warning("sending a prompt again (attempt %d): %s", state.attempt_number + 1, error)

        return AsyncRetrying(
            retry=retry_if_exception_type(_RetryError),
            wait=wait_exponential(multiplier=0.2, max=10.0) + wait_random(0.0, 1.0),
            before_sleep=note,
            reraise=True,
        )


def vocab_size(model_path: str) -> int:
    """Rows of the model's embeddings."""
    from transformers import AutoConfig

    text: Any = AutoConfig.from_pretrained(model_path).get_text_config()
    return text.vocab_size


def _first(faults: BaseExceptionGroup[GspoError]) -> GspoError:
    error = faults.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
