"""Only servers that are up and hold the current weights are asked; who came back gets the weights first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from gspo_mm.config import parse_config
from gspo_mm.runtime.background import Background
from gspo_mm.runtime.preempt import StoppedError, StopRequest
from gspo_mm.serving import fleet as module
from gspo_mm.serving.fleet import Fleet
from gspo_mm.serving.registry import last_beat, register, servers_folder
from gspo_mm.serving.server import Server, ServerError
from tests.fake_server import FakeServer
from tests.waiting import PATIENCE, eventually

type Servers = Callable[[], FakeServer]


@pytest.fixture
def new_server() -> Iterator[Servers]:
    servers: list[FakeServer] = []

    def new() -> FakeServer:
        servers.append(FakeServer())
        return servers[-1]

    yield new
    for server in servers:
        server.close()


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Background]:
    monkeypatch.setattr(module, "_POLL", 0.02)
    background = Background("fleet")
    yield background
    background.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return servers_folder(tmp_path / "run")


def new_fleet(folder: Path, stop: StopRequest | None = None, **settings: Any) -> Fleet:
    """One that waits for servers that are started elsewhere."""
    run = folder.parent
    timeouts = {"start_timeout": 60, "down_timeout": 60, "request_timeout": 60}
    return Fleet(
        parse_config(
            {
                "run": {"name": run.name, "dir": str(run.parent)},
                "model": {"path": "m"},
                "data": {"train": ["a.tar"]},
                "reward": {"file": "r.yaml"},
                "rollout": {"engine": "sglang", "sglang": {"start": "elsewhere"} | timeouts | settings},
            }
        ),
        stop,
    )


def up(server: FakeServer, name: str = "a", generation: str = "") -> Server:
    return Server(
        name=name,
        generation=generation or f"first {name}",
        state="up",
        url=server.url,
        api_key="user",
        admin_key="admin",
    )


def gone(name: str = "a", state: Any = "stopped", reason: str = "its node died") -> Server:
    return Server(name=name, generation="", state=state, reason=reason)


def urls(servers: list[Server]) -> list[str]:
    return [server.url for server in servers]


# --- who is up


def test_servers_that_come_late_are_waited_for(loop: Background, folder: Path, new_server: Servers) -> None:
    server = new_server()
    fleet = new_fleet(folder)
    opening = loop.start(fleet.open())
    eventually(lambda: last_beat(folder) is not None)
    assert not opening.done()
    register(folder, up(server))
    opening.result(PATIENCE)
    assert fleet.up() == [up(server)]


def test_servers_that_do_not_come_are_a_fault(loop: Background, folder: Path) -> None:
    with pytest.raises(
        ServerError, match=r"0 of 1 servers are up after rollout\.sglang\.start_timeout=1 s"
    ) as caught:
        loop.run(new_fleet(folder, start_timeout=1).open())
    assert str(folder) in str(caught.value)


def test_a_stop_ends_the_wait_for_servers_that_do_not_come(loop: Background, folder: Path) -> None:
    stop = StopRequest()
    opening = loop.start(new_fleet(folder, stop).open())
    eventually(lambda: last_beat(folder) is not None)
    assert not opening.done()
    stop.requested = True
    with pytest.raises(StoppedError, match="stopped by a signal while servers were awaited; start again"):
        opening.result(PATIENCE)


def test_a_stop_ends_the_wait_for_servers_that_were_lost_as_a_loss_of_servers(
    loop: Background, folder: Path, new_server: Servers
) -> None:
    """After which a run keeps the steps that it has done."""
    stop, server = StopRequest(), new_server()
    register(folder, up(server))
    fleet = new_fleet(folder, stop)
    loop.run(fleet.open())
    register(folder, gone(state="down"))
    eventually(lambda: not fleet.up())
    waiting = [loop.start(fleet.url()), loop.start(fleet.reachable())]
    assert not any(wait.done() for wait in waiting)
    stop.requested = True
    for wait in waiting:
        with pytest.raises(ServerError, match=r"no server .*, and stopped by a signal while one was awaited"):
            wait.result(PATIENCE)


def test_a_registration_that_nobody_answers_for_is_not_up(
    loop: Background, folder: Path, new_server: Servers
) -> None:
    starting, ready = new_server(), new_server()
    starting.said["/ready"] = (502, "gone")
    register(folder, up(starting, "a"))
    register(folder, up(ready, "b"))
    fleet = new_fleet(folder)
    loop.run(fleet.open())
    assert fleet.up() == [up(ready, "b")]
    del starting.said["/ready"]
    eventually(lambda: len(fleet.up()) == 2)


def test_a_run_does_not_begin_without_a_server_that_it_was_promised(loop: Background, folder: Path) -> None:
    """Also when that stopped before anybody watched: while the model was loaded."""
    fleet = new_fleet(folder)
    register(folder, gone(reason="has no room"))
    with pytest.raises(ServerError, match="1 of 1 servers have stopped for good: a has no room"):
        loop.run(fleet.open())


def test_a_server_that_its_keeper_took_down_is_not_up(
    loop: Background, folder: Path, new_server: Servers
) -> None:
    fleet, _ = opened(loop, folder, new_server)
    register(folder, gone(state="down"))
    eventually(lambda: fleet.up() == [])


def test_a_suspected_server_is_looked_at_and_stays_if_it_answers(
    loop: Background, folder: Path, new_server: Servers
) -> None:
    fleet, (alive, dead) = opened(loop, folder, new_server, new_server)
    dead.close()
    loop.run(fleet.suspect(alive.url))
    assert set(urls(fleet.up())) == {alive.url, dead.url}
    loop.run(fleet.suspect(dead.url))
    assert urls(fleet.up()) == [alive.url]


def opened(loop: Background, folder: Path, *new: Servers, **settings: Any) -> tuple[Fleet, list[FakeServer]]:
    """A fleet whose servers, a, b and so on, are all up and have the weights of version 0."""
    servers = [make() for make in new]
    for name, server in zip("abc", servers, strict=False):
        register(folder, up(server, name))
    fleet = new_fleet(folder, **settings)
    loop.run(fleet.open())
    eventually(lambda: len(fleet.up()) == len(servers))
    loop.run(fleet.hold(0, fleet.up()))
    return fleet, servers


# --- who has the weights


def test_nobody_is_asked_before_the_first_push(loop: Background, folder: Path, new_server: Servers) -> None:
    register(folder, up(new_server()))
    fleet = new_fleet(folder, down_timeout=1)
    loop.run(fleet.open())
    assert fleet.version == -1
    with pytest.raises(
        ServerError, match=r"no server holds the current weights for rollout\.sglang\.down_timeout=1 s"
    ):
        loop.run(fleet.url())


def test_after_a_push_its_servers_are_asked_with_their_key(
    loop: Background, folder: Path, new_server: Servers
) -> None:
    register(folder, up(new_server()))
    fleet = new_fleet(folder)
    loop.run(fleet.open())
    waiting = loop.start(fleet.url())
    loop.run(fleet.hold(3, fleet.up()))
    assert waiting.result(PATIENCE) == (fleet.up()[0].url, "user")
    assert fleet.version == 3
    assert fleet.stale() == []


def test_a_server_that_a_push_did_not_reach_stands_aside(
    loop: Background, folder: Path, new_server: Servers
) -> None:
    fleet, (first, second) = opened(loop, folder, new_server, new_server)
    loop.run(fleet.hold(1, [server for server in fleet.up() if server.url == second.url]))
    assert urls(fleet.stale()) == [first.url]
    assert loop.run(fleet.url()) == (second.url, "user")


def test_a_server_that_was_started_anew_gets_the_weights_first(
    loop: Background, folder: Path, new_server: Servers
) -> None:
    fleet, (server,) = opened(loop, folder, new_server)
    again = up(server, generation="second")
    register(folder, again)
    eventually(lambda: fleet.up() == [again])
    assert fleet.stale() == [again]
    waiting = loop.start(fleet.url())
    loop.run(fleet.reachable())  # a turn of the loop
    assert not waiting.done()
    loop.run(fleet.hold(0, fleet.up()))
    assert waiting.result(PATIENCE) == (server.url, "user")


def test_a_server_that_was_only_out_of_reach_still_has_them(
    loop: Background, folder: Path, new_server: Servers
) -> None:
    fleet, (server,) = opened(loop, folder, new_server)
    server.said["/ready"] = (502, "gone")
    loop.run(fleet.suspect(server.url))
    assert fleet.up() == []
    del server.said["/ready"]
    eventually(fleet.up)
    assert fleet.stale() == []


# --- when all are gone


def test_a_push_waits_for_a_server(loop: Background, folder: Path, new_server: Servers) -> None:
    fleet, (server,) = opened(loop, folder, new_server)
    register(folder, gone(state="down"))
    eventually(lambda: fleet.up() == [])
    waiting = loop.start(fleet.reachable())
    again = up(server, generation="second")
    register(folder, again)
    assert waiting.result(PATIENCE) == [again]


def test_a_run_without_any_server_gives_up_after_a_while(
    loop: Background, folder: Path, new_server: Servers
) -> None:
    fleet, _ = opened(loop, folder, new_server, down_timeout=1)
    register(folder, gone(state="down"))
    eventually(lambda: fleet.up() == [])
    with pytest.raises(ServerError, match=r"no server is up for rollout\.sglang\.down_timeout=1 s"):
        loop.run(fleet.reachable())


def test_a_run_whose_servers_have_all_stopped_for_good_gives_up_at_once(
    loop: Background, folder: Path, new_server: Servers
) -> None:
    fleet, _ = opened(loop, folder, new_server)
    register(folder, gone(reason="ended with status 1"))
    eventually(lambda: fleet.up() == [])
    for wait in (fleet.url, fleet.reachable):
        with pytest.raises(ServerError, match="stopped for good: a ended with status 1"):
            loop.run(wait())


def test_hosts_elsewhere_hear_that_the_run_has_ended(
    loop: Background, folder: Path, new_server: Servers
) -> None:
    fleet, _ = opened(loop, folder, new_server)
    before = last_beat(folder)
    assert before is not None
    assert before[1] == ""
    fleet.close("all steps are done")
    after = last_beat(folder)
    assert after is not None
    assert after[1] == "all steps are done"


# --- servers that somebody else keeps running


@pytest.fixture
def external(
    loop: Background, folder: Path, new_server: Servers, monkeypatch: pytest.MonkeyPatch
) -> tuple[Fleet, FakeServer]:
    monkeypatch.setenv("GSPO_MM_API_KEY", "theirs")
    monkeypatch.setenv("GSPO_MM_ADMIN_KEY", "theirs too")
    server = new_server()
    fleet = new_fleet(folder, urls=[server.url + "/"])
    loop.run(fleet.open())
    loop.run(fleet.hold(0, fleet.up()))
    return fleet, server


def test_external_servers_are_asked_with_the_keys_of_the_environment(
    loop: Background, external: tuple[Fleet, FakeServer]
) -> None:
    fleet, server = external
    assert loop.run(fleet.url()) == (server.url, "theirs")
    assert fleet.up()[0].admin_key == "theirs too"


def test_an_external_server_that_was_away_gets_the_weights_first(
    loop: Background, external: tuple[Fleet, FakeServer]
) -> None:
    """Nobody tells whether it was started again."""
    fleet, server = external
    server.said["/ready"] = (502, "gone")
    loop.run(fleet.suspect(server.url))
    assert fleet.up() == []
    del server.said["/ready"]
    eventually(fleet.up)
    assert urls(fleet.stale()) == [server.url]


def test_a_server_that_pauses_for_weights_is_still_there(
    loop: Background, folder: Path, new_server: Servers
) -> None:
    fleet, (server,) = opened(loop, folder, new_server)
    server.said["/ready"] = (503, "")
    loop.run(fleet.suspect(server.url))
    assert fleet.up()


# --- the router in front of them


def kill_routers() -> None:
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile
            if "sglang_router" in " ".join(process.cmdline()):
                process.kill()


@pytest.mark.slow
def test_a_router_that_is_killed_is_replaced(loop: Background, folder: Path, new_server: Servers) -> None:
    pytest.importorskip("sglang_router")
    servers = [up(new_server(), "a"), up(new_server(), "b")]
    for server in servers:
        register(folder, server)
    fleet = new_fleet(folder, servers=2, max_restarts=1)
    loop.run(fleet.open())
    try:
        loop.run(fleet.hold(1, servers))
        first, _ = loop.run(fleet.url())
        kill_routers()

        def next_url() -> str:
            return url if (url := loop.run(fleet.url())[0]) != first else ""

        second = eventually(next_url)
        assert second.startswith("http://127.0.0.1:")
        answer = httpx.get(second + "/health", timeout=PATIENCE)
        assert answer.status_code == 200
        kill_routers()
        with pytest.raises(
            ServerError, match=r"sglang-router has ended 2 times, rollout.sglang.max_restarts=1"
        ):
            eventually(lambda: loop.run(fleet.url())[0] not in (first, second))
    finally:
        fleet.close("the test is over")
