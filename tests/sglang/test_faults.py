"""A run whose servers are killed, one, then both, and that is killed itself in the end; all processes are real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import yaml

from gspo_mm.config import save_config
from gspo_mm.observe.metrics import read_metrics
from gspo_mm.rollout.saved import list_steps, load_rollouts
from gspo_mm.serving.registry import registered
from gspo_mm.serving.server import Server
from tests.sglang.conftest import MakeConfig

PATIENCE = 420  # seconds that anything may take before the test fails; two servers start on two busy cores
GROUPS, GROUP_SIZE = 8, 4


class Run:
    """`gspo-mm train` in a process, seen from outside."""

    def __init__(self, config: Path, path: Path) -> None:
        self.path = path
        self.process = subprocess.Popen([sys.executable, "-m", "gspo_mm.cli", "train", str(config)])

    def steps(self) -> int:
        return max((line["step"] for line in read_metrics(self.path)), default=0)

    def log(self) -> str:
        return (self.path / "log.txt").read_text()

    def up(self) -> dict[str, Server]:
        return {s.name: s for s in registered(self.path / "servers") if s.state == "up"}

    def wait(self, what: str, condition: Callable[[], Any]) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, f"the run ended with {self.process.returncode}:\n{self.log()}"
            assert time.monotonic() < end, f"in vain for {what}:\n{self.log()}"
            time.sleep(0.2)

    def wait_for_steps(self, count: int) -> None:
        goal = self.steps() + count
        self.wait(f"step {goal}", lambda: self.steps() >= goal)


@pytest.fixture
def run(make_config: MakeConfig, tmp_path: Path) -> Iterator[Run]:
    # random weights never answer well: whether there is a vowel in the answer differs within a group
    reward = {"name": "vowel", "type": "format", "args": {"pattern": "(?s).*[aeiou].*"}}
    (tmp_path / "reward.yaml").write_text(yaml.safe_dump({"name": "letters", "parts": [reward]}))
    config = make_config(
        name="faults",
        reward={"file": str(tmp_path / "reward.yaml")},
        rollout={
            "prompts_per_step": GROUPS,
            "group_size": GROUP_SIZE,
            "sampling": {"max_new_tokens": 32},
            "sglang": {"servers": 2},
        },
        policy={"optimizer": {"lr": 1e-6}},  # else soon all answers are vowels, and nothing is left to learn
        train={"steps": 10_000, "eval_every": 0},
        checkpoint={"every": 0},
        observe={"save_rollouts_every": 1, "rollouts_per_save": 0},
    )
    save_config(config, tmp_path / "config.yaml")
    run = Run(tmp_path / "config.yaml", config.run.path)
    yield run
    run.process.kill()
    run.process.wait()


def kill(server: Server) -> None:
    port = urlsplit(server.url).port
    listening = psutil.net_connections(kind="tcp")
    (pid,) = {c.pid for c in listening if c.status == "LISTEN" and c.laddr.port == port}
    os.kill(pid, signal.SIGKILL)


def trees(root: int) -> list[psutil.Process]:
    return [psutil.Process(root), *psutil.Process(root).children(recursive=True)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_survives_its_servers_and_they_do_not_survive_it(run: Run) -> None:
    run.wait("two servers", lambda: len(run.up()) == 2)
    run.wait("the first steps", lambda: run.steps() >= 2)
    first, second = run.up().values()

    # one dies: the other goes on alone until it is back and has the current weights
    kill(first)
    run.wait_for_steps(2)
    run.wait("the killed server", lambda: run.up().get(first.name, first).generation != first.generation)
    log = run.path / "servers" / f"{first.name}.log"
    run.wait("prompts for it", lambda: "POST /generate" in log.read_text().rpartition("server_args=")[2])
    assert run.up()[second.name] == second, "the other one was left in peace"

    # both die: the run waits for them and says so
    for server in run.up().values():
        kill(server)
    run.wait("a word about it", lambda: "waiting for one" in run.log())
    run.wait_for_steps(3)
    assert "servers are back" in run.log()

    # through all of this every group was trained on once, with answers of the weights of its step
    steps = list_steps(run.path)
    assert steps == list(range(1, len(steps) + 1))
    groups = {step: load_rollouts(run.path, step) for step in steps}
    assert [g.id for step in steps for g in groups[step]] == list(range(GROUPS * len(steps)))
    for step in steps:
        assert all(len(group.completions) == GROUP_SIZE for group in groups[step])
        versions = {v for g in groups[step] for c in g.completions for v in c.versions}
        assert versions == {step - 1}
    keys = [g.prompt.key for step in steps for g in groups[step]]
    epoch = 200  # prompts in the shards
    assert all(len(set(keys[i : i + epoch])) == len(keys[i : i + epoch]) for i in range(0, len(keys), epoch))

    # the trainer is killed: nothing of it is left
    everything = trees(run.process.pid)
    assert sum("sglang" in " ".join(p.cmdline()) for p in everything) >= 2
    run.process.kill()
    _, alive = psutil.wait_procs(everything, timeout=PATIENCE)
    assert not alive
