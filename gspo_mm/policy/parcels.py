"""Rank 0 has the shares of all ranks: they reach each machine once, and its first rank passes them on to the others there.

A data-parallel rank's shares are written once, however many ranks compute them together, as arrays; images stand in
them by their keys, and an image's bytes travel once to a machine and once to each of its ranks that packs it. So what rank 0
holds to send does not grow with the number of ranks: the batch, and a machine's part of it.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from gspo_mm.runtime.dist import Ranks
from gspo_mm.types import EncodedImage, Share


def passed_on(
    of_dp_rank: Sequence[list[Share]] | None, ranks: Ranks, dp_rank_of: Sequence[int]
) -> list[Share]:
    """This rank's shares of each update. A collective; rank 0 gives those of each data-parallel rank.

    `dp_rank_of`: the data-parallel rank of each rank.
    """
    first, *others = next(machine for machine in ranks.machines if ranks.rank in machine)
    if ranks.main:
        assert of_dp_rank is not None
        if ranks.size == 1:
            return of_dp_rank[0]
        parcel = Parcel.of(of_dp_rank)
        for to, *rest in ranks.machines:
            if to != 0:
                ranks.send(parcel.part({dp_rank_of[rank] for rank in (to, *rest)}).written(), to)
    else:
        parcel = Parcel.read(ranks.receive(0 if ranks.rank == first else first))
    if ranks.rank == first:
        for to in others:
            ranks.send(parcel.part({dp_rank_of[to]}).written(), to)
    if of_dp_rank is not None and ranks.main:
        return of_dp_rank[dp_rank_of[0]]
    return parcel.shares_of(dp_rank_of[ranks.rank])


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """The shares of some data-parallel ranks, and the images that they show, each once."""

    shares: dict[int, bytes]  # of each rank, with images by their keys
    shown: dict[int, frozenset[str]]  # the keys in them
    images: dict[str, EncodedImage]

    @classmethod
    def of(cls, of_dp_rank: Sequence[list[Share]]) -> Parcel:
        shares: dict[int, bytes] = {}
        shown: dict[int, frozenset[str]] = {}
        images: dict[str, EncodedImage] = {}
        for rank, own in enumerate(of_dp_rank):
            pickler = _Pickler(file := io.BytesIO())
            pickler.dump(own)
            shares[rank], shown[rank] = file.getvalue(), frozenset(pickler.images)
            images |= pickler.images
        return cls(shares=shares, shown=shown, images=images)

    def part(self, dp_ranks: Collection[int]) -> Parcel:
        shown = {rank: self.shown[rank] for rank in dp_ranks}
        images = {key: self.images[key] for key in frozenset().union(*shown.values())}
        return Parcel(shares={rank: self.shares[rank] for rank in dp_ranks}, shown=shown, images=images)

    def written(self) -> memoryview:
        pickle.dump(self, file := io.BytesIO(), protocol=5)
        return file.getbuffer()

    @staticmethod
    def read(data: memoryview) -> Parcel:
        return pickle.loads(data)

    def shares_of(self, dp_rank: int) -> list[Share]:
        return _Unpickler(io.BytesIO(self.shares[dp_rank]), self.images).load()


class _Pickler(pickle.Pickler):
    """Writes an image's key in its place, and notes the image."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.images: dict[str, EncodedImage] = {}

    def persistent_id(self, obj: Any) -> str | None:
        if not isinstance(obj, EncodedImage):
            return None
        self.images[obj.key] = obj
        return obj.key


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, images: dict[str, EncodedImage]) -> None:
        super().__init__(file)
        self._images = images

    def persistent_load(self, pid: Any) -> EncodedImage:
        return self._images[pid]
