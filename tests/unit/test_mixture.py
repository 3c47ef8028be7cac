"""A mixture has one order by seed, whoever reads it, and goes on exactly where a kill stopped it."""

import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from gspo_mm.data.mixture import Mixture, Position, Source
from gspo_mm.data.prefetch import Prefetch
from gspo_mm.data.shards import SOURCE
from gspo_mm.types import DataError
from tests.tars import write_tar

SIZES = {"a": (7, 150), "b": (4, 180), "c": (2, 115)}  # shards, samples of each: 2,000 in all
WEIGHTS = {"a": 3.0, "b": 1.0, "c": 0.5}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    folder = tmp_path_factory.mktemp("sources")
    return [
        Source(name=name, weight=WEIGHTS[name], shards=[shard(folder, name, n, each) for n in range(shards)])
        for name, (shards, each) in SIZES.items()
    ]


def shard(folder: Path, name: str, number: int, samples: int) -> str:
    members = [(f"{name}{number}-{i:03d}.json", b"{}") for i in range(samples)]
    return write_tar(folder / f"{name}{number}.tar", members)


def mixture(sources: list[Source], *, seed: int = 3, **options: Any) -> Mixture:
    return Mixture(sources, shuffle_buffer=options.pop("buffer", 100), seed=seed, repeat=True, **options)


def keys(samples: Mixture, count: int) -> list[str]:
    return [raw["__key__"] for raw, _ in islice(samples, count)]


def test_the_seed_decides_the_order(sources: list[Source]) -> None:
    first, same, other = (keys(mixture(sources, seed=seed), 500) for seed in (3, 3, 4))
    assert first == same != other


def test_sources_come_by_their_weights(sources: list[Source]) -> None:
    counts = Counter(raw[SOURCE] for raw, _ in islice(mixture(sources), 9000))
    for name, weight in WEIGHTS.items():
        assert counts[name] / 9000 == pytest.approx(weight / 4.5, abs=0.02)


def test_every_source_goes_through_its_own_epochs(sources: list[Source]) -> None:
    of_c = [key for key in keys(mixture(sources), 9000) if key.startswith("c")]
    for epoch in range(3):
        assert len(set(of_c[230 * epoch : 230 * (epoch + 1)])) == 230
    *_, (_, position) = islice(mixture(sources), 5000)
    assert position.taken == 5000
    assert position.epoch == min(cursor.epoch for cursor in position.sources.values()) == 1


def test_without_repeating_each_source_comes_once_in_its_order(sources: list[Source]) -> None:
    once = Mixture(sources, shuffle_buffer=0, seed=1, repeat=False)
    found = [raw["__key__"] for raw, _ in once]
    assert found == sorted(found)
    assert len(found) == 2000


def test_other_sources_than_those_of_the_checkpoint_are_refused(sources: list[Source]) -> None:
    *_, (_, position) = islice(mixture(sources), 100)
    with pytest.raises(DataError, match=r"sources \['a', 'b', 'c'\] but data.train names \['a', 'b'\]"):
        mixture(sources[:2], position=position)


# a reader that is killed: it writes down what it took, and every few samples its position

EVERY = 5  # samples between checkpoints
TOTAL = 6000  # positions, three times what the sources hold together
KILLS = 20


def read(folder: Path, sources: list[Source], seen: Any) -> None:
    """The reader's process: takes samples until TOTAL positions are gone."""
    start = newest(folder)
    position = Position.of(json.loads(start.read_text())) if start else None
    samples = Prefetch(mixture(sources, position=position), size=lambda _: 1, max_bytes=64)
    with (folder / f"taken-{os.getpid()}.jsonl").open("a", buffering=1) as log:
        for raw, after in samples:
            log.write(json.dumps([after.taken - 1, raw["__key__"]]) + "\n")
            seen.value = after.taken
            if after.taken % EVERY == 0:
                temporary = folder / ".position"
                temporary.write_text(json.dumps(after.state()))
                temporary.replace(folder / f"{after.taken:06d}.json")
            if after.taken >= TOTAL:
                return
            time.sleep(0.0002)


def newest(folder: Path) -> Path | None:
    return max(folder.glob("[0-9]*.json"), default=None)


def forget_what_followed(folder: Path) -> int:
    """Drop what came after the last checkpoint, as a resumed run does; returns where that stands."""
    last = newest(folder)
    taken = int(last.stem) if last else 0
    for log in folder.glob("taken-*.jsonl"):
        lines = [line for line in log.read_text().splitlines() if line.endswith("]")]  # one may be cut off
        log.write_text("".join(f"{line}\n" for line in lines if json.loads(line)[0] < taken))
    return taken


def start(folder: Path, sources: list[Source], seen: Any) -> BaseProcess:
    context = multiprocessing.get_context("fork")  # to spare it the imports
    process = context.Process(target=read, args=(folder, sources, seen), daemon=True)
    process.start()
    return process


def test_kills_change_nothing(sources: list[Source], tmp_path: Path) -> None:
    from webdataset import tariterators  # noqa: F401  (before the processes are forked)

    rng = random.Random(11)
    seen = multiprocessing.RawValue("q", 0)
    for _ in range(KILLS):
        seen.value = taken = forget_what_followed(tmp_path)
        process = start(tmp_path, sources, seen)
        deadline, stop_at = time.monotonic() + 60, taken + rng.randint(1, 200)
        while seen.value < stop_at:
            assert time.monotonic() < deadline
            assert process.exitcode is None
            time.sleep(rng.random() * 0.002)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    forget_what_followed(tmp_path)
    last = start(tmp_path, sources, seen)
    last.join(120)
    assert last.exitcode == 0

    consumed = sorted(json.loads(line) for log in tmp_path.glob("taken-*.jsonl") for line in log.open())
    assert [place for place, _ in consumed] == list(range(TOTAL))
    assert [key for _, key in consumed] == keys(mixture(sources), TOTAL)
