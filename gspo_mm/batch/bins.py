"""Micro-batches in the making: what they cost, and which of them has room for some sequences more."""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass

TRIES = 8  # bins, cheapest first, that are looked at before the one with most room


@dataclass(frozen=True, slots=True)
class Item:
    """One sequence, as far as balancing looks at it."""

    tokens: int  # rounded up; at most the budget, so that an overlong sequence fills a bin by itself
    cost: int  # without its images
    images: tuple[tuple[int, int], ...]  # (number, cost) of each distinct image it shows


type Unit = dict[int, Item]  # sequences that are placed together, by their place in the input


class Bin:
    """A micro-batch in the making."""

    def __init__(self, room: int) -> None:
        self.room = room  # tokens
        self.cost = 0  # every distinct image once
        self.members: Unit = {}
        self._shown: Counter[int] = Counter()  # how many members show an image

    @property
    def images(self) -> list[int]:
        return [image for image, count in self._shown.items() if count]

    def added(self, item: Item) -> int:
        """What `item` would cost here on top."""
        return item.cost + sum(cost for image, cost in item.images if not self._shown[image])

    def saved(self, item: Item) -> int:
        """What there is less to do without the member `item`."""
        return item.cost + sum(cost for image, cost in item.images if self._shown[image] == 1)

    def put(self, place: int, item: Item) -> None:
        self.cost += self.added(item)
        self.room -= item.tokens
        self.members[place] = item
        self._shown.update(image for image, _ in item.images)

    def take(self, place: int) -> Item:
        item = self.members.pop(place)
        self.cost -= self.saved(item)
        self.room += item.tokens
        self._shown.subtract(image for image, _ in item.images)
        return item


class Bins:
    """Bins that are found by least cost or by most room in O(log B).

    A bin's old entries stay in the heaps until they come up; they are known by a cost or room that is no longer true.
    """

    def __init__(self, count: int, max_tokens: int) -> None:
        self.all = [Bin(max_tokens) for _ in range(count)]
        self._by_cost = [(0, i) for i in range(count)]
        self._by_room = [(-max_tokens, i) for i in range(count)]

    def put(self, unit: Unit) -> bool:
        """Put `unit` into a cheap bin that has room; False when none has."""
        number = self._find(sum(item.tokens for item in unit.values()))
        if number is None:
            return False
        chosen = self.all[number]
        for place, item in unit.items():
            chosen.put(place, item)
        heapq.heappush(self._by_cost, (chosen.cost, number))
        heapq.heappush(self._by_room, (-chosen.room, number))
        return True

    def _find(self, tokens: int) -> int | None:
        looked_at: list[tuple[int, int]] = []
        found = None
        while found is None and self._by_cost and len(looked_at) < TRIES:
            cost, number = heapq.heappop(self._by_cost)
            if cost == self.all[number].cost:
                looked_at.append((cost, number))
                found = number if tokens <= self.all[number].room else None
        for entry in looked_at:
            heapq.heappush(self._by_cost, entry)
        if found is not None:
            return found
        while -self._by_room[0][0] != self.all[self._by_room[0][1]].room:
            heapq.heappop(self._by_room)
        room, number = -self._by_room[0][0], self._by_room[0][1]
        return number if tokens <= room else None
