"""The stream of samples is a function of (seed, epoch), can stop anywhere, and counts what is damaged."""

import io
import tarfile
from pathlib import Path

import pytest

from gspo_mm.data.places import expand_shards
from gspo_mm.data.shards import FAULT, read_shard
from gspo_mm.data.stream import Cursor, SampleStream
from gspo_mm.types import DataError


def write_shard(path: Path, keys: list[str]) -> str:
    with tarfile.open(path, "w") as tar:
        for key in keys:
            for suffix in ("json", "png"):
                data = f"{key}.{suffix}".encode()
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return str(path)


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    return [write_shard(tmp_path / f"s{n}.tar", [f"{n}{i:02d}" for i in range(7)]) for n in range(3)]


def stream(
    shards: list[str], *, buffer: int = 5, seed: int = 1, cursor: Cursor | None = None
) -> SampleStream:
    return SampleStream(shards, shuffle_buffer=buffer, seed=seed, repeat=True, cursor=cursor)


def keys(samples: SampleStream, count: int) -> list[str]:
    return [next(samples)["__key__"] for _ in range(count)]


def test_members_of_a_key_come_as_one_sample(shards: list[str]) -> None:
    first = next(iter(read_shard(shards[0])))
    assert first == {"__key__": "000", "__url__": shards[0], "json": b"000.json", "png": b"000.png"}


def test_without_a_buffer_the_order_is_that_of_the_shards(shards: list[str]) -> None:
    assert keys(stream(shards, buffer=0), 21) == [f"{n}{i:02d}" for n in range(3) for i in range(7)]


def test_every_epoch_holds_every_sample_once_in_its_own_order(shards: list[str]) -> None:
    samples = stream(shards)
    epochs = [keys(samples, 21) for _ in range(3)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 21 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != sorted(epochs[0])
    assert keys(stream(shards), 21) == epochs[0]
    assert keys(stream(shards, seed=2), 21) != epochs[0]


@pytest.mark.parametrize("buffer", [0, 1, 5, 100])
@pytest.mark.parametrize("stop", [0, 1, 6, 20, 21, 22, 50])
def test_a_stream_opened_at_a_cursor_continues_exactly(shards: list[str], buffer: int, stop: int) -> None:
    whole = stream(shards, buffer=buffer)
    keys(whole, stop)
    again = stream(shards, buffer=buffer, cursor=whole.cursor)
    assert keys(again, 30) == keys(whole, 30)
    assert again.cursor == whole.cursor


def test_a_stream_that_does_not_repeat_ends(shards: list[str]) -> None:
    assert len(list(SampleStream(shards, shuffle_buffer=0, seed=0, repeat=False))) == 21


def test_braces_and_globs_expand_in_order_each_shard_once(shards: list[str], tmp_path: Path) -> None:
    assert expand_shards([f"{tmp_path}/s{{0..1}}.tar", f"{tmp_path}/s*.tar"]) == shards


@pytest.mark.parametrize("pattern", ["s9.tar", "x*.tar", "s{0..3}.tar"])
def test_a_pattern_without_a_file_is_named(shards: list[str], tmp_path: Path, pattern: str) -> None:
    with pytest.raises(DataError) as caught:
        expand_shards([f"{tmp_path}/{pattern}"])
    assert str(tmp_path / pattern) in str(caught.value)


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


def test_shards_without_samples_do_not_loop_for_ever(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="hold no sample"):
        next(stream([write_shard(tmp_path / "empty.tar", [])]))
