"""A distributed checkpoint tensor by tensor: megatron-core's own reading and writing take a whole model.

torch.distributed.checkpoint's layout: files of tensors one after another, each as torch.save writes it, and `.metadata`, a
pickle that says which part of which tensor is where. What is written here is named, cut and described by megatron-core, from
a model on torch's meta device, so that it is what `distributed.py` would have written.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult

from gspo_mm.checkpoint.distributed import CheckpointError, common_of, finalize, request_of
from gspo_mm.policy.compat import StorageInfo, is_quantized, part_of_file
from gspo_mm.policy.model import PolicyModel
from gspo_mm.runtime.disk import UncachedFile

_OBJECTS = "objects.distcp"  # what is not a tensor

type Part = ShardedTensor | ShardedTensorFactory
# where a piece of a tensor is in a file: key and first element in the checkpoint, first byte and how many
type Place = tuple[str, list[int], int, int]


def write_value(file: UncachedFile, part: Part, value: torch.Tensor) -> Iterator[Place]:
    """Append a parameter's value to a file, in the pieces that checkpoints cut it into."""
    filled = replace(part, data=value)
    for piece in nested_values([_pieces(filled)]):
        data = piece.data.contiguous().reshape(_shape(piece))
        if data.untyped_storage().nbytes() != data.nbytes:  # of a view torch saves all that is behind it
            data = data.clone()
        begin = file.tell()
        torch.save(data, cast(BinaryIO, file))
        yield piece.key, list(piece.global_offset), begin, file.tell() - begin


def keys_of(parts: Iterable[Part]) -> set[str]:
    """What checkpoints call the tensors that these are cut into."""
    return {piece.key for part in parts for piece in nested_values([_pieces(part)])}


def describe(model: PolicyModel, folder: Path, places: Mapping[str, Iterable[Place]]) -> None:
    """Make a checkpoint of `folder`, whose files of tensors have `places`; `model` is on the meta device."""
    where = {
        (key, tuple(offset)): StorageInfo(file, begin, length)
        for file, of_file in places.items()
        for key, offset, begin, length in of_file
    }
    request = request_of([model], folder)
    _, buckets, results = request.async_fn_args
    written: dict[int, list[WriteResult]] = {}
    with (folder / _OBJECTS).open("wb") as file:
        for number, (_, _, (objects, tensors)) in enumerate(buckets):
            found = [(item, where[item.index.fqn, tuple(item.index.offset)]) for item, _ in tensors]
            for item, data in objects:
                begin = file.tell()
                file.write(data.getbuffer())
                found.append((item, StorageInfo(_OBJECTS, begin, file.tell() - begin)))
            written[number] = [
                WriteResult(index=item.index, size_in_bytes=info.length, storage_data=info)
                for item, info in found
            ]
    results.put(written)
    finalize(request)


class Reader:
    """Tensors of a checkpoint, whatever layout it was written under."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError for a folder that is none, or of which a file is missing or cut off."""
        common_of(folder)
        self.folder = folder
        self._metadata = FileSystemReader(folder).read_metadata()
        self._places: dict[MetadataIndex, Any] = self._metadata.storage_data
        ends: dict[str, int] = {}
        for info in self._places.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in ends.items():
            file = folder / name
            if not file.is_file() or file.stat().st_size < end:
                state = "is cut off" if file.is_file() else "is not there"
                raise CheckpointError(f"{file} {state}; take another checkpoint, or copy this one again")

    def names(self) -> set[str]:
        """Keys of all tensors."""
        tensors = self._metadata.state_dict_metadata.items()
        return {key for key, found in tensors if isinstance(found, TensorStorageMetadata)}

    def value(self, part: Part) -> torch.Tensor:
        """A whole parameter. Raises CheckpointError for one that the checkpoint does not have."""
        found: Any = dict_list_map_outplace(self._read, _pieces(part))
        return part.merge_fn(found) if isinstance(part, ShardedTensorFactory) else found

    def _read(self, piece: ShardedTensor) -> torch.Tensor:
        stored = self._metadata.state_dict_metadata.get(piece.key)
        if not isinstance(stored, TensorStorageMetadata) or tuple(stored.size) != tuple(piece.global_shape):
            size = tuple(stored.size) if isinstance(stored, TensorStorageMetadata) else "not in it"
            raise CheckpointError(
                f"{self.folder} is a checkpoint of another model: {piece.key} is {size}, and not {tuple(piece.global_shape)}"
            )
        first = piece.global_offset
        shape = _shape(piece)
        whole: torch.Tensor | None = None
        for chunk in stored.chunks:
            # first and end of what both have, counted over the whole tensor
            low = [max(a, b) for a, b in zip(first, chunk.offsets, strict=True)]
            high = [
                min(a + m, b + n) for a, m, b, n in zip(first, shape, chunk.offsets, chunk.sizes, strict=True)
            ]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            data = self._load(MetadataIndex(piece.key, chunk.offsets)).reshape(chunk.sizes)
            if tuple(chunk.offsets) == tuple(first) and tuple(chunk.sizes) == shape:
                return data.reshape(piece.local_shape)
            if whole is None:
                whole = torch.empty(shape, dtype=data.dtype)
            whole[_box(low, high, first)] = data[_box(low, high, chunk.offsets)]
        assert whole is not None
        return whole.reshape(piece.local_shape)

    def _load(self, index: MetadataIndex) -> torch.Tensor:
        info = self._places[index]
        file = self.folder / info.relative_path
        try:
            with file.open("rb", buffering=0) as stream:
                view = cast(BinaryIO, part_of_file(stream, info.offset, info.length))
                value = torch.load(view, map_location="cpu", weights_only=True)
            return value.dequantize() if is_quantized(value) else value
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise CheckpointError(
                f"{file} is damaged where {index.fqn} is ({' '.join(str(error).split())[:200]}); take another checkpoint, "
                "or copy this one again"
            ) from None


def _pieces(part: Part) -> Any:
    return part.build() if isinstance(part, ShardedTensorFactory) else part


def _shape(piece: ShardedTensor) -> tuple[int, ...]:
    """Of a piece as it is stored: with the axes that the whole tensor has before a parameter's own, such as that of experts."""
    return (1,) * piece.prepend_axis_num + tuple(piece.local_shape)


def _box(low: Iterable[int], high: Iterable[int], origin: Iterable[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))
