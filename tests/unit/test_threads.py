"""Processes that compute at the same time on one machine have no more threads than it has cores."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from gspo_mm.stages import set_threads
from tests.unit.test_servers import new_config


@pytest.mark.parametrize(
    ("rollout", "sglang", "ranks", "threads"),
    [
        ({}, {}, 1, 8),  # in turn: servers stand still while the policy trains
        ({}, {}, 2, 4),
        ({"max_staleness": 1}, {}, 1, 4),
        ({"max_staleness": 1}, {"servers": 3}, 1, 2),
        ({"max_staleness": 1}, {"servers": 40}, 1, 1),
        ({"max_staleness": 1}, {"start": "elsewhere"}, 1, 8),
        ({"max_staleness": 1}, {"urls": ["http://10.0.0.1:30000"]}, 1, 8),
    ],
)
def test_the_trainer_leaves_cores_to_servers_that_sample_meanwhile(
    rollout: dict[str, Any],
    sglang: dict[str, Any],
    ranks: int,
    threads: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = new_config(tmp_path, sglang=sglang, rollout=rollout)
    given: list[int] = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    set_threads(config)
    assert given == [threads]


def test_what_the_user_says_is_stronger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(torch, "set_num_threads", lambda _: pytest.fail("it was set"))
    set_threads(new_config(tmp_path, sglang={}))
