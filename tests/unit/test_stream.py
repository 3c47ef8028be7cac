"""The stream of samples is a function of (seed, epoch), can stop anywhere, and continues without reading it all again."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from gspo_mm.data import stream as stream_module
from gspo_mm.data.listing import Shard
from gspo_mm.data.shards import read_shard
from gspo_mm.data.stream import Cursor, SampleStream
from gspo_mm.types import DataError
from tests.tars import write_tar


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    return [write_tar(tmp_path / f"s{n}.tar", members(f"{n}{i:02d}" for i in range(7))) for n in range(3)]


def members(keys: Iterable[str]) -> list[tuple[str, bytes]]:
    return [(f"{key}.{suffix}", f"{key}.{suffix}".encode()) for key in keys for suffix in ("json", "png")]


def stream(
    shards: list[str], *, buffer: int = 5, seed: int = 1, cursor: Cursor | None = None
) -> SampleStream:
    return SampleStream(shards, shuffle_buffer=buffer, seed=seed, repeat=True, cursor=cursor)


def keys(samples: SampleStream, count: int) -> list[str]:
    return [next(samples)["__key__"] for _ in range(count)]


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


def test_the_order_of_an_unnamed_source_stays_what_it_always_was(shards: list[str]) -> None:
    """Runs are compared by their seeds: another order would make other runs of them."""
    order = "102 104 103 106 100 200 203 202 205 206 201 101 001 204 003 004 005 006 105 000 002"
    assert keys(stream(shards, buffer=5, seed=1), 21) == order.split()


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


def test_shards_without_samples_do_not_loop_for_ever(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="hold no sample"):
        next(stream([write_tar(tmp_path / "empty.tar", [])]))


def many(folder: Path, shards: int, samples: int) -> list[str]:
    return [
        write_tar(folder / f"m{n:02d}.tar", members(f"{n:02d}{i:03d}" for i in range(samples)))
        for n in range(shards)
    ]


@pytest.mark.parametrize(("buffer", "most"), [(0, 1), (1, 2), (10, 8)])
def test_resuming_reads_only_the_shards_that_are_still_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffer: int, most: int
) -> None:
    shards = many(tmp_path, shards=30, samples=20)
    whole = stream(shards, buffer=buffer)
    keys(whole, 555)
    opened: list[str] = []
    monkeypatch.setattr(stream_module, "read_shard", lambda path: opened.append(path) or read_shard(path))
    again = stream(shards, buffer=buffer, cursor=Cursor.of(whole.cursor.state()))
    first = keys(again, 1)
    assert len(opened) <= most
    monkeypatch.undo()
    assert first + keys(again, 100) == keys(whole, 101)


def test_a_shard_that_shrank_since_the_checkpoint_is_told(tmp_path: Path) -> None:
    shards = many(tmp_path, shards=4, samples=10)
    whole = stream(shards, buffer=30)
    keys(whole, 5)
    for shard in shards:
        write_tar(Path(shard), members(["000"]))
    with pytest.raises(DataError, match=r"m0\d\.tar has 10240 bytes, and had 30720 when the checkpoint"):
        stream(shards, buffer=30, cursor=whole.cursor)
    unsized = replace(whole.cursor, shards=tuple(Shard(s.place, None) for s in whole.cursor.shards))
    with pytest.raises(DataError, match=r"m0\d\.tar.* holds fewer samples than when the checkpoint"):
        keys(stream(shards, buffer=30, cursor=unsized), 1)


def test_nothing_is_read_before_the_first_sample(tmp_path: Path) -> None:
    stream([str(tmp_path / "gone.tar")], cursor=Cursor(read=3))


def test_the_name_of_a_source_gives_it_an_order_of_its_own(shards: list[str]) -> None:
    a, b = (SampleStream(shards, shuffle_buffer=5, seed=1, repeat=True, name=name) for name in "ab")
    assert keys(a, 21) != keys(b, 21)
