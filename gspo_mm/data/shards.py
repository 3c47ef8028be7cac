"""A WebDataset shard -> its samples, undecoded.

A damaged shard gives its readable samples and then one that only says what is wrong, so that the fault is counted
and named with all others. Nothing is written to disk under a member's name, and nothing in it is unpickled.
"""

from __future__ import annotations

import logging
import lzma
import tarfile
import time
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from gspo_mm.data.places import PipeError, is_url, open_shard, reason_of, shown
from gspo_mm.types import DataError

logger = logging.getLogger(__name__)

FAULT = "__fault__"  # key of a sample that reports damage of its shard instead of bringing data
SOURCE = "__source__"  # key of the name of the source that a sample comes from
# a larger one is a damaged header, or a small compressed shard that would fill the memory
MAX_MEMBER_BYTES = 256 * 2**20
_TRIES = 3  # times that a shard in a store is read from its beginning, 1 and 2 s apart
# of the content: reading again does not help
_DAMAGE = (
    tarfile.TarError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
)
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

    A store that fails halfway is asked again, and what was given before is passed over.
    """
    given = failures = 0
    while True:
        try:
            for number, (name, data) in enumerate(_read(place)):
                if number == given:
                    given += 1
                    yield {"fname": name, "data": data, "__url__": place}
            return
        except DataError:
            raise
        except PipeError as error:
            if not given:
                raise DataError(
                    f"shard {shown(place)} cannot be read: {error}; try the command in a shell"
                ) from None
            fault: Exception = error
        except Exception as error:  # tarfile, the decompressors and remote stores raise whatever they meet
            fault = error
        failures += 1
        if not is_url(place) or isinstance(fault, _DAMAGE) or failures == _TRIES:
            faults.append(reason_of(fault))
            return
        logger.warning("shard %s failed (%s) and is read again", shown(place), reason_of(fault))
        time.sleep(failures)


def _read(place: str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files in a tar.

    Read here and not by webdataset's `tar_file_iterator`, for the two things that it does not look at: the size of a
    member before it is read, and the end of the tar, without which one that was cut between two members seems whole.
    """
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
                yield member.name, data
            tar.members = []  # type: ignore[attr-defined]  (tarfile would keep them all)
        # tarfile has read the first of the two blocks that end it
        assert tar.fileobj
        if tar.fileobj.read(_BLOCK) != bytes(_BLOCK):
            raise tarfile.ReadError("the tar is cut off: its end marker is missing")
