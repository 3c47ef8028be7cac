"""Nothing that a guard started outlives it, its command or the process that asked for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from gspo_mm.serving.guard import guarded
from tests.waiting import PATIENCE, eventually

# A command that leaves processes of every kind, each of which writes FOLDER/NAME.pid: a child, one in a session of its
# own, and one whose parent is gone. Its own end, by a file FOLDER/end, has status 3.
TREE = """
import os, signal, subprocess, sys, time
from pathlib import Path

folder, how = Path(sys.argv[1]), sys.argv[2:]

def sign(name):
    path = folder / f".{name}"
    path.write_text(str(os.getpid()))
    path.rename(folder / f"{name}.pid")

def stay(name):
    if "stubborn" in how:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sign(name)
    while True:
        signal.pause()

def spawn(name, *before):
    if os.fork() == 0:
        for step in before:
            step()
        stay(name)

def leave_parent():
    if os.fork():
        os._exit(0)

spawn("child")
spawn("session", os.setsid)
spawn("orphan", os.setsid, leave_parent)
if "stubborn" in how:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
elif "polite" in how:
    signal.signal(signal.SIGTERM, lambda *_: (sign("asked"), sys.exit(5)))
sign("command")
while not (folder / "end").exists():
    time.sleep(0.01)
os._exit(3)
"""
NAMES = ["child", "session", "orphan", "command"]


class Tree:
    """A guard with TREE under it."""

    def __init__(self, folder: Path, *how: str) -> None:
        self.folder = folder
        self._how = how

    def command(self) -> list[str]:
        return [sys.executable, "-c", TREE, str(self.folder), *self._how]

    def members(self) -> list[psutil.Process]:
        """All processes of the command, as soon as they are there."""
        eventually(lambda: all((self.folder / f"{name}.pid").exists() for name in NAMES))
        return [psutil.Process(self.pid(name)) for name in NAMES]

    def pid(self, name: str) -> int:
        return int((self.folder / f"{name}.pid").read_text())


@pytest.fixture
def tree(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Tree]:
    how = getattr(request, "param", ())
    yield Tree(tmp_path, *how)
    for path in tmp_path.glob("*.pid"):  # of a test that failed
        with suppress(ProcessLookupError):
            os.kill(int(path.read_text()), signal.SIGKILL)


def gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def all_gone(processes: list[psutil.Process]) -> bool:
    return all(gone(process) for process in processes)


def impatient(command: list[str]) -> list[str]:
    """As `guarded`, with hardly any grace between TERM and KILL."""
    script = "import os, sys; from gspo_mm.serving import guard; guard._GRACE = 0.2; "
    script += "sys.exit(guard.main(os.getppid(), sys.argv[1:]))"
    return [sys.executable, "-c", script, *command]


@pytest.mark.parametrize("status", [0, 3])
def test_the_commands_exit_status_is_the_guards(status: int) -> None:
    done = subprocess.run(guarded([sys.executable, "-c", f"raise SystemExit({status})"]), timeout=PATIENCE)
    assert done.returncode == status


def test_a_command_that_died_of_a_signal_has_not_succeeded() -> None:
    script = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert subprocess.run(guarded([sys.executable, "-c", script]), timeout=PATIENCE).returncode != 0


def asking(command: list[str], then: str) -> list[str]:
    """A process that starts `command` under a guard."""
    script = "import os, subprocess; from gspo_mm.serving.guard import guarded; "
    return [sys.executable, "-c", f"{script}subprocess.Popen(guarded({command!r})){then}"]


def test_a_guard_whose_parent_was_gone_before_it_began_ends_as_well() -> None:
    # whoever holds the output is still there: the guard, and its command
    asker = asking([sys.executable, "-c", "import signal; signal.pause()"], "; os._exit(0)")
    subprocess.run(asker, check=True, capture_output=True, timeout=PATIENCE)


def test_all_die_with_the_process_that_asked(tree: Tree) -> None:
    asker = subprocess.Popen(asking(tree.command(), ".wait()"), start_new_session=True)
    members = tree.members()
    (guard,) = psutil.Process(asker.pid).children()
    assert not any(gone(process) for process in members)
    asker.kill()
    asker.wait()
    eventually(lambda: all_gone([*members, guard]))


def test_what_the_command_left_behind_dies_when_it_ends(tree: Tree) -> None:
    guard = subprocess.Popen(guarded(tree.command()))
    members = tree.members()
    (tree.folder / "end").touch()
    assert guard.wait(PATIENCE) == 3
    assert all_gone(members)


@pytest.mark.parametrize("tree", [["polite"]], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_guard_asks_the_command_to_end(tree: Tree, number: signal.Signals) -> None:
    guard = subprocess.Popen(guarded(tree.command()))
    members = tree.members()
    guard.send_signal(number)
    assert guard.wait(PATIENCE) == 5
    assert (tree.folder / "asked.pid").exists()
    assert all_gone(members)


@pytest.mark.parametrize("tree", [["stubborn"]], indirect=True)
def test_who_does_not_listen_is_killed(tree: Tree) -> None:
    guard = subprocess.Popen(impatient(tree.command()))
    members = tree.members()
    guard.terminate()
    assert guard.wait(PATIENCE) != 0
    assert all_gone(members)


def test_the_command_dies_with_its_guard(tree: Tree) -> None:
    guard = subprocess.Popen(guarded(tree.command()))
    members = tree.members()
    guard.kill()
    guard.wait()
    eventually(lambda: gone(members[NAMES.index("command")]))


def test_slurms_warning_signal_ends_nothing(tree: Tree) -> None:
    guard = subprocess.Popen(guarded(tree.command()))
    members = tree.members()
    guard.send_signal(signal.SIGUSR1)
    os.kill(tree.pid("command"), signal.SIGUSR1)
    (tree.folder / "end").touch()
    assert guard.wait(PATIENCE) == 3
    assert all_gone(members)


def test_a_terminals_interrupt_does_not_reach_the_command(tree: Tree) -> None:
    guard = subprocess.Popen(guarded(tree.command()), start_new_session=True)
    tree.members()
    assert os.getpgid(tree.pid("command")) != os.getpgid(guard.pid)
    guard.terminate()
    guard.wait(PATIENCE)
