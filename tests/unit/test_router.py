"""sglang-router's own process in front of servers: prompts go to those that it was told of, with their keys."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from gspo_mm.serving.router import GROUP, Router
from gspo_mm.serving.server import Server, ServerError
from tests.fake_server import FakeServer, Handler
from tests.waiting import PATIENCE, eventually

pytest.importorskip("sglang_router")
pytestmark = pytest.mark.slow  # its process takes long to start

type Do = Callable[..., Any]


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    servers = [FakeServer(), FakeServer()]
    for server in servers:
        info = {
            "model_path": "m",
            "model_type": "qwen3_vl_moe",
            "tp_size": 1,
            "dp_size": 1,
            "version": "0.5.23",
        }
        for path in ("/get_server_info", "/server_info", "/get_model_info", "/model_info"):
            server.said[path] = (200, info)
    yield servers
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def do() -> Iterator[Do]:
    """Run a coroutine; all on one loop, as the fleet does."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("router") / "router.log"


@pytest.fixture(scope="module")
def shared_router(log: Path) -> Iterator[Router]:
    router = Router(log)
    yield router
    router.close()


@pytest.fixture
def router(shared_router: Router, do: Do) -> Iterator[Router]:
    """One that knows no server."""
    yield shared_router
    do(shared_router.serve([]))


def registration(server: FakeServer) -> Server:
    return Server(
        name=server.url, generation="g", state="up", url=server.url, api_key="user", admin_key="admin"
    )


def ask(router: Router, key: str | None = None, *, group: str = "") -> httpx.Response:
    return httpx.post(
        router.url + "/generate",
        json={"input_ids": [[1, 2, 3]], "sampling_params": {"n": 2}},
        headers={"Authorization": f"Bearer {key or router.api_key}", GROUP: group or secrets.token_hex(8)},
        timeout=PATIENCE,
    )


def test_prompts_go_to_the_servers_that_it_was_told_of_and_to_no_other(
    router: Router, servers: list[FakeServer], do: Do
) -> None:
    first, second = servers
    do(router.serve([registration(first), registration(second)]))
    assert set(router.workers) == {first.url, second.url}
    assert [len(ask(router).json()) for _ in range(8)] == [2] * 8
    asked = first.prompts() + second.prompts()
    assert len(asked) == 8
    assert {request.headers["Authorization"] for request in asked} == {"Bearer user"}
    do(router.serve([registration(second)]))
    assert set(router.workers) == {second.url}
    before = len(first.prompts())
    for _ in range(8):
        assert ask(router).status_code == 200
    assert len(first.prompts()) == before


def test_prompts_that_begin_alike_are_spread_over_all_servers(
    router: Router, servers: list[FakeServer], do: Do
) -> None:
    """Each stands for a group of answers: eight at one server while another has nothing to do would cost half."""
    go_on = threading.Event()

    def hold(handler: Handler) -> None:
        assert go_on.wait(PATIENCE)
        handler.say(200, [])

    for server in servers:
        server.script.extend([hold] * 8)
    do(router.serve([registration(server) for server in servers]))
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, router) for _ in range(8)]
        try:
            eventually(lambda: sum(len(server.prompts()) for server in servers) == 8)
            assert {len(server.prompts()) for server in servers} <= {3, 4, 5}
        finally:
            go_on.set()
        assert [call.result().status_code for call in asked] == [200] * 8


def test_requests_of_a_group_go_to_one_server_while_it_is_there(
    router: Router, servers: list[FakeServer], do: Do
) -> None:
    first, second = servers
    do(router.serve([registration(first), registration(second)]))
    for group in range(8):
        before = [len(server.prompts()) for server in servers]
        for _ in range(4):
            ask(router, group=f"group {group}")
        assert sorted(
            len(server.prompts()) - count for server, count in zip(servers, before, strict=True)
        ) == [0, 4]
    do(router.serve([registration(second)]))
    answers = [ask(router, group=f"group {group}").status_code for group in range(8)]
    assert answers == [200] * 8


def test_it_answers_nobody_without_its_key(router: Router, servers: list[FakeServer], do: Do) -> None:
    do(router.serve([registration(servers[0])]))
    assert ask(router, "wrong").status_code == 401
    assert not servers[0].prompts()


def test_its_key_is_on_no_command_line_and_in_no_log(
    router: Router, log: Path, servers: list[FakeServer], do: Do
) -> None:
    do(router.serve([registration(servers[0])]))
    ask(router)
    lines = [str(process.cmdline()) for process in psutil.Process().children(recursive=True)]
    assert any("sglang_router" in line for line in lines)
    assert not [text for text in [*lines, log.read_text()] if router.api_key in text]


def test_of_changes_at_once_the_latest_stays(router: Router, servers: list[FakeServer], do: Do) -> None:
    """Each request that fails looks for dead servers by itself, while the fleet looks too."""
    first, second = map(registration, servers)

    async def at_once(*changes: list[Server]) -> None:
        async with asyncio.TaskGroup() as group:
            for change in changes:
                group.create_task(router.serve(change))

    do(router.serve([first, second]))
    do(at_once([], [], [second], []))
    assert not router.workers
    do(at_once([first, second], [], [second]))
    assert set(router.workers) == {second.url}
    assert ask(router).status_code == 200


def test_a_server_that_dies_while_it_is_taken_in_is_left_out(
    router: Router, servers: list[FakeServer], do: Do
) -> None:
    dead = FakeServer()
    dead.close()
    do(router.serve([registration(dead), registration(servers[0])]))
    assert set(router.workers) == {servers[0].url}
    answer = ask(router)
    assert answer.status_code == 200, answer.text


def test_a_router_that_does_not_answer_is_a_sentence(
    tmp_path: Path, servers: list[FakeServer], do: Do, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gspo_mm.serving.router._PATIENCE", 0.5)
    router = Router(tmp_path / "router.log")
    monkeypatch.setattr(router, "_client", httpx.AsyncClient(base_url="http://127.0.0.1:9"))
    with pytest.raises(ServerError, match=r"sglang-router failed, see .*router\.log"):
        do(router.serve([registration(servers[0])]))
    router.close()
    do(router.serve([registration(servers[0])]))  # of one that has ended nothing is expected


def test_closing_ends_its_processes(tmp_path: Path, servers: list[FakeServer], do: Do) -> None:
    before = psutil.Process().children(recursive=True)
    router = Router(tmp_path / "router.log")
    do(router.serve([registration(servers[0])]))
    family = set(psutil.Process().children(recursive=True)) - set(before)
    assert len(family) >= 2  # guard and router
    router.close()
    assert not [process for process in family if process.is_running()]
