"""Many tensors as few flat ones: what travels in one piece, laid out as SGLang's `flattened_bucket` is.

A bucket is one run of bytes, tensor after tensor without gaps. There are two buffers in turn, so that one can be
filled while the other is under way, and no more memory than that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Tensors one after the other."""

    flat: torch.Tensor  # [bytes] uint8
    names: list[str] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)
    shapes: list[torch.Size] = field(default_factory=list)


class Buffers:
    """Buffers of `size` bytes each, used in turn; one that must take a larger tensor grows to it."""

    def __init__(self, size: int, device: torch.device, *, turns: int = 2) -> None:
        self._size = size
        self._device = device
        self._buffers = [torch.empty(0, dtype=torch.uint8, device=device) for _ in range(turns)]

    def fill(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[Bucket]:
        """Buckets that hold all of `tensors`, in their order.

        With two turns, the bucket before the one that is being filled is left alone; with one, none is.
        """
        turn, start, bucket = 0, 0, None
        for name, tensor in tensors:
            # SGLang reads the tensors as views, which must begin at a multiple of their element's size
            fits = bucket and start + tensor.nbytes <= len(bucket.flat) and not start % tensor.itemsize
            if bucket and not fits:
                yield _cut(bucket, start)
                bucket = None
            if bucket is None:
                bucket, turn, start = Bucket(flat=self._buffer(turn, tensor.nbytes)), turn + 1, 0
            end = start + tensor.nbytes
            bucket.flat[start:end].view(tensor.dtype).view(tensor.shape).copy_(tensor)
            bucket.names.append(name)
            bucket.dtypes.append(tensor.dtype)
            bucket.shapes.append(tensor.shape)
            start = end
        if bucket:
            yield _cut(bucket, start)

    def _buffer(self, turn: int, least: int) -> torch.Tensor:
        size, turn = max(self._size, least), turn % len(self._buffers)
        if len(self._buffers[turn]) < size:
            # given back before the larger one is taken
            self._buffers[turn] = torch.empty(0, device=self._device)
            self._buffers[turn] = torch.empty(size, dtype=torch.uint8, device=self._device)
        return self._buffers[turn]


def _cut(bucket: Bucket, end: int) -> Bucket:
    return Bucket(flat=bucket.flat[:end], names=bucket.names, dtypes=bucket.dtypes, shapes=bucket.shapes)
