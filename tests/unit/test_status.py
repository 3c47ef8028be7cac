"""`gspo-mm status`: what a run folder says, while its run lives, when it has ended, and when it was killed."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gspo_mm.checkpoint.owner import Owner
from gspo_mm.cli import app
from gspo_mm.commands.status import status_of
from gspo_mm.types import GspoError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 40 steps after 30 of them, with a checkpoint of the 20th."""
    (tmp_path / "config.yaml").write_text("run: {name: r}\ntrain: {steps: 40}\n")
    lines = [
        {"step": step, "time/step": 2.0, "tokens_per_second": 100.0, "reward/mean": step / 100}
        for step in range(1, 31)
    ]
    lines[9]["eval/accuracy"], lines[19]["eval/accuracy"], lines[29]["eval/accuracy"] = 0.25, 0.75, 0.5
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    checkpoint = tmp_path / "checkpoints" / "step-00000020"
    (checkpoint / "policy").mkdir(parents=True)
    (checkpoint / "policy" / "weights").touch()
    (checkpoint / "state.json").write_text('{"step": 20}')
    (tmp_path / "log.txt").write_text(
        f"2026-01-01 10:00:00,000 INFO    gspo_mm.harness: resuming {tmp_path} after step 20\n"
        "2026-01-01 10:00:01,000 WARNING gspo_mm.serving.fleet: server a-0 does not answer\n"
        "2026-01-01 10:00:02,000 ERROR   gspo_mm: something broke\n"
    )
    return tmp_path


def test_numbers_are_those_of_the_folder(run: Path) -> None:
    found = status_of(run)
    assert (found["state"], found["step"], found["steps"]) == ("stopped", 30, 40)
    assert (found["seconds_per_step"], found["seconds_left"], found["tokens_per_second"]) == (
        2.0,
        20.0,
        100.0,
    )
    assert found["reward"] == {"first": pytest.approx(0.105), "last": pytest.approx(0.205)}
    assert found["held_out"] == {"first": 0.25, "best": 0.75, "last": 0.5}
    assert found["verdict"] == "No rule holds, but 0 steps are few to judge by."
    assert found["checkpoint"].endswith("step-00000020")
    assert (found["restarts"], found["warnings"], found["errors"]) == (1, 1, 1)
    assert found["last_error"] == "something broke"


def test_a_living_run_says_what_it_is_at(run: Path) -> None:
    owner = Owner(run)
    (run / "progress.json").write_text(
        json.dumps({"step": 31, "steps": 50, "phase": "update", "beats": 7, "time": 0})
    )
    found = status_of(run)
    assert (found["state"], found["step"], found["steps"], found["phase"]) == ("running", 31, 50, "update")
    assert f"process {os.getpid()}" in found["owner"]
    shown = CliRunner().invoke(app, ["status", str(run)]).stdout
    assert "31 of 50, update, progress" in shown
    assert "0:00:38 left" in shown
    owner.release()


def test_one_that_was_killed_is_told_from_one_that_ended(run: Path) -> None:
    pid = os.fork()
    if pid == 0:
        Owner(run)
        os._exit(9)
    os.waitpid(pid, 0)
    assert status_of(run)["state"] == "died"
    Owner(run).release()
    (run / "config.yaml").write_text("train: {steps: 30}\n")
    (run / "summary.json").write_text("{}")
    assert status_of(run)["state"] == "ended"
    as_json = json.loads(CliRunner().invoke(app, ["status", str(run), "--json"]).stdout)
    assert as_json["steps"] == 30


def test_a_folder_without_a_run_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(GspoError, match="is no run folder"):
        status_of(tmp_path)
