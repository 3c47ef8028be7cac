"""A signal at any moment ends a command in order: with a sentence, the documented status, and what was trained."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT
from tests.waiting import eventually

PATIENCE = 240  # seconds


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    command = [sys.executable, "-m", "gspo_mm.cli", *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def listens(process: subprocess.Popen[str]) -> bool:
    """Whether it has a handler of SIGUSR1."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (signal.SIGUSR1 - 1) & 1)


def logged(run: Path, text: str) -> bool:
    return (run / "log.txt").exists() and text in (run / "log.txt").read_text()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=PATIENCE)
    assert "Traceback" not in output
    return process.returncode, " ".join(output.split())


@pytest.mark.parametrize(
    ("command", "number", "moment"),
    [
        ("sft", signal.SIGTERM, lambda run: True),  # nothing is imported yet
        ("train", signal.SIGUSR1, lambda run: logged(run, "loading ")),
    ],
    ids=["at once", "while the model is loaded"],
)
def test_a_signal_before_the_first_step_is_told_and_leaves_nothing_to_continue_from(
    command: str,
    number: signal.Signals,
    moment: Callable[[Path], bool],
    short_config: Path,
    tmp_path: Path,
) -> None:
    with running(command, str(short_config), f"run.dir={tmp_path}") as process:
        eventually(lambda: listens(process) and moment(tmp_path / "short"))
        process.send_signal(number)
        status, output = ended(process)
    assert status == 2, output
    assert f"{number.name} received" in output
    assert "error: stopped by a signal" in output
    assert "start again with run.resume=auto to continue" in output
    assert not list(tmp_path.glob("short/checkpoints/step-*"))


def test_a_signal_while_the_model_is_exported_changes_nothing(short_config: Path, tmp_path: Path) -> None:
    settings = [f"run.dir={tmp_path}", "train.steps=1", "train.eval_prompts=1"]
    run = tmp_path / "short"
    with running("train", str(short_config), *settings) as process:
        eventually(lambda: list(run.glob("checkpoints/step-*/state.json")), patience=PATIENCE)
        process.send_signal(signal.SIGTERM)
        status, output = ended(process)
    assert status == 0, output
    assert (run / "hf").is_dir()
    assert (run / "summary.json").exists()
