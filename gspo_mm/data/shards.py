"""A WebDataset shard -> its samples, undecoded.

A damaged shard gives its readable samples and then one that only says what is wrong, so that the fault is counted
and named with all others. Nothing is written to disk under a member's name, and nothing in it is unpickled.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

from gspo_mm.data.places import PipeError, open_shard, reason_of, shown
from gspo_mm.types import DataError

FAULT = "__fault__"  # key of a sample that reports damage of its shard instead of bringing data
SOURCE = "__source__"  # key of the name of the source that a sample comes from
MAX_MEMBER_BYTES = 256 * 2**20  # a larger one is a damaged header, or a small compressed shard that would fill the memory
_BLOCK = 512  # bytes; two blocks of zeros end a whole tar

type RawSample = Mapping[str, Any]  # {"__key__": str, "__url__": str, suffix: bytes, ...}


def read_shard(place: str) -> Iterator[RawSample]:
    """Samples of one tar, plain or compressed, in their order; damage ends it with a sample {FAULT: what is wrong}.

    Raises DataError when the shard cannot be opened at all, or its command fails before anything came: one that
    vanished is not a damaged sample.
    """
    from webdataset.tariterators import group_by_keys  # imports torch

    faults: list[str] = []
    held: dict[str, Any] | None = None
    for sample in group_by_keys(
        _members(place, faults), handler=lambda error: not faults.append(str(error.args[0]))
    ):
        if held is not None:
            yield held
        held = sample
    # the last sample before damage may lack members: it is part of the fault
    if held is not None and not faults:
        yield held
    if faults:
        yield {"__key__": held["__key__"] if held else "?", "__url__": place, FAULT: "; ".join(faults)}


def _members(place: str, faults: list[str]) -> Iterator[dict[str, Any]]:
    """Files of the tar as webdataset's `group_by_keys` wants them; what stops the reading goes to `faults`.

    Read here and not by webdataset's `tar_file_iterator`, for the two things that it does not look at: the size of a
    member before it is read, and the end of the tar, without which one that was cut between two members seems whole.
    """
    came = False
    try:
        with open_shard(place) as file, tarfile.open(fileobj=file, mode="r|*") as tar:
            for member in tar:
                if member.isreg() and not member.name.startswith("__"):
                    if member.size > MAX_MEMBER_BYTES:
                        raise tarfile.ReadError(
                            f"{member.name} claims {member.size} bytes, more than {MAX_MEMBER_BYTES}"
                        )
                    content = tar.extractfile(member)
                    assert content
                    data = content.read()
                    if len(data) != member.size:
                        raise tarfile.ReadError(f"{member.name} is cut off")
                    came = True
                    yield {"fname": member.name, "data": data, "__url__": place}
                tar.members = []  # type: ignore[attr-defined]  (tarfile would keep them all)
            # tarfile has read the first of the two blocks that end it
            assert tar.fileobj
            if tar.fileobj.read(_BLOCK) != bytes(_BLOCK):
                raise tarfile.ReadError("the tar is cut off: its end marker is missing")
    except DataError:
        raise
    except PipeError as error:
        if not came:
            raise DataError(f"shard {shown(place)} cannot be read: {error}; try the command in a shell") from None
        faults.append(str(error))
    except Exception as error:  # tarfile, the decompressors and remote stores raise whatever they meet
        faults.append(reason_of(error))
