"""A run folder has one owner: whoever lives keeps it, whoever died is taken over, and no two have it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from gspo_mm.checkpoint import owner as module
from gspo_mm.checkpoint.owner import FOLDER, Owner, OwnerError, check_free, owner_of
from tests.waiting import eventually

OWNS = """
import sys, time
from pathlib import Path
from gspo_mm.checkpoint import owner
owner.BEAT = 0.05
owner.Owner.of(Path(sys.argv[1]))
print("owned", flush=True)
if sys.argv[2] == "ends":
    sys.exit(2)
while True:
    time.sleep(1)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT", 0.05)
    monkeypatch.setattr(module, "PATIENCE", 0.5)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


@contextmanager
def other(folder: Path, then: str = "stays", **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Another process of this machine that owns the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNS, str(folder), then],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    assert process.stdout
    assert process.stdout.readline() == "owned\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def file(folder: Path) -> Path:
    """Of the last owner."""
    return max((folder / FOLDER).iterdir())


def record(folder: Path) -> dict[str, Any]:
    return json.loads(file(folder).read_text())


def rewrite(folder: Path, **values: Any) -> None:
    file(folder).write_text(json.dumps(record(folder) | values))


def test_a_live_owner_is_named_and_refuses_others(tmp_path: Path) -> None:
    with other(tmp_path, SLURM_JOB_ID="77") as process:
        with pytest.raises(OwnerError) as caught:
            Owner.of(tmp_path)
        text = str(caught.value)
        assert f"in use by process {process.pid} on {socket.gethostname()}, Slurm job 77, since 20" in text
        assert "choose another run.name" in text
        assert record(tmp_path)["pid"] == process.pid


def test_one_that_was_killed_here_is_taken_over_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with other(tmp_path) as process:
        process.kill()  # and not reaped yet, as where nobody waits for it
        eventually(lambda: module._started(process.pid) == "ended")
        monkeypatch.setattr(module.time, "sleep", lambda _: pytest.fail("nothing is waited for"))
        owner = Owner.of(tmp_path)
        assert f"was in use by process {process.pid}" in owner.note
        assert record(tmp_path)["pid"] == os.getpid()
        owner.check()
        owner.release()


def test_one_that_ended_in_order_leaves_the_folder_to_the_next(tmp_path: Path) -> None:
    with other(tmp_path, "ends") as process:
        process.wait()
        assert owner_of(tmp_path) == ("", False)
        owner = Owner.of(tmp_path)
        assert not owner.note
        assert owner_of(tmp_path) == (module._named(record(tmp_path)), True)
        owner.release()
        assert owner_of(tmp_path) == ("", False)
        assert [path.name for path in sorted((tmp_path / FOLDER).iterdir())] == ["000001.json", "000002.json"]


def test_a_process_number_that_was_given_again_is_not_the_owner(tmp_path: Path) -> None:
    with other(tmp_path):
        rewrite(tmp_path, started="1")
        assert check_free(tmp_path)[0] == 1


def test_an_owner_on_another_machine_lives_while_its_file_changes(tmp_path: Path) -> None:
    with other(tmp_path) as process:
        elsewhere = record(tmp_path) | {"host": "node7", "machine": "another"}
        original = module._read
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                module, "_read", lambda path: (original(path) or {}) | {"host": "node7", "machine": "another"}
            )
            with pytest.raises(OwnerError, match=rf"process {process.pid} on node7"):
                check_free(tmp_path)
            process.send_signal(signal.SIGSTOP)
            _, found = check_free(tmp_path)
        assert found["token"] == elsewhere["token"]


def test_an_owner_on_another_machine_that_ends_while_it_is_looked_for_is_no_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with other(tmp_path):
        pass
    rewrite(tmp_path, host="node7")
    monkeypatch.setattr(module.time, "sleep", lambda _: rewrite(tmp_path, beat=module._ENDED))
    assert module._has_ended(check_free(tmp_path)[1])


def test_a_requeued_job_takes_over_from_itself_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with other(tmp_path, SLURM_JOB_ID="77"):
        rewrite(tmp_path, host="node7", machine="another")
        monkeypatch.setenv("SLURM_JOB_ID", "77")
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        monkeypatch.setattr(module.time, "sleep", lambda _: pytest.fail("nothing is waited for"))
        Owner.of(tmp_path).release()


def test_the_same_command_twice_in_one_job_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with other(tmp_path), pytest.raises(OwnerError, match="Slurm job 77"):
        Owner.of(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}'])
def test_a_file_that_was_cut_off_is_taken_over(text: str, tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "000001.json").write_text(text)
    owner = Owner.of(tmp_path)
    assert "a run that left no name" in owner.note
    owner.release()


def test_an_owner_that_was_suspended_and_replaced_notices_and_leaves_the_other_alone(tmp_path: Path) -> None:
    owner = Owner.of(tmp_path)
    beats, owner._record = owner._record, owner._record | {"started": "1"}
    owner._write("0")  # as if its process were gone
    with other(tmp_path) as process:
        owner._record = beats
        owner._write("1")  # a sign of life, too late
        assert record(tmp_path)["pid"] == process.pid
        with pytest.raises(OwnerError, match=rf"was taken over by process {process.pid}"):
            owner.check()
        owner.release()
        assert record(tmp_path)["pid"] == process.pid


def test_a_file_removed_by_hand_comes_back(tmp_path: Path) -> None:
    owner = Owner.of(tmp_path)
    shutil.rmtree(tmp_path / FOLDER)
    owner.check()
    assert record(tmp_path)["token"] == owner._record["token"]
    owner.release()
    assert owner_of(tmp_path) == ("", False)


def test_one_that_looked_before_another_took_over_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with other(tmp_path):
        pass
    original, found = module.check_free, check_free(tmp_path)
    looks = iter([lambda _: found])
    monkeypatch.setattr(module, "check_free", lambda folder: next(looks, original)(folder))
    with other(tmp_path) as process, pytest.raises(OwnerError, match=f"process {process.pid}"):
        Owner.of(tmp_path)
    assert len(list((tmp_path / FOLDER).iterdir())) == 2


def test_of_many_that_start_at_once_one_owns(tmp_path: Path) -> None:
    """All find the same dead owner, in each of twenty folders."""
    (tmp_path / "0").mkdir()
    with other(tmp_path / "0"):
        pass
    folders = [tmp_path / str(number) for number in range(20)]
    for folder in folders[1:]:
        shutil.copytree(folders[0], folder)
    code = (
        "import sys; from pathlib import Path; from gspo_mm.checkpoint.owner import *\n"
        "print('ready', flush=True)\n"
        "for line in sys.stdin:\n"
        "    try: Owner.of(Path(line.strip())); print('owned', flush=True)\n"
        "    except OwnerError: print('refused', flush=True)\n"
    )
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            )
            for _ in range(6)
        ]
        lines = [(process.stdin, process.stdout) for process in processes if process.stdin and process.stdout]
        assert [reads.readline() for _, reads in lines] == ["ready\n"] * 6
        for folder in folders:
            for writes, _ in lines:
                print(folder, file=writes, flush=True)
            assert sorted(reads.readline() for _, reads in lines) == ["owned\n"] + ["refused\n"] * 5
        for writes, _ in lines:
            writes.close()


def test_a_process_owns_a_folder_once(tmp_path: Path) -> None:
    assert Owner.of(tmp_path) is Owner.of(tmp_path / "." / "")
    Owner.of(tmp_path).release()
