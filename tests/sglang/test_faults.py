"""A run on answers in turns: between two turns a server is killed, then both, and in the end the run; all processes are real."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from gspo_mm.config import save_config
from gspo_mm.observe.metrics import read_metrics
from gspo_mm.rollout.saved import list_steps, load_rollouts
from tests.sglang.conftest import MakeConfig
from tests.watched import Gate, Watched, kill_server

PATIENCE = 420  # seconds that anything may take before the test fails; two servers start on two busy cores
GROUPS, GROUP_SIZE = 8, 4


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


@pytest.fixture
def run(make_config: MakeConfig, turning_model: Path, gate: Gate, tmp_path: Path) -> Iterator[Watched]:
    # random weights never answer well: whether there is a vowel in the answer differs within a group
    reward = {"name": "vowel", "type": "format", "args": {"pattern": "(?s).*[aeiou].*"}}
    (tmp_path / "reward.yaml").write_text(yaml.safe_dump({"name": "letters", "parts": [reward]}))
    config = make_config(
        name="faults",
        model={"path": str(turning_model)},
        reward={"file": str(tmp_path / "reward.yaml")},
        rollout={
            "prompts_per_step": GROUPS,
            "group_size": GROUP_SIZE,
            "sampling": {"max_new_tokens": 32},
            "environment": gate.environment,
            "sglang": {"servers": 2},
        },
        policy={"optimizer": {"lr": 1e-6}},  # else soon all answers are vowels, and nothing is left to learn
        train={"steps": 10_000, "eval_every": 0},
        checkpoint={"every": 0},
        observe={"save_rollouts_every": 1, "rollouts_per_save": 0},
    )
    save_config(config, tmp_path / "config.yaml")
    run = Watched(config.run.path, patience=PATIENCE)
    command = [sys.executable, "-m", "gspo_mm.cli", "train", str(tmp_path / "config.yaml")]
    with subprocess.Popen(command) as process:
        run.processes.append(process)
        yield run
        process.kill()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_survives_its_servers_and_they_do_not_survive_it(run: Watched, gate: Gate) -> None:
    run.wait("two servers", lambda: len(run.up()) == 2)
    run.wait("the first steps", lambda: run.steps() >= 2)
    first, second = run.up().values()

    # one dies between two turns: the other goes on alone until it is back and has the current weights
    gate.close(run)
    kill_server(first)
    gate.open()
    run.wait_for_steps(2)
    run.wait("the killed server", lambda: run.up().get(first.name, first).generation != first.generation)
    log = run.path / "servers" / f"{first.name}.log"
    # the first is to see whether it keeps ids
    run.wait(
        "prompts for it", lambda: log.read_text().rpartition("server_args=")[2].count("POST /generate") > 1
    )
    assert run.up()[second.name] == second, "the other one was left in peace"

    # both die: the run waits for them and says so
    gate.close(run)
    for server in run.up().values():
        kill_server(server)
    gate.open()
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

    # answers have their second turn, and with both servers it was asked for where the first was answered
    answers = [answer for step in steps for group in groups[step] for answer in group.completions]
    assert {len(answer.turns) for answer in answers} == {1, 2}
    assert not [answer.fault for answer in answers if answer.fault]
    cached = [line["turns/cached_fraction"] for line in read_metrics(run.path) if line["step"] in (1, 2)]
    assert min(cached) > 0.9

    # the trainer is killed: nothing of it is left
    everything = run.family()
    assert sum("sglang" in " ".join(p.cmdline()) for p in everything) >= 2
    run.processes[0].kill()
    _, alive = psutil.wait_procs(everything, timeout=PATIENCE)
    assert not alive
