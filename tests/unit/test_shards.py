"""A shard gives its samples; what is damaged is counted, and what vanished stops the run."""

import bz2
import gzip
import lzma
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from gspo_mm.data.shards import FAULT, MAX_MEMBER_BYTES, read_shard
from gspo_mm.types import DataError
from tests.tars import write_tar


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    return [write_tar(tmp_path / f"s{n}.tar", members(f"{n}{i:02d}" for i in range(7))) for n in range(3)]


def members(keys: Iterable[str]) -> list[tuple[str, bytes]]:
    return [(f"{key}.{suffix}", f"{key}.{suffix}".encode()) for key in keys for suffix in ("json", "png")]


def test_members_of_a_key_come_as_one_sample(shards: list[str]) -> None:
    first = next(iter(read_shard(shards[0])))
    assert first == {"__key__": "000", "__url__": shards[0], "json": b"000.json", "png": b"000.png"}


@pytest.mark.parametrize("cut", [3000, 512 * 8 + 100, 512 * 8])
def test_a_cut_off_shard_gives_its_whole_samples_and_then_one_fault(shards: list[str], cut: int) -> None:
    path = Path(shards[0])
    path.write_bytes(path.read_bytes()[:cut])  # a sample is 4 blocks of 512 bytes
    *good, fault = read_shard(shards[0])
    # "001" is whole in the second and third case, but the reader cannot know that no member of it is missing
    assert [s["__key__"] for s in good] == ["000"]
    assert all(FAULT not in s and {"json", "png"} <= s.keys() for s in good)
    assert fault[FAULT]
    assert fault["__url__"] == shards[0]


def test_a_file_that_is_no_tar_is_one_fault(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"not a tar" * 500)
    (fault,) = read_shard(str(tmp_path / "a.tar"))
    assert fault[FAULT]


def test_a_shard_that_vanished_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be opened"):
        list(read_shard(str(tmp_path / "gone.tar")))


@pytest.mark.parametrize(("mode", "suffix"), [("w:gz", "tar.gz"), ("w:bz2", "tar.bz2"), ("w:xz", "tar.xz")])
def test_a_compressed_shard_gives_the_same_samples(
    shards: list[str], tmp_path: Path, mode: str, suffix: str
) -> None:
    path = write_tar(tmp_path / f"c.{suffix}", members(f"0{i:02d}" for i in range(7)), mode)
    assert [s["__key__"] for s in read_shard(path)] == [s["__key__"] for s in read_shard(shards[0])]


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("part", ["tar", "compressed"])
def test_a_compressed_shard_that_was_cut_off_is_a_fault(
    shards: list[str], tmp_path: Path, compress: Callable[[bytes], bytes], part: str
) -> None:
    whole = Path(shards[0]).read_bytes()
    data = compress(whole[: 512 * 8]) if part == "tar" else compress(whole)[:100]
    (tmp_path / "c.tar").write_bytes(data)
    assert list(read_shard(str(tmp_path / "c.tar")))[-1][FAULT]


def test_a_member_that_would_fill_the_memory_is_a_fault(tmp_path: Path) -> None:
    header = bytearray(Path(write_tar(tmp_path / "a.tar", members(["1", "2"]))).read_bytes())
    header[2048 + 124 : 2048 + 136] = f"{MAX_MEMBER_BYTES + 1:011o}\0".encode()
    header[2048 + 148 : 2048 + 156] = b" " * 8
    header[2048 + 148 : 2048 + 156] = f"{sum(header[2048:2560]):06o}\0 ".encode()
    (tmp_path / "a.tar").write_bytes(header)
    (fault,) = read_shard(str(tmp_path / "a.tar"))
    assert "2.json claims 268435457 bytes" in fault[FAULT]
