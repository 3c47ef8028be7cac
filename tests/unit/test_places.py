"""Shards are found and opened wherever they are: files, URLs, stores and commands."""

import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from gspo_mm.data.places import expand_shards, shard_name, shown
from gspo_mm.data.shards import FAULT, read_shard
from gspo_mm.types import DataError
from tests.tars import write_samples


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    return [write_samples(tmp_path / f"s{n}.tar", [f"{n}{i:02d}" for i in range(5)]) for n in range(3)]


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The folder of the shards, served by a plain web server, which knows no ranges."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def keys(place: str) -> list[str]:
    return [sample["__key__"] for sample in read_shard(place)]


def test_braces_and_globs_expand_in_order_each_shard_once(shards: list[str], tmp_path: Path) -> None:
    assert expand_shards([f"{tmp_path}/s{{0..1}}.tar", f"{tmp_path}/s*.tar"]) == shards


@pytest.mark.parametrize("pattern", ["s9.tar", "x*.tar", "s{0..3}.tar"])
def test_a_pattern_without_a_file_is_named(shards: list[str], tmp_path: Path, pattern: str) -> None:
    with pytest.raises(DataError) as caught:
        expand_shards([f"{tmp_path}/{pattern}"])
    assert str(tmp_path / pattern) in str(caught.value)


def test_braces_that_cannot_be_expanded_are_told() -> None:
    with pytest.raises(DataError, match=r"braces of shard pattern"):
        expand_shards(["pipe:cat {a,b"])


def test_a_web_server_is_read_like_a_folder(shards: list[str], web: str) -> None:
    assert expand_shards([f"{web}/s{{0..2}}.tar"]) == [f"{web}/s{n}.tar" for n in range(3)]
    assert expand_shards([f"{web}/*.tar"]) == [f"{web}/s{n}.tar" for n in range(3)]
    assert keys(f"{web}/s1.tar?signature=x") == keys(shards[1])


class Shaky(BaseHTTPRequestHandler):
    """Breaks off in the middle of its first answers."""

    content = b""
    breaks = 0  # answers that are still to be broken off

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.send_header("Accept-Ranges", "none")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        if type(self).breaks:
            type(self).breaks -= 1
            self.wfile.write(self.content[: len(self.content) // 2])
            return
        self.wfile.write(self.content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(("breaks", "lost"), [(2, False), (3, True)])
def test_a_store_that_breaks_off_is_asked_again(
    shards: list[str], monkeypatch: pytest.MonkeyPatch, breaks: int, lost: bool
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    handler = type("Handler", (Shaky,), {"content": Path(shards[0]).read_bytes(), "breaks": breaks})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = list(read_shard(f"http://127.0.0.1:{server.server_port}/a.tar"))
        server.shutdown()
    assert (FAULT in found[-1]) == lost
    if not lost:
        assert [sample["__key__"] for sample in found] == keys(shards[0])


def test_a_store_is_read_like_a_folder(shards: list[str]) -> None:
    store = fsspec.filesystem("memory")
    for shard in shards:
        store.pipe(f"/bucket/{Path(shard).name}", Path(shard).read_bytes())
    found = expand_shards(["memory://bucket/s*.tar"])
    assert [shard_name(place) for place in found] == ["s0.tar", "s1.tar", "s2.tar"]
    assert [keys(place) for place in found] == [keys(shard) for shard in shards]


def test_a_command_is_read_like_a_file(shards: list[str], tmp_path: Path) -> None:
    assert expand_shards([f"pipe:cat {tmp_path}/s{{0..1}}.tar"]) == [f"pipe:cat {s}" for s in shards[:2]]
    assert keys(f"pipe:cat {shards[0]}") == keys(shards[0])
    assert keys(f"pipe:gzip -c {shards[0]} | cat") == keys(shards[0])


def test_a_command_that_fails_halfway_is_a_fault_of_its_shard(shards: list[str]) -> None:
    *good, fault = read_shard(f"pipe:head -c 9000 {shards[0]}; echo no more >&2; exit 3")
    assert good
    assert "status 3: no more" in fault[FAULT]
    *whole, fault = read_shard(f"pipe:cat {shards[0]}; exit 4")  # after the tar has ended
    assert len(whole) == 4
    assert "status 4" in fault[FAULT]


def test_a_command_that_gives_nothing_stops_the_run() -> None:
    with pytest.raises(DataError, match=r"cannot be read: its command ended with status 127.*not found"):
        list(read_shard("pipe:no-such-program --here"))


def test_a_command_that_never_ends_is_ended(shards: list[str]) -> None:
    assert keys(f"pipe:cat {shards[0]}; yes") == keys(shards[0])
    reading = iter(read_shard(f"pipe:cat {shards[0]}; sleep 1000"))
    next(reading)
    reading.close()  # type: ignore[attr-defined]


def test_a_url_that_is_not_there_is_told_without_its_signature(shards: list[str], web: str) -> None:
    with pytest.raises(DataError, match=r"/gone.tar cannot be opened") as caught:
        list(read_shard(f"{web}/gone.tar?signature=secret"))
    assert "secret" not in str(caught.value)
    with pytest.raises(DataError, match="no shard matches"):
        expand_shards([f"{web}/gone*.tar"])


@pytest.mark.parametrize("url", ["nostore://a/*.tar", "http://127.0.0.1:9/*.tar"])
def test_a_store_that_cannot_be_listed_is_told(url: str) -> None:
    with pytest.raises(DataError, match="cannot be listed"):
        expand_shards([url])


@pytest.mark.parametrize(
    ("place", "name", "text"),
    [
        ("/a/b.tar", "b.tar", "/a/b.tar"),
        ("https://h/a/b.tar?sig=1#x", "b.tar", "https://h/a/b.tar"),
        ("s3://bucket/a/b.tar", "b.tar", "s3://bucket/a/b.tar"),
        ("pipe:cat /a/b.tar", "b.tar", "pipe:cat /a/b.tar"),
        ("pipe:curl https://h/b.tar?sig=1 -s", "b.tar -s", "pipe:curl https://h/b.tar -s"),
    ],
)
def test_a_place_has_a_name_and_a_form_for_messages(place: str, name: str, text: str) -> None:
    assert (shard_name(place), shown(place)) == (name, text)
