"""Seeds, phase times, logging and signals."""

import io
import logging
import os
import signal
import warnings
from collections.abc import Buffer
from pathlib import Path

import pytest

from gspo_mm.observe.progress import Progress
from gspo_mm.runtime.log import setup_logging
from gspo_mm.runtime.phases import Busy, Phases
from gspo_mm.runtime.preempt import StopRequest
from gspo_mm.runtime.reporting import run_reporting_faults
from gspo_mm.runtime.seeds import derive_seed
from tests.waiting import eventually


def test_every_purpose_and_step_has_a_seed_of_its_own() -> None:
    seeds = {
        derive_seed(run, what, step)
        for run in range(5)
        for what in ("rollout", "epoch")
        for step in range(50)
    }
    assert len(seeds) == 500
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, "rollout", 2) == 7763091218668521687  # the same on every machine and version


def test_phases_add_up_within_a_step_and_start_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 3.0, 4.0, 10.0, 11.0, 12.0, 20.0])
    monkeypatch.setattr("gspo_mm.runtime.phases.time.perf_counter", lambda: next(clock))
    entered: list[str] = []
    phases = Phases(on_enter=entered.append)
    with phases("a"):
        pass
    with phases("a"):
        pass
    assert phases.take() == {"time/a": 3.0, "time/step": 10.0}
    with phases("b"):
        pass
    assert phases.take() == {"time/b": 1.0, "time/step": 10.0}
    assert entered == ["a", "a", "b"]


def test_a_phase_within_another_counts_for_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 2.0, 5.0, 6.0, 8.0, 9.0, 10.0])
    monkeypatch.setattr("gspo_mm.runtime.phases.time.perf_counter", lambda: next(clock))
    entered: list[str] = []
    phases = Phases(on_enter=entered.append)
    with phases("update"):
        with phases("pack"):
            pass
        with phases("pack"):
            pass
    assert phases.take() == {"time/update": 3.0, "time/pack": 5.0, "time/step": 10.0}
    assert entered == ["update", "pack", "update", "pack", "update"]


def test_work_beside_counts_once_however_much_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("gspo_mm.runtime.phases.time.perf_counter", lambda: now)
    busy = Busy()
    now = 1.0
    with busy:
        now = 2.0
        with busy:
            now = 4.0
        now = 5.0
        assert busy.take() == 0.8, "from 1 to 5, of 5 s"
        now = 7.0
    now = 10.0
    assert busy.take() == 0.4, "from 5 to 7, of 5 s"
    assert busy.take() == 0.0, "no time has passed"


def test_a_signal_becomes_a_request_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) is before


class Interrupted(io.RawIOBase):
    """A log file; a signal comes while its first line is written."""

    def __init__(self) -> None:
        self.text = ""

    def writable(self) -> bool:
        return True

    def write(self, data: Buffer, /) -> int:
        if not self.text:
            os.kill(os.getpid(), signal.SIGUSR1)
        line = bytes(data)
        self.text += line.decode()
        return len(line)


def test_a_signal_in_the_middle_of_a_log_line_is_told_after_it(capsys: pytest.CaptureFixture[str]) -> None:
    file, root = Interrupted(), logging.getLogger()
    handler = logging.StreamHandler(io.TextIOWrapper(io.BufferedWriter(file)))
    root.addHandler(handler)
    try:
        with StopRequest() as stop:
            root.warning("a line")
            eventually(lambda: "received" in file.text)
    finally:
        root.removeHandler(handler)
    assert stop.requested
    assert file.text == "a line\nSIGUSR1 received: stopping, with a checkpoint\n"
    assert "error" not in capsys.readouterr().err


def test_a_second_interrupt_stops_at_once() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_log_and_warnings_reach_the_runs_file(tmp_path: Path) -> None:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        for handler in handlers:
            root.removeHandler(handler)
        setup_logging(tmp_path)
        logging.getLogger("gspo_mm.x").info("hello")
        warnings.warn("careful", stacklevel=1)
        text = (tmp_path / "log.txt").read_text()
    finally:
        for handler in list(root.handlers):
            root.removeHandler(handler)
        for handler in handlers:
            root.addHandler(handler)
        root.setLevel(level)
    assert "INFO    gspo_mm.x: hello" in text
    assert "careful" in text


def test_what_a_library_says_of_its_future_is_in_the_log_once_and_not_on_the_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where other code changes the filters, as the optimizer does at every step."""
    with warnings.catch_warnings():
        setup_logging(tmp_path)
        for _ in range(5):
            warnings.warn("`old` will go", FutureWarning, stacklevel=1)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="nothing")
        logging.getLogger("ours").warning("careful")
    screen = capsys.readouterr().err
    assert "careful" in screen
    assert "`old`" not in screen
    assert (tmp_path / "log.txt").read_text().count("FutureWarning: `old` will go") == 1


def test_progress_prints_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(total=3, title="run") as progress:
        progress.start_at(1)
        progress.phase("rollout")
        progress.step(2, {"reward/mean": 0.5, "accuracy": 0.25, "eval/accuracy": 0.125})
        progress.step(3, {"reward/mean": 0.75, "accuracy": 0.5})
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("run 2/3  reward 0.500  accuracy 25.0%  held-out 12.5%")
    assert lines[1].startswith("run 3/3  reward 0.750  accuracy 50.0%  held-out 12.5%")


@pytest.mark.parametrize("fault", [KeyError("a fault of ours"), FileNotFoundError("a fault of ours")])
def test_a_fault_that_nobody_expected_is_in_the_log_with_its_traceback(
    fault: Exception, tmp_path: Path
) -> None:
    def command() -> None:
        setup_logging(tmp_path)
        raise fault

    with pytest.raises(type(fault)):
        run_reporting_faults(command)
    setup_logging()
    log = (tmp_path / "log.txt").read_text()
    assert "a fault of ours" in log
    assert "in command" in log
