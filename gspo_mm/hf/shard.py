"""A safetensors file written tensor by tensor, none of which is kept in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch

from gspo_mm.runtime.disk import UncachedFile

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def room_for(tensors: int) -> int:
    """Bytes of a header that names so many tensors."""
    return 2**12 + 512 * tensors


class ShardWriter:
    """A context; the file can be read when `finish` has returned, and not before. Raises OSError when the disk refuses."""

    def __init__(self, path: Path, *, room: int, cached: bool = True) -> None:
        """`room`: bytes kept free for the header, which is known last: the format lets it end in blanks.

        `cached`: for a reader that comes soon.
        """
        self.size = 0  # bytes of tensors
        self._header: dict[str, Any] = {}
        self._room = room // 8 * 8
        self._left = self._room - 64  # of it, less the part that is not of tensors
        self._path = path
        self._file = path.open("wb") if cached else UncachedFile(path)
        self._file.write(bytes(8 + self._room))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # what is still to be written is of no use
            self._file.close()

    def takes(self, name: str) -> bool:
        """Whether there is room in the header for another tensor, of eight dims at most."""
        return self._left > len(json.dumps(name)) + 256

    def add(self, name: str, parts: Iterable[torch.Tensor]) -> None:
        """Append a tensor, which is `parts` one after another along their first dim."""
        begin, shape, dtype = self.size, [], ""
        for part in parts:
            shape = [shape[0] + part.shape[0], *shape[1:]] if shape else list(part.shape)
            dtype = _DTYPES[part.dtype]
            self._file.write(memoryview(part.detach().contiguous().reshape(-1).view(torch.uint8).numpy()))
            self.size += part.nbytes
        self._header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, self.size]}
        self._left -= len(json.dumps({name: self._header[name]}))

    def finish(self) -> tuple[int, list[str]]:
        """Bytes and names of the tensors."""
        text = json.dumps({"__metadata__": {"format": "pt"}} | self._header).encode()
        assert len(text) <= self._room
        self._file.close()
        with self._path.open("r+b") as file:
            file.write(self._room.to_bytes(8, "little") + text.ljust(self._room))
        return self.size, list(self._header)
