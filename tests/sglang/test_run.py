"""A run whose server samples ahead of the trainer, with the server of this folder's tests as one that others keep running."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gspo_mm.config import save_config
from gspo_mm.observe.metrics import read_metrics
from gspo_mm.rollout.saved import load_rollouts
from gspo_mm.rollout.sglang import SGLangEngine
from gspo_mm.serving.admin import is_fine
from tests.sglang.conftest import MakeConfig

STEPS, GROUPS = 5, 4


@pytest.mark.parametrize(
    ("on_update", "mode"), [("retract", "distributed"), ("in_place", "tensor"), ("finish", "disk")]
)
def test_no_token_is_older_than_the_bound_and_no_group_is_trained_on_twice(
    on_update: str, mode: str, make_config: MakeConfig, engine: SGLangEngine, tmp_path: Path
) -> None:
    (server,) = engine.fleet.up()
    # random weights never answer well: whether there is a vowel in the answer differs within a group
    reward = {"name": "vowel", "type": "format", "args": {"pattern": "(?s).*[aeiou].*"}}
    (tmp_path / "reward.yaml").write_text(yaml.safe_dump({"name": "letters", "parts": [reward]}))
    config = make_config(
        name=f"ahead-{on_update}",
        reward={"file": str(tmp_path / "reward.yaml")},
        rollout={
            "prompts_per_step": GROUPS,
            "group_size": 4,
            "sampling": {"max_new_tokens": 32},
            "max_staleness": 1,
            "on_update": on_update,
            "sglang": {"urls": [server.url]},
        },
        sync={"mode": mode},
        policy={"optimizer": {"lr": 1e-6}},
        train={"steps": STEPS, "eval_every": 0},
        checkpoint={"every": 0, "export_hf": False},
        observe={"save_rollouts_every": 1, "rollouts_per_save": 0, "report": False},
    )
    save_config(config, tmp_path / "config.yaml")
    keys = {"GSPO_MM_API_KEY": server.api_key, "GSPO_MM_ADMIN_KEY": server.admin_key}
    command = [sys.executable, "-m", "gspo_mm.cli", "train", str(tmp_path / "config.yaml")]
    done = subprocess.run(command, env=os.environ | keys, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]

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
    assert is_fine(server, "/ready", timeout=60), "a server that others keep running goes on"
