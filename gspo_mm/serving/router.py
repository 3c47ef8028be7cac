"""sglang-router in front of several servers: one address, prompts spread by load and by what is in their caches."""

from __future__ import annotations

import logging
import os
import secrets
import subprocess
import sys
from pathlib import Path

import httpx
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_fixed

from gspo_mm.runtime.net import LOOPBACK, free_port
from gspo_mm.serving.guard import guarded
from gspo_mm.serving.server import Server

logger = logging.getLogger(__name__)

_KEY = "GSPO_MM_ROUTER_KEY"
# the key travels in the environment: a command line is for everybody to read
_LAUNCH = (
    f"import os, sys; sys.argv += ['--api-key', os.environ.pop('{_KEY}')]; "
    "from sglang_router.launch_router import main; main()"
)
_PATIENCE = 60.0  # seconds for the router to start, or to take in a server


class _NotYetError(Exception):
    pass


class Router:
    """The router's process and the servers that it knows."""

    def __init__(self, log: Path) -> None:
        self.url = f"http://{LOOPBACK}:{free_port(LOOPBACK)}"
        self.api_key = secrets.token_hex(24)
        self.workers: dict[str, str] = {}  # the router's id of each server, by URL
        self._client = httpx.AsyncClient(
            base_url=self.url, headers={"Authorization": f"Bearer {self.api_key}"}, timeout=10.0
        )
        port = self.url.rpartition(":")[2]
        # a prompt goes where its beginning is known, unless that server has more than one prompt more to answer than
        # another: each stands for a whole group, and sglang-router's own 64 would leave servers idle
        command = [
            sys.executable, "-c", _LAUNCH, "--host", LOOPBACK, "--port", port, "--prometheus-host", LOOPBACK,
            "--prometheus-port", str(free_port(LOOPBACK)), "--policy", "cache_aware", "--balance-abs-threshold", "1",
            "--balance-rel-threshold", "1.0", "--disable-retries",
            "--request-timeout-secs", "86400", "--log-level", "warn",
        ]  # fmt: skip
        log.touch(mode=0o600)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                guarded(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, _KEY: self.api_key},
                start_new_session=True,
            )

    async def serve(self, servers: list[Server]) -> None:
        """Make `servers` the ones that prompts are sent to."""
        wanted = {server.url: server for server in servers}
        for url in set(self.workers) - set(wanted):
            await self._delete(self.workers.pop(url))
        for url in wanted.keys() - self.workers.keys():
            self.workers[url] = await self._add(wanted[url])

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()

    async def _add(self, server: Server) -> str:
        body = {"url": server.url, "api_key": server.api_key}
        async for attempt in self._patiently():
            with attempt:
                (await self._client.post("/workers", json=body)).raise_for_status()
        async for attempt in self._patiently():
            with attempt:
                known = (await self._client.get("/workers")).raise_for_status().json()["workers"]
                ids = [w["id"] for w in known if w["url"] == server.url and w["is_healthy"]]
                if not ids:
                    raise _NotYetError(f"the router has not taken in {server.url}")
                return ids[0]
        raise AssertionError

    async def _delete(self, worker: str) -> None:
        async for attempt in self._patiently():
            with attempt:
                response = await self._client.delete(f"/workers/{worker}")
                if response.status_code != 404:
                    response.raise_for_status()

    def _patiently(self) -> AsyncRetrying:
        return AsyncRetrying(
            retry=retry_if_exception_type((httpx.HTTPError, _NotYetError)),
            wait=wait_fixed(0.2),
            stop=stop_after_delay(_PATIENCE),
            reraise=True,
        )
