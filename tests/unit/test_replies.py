"""Replies become the same arrays here and in the process that reads large ones, which ends with the trainer."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from gspo_mm.rollout.replies import ReplyReader, compact

PATIENCE = 60  # seconds


def body(tokens: int, *, samples: int = 2) -> bytes:
    sample: dict[str, Any] = {
        "text": "a" * tokens,
        "output_ids": list(range(tokens)),
        "prompt_token_ids": [5, 6],
        "meta_info": {
            "output_token_logprobs": [[-0.1 * t, t, None] for t in range(tokens)],
            "prompt_tokens": 2,
        },
    }
    return json.dumps([sample] * samples).encode()


@pytest.fixture
def reader() -> Iterator[ReplyReader]:
    reader = ReplyReader()
    yield reader
    reader.close()


def children() -> set[int]:
    return {p.pid for p in psutil.Process().children(recursive=True)}


def test_numbers_stay_what_they_were() -> None:
    (sample, _) = compact(body(3))
    assert tuple(sample["output_ids"]) == (0, 1, 2)
    assert tuple(sample["prompt_token_ids"]) == (5, 6)
    assert tuple(sample["meta_info"]["output_token_logprobs"]) == (-0.0, -0.1, -0.2)
    assert sample["meta_info"]["prompt_tokens"] == 2


def test_small_replies_are_read_here(reader: ReplyReader) -> None:
    before = children()
    assert asyncio.run(reader.read(body(10))) == compact(body(10))
    assert children() == before


def test_large_replies_are_read_elsewhere(reader: ReplyReader) -> None:
    large = body(5000)
    before = children()
    assert asyncio.run(reader.read(large)) == compact(large)
    assert children() > before


def test_when_the_reading_process_dies_replies_are_read_here(reader: ReplyReader) -> None:
    before = children()
    large = body(5000)
    asyncio.run(reader.read(large))
    for pid in children() - before:
        os.kill(pid, signal.SIGKILL)
    assert asyncio.run(reader.read(large)) == compact(large)
    assert asyncio.run(reader.read(large)) == compact(large)


_TRAINER = """
import asyncio, os, sys, time
from gspo_mm.rollout.replies import ReplyReader
if __name__ == "__main__":
    asyncio.run(ReplyReader().read(sys.stdin.buffer.read()))
    print("read", flush=True)
    time.sleep(600)
"""


def test_the_reading_process_does_not_survive_the_trainer(tmp_path: Any) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(_TRAINER)
    with subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as trainer:
        assert trainer.stdin
        assert trainer.stdout
        trainer.stdin.write(body(5000))
        trainer.stdin.close()
        assert trainer.stdout.readline() == b"read\n"
        readers = psutil.Process(trainer.pid).children(recursive=True)
        assert readers
        trainer.kill()
        _, alive = psutil.wait_procs(readers, timeout=PATIENCE)
        assert not alive
