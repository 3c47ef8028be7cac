"""Shards that join, leave, move or change between two parts of a run: an epoch ends with those that it began with."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gspo_mm.config import DataConfig
from gspo_mm.data.listing import Shard, find_again, list_shards
from gspo_mm.data.mixture import Mixture, Position, Source
from gspo_mm.data.places import expand_shards
from gspo_mm.data.processor import Processor
from gspo_mm.data.source import PromptSource
from gspo_mm.types import DataError
from tests.tars import write_samples, write_tar

SIZE = 4  # samples of a shard


def shard(folder: Path, number: int, size: int = SIZE) -> str:
    folder.mkdir(exist_ok=True)
    members = [
        (f"{number}{i}.{end}", f"{number}{i}".encode()) for i in range(size) for end in ("json", "png")
    ]
    return write_tar(folder / f"s{number}.tar", members)


def names(*shards: int) -> list[str]:
    return [f"{number}{i}" for number in shards for i in range(SIZE)]


class Run:
    """A reader of one source; `resume` is a new process, with whatever the glob finds by then."""

    def __init__(self, pattern: str, *, buffer: int, **mixed: str) -> None:
        self.patterns = mixed or {"": pattern}
        self.buffer = buffer
        self.resume(Position())

    def resume(self, position: Position | None = None) -> list[str]:
        before = Position.of(json.loads(json.dumps(self.position.state()))) if position is None else position
        sources = [Source(name=n, shards=expand_shards([p])) for n, p in self.patterns.items()]
        mixture = Mixture(sources, shuffle_buffer=self.buffer, seed=7, repeat=True, position=before)
        self.position, self.samples = before, iter(mixture)
        return mixture.notes

    def take(self, count: int) -> list[str]:
        found = []
        for _ in range(count):
            sample, self.position = next(self.samples)
            found.append(sample["__key__"])
        return found


@pytest.mark.parametrize("buffer", [0, 1, 5, 100])
@pytest.mark.parametrize("stop", range(0, 13))
def test_a_shard_that_joins_comes_in_with_the_next_epoch(stop: int, buffer: int, tmp_path: Path) -> None:
    for number in (1, 3, 5):
        shard(tmp_path, number)
    run = Run(f"{tmp_path}/*.tar", buffer=buffer)
    whole = Run(f"{tmp_path}/*.tar", buffer=buffer)
    expected = whole.take(12)
    first = run.take(stop)
    for number in (0, 4, 9):  # before, between and after the others
        shard(tmp_path, number)
    notes = run.resume()
    if len(first) > 0:
        assert "is new: it comes in with epoch 1" in notes[0]
        rest = run.take(12 - len(first))
        assert first + rest == expected
    else:
        assert notes == []
    assert Counter(run.take(24)) == Counter(names(0, 1, 3, 4, 5, 9))
    run.resume()
    assert Counter(run.take(24)) == Counter(names(0, 1, 3, 4, 5, 9))


@pytest.mark.parametrize("buffer", [0, 2, 100])
@pytest.mark.parametrize("stop", range(1, 13))
def test_a_shard_that_leaves_is_refused_while_the_epoch_needs_it_and_told_after(
    stop: int, buffer: int, tmp_path: Path
) -> None:
    for number in range(3):
        shard(tmp_path, number)
    expected = Run(f"{tmp_path}/*.tar", buffer=buffer).take(12)
    for gone in range(3):
        run = Run(f"{tmp_path}/*.tar", buffer=buffer)
        first = run.take(stop)
        path = tmp_path / f"s{gone}.tar"
        content = path.read_bytes()
        path.unlink()
        if set(expected[stop:]) & set(names(gone)):
            with pytest.raises(
                DataError, match=rf"shard .*s{gone}.tar is gone, and the rest of epoch 0 .*restore it"
            ):
                run.resume()
        else:
            (note,) = run.resume()
            assert f"s{gone}.tar is gone: epoch 0 has used it" in note
            assert first + run.take(12 - stop) == expected
            assert Counter(run.take(8)) == Counter(names(*({0, 1, 2} - {gone})))
        path.write_bytes(content)


@pytest.mark.parametrize("stop", [1, 5, 11, 12, 13, 20])
def test_a_folder_that_was_moved_goes_on(stop: int, tmp_path: Path) -> None:
    for number in range(3):
        shard(tmp_path / "a", number)
    run, whole = (Run(f"{tmp_path}/a/*.tar", buffer=5) for _ in range(2))
    first = run.take(stop)
    expected = whole.take(30)
    (tmp_path / "a").rename(tmp_path / "b")
    run.patterns = {"": f"{tmp_path}/b/*.tar"}
    assert run.resume() == []
    assert first + run.take(30 - stop) == expected


def test_a_shard_with_another_size_is_named_wherever_it_is(tmp_path: Path) -> None:
    for number in range(3):
        shard(tmp_path / "a", number)
    run = Run(f"{tmp_path}/a/*.tar", buffer=0)
    run.take(6)
    (tmp_path / "a").rename(tmp_path / "b")
    run.patterns = {"": f"{tmp_path}/b/*.tar"}
    shard(tmp_path / "b", 0, size=40)
    with pytest.raises(
        DataError, match=r"b/s0.tar has \d+ bytes, and had \d+ .*restore it, or start another"
    ):
        run.resume()


def test_joined_left_and_left_again_over_many_parts(tmp_path: Path) -> None:
    """Each part begins with other shards; every epoch holds those that were there when it began, once."""
    for number in (1, 2):
        shard(tmp_path, number)
    run = Run(f"{tmp_path}/*.tar", buffer=3)
    run.take(5)
    shard(tmp_path, 3)
    run.resume()
    run.take(3 + 7)  # 7 of the second epoch, which is of 1, 2, 3
    shard(tmp_path, 4)
    run.resume()
    run.take(5)
    run.resume()
    (tmp_path / "s2.tar").unlink()
    run.resume()  # at the end of the epoch nothing of it is needed
    assert Counter(run.take(12)) == Counter(names(1, 3, 4))


@pytest.mark.parametrize("stop", range(1, 20, 3))
def test_sources_of_a_mixture_keep_a_list_each(stop: int, tmp_path: Path) -> None:
    for number in (1, 2):
        shard(tmp_path / "a", number)
        shard(tmp_path / "b", number + 5)
    patterns = {"a": f"{tmp_path}/a/*.tar", "b": f"{tmp_path}/b/*.tar"}
    run = Run("", buffer=3, **patterns)
    taken = run.take(stop)
    shard(tmp_path / "a", 3)
    run.resume()
    while len(taken) < 100:
        taken += run.take(1)
    of_a = [key for key in taken if key[0] in "123"]
    of_b = [key for key in taken if key[0] in "67"]
    began = sum(key[0] in "123" for key in taken[:stop])
    joined = 8 * -(-began // 8)  # with the end of the epoch that was under way
    assert Counter(of_a[:joined]) == Counter(names(1, 2) * (joined // 8))
    assert Counter(of_a[joined : joined + 12]) == Counter(names(1, 2, 3))
    assert Counter(of_b[:8]) == Counter(names(6, 7))


def test_shards_of_equal_names_are_told_apart_by_place_then_size(tmp_path: Path) -> None:
    places = [shard(tmp_path / folder, 1, size) for folder, size in (("a", 4), ("b", 40), ("c", 80))]
    before = list_shards(places)
    (tmp_path / "a").rename(tmp_path / "z")
    (tmp_path / "b").rename(tmp_path / "y")
    now = [f"{tmp_path}/{folder}/s1.tar" for folder in ("c", "y", "z")]
    assert find_again(before, now) == ([now[2], now[1], now[0]], [])


def test_urls_and_commands_are_known_by_name(tmp_path: Path) -> None:
    before = list_shards(
        ["https://a.org/x/1.tar?sig=secret", "https://a.org/x/1.tar?part=2", "pipe:cat /a/2.tar"]
    )
    assert before[0] == Shard("https://a.org/x/1.tar", None)
    now = [
        "s3://b/2.tar",
        "https://a.org/x/1.tar?sig=new",
        "https://a.org/x/1.tar?part=2",
        "pipe:cat /a/3.tar",
    ]
    assert find_again(before, now) == ([now[1], now[2], now[0]], [now[3]])


def test_a_checkpoint_of_an_older_version_goes_on_with_what_is_there(tmp_path: Path) -> None:
    for number in range(3):
        shard(tmp_path, number)
    run, whole = (Run(f"{tmp_path}/*.tar", buffer=5) for _ in range(2))
    first, expected = run.take(5), whole.take(12)
    state: Any = json.loads(json.dumps(run.position.state()))
    del state["sources"][""]["shards"]
    run.position = Position.of(state)
    run.resume()
    assert first + run.take(7) == expected


def test_a_source_says_at_once_and_once_what_has_changed(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def source() -> PromptSource:
        return PromptSource(data, processor, seed=0, split="train")

    for number in range(3):
        write_samples(tmp_path / f"t{number}.tar", map(str, range(5)))
    data = DataConfig(train=[f"{tmp_path}/*.tar"], shuffle_buffer=0)
    processor = Processor(str(tiny_model), data)
    whole = source()
    whole.take(7)
    write_samples(tmp_path / "t9.tar", map(str, range(5)))
    again = source()
    with caplog.at_level(logging.WARNING):
        again.load(json.loads(json.dumps(whole.state())))
        again.load(json.loads(json.dumps(whole.state())))
        assert len(again.take(28)) == 28
    assert caplog.text.count("t9.tar is new") == 1
    (tmp_path / "t1.tar").unlink()
    with pytest.raises(DataError, match=r"t1.tar is gone"):
        source().load(whole.state())
