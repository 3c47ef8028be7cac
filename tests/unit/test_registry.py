"""RUN/servers tells who serves, to the owner alone, and never half of it."""

from __future__ import annotations

import json
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gspo_mm.serving.registry import (
    beat,
    forget_ended,
    last_beat,
    register,
    registered,
    servers_folder,
    write_private,
)
from gspo_mm.serving.server import Server
from tests.fake_server import FakeServer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return servers_folder(tmp_path / "run")


@pytest.fixture
def server() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.close()


def up(name: str, url: str = "http://127.0.0.1:1") -> Server:
    return Server(name=name, generation="g", state="up", url=url, api_key="k", admin_key="a", workers=2)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_registrations_read_back_in_the_order_of_their_names(folder: Path) -> None:
    for name in ("b", "a", "c"):
        register(folder, up(name))
    assert registered(folder) == [up("a"), up("b"), up("c")]


def test_a_server_has_one_registration_that_changes(folder: Path) -> None:
    register(folder, up("a"))
    gone = Server(name="a", generation="g", state="down", reason="it died")
    register(folder, gone)
    assert registered(folder) == [gone]


def test_keys_are_for_the_owner_alone(folder: Path) -> None:
    register(folder, up("a"))
    beat(folder)
    assert mode(folder) == 0o700
    assert [mode(path) for path in folder.iterdir()] == [0o600, 0o600]


def test_a_folder_that_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    (tmp_path / "servers").mkdir(mode=0o755)
    assert mode(servers_folder(tmp_path)) == 0o700


def test_readers_only_ever_see_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    texts = {json.dumps([number] * 20_000) for number in range(2)}
    write_private(path, next(iter(texts)))
    done = threading.Event()

    def write() -> None:
        for _ in range(50):
            for text in texts:
                write_private(path, text)
        done.set()

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    while not done.is_set():
        assert path.read_text() in texts
    for writer in writers:
        writer.join()
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_the_heartbeat_tells_whether_and_why_the_run_has_ended(folder: Path) -> None:
    assert last_beat(folder) is None
    beat(folder)
    first = last_beat(folder)
    assert first is not None
    assert first[1] == ""
    beat(folder, ended="all steps are done")
    last = last_beat(folder)
    assert last is not None
    assert last[0] >= first[0]
    assert last[1] == "all steps are done"
    assert registered(folder) == []


def test_a_new_run_forgets_who_is_gone_and_keeps_who_is_there(folder: Path, server: FakeServer) -> None:
    dead = FakeServer()
    dead.close()
    register(folder, up("alive", server.url))
    register(folder, up("dead", dead.url))
    register(folder, Server(name="stopped", generation="g", state="stopped", url=server.url))
    register(folder, Server(name="down", generation="g", state="down"))
    forget_ended(folder)
    assert [r.name for r in registered(folder)] == ["alive"]
