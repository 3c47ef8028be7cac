"""A short run of the whole pipeline through the command line, shared by the end-to-end tests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.forked import COMMANDS, ROOT


def gspo_mm(
    *arguments: str,
    check: bool = True,
    ranks: int = 1,
    script: Path | None = None,
    real: bool = False,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run the command on `ranks` ranks; output is captured. `script` stands in for the program.

    `real`: in a process that Python or torchrun starts, as a user would, instead of in a fork.
    """
    command = [*([str(script)] if script else ["-m", "gspo_mm.cli"]), *arguments]
    result = (_started if real else COMMANDS.run)(*command, ranks=ranks, timeout=550, **environment)
    assert "UnexplainedMetricWarning" not in result.stderr
    if check and result.returncode:
        raise AssertionError(f"{arguments} exited {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result


def _started(
    *command: str, ranks: int, timeout: float, **environment: str
) -> subprocess.CompletedProcess[str]:
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        environment.setdefault("OMP_NUM_THREADS", "1")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **environment}
    return subprocess.run(
        [*start, *command], cwd=ROOT, capture_output=True, text=True, env=env, timeout=timeout
    )


@pytest.fixture(scope="session")
def short_config(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, digit_shards: Path) -> Path:
    """A config of four small steps that starts from random weights."""
    folder = tmp_path_factory.mktemp("short")
    values = {
        "run": {"name": "short", "dir": str(folder / "runs"), "seed": 3},
        "model": {"path": str(tiny_model)},
        "data": {
            "train": [str(digit_shards / "train-*.tar")],
            "validation": [str(digit_shards / "validation-*.tar")],
            "shuffle_buffer": 50,
        },
        "rollout": {
            "prompts_per_step": 8,
            "group_size": 4,
            "drop_dead_groups": True,
            "sampling": {"max_new_tokens": 6},
        },
        "reward": {"file": str(folder / "reward.yaml")},
        "loss": {"clip_low": 0.004, "clip_high": 0.006},
        "policy": {"dtype": "float32", "optimizer": {"lr": 1e-3}, "micro_batch_tokens": 512},
        "train": {"steps": 4, "updates_per_batch": 2, "eval_prompts": 16, "eval_every": 2},
        "sft": {"steps": 4, "batch_size": 8},
        "checkpoint": {"every": 1},
        "observe": {"save_rollouts_every": 1, "routing_audit": 2},
    }
    # random weights never write "<answer>": a format of their own gives rewards that differ within a group
    (folder / "reward.yaml").write_text(
        yaml.safe_dump(
            {
                "name": "letters",
                "parts": [
                    {
                        "name": "vowel",
                        "type": "format",
                        "accuracy": True,
                        "args": {"pattern": "(?s).*[aeiou].*"},
                    }
                ],
            }
        )
    )
    path = folder / "short.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="session")
def short_run(short_config: Path) -> Path:
    """The folder of that config's uninterrupted run."""
    gspo_mm("train", str(short_config), real=True)
    return short_config.parent / "runs" / "short"
