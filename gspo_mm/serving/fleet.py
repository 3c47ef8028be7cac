"""The servers that answer for a run, as the trainer sees them: which are up, and which hold the current weights.

Only a server that holds the current weights is asked. A server that was started again holds those of model.path, so it
stands aside until the next push. With more than one server, sglang-router stands in front and spreads the prompts.
All methods but `close` belong to one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable

from gspo_mm.config import Config
from gspo_mm.runtime.preempt import StopRequest, stopped
from gspo_mm.serving.admin import is_alive
from gspo_mm.serving.host import ServerHost, host_beside_trainer
from gspo_mm.serving.launch import trainer_machines
from gspo_mm.serving.registry import beat, forget_ended, registered, servers_folder
from gspo_mm.serving.router import Router
from gspo_mm.serving.server import Holding, Server, ServerError

logger = logging.getLogger(__name__)

_POLL = 0.5  # seconds
_BEAT = 2.0  # seconds


class Fleet:
    """Watches RUN/servers, where it forgets what earlier runs left when it is made. Start it with `open`."""

    def __init__(self, config: Config, stop: StopRequest | None = None) -> None:
        self._config = config
        self._stop = stop or StopRequest()  # ends each wait for servers
        self._sglang = config.rollout.sglang
        self._folder = servers_folder(config.run.path)
        self._wanted = len(self._sglang.urls) or self._sglang.servers * trainer_machines(config)
        self._up: dict[str, Server] = {}
        self._holdings: dict[str, Holding] = {}  # by generation
        self._version = -1
        self._back = 0  # servers that came back
        self._changed = asyncio.Condition()
        self._router: Router | None = None
        self._routers = 1  # started
        self._complete = False  # whether all servers have been up
        self._fault: ServerError | None = None
        self._task: asyncio.Task[None] | None = None
        self._host: ServerHost | None = None
        # at once: a server elsewhere may stop for good before `open` is called, and that has to be seen
        forget_ended(self._folder)
        if self._sglang.start != "elsewhere" and not self._sglang.urls:
            self._host = host_beside_trainer(config, self._folder)

    async def open(self) -> None:
        """Start what is to be started here and wait for all servers.

        Raises ServerError when they do not come, StoppedError when the run is asked to stop first.
        """
        beat(self._folder)
        if self._host:
            self._host.start()
        if self._wanted > 1:
            self._router = Router(self._folder / "router.log")
        self._task = asyncio.create_task(self._watch())
        began = reported = time.monotonic()
        while len(self._up) < self._wanted:
            if self._fault:
                raise self._fault
            if self._stop.requested:
                raise stopped("while servers were awaited")
            now = time.monotonic()
            if now - began > self._sglang.start_timeout:
                raise ServerError(
                    f"{len(self._up)} of {self._wanted} servers are up after rollout.sglang.start_timeout="
                    f"{self._sglang.start_timeout} s; {self._whereabouts()}"
                )
            if now - reported > 15:
                reported = now
                logger.info("%d of %d servers are up after %.0f s", len(self._up), self._wanted, now - began)
            await asyncio.sleep(_POLL)
        self._complete = True

    @property
    def version(self) -> int:
        """Version of the weights that are sampled with."""
        return self._version

    def up(self) -> list[Server]:
        """Servers that a push of weights must reach."""
        return list(self._up.values())

    def holding(self, server: Server) -> Holding:
        """What this server holds since it was started."""
        return self._holdings.setdefault(server.generation, Holding())

    async def reachable(self) -> list[Server]:
        """As `up`, once there is one. Raises ServerError after rollout.sglang.down_timeout."""
        await self._wait_for(lambda: bool(self._up), "no server is up")
        return self.up()

    def stale(self) -> list[Server]:
        """Servers that came back and wait for the current weights."""
        return [server for server in self.up() if not self._is_current(server)]

    async def hold(self, version: int, servers: list[Server]) -> None:
        """`servers` now have the weights of `version`, which is the current one from now on."""
        self._version = version
        for server in servers:
            self.holding(server).version = version
        await self._route()

    async def url(self) -> tuple[str, str]:
        """Where to send a prompt, and the key; waits for a server. Raises ServerError after rollout.sglang.down_timeout."""
        await self._wait_for(lambda: bool(self._serving()), "no server holds the current weights")
        if self._router:
            return self._router.url, self._router.api_key
        server = self._serving()[0]
        return server.url, server.api_key

    def name_of(self, url: str) -> str:
        """The server behind `url`, for people; of several behind a router all that may have been asked."""
        known = [server for server in self.up() if self._router or server.url == url]
        return f"{' or '.join(server.name for server in known) or 'a server'} at {url}"

    def take_counts(self) -> dict[str, float]:
        """Servers that are up now, and that came back since the last call."""
        back, self._back = self._back, 0
        return {"rollout/servers_up": float(len(self._up)), "rollout/servers_back": float(back)}

    async def suspect(self, url: str) -> None:
        """A request to `url` failed: look at once whether the server is still there."""
        for server in list(self._up.values()):
            if self._router is None and server.url != url:
                continue
            if not await asyncio.to_thread(is_alive, server) and self._up.get(server.name) is server:
                logger.warning("server %s does not answer", server.name)
                del self._up[server.name]
                if self._sglang.urls:  # nobody knows whether it will come back with these weights
                    self._holdings.pop(server.generation, None)
                await self._route()

    def close(self, reason: str) -> None:
        """End servers started here, and report to the others."""
        beat(self._folder, ended=reason)
        router, self._router = self._router, None  # else another would be started
        if router:
            router.close()
        if self._host:
            self._host.stop(reason)

    async def _watch(self) -> None:
        try:
            await self._keep_watching()
        except Exception as error:
            # nobody waits for this task: the run would wait for servers without a word
            logger.exception("watching the servers failed")
            await self._fail(ServerError(f"the servers can no longer be watched: {error!r}"))

    async def _fail(self, fault: ServerError) -> None:
        self._fault = fault
        async with self._changed:
            self._changed.notify_all()

    async def _keep_watching(self) -> None:
        beaten = 0.0
        while True:
            if time.monotonic() - beaten > _BEAT:
                beat(self._folder)
                beaten = time.monotonic()
            await self._look_at_router()
            before = dict(self._up)
            gone = await self._look()
            if before != self._up or not self._is_routed():
                await self._route()
            if self._stop.requested:
                async with self._changed:
                    self._changed.notify_all()
            # a run may lose servers, but does not begin without one that it was promised
            if gone and (not self._complete or (not self._up and len(gone) >= self._wanted)):
                reasons = "; ".join(f"{server.name} {server.reason}" for server in gone)
                await self._fail(
                    ServerError(f"{len(gone)} of {self._wanted} servers have stopped for good: {reasons}")
                )
            await asyncio.sleep(_POLL)

    async def _look_at_router(self) -> None:
        """Start another when it has ended."""
        if self._router is None or (status := self._router.ended()) is None:
            return
        if self._routers > self._sglang.max_restarts:
            await self._fail(
                ServerError(
                    f"sglang-router has ended {self._routers} times, rollout.sglang.max_restarts="
                    f"{self._sglang.max_restarts}; its log is {self._router.log}"
                )
            )
            return
        self._routers += 1
        logger.warning(
            "sglang-router has ended with status %d: starting another, log in %s", status, self._router.log
        )
        self._router.close()
        self._router = Router(self._router.log)

    async def _look(self) -> list[Server]:
        """Bring `_up` up to date; returns servers that will not come back."""
        if self._sglang.urls:
            found = [_external(number, url, self._sglang.tp) for number, url in enumerate(self._sglang.urls)]
        else:
            found = registered(self._folder)
        for server in found:
            known = self._up.get(server.name)
            if server.state == "up" and known != server:
                if await asyncio.to_thread(is_alive, server):
                    self._up[server.name] = server
                    self._back += self._complete
            elif server.state != "up" and known:
                logger.warning("server %s is gone: %s", server.name, server.reason.split(";")[0])
                del self._up[server.name]
        return [server for server in found if server.state == "stopped"]

    async def _wait_for(self, ready: Callable[[], bool], trouble: str) -> None:
        if ready():
            return
        logger.warning("%s: waiting for one", trouble)
        async with self._changed:
            try:
                async with asyncio.timeout(self._sglang.down_timeout):
                    await self._changed.wait_for(lambda: ready() or self._fault or self._stop.requested)
            except TimeoutError:
                raise ServerError(
                    f"{trouble} for rollout.sglang.down_timeout={self._sglang.down_timeout} s; {self._whereabouts()}"
                ) from None
        if self._stop.requested and not ready():  # a loss of servers, after which the steps done are kept
            raise ServerError(f"{trouble}, and {stopped('while one was awaited')}")
        if self._fault:
            raise self._fault
        logger.info("servers are back")

    def _is_current(self, server: Server) -> bool:
        return self.holding(server).version == self._version

    def _serving(self) -> list[Server]:
        """Servers that can be asked: current and, where there is a router, known to it."""
        routed = self._router is None or (self._router.workers and self._router.ended() is None)
        return self._current() if routed else []

    def _current(self) -> list[Server]:
        return [server for server in self.up() if self._is_current(server)]

    def _is_routed(self) -> bool:
        """Whether the router knows all that can be asked: one may not have answered it."""
        return self._router is None or set(self._router.workers) == {server.url for server in self._current()}

    async def _route(self) -> None:
        if self._router:
            await self._router.serve(self._current())
        async with self._changed:
            self._changed.notify_all()

    def _whereabouts(self) -> str:
        if self._sglang.urls:
            return f"see that {', '.join(self._sglang.urls)} are running"
        where = "their logs are in" if self._host else "`gspo-mm serve` writes their logs into"
        return f"{where} {self._folder}"


def _external(number: int, url: str, workers: int) -> Server:
    return Server(
        name=f"external-{number}",
        generation=url,
        state="up",
        url=url.rstrip("/"),
        api_key=os.environ.get("GSPO_MM_API_KEY", ""),
        admin_key=os.environ.get("GSPO_MM_ADMIN_KEY", ""),
        workers=workers,
    )
