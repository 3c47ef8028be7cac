"""A run whose server samples ahead of the trainer, with the server of this folder's tests as one that others keep running."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml

from gspo_mm.checkpoint.store import Store, read_answers
from gspo_mm.config import Config, save_config
from gspo_mm.observe.metrics import read_metrics
from gspo_mm.rollout.saved import load_rollouts
from gspo_mm.rollout.sglang import SGLangEngine
from gspo_mm.serving.admin import is_fine
from tests.sglang.conftest import MakeConfig
from tests.watched import Gate, Watched

STEPS, GROUPS = 5, 4


type Prepare = Callable[..., tuple[Config, Command]]


@dataclass(frozen=True, kw_only=True)
class Command:
    """Training as a user starts it."""

    arguments: list[str]
    env: dict[str, str]


@pytest.fixture
def prepare(make_config: MakeConfig, engine: SGLangEngine, tmp_path: Path) -> Prepare:
    """A config of groups ahead of the trainer; sections go over it."""
    (server,) = engine.fleet.up()
    # random weights never answer well: whether there is a vowel in the answer differs within a group
    reward = {"name": "vowel", "type": "format", "args": {"pattern": "(?s).*[aeiou].*"}}
    (tmp_path / "reward.yaml").write_text(yaml.safe_dump({"name": "letters", "parts": [reward]}))

    def prepared(name: str, *, rollout: dict[str, Any], **sections: dict[str, Any]) -> tuple[Config, Command]:
        ahead = {
            "prompts_per_step": GROUPS,
            "group_size": 4,
            "sampling": {"max_new_tokens": 32},
            "max_staleness": 1,
            "sglang": {"urls": [server.url]},
        }
        config = make_config(
            name=name,
            reward={"file": str(tmp_path / "reward.yaml")},
            rollout=ahead | rollout,
            policy={"optimizer": {"lr": 1e-6}},
            observe={"save_rollouts_every": 1, "rollouts_per_save": 0, "report": False},
            **sections,
        )
        save_config(config, tmp_path / "config.yaml")
        keys = {"GSPO_MM_API_KEY": server.api_key, "GSPO_MM_ADMIN_KEY": server.admin_key}
        arguments = [sys.executable, "-m", "gspo_mm.cli", "train", str(tmp_path / "config.yaml")]
        return config, Command(arguments=arguments, env=os.environ | keys)

    return prepared


def finish(command: Command) -> None:
    done = subprocess.run(command.arguments, env=command.env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("on_update", "mode"), [("retract", "distributed"), ("in_place", "tensor"), ("finish", "disk")]
)
def test_no_token_is_older_than_the_bound_and_no_group_is_trained_on_twice(
    on_update: str, mode: str, prepare: Prepare, engine: SGLangEngine
) -> None:
    config, command = prepare(
        f"ahead-{on_update}",
        rollout={"on_update": on_update},
        sync={"mode": mode},
        train={"steps": STEPS, "eval_every": 0},
        checkpoint={"every": 0, "export_hf": False},
    )
    finish(command)

    trained: list[int] = []
    ages: set[int] = set()
    mixed = 0  # answers sampled by weights of two versions
    for step in range(1, STEPS + 1):
        groups = load_rollouts(config.run.path, step)
        assert len(groups) == GROUPS
        trained += [group.id for group in groups]
        completions = [c for group in groups for c in group.completions]
        ages |= {step - 1 - version for c in completions for version in c.versions}
        mixed += sum(len(set(c.versions)) > 1 for c in completions)
    assert len(set(trained)) == len(trained) == STEPS * GROUPS
    assert ages == {0, 1}
    if on_update == "finish":
        assert not mixed
    lines = [line for line in read_metrics(config.run.path) if line["step"]]
    assert max(line["rollout/staleness_max"] for line in lines) == 1
    for side in ("busy/trainer", "busy/servers"):
        assert all(0 < line[side] <= 1 for line in lines), side
    (server,) = engine.fleet.up()
    assert is_fine(server, "/ready", timeout=60), "a server that others keep running goes on"


@pytest.mark.slow
def test_a_run_killed_between_turns_goes_on_with_the_answers_that_it_had(
    prepare: Prepare, turning_model: Path, tmp_path: Path
) -> None:
    gate, steps = Gate(tmp_path), 8
    config, command = prepare(
        "killed",
        model={"path": str(turning_model)},
        # all answers ahead are there at each push, and at each checkpoint
        rollout={"on_update": "finish", "environment": gate.environment},
        train={"steps": steps, "eval_every": 0},
        checkpoint={"every": 1, "export_hf": False},
    )
    run, checkpoints = Watched(config.run.path, patience=300), Store(config.run.path / "checkpoints", keep=1)
    with subprocess.Popen(command.arguments, env=command.env) as process:
        run.processes.append(process)
        run.wait("a checkpoint", lambda: checkpoints.latest())
        gate.close(run)
        process.kill()
    latest = checkpoints.latest()
    assert latest
    waiting = [group["completions"] for group in read_answers(latest)]
    gate.open()
    finish(command)

    groups = [group for step in range(1, steps + 1) for group in load_rollouts(config.run.path, step)]
    assert len(groups) == steps * GROUPS
    assert len({group.id for group in groups}) == len({group.prompt.key for group in groups}) == len(groups)
    # whole groups: two answers may be the same, those that end at once for example
    trained = Counter(tuple(answer.logprobs for answer in group.completions) for group in groups)
    assert max(len(answer["turns"]) for answers in waiting for answer in answers) == 2
    for answers in waiting:
        logprobs = [chain(*(turn["logprobs"] for turn in answer["turns"])) for answer in answers]
        assert trained[tuple(map(tuple, logprobs))] == 1
