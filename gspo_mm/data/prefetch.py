"""Reads ahead in a thread, so that the network and the disk work while the caller computes."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

# waking the other thread costs as much as reading a small sample, so it is done for several at a time
_BATCH = 32  # items that wake a waiting caller
_MOST = 2048  # items that wait: some steps' worth, where samples are so small that their bytes would allow tens of thousands
_LINGER = 0.005  # seconds after which it looks for fewer
_PATIENCE = (
    2.0  # seconds that `close` waits for the thread, which may hang in a read that cannot be interrupted
)


class _Shared:
    """What thread and caller share. The thread knows nothing else, so a forgotten `Prefetch` is collected and closed."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.items: deque[tuple[Any, int]] = deque()  # with their bytes
        self.bytes = 0
        self.wanted = False  # the caller waits
        self.full = 0  # bytes that waited when the thread found no room; 0: it reads
        self.ended = False  # no more items come
        self.fault: BaseException | None = None
        self.closed = False


class Prefetch[T]:
    """Iterator over `items`, which a thread runs through ahead of the caller.

    At most `max_bytes` of items wait, as `size` counts them, and `_MOST` items; there is always room for one. What `items`
    raises is raised here after the items before it, at this and every later call.
    """

    def __init__(self, items: Iterable[T], *, size: Callable[[T], int], max_bytes: int) -> None:
        self._shared = _Shared()
        self._thread = threading.Thread(
            target=_read, args=(iter(items), size, max_bytes, self._shared), name="prefetch", daemon=True
        )
        self._close = weakref.finalize(self, _close, self._shared)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        shared = self._shared
        with shared.changed:
            while not shared.items and not shared.ended and not shared.closed:
                shared.wanted = True
                shared.changed.wait(_LINGER)
            shared.wanted = False
            if shared.items:
                item, size = shared.items.popleft()
                shared.bytes -= size
                if shared.full and (not shared.items or shared.bytes <= shared.full // 2):
                    shared.changed.notify()
                return item
            if shared.fault:
                raise shared.fault
            raise StopIteration

    def close(self) -> None:
        """Stop reading and forget what waits. Never hangs: a thread stuck in a read is left to the process's end."""
        self._close()
        if self._thread is not threading.current_thread():
            self._thread.join(_PATIENCE)


def _close(shared: _Shared) -> None:
    with shared.changed:
        shared.closed = True
        shared.items.clear()
        shared.changed.notify_all()


def _is_full(shared: _Shared, bytes_: int, max_bytes: int) -> bool:
    return bool(shared.items) and (shared.bytes + bytes_ > max_bytes or len(shared.items) >= _MOST)


def _read(items: Iterator[Any], size: Callable[[Any], int], max_bytes: int, shared: _Shared) -> None:
    fault: BaseException | None = None
    try:
        for item in items:
            bytes_ = size(item)
            with shared.changed:
                while _is_full(shared, bytes_, max_bytes) and not shared.closed:
                    shared.full = max(1, shared.bytes)
                    shared.changed.wait()
                shared.full = 0
                if shared.closed:
                    return
                shared.items.append((item, bytes_))
                shared.bytes += bytes_
                if shared.wanted and len(shared.items) >= _BATCH:
                    shared.changed.notify()
    except BaseException as error:  # raised again in the caller's thread
        fault = error
    finally:
        with shared.changed:
            shared.fault, shared.ended = fault, True
            shared.changed.notify_all()
