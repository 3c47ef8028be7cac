"""Senders go around the servers: at once, but never two at the same ones."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gspo_mm.serving.server import ServerError
from gspo_mm.sync.circle import Circle

PATIENCE = 30

type Lines = dict[tuple[int, int], SimpleQueue[bool]]


class Rank:
    """As much of `Ranks` as a circle needs, between threads."""

    def __init__(self, rank: int, lines: Lines) -> None:
        self.rank, self._lines = rank, lines

    def tell(self, flag: bool, to: int) -> Any:
        self._lines[self.rank, to].put(flag)
        return SimpleNamespace(wait=lambda: None)

    def hear(self, source: int) -> bool:
        return self._lines[source, self.rank].get(timeout=PATIENCE)


def run(senders: list[int], parts: int, rounds: int, send: Any) -> list[Circle]:
    """All of them in threads; `send(rank, round, part)`."""
    lines: Lines = {(before, after): SimpleQueue() for before in senders for after in senders}
    circles = [Circle(cast(Any, Rank(r, lines)), senders, parts=parts, rounds=rounds) for r in senders]

    def go(rank: int, circle: Circle) -> None:
        for number in range(rounds):
            circle.go_round(number, partial(send, rank, number))

    with ThreadPoolExecutor(len(senders)) as pool:
        for _ in pool.map(go, senders, circles):
            pass
    assert all(line.empty() for line in lines.values()), "the next push would hear it"
    return circles


@pytest.mark.parametrize(
    ("senders", "parts", "rounds"), [([0], 1, 3), ([0, 3], 1, 2), ([0, 3], 2, 2), ([1, 2, 4, 7, 9], 3, 4)]
)
def test_every_part_hears_every_sender_once_a_round_and_one_at_a_time(
    senders: list[int], parts: int, rounds: int
) -> None:
    heard: list[list[tuple[int, int]]] = [[] for _ in range(parts)]
    busy = [threading.Lock() for _ in range(parts)]

    def send(rank: int, number: int, part: int) -> None:
        assert busy[part].acquire(blocking=False)
        heard[part].append((number, rank))
        busy[part].release()

    run(senders, parts, rounds, send)
    for of_part in heard:
        assert sorted(of_part) == [(number, rank) for number in range(rounds) for rank in senders]
        assert [number for number, _ in of_part] == sorted(number for number, _ in of_part)
    assert len({of_part[0] for of_part in heard}) == parts, "each begins with another"


def test_as_many_send_at_once_as_there_are_parts() -> None:
    everyone = threading.Barrier(2)
    run([0, 1, 2, 3], 2, 3, lambda *_: everyone.wait(PATIENCE))


def test_a_fault_of_one_ends_the_sending_of_all() -> None:
    sent = []

    def send(rank: int, number: int, part: int) -> None:
        if (rank, number) == (1, 1):
            raise ServerError("gone")
        sent.append((number, rank))

    circles = run([0, 1, 2], 1, 5, send)
    assert sent == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert [str(circle.fault) if circle.fault else None for circle in circles] == [None, "gone", None]
