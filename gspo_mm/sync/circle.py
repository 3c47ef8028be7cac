"""Whose turn it is to send weights to which servers, where several ranks have some: they send at once, to different servers.

A server loads one bucket at a time, and two senders that broadcast to the same servers could each wait for a server that waits
for the other. So servers are in parts, and a part takes from one sender at a time. Its turns go around the senders, for
each part from another one on:

    turn     0          1          2          3
    part 0   sender 0   sender 1   sender 2   sender 3
    part 1   sender 2   sender 3   sender 0   sender 1

A round is a turn of every sender at every part: it brings one bucket of each to all servers. Rounds follow one another
without a stop. A sender hears from the one before it that a part is free, or that something failed; nobody else is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist

from gspo_mm.runtime.dist import Ranks
from gspo_mm.serving.server import ServerError


class Circle:
    """This rank's place among the senders of a push."""

    def __init__(self, ranks: Ranks, senders: Sequence[int], *, parts: int, rounds: int) -> None:
        """`senders`: ranks, this one among them, at least as many as `parts`. All go through `rounds` rounds."""
        place, self._size = senders.index(ranks.rank), len(senders)
        self._ranks = ranks
        self._before, self._after = senders[place - 1], senders[(place + 1) % self._size]
        first = [part * self._size // parts for part in range(parts)]  # the sender that begins with a part
        # (turn, part): no two at once
        self.turns = sorted(((place - first[part]) % self._size, part) for part in range(parts))
        self._last = rounds - 1, self._size - 1
        self._told: list[dist.Work] = []
        self._failed = False
        self.fault: ServerError | None = None  # of this rank

    def go_round(self, number: int, send: Callable[[int], None]) -> None:
        """Call `send` with each part when its turn has come, or not at all once a sender has failed."""
        for turn, part in self.turns:
            if self._size > 1 and (number, turn) != (0, 0):
                self._failed |= self._ranks.hear(self._before)
            if not self._failed:
                try:
                    send(part)
                except ServerError as fault:
                    self.fault, self._failed = fault, True
            if self._size > 1 and (number, turn) != self._last:
                self._told.append(self._ranks.tell(self._failed, self._after))
        if number == self._last[0]:
            for work in self._told:
                work.wait()
