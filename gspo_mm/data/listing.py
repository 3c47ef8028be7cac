"""The shards of an epoch by name and size, and how a run that is continued finds them again.

A checkpoint holds the list of the epoch under way, so that this epoch is ended with the shards that it began with; those
that have joined since come in with the next one. A shard is known by its name, so a folder may be moved.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from gspo_mm.data.places import is_local, shard_name, shown
from gspo_mm.types import DataError


class Shard(NamedTuple):
    place: str  # without the query of a URL, which may hold a signature
    size: int | None  # bytes; None for URLs and commands, which are known by their names alone

    @property
    def name(self) -> str:
        return shard_name(self.place)


def list_shards(places: Sequence[str]) -> tuple[Shard, ...]:
    return tuple(Shard(shown(place), _size(place)) for place in places)


def find_again(before: Sequence[Shard], places: Sequence[str]) -> tuple[list[str | None], list[str]]:
    """Where each shard of `before` is now, None for those that are gone, and the places that are none of them.

    The same place comes first, then the same name and size, then the same name. Raises DataError for a shard whose
    size is another.
    """
    left = dict(enumerate(zip(list_shards(places), places, strict=True)))
    found: dict[int, str] = {}
    for same in (
        lambda shard: (shard.place,),
        lambda shard: (shard.name, shard.size),
        lambda shard: (shard.name,),
    ):
        waiting = defaultdict(list)
        for number, (shard, _) in left.items():
            waiting[same(shard)].append(number)
        for number, shard in enumerate(before):
            if number not in found and (candidates := waiting[same(shard)]):
                now, found[number] = left.pop(candidates.pop(0))
                _check_size(shard, now)
    return [found.get(number) for number in range(len(before))], [place for _, place in left.values()]


def _check_size(before: Shard, now: Shard) -> None:
    if None not in (before.size, now.size) and before.size != now.size:
        raise DataError(
            f"shard {now.place} has {now.size} bytes, and had {before.size} when the checkpoint was written; restore it, "
            "or start another run.name"
        )


def _size(place: str) -> int | None:
    if is_local(place):
        with suppress(OSError):  # one that has vanished is named when it is read
            return Path(place).stat().st_size
    return None
