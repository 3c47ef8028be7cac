"""Reading ahead changes nothing but the time: same items, same errors, bounded memory, and closing never hangs."""

import gc
import threading
import time
from collections.abc import Iterator

import pytest

from gspo_mm.data import prefetch
from gspo_mm.data.prefetch import Prefetch
from tests.waiting import eventually


def ahead(items: Iterator[int], max_bytes: int = 10) -> Prefetch[int]:
    return Prefetch(items, size=lambda _: 1, max_bytes=max_bytes)


def test_items_come_in_order_and_end() -> None:
    assert list(ahead(iter(range(1000)))) == list(range(1000))


@pytest.mark.parametrize("max_bytes", [0, 1, 10])
def test_no_more_than_the_limit_is_read_ahead_but_always_one(max_bytes: int) -> None:
    read: list[int] = []
    items = ahead((read.append(i) or i for i in range(100)), max_bytes)
    assert next(items) == 0
    # what waits, and one that has been read and finds no room
    full = max(1, max_bytes) + 1
    eventually(lambda: len(read) >= full)
    time.sleep(0.05)
    assert full <= len(read) <= 1 + full
    assert [next(items) for _ in range(50)] == list(range(1, 51))
    assert len(read) <= 51 + full
    items.close()


def test_a_slow_and_a_fast_caller_get_everything() -> None:
    for max_bytes in (1, 3, 1000):
        items = Prefetch(iter(range(300)), size=lambda i: i % 7, max_bytes=max_bytes)
        found = []
        for item in items:
            found.append(item)
            if item % 50 == 0:
                time.sleep(0.01)
        assert found == list(range(300))


def test_a_large_item_counts_by_its_size() -> None:
    read: list[int] = []
    items = Prefetch((read.append(i) or i for i in range(100)), size=lambda _: 4, max_bytes=10)
    eventually(lambda: len(read) == 3)
    time.sleep(0.05)
    assert len(read) == 3
    items.close()


def test_of_the_smallest_items_no_more_than_some_are_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "_MOST", 5)
    read: list[int] = []
    items = Prefetch((read.append(i) or i for i in range(100)), size=lambda _: 0, max_bytes=10)
    eventually(lambda: len(read) == 6)
    time.sleep(0.05)
    assert len(read) == 6
    assert list(items) == list(range(100))


def test_an_error_reaches_the_caller_after_the_items_before_it_and_stays() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    items = ahead(failing())
    assert next(items) == 1
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            next(items)


def test_closing_stops_the_thread_and_its_generator() -> None:
    closed = threading.Event()

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    items = ahead(endless())
    next(items)
    items.close()
    items.close()
    assert closed.wait(5)
    assert next(items, None) is None


def test_closing_does_not_wait_for_a_read_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "_PATIENCE", 0.1)
    release = threading.Event()

    def hanging() -> Iterator[int]:
        yield 1
        release.wait(60)
        yield 2

    items = ahead(hanging())
    next(items)
    begin = time.monotonic()
    items.close()
    assert time.monotonic() - begin < 5
    release.set()


def test_a_caller_that_waits_is_woken_by_closing() -> None:
    release = threading.Event()
    items = ahead(iter(lambda: release.wait(60) and 1, None))
    found: list[object] = []
    waiting = threading.Thread(target=lambda: found.append(next(items, "ended")))
    waiting.start()
    time.sleep(0.05)
    threading.Thread(target=items.close).start()
    waiting.join(5)
    release.set()
    assert found == ["ended"]


def test_one_that_is_forgotten_ends_its_thread() -> None:
    items = ahead(iter(int, 1))
    next(items)
    thread = items._thread
    assert thread.is_alive()
    del items
    gc.collect()
    eventually(lambda: not thread.is_alive())
