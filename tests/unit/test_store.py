"""Whatever is in RUN/checkpoints and whenever a process dies: the newest whole checkpoint is found, and only ours go."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gspo_mm.checkpoint.store import Store
from gspo_mm.runtime import disk
from gspo_mm.runtime.disk import refusal


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "checkpoints", keep=2)


def save(store: Store, step: int, accuracy: float | None = None) -> Path:
    store.begin(step)
    (store.temporary(step) / "policy").mkdir()
    (store.temporary(step) / "policy" / "weights").write_text(str(step))
    store.publish(step, {"step": step, "accuracy": accuracy})
    return store.path(step)


def names(store: Store) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


DIES = """
import os, shutil, sys
from pathlib import Path
from gspo_mm.checkpoint.store import Store
store, step, left = Store(Path(sys.argv[1]), 1), int(sys.argv[2]), int(sys.argv[3])
def dying(call):
    def counted(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return call(*args, **kwargs)
    return counted
for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync"):
    setattr(os, name, dying(getattr(os, name)))
store.sweep()
if not store.is_whole(store.path(step)):
    store.begin(step)
    (store.temporary(step) / "policy").mkdir()
    (store.temporary(step) / "policy" / "weights").write_text(str(step))
    store.publish(step, {"step": step})
"""


@pytest.mark.parametrize("step", [2, 3], ids=["the same step", "the next step"])
@pytest.mark.parametrize("headless", [False, True])
def test_a_process_that_dies_between_any_two_operations_leaves_the_newest_whole_checkpoint(
    step: int, headless: bool, tmp_path: Path
) -> None:
    """Fork, not spawn: hundreds of starts of Python would take minutes."""
    code = compile(DIES, "dies", "exec")
    for operations in range(100):
        folder = tmp_path / str(operations)
        store = Store(folder, 1)
        save(store, 2)
        (folder / ".tmp-step-00000001" / "policy").mkdir(parents=True)  # of a start before
        if headless:
            (folder / "step-00000003").mkdir()
        child = os.fork()
        if child == 0:
            sys.argv = ["dies", str(folder), str(step), str(operations)]
            exec(code, {"__name__": "dies"})
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        latest = Store(folder, 1).latest()
        assert latest in (folder / "step-00000002", folder / f"step-{step:08d}")
        assert (latest / "policy" / "weights").read_text() == str(int(latest.name[5:]))
        store.sweep()
        assert not [name for name in names(store) if name.startswith(".")]
        if status == 0:
            assert latest == folder / f"step-{step:08d}"
            break
        assert status == 9
    assert operations >= 2


def test_only_whole_checkpoints_of_our_own_names_are_resumed_from_and_removed(store: Store) -> None:
    save(store, 2)
    users = ["step-00000002-best", "step-before-change", "step-final", "step-9", "best", "step-00000001.bak"]
    for name in users:
        shutil.copytree(store.path(2), store.folder / name)
    (store.folder / "latest").symlink_to("step-00000002")
    for step in range(3, 7):
        save(store, step)
    assert store.latest() == store.path(6)
    assert names(store) == sorted([*users, "latest", "step-00000005", "step-00000006"])


def test_a_copy_under_the_name_of_another_step_is_not_that_step(store: Store) -> None:
    shutil.copytree(save(store, 2), store.path(9))
    assert store.latest() == store.path(2)
    (told,) = store.sweep()
    assert "step-00000009 is no whole checkpoint of step 9" in told
    assert save(store, 9) == store.latest()
    assert json.loads((store.folder / "step-00000009-moved-1" / "state.json").read_text())["step"] == 2


def test_a_link_to_a_checkpoint_elsewhere_is_resumed_from_and_stays(store: Store, tmp_path: Path) -> None:
    elsewhere = Path(shutil.move(save(store, 2), tmp_path / "archive"))
    store.path(2).symlink_to(elsewhere)
    assert store.latest() == store.path(2)
    for step in range(3, 6):
        save(store, step)
    assert names(store) == ["step-00000002", "step-00000004", "step-00000005"]
    assert (elsewhere / "state.json").exists()


def test_what_is_put_aside_stays(tmp_path: Path) -> None:
    store = Store(tmp_path / "checkpoints", keep=2, keep_every=5)
    for step in range(1, 13):
        (save(store, step) / "KEEP").touch() if step == 3 else save(store, step)
    stay = [3, 5, 10, 11, 12]
    assert names(store) == [f"step-{step:08d}" for step in stay]
    assert store.latest() == store.path(12)


def test_the_best_stays_beside_the_newest_until_a_better_one_comes(tmp_path: Path) -> None:
    store = Store(tmp_path / "checkpoints", keep=1, keep_best=True)
    known = {1: 0.2, 2: 0.6, 3: None, 4: 0.5, 5: 0.6, 6: 0.1}
    stay = {1: [1], 2: [1, 2], 3: [2, 3], 4: [2, 4], 5: [4, 5], 6: [5, 6]}
    for step, accuracy in known.items():
        save(store, step, accuracy)
        assert names(store) == [f"step-{each:08d}" for each in stay[step]]
    assert store.best() == store.path(5)
    assert store.latest() == store.path(6)


def test_a_folder_of_checkpoints_that_is_a_link_is_used(store: Store, tmp_path: Path) -> None:
    (tmp_path / "large disk").mkdir()
    store.folder.symlink_to(tmp_path / "large disk")
    for step in range(1, 5):
        save(store, step)
    assert (tmp_path / "large disk" / "step-00000004" / "state.json").exists()
    assert len(names(store)) == 2


@pytest.mark.parametrize("kind", ["file", "empty folder", "broken link", "half a state", "no state"])
def test_what_is_no_checkpoint_is_not_resumed_from_and_makes_way(
    kind: str, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    save(store, 4)
    place = store.path(5)
    if kind == "file":
        place.write_text("notes")
    elif kind == "broken link":
        place.symlink_to("gone")
    else:
        place.mkdir()
        if kind == "half a state":
            (place / "state.json").write_text('{"step"')
        if kind == "no state":
            (place / "state.json").write_text("[]")
    assert store.latest() == store.path(4)
    assert len(store.sweep()) == 1
    assert save(store, 5) == store.latest()
    assert os.path.lexists(store.folder / "step-00000005-moved-1")
    assert "it is now step-00000005-moved-1" in caplog.text


def test_unfinished_checkpoints_are_swept_and_nothing_else(store: Store, tmp_path: Path) -> None:
    save(store, 1)
    for name in (
        ".tmp-step-00000002",
        ".tmp-step-00000003",
        ".old-step-00000001",
        ".tmp-mine",
        ".tmp-step-2",
    ):
        (store.folder / name).mkdir()
        (store.folder / name / "weights").write_text("w")
    (tmp_path / "target").mkdir()
    (store.folder / ".tmp-step-00000007").symlink_to(tmp_path / "target")
    assert len(store.sweep()) == 3
    assert names(store) == [".tmp-mine", ".tmp-step-00000007", ".tmp-step-2", "step-00000001"]
    assert (tmp_path / "target").exists()


def test_one_that_cannot_be_removed_is_told_and_the_new_one_is_there(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(store, 1), save(store, 2)

    def busy(path: Path, **_: object) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    monkeypatch.setattr(shutil, "rmtree", busy)
    assert save(store, 3) == store.latest()
    assert "step-00000001 cannot be removed: device or resource busy; something else uses it" in caplog.text


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "your quota"),
        (errno.EROFS, "mounted read-only"),
        (errno.EACCES, "permission"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EFBIG, "ulimit -f"),
        (errno.ESTALE, "file server has forgotten"),
        (errno.ENAMETOOLONG, "shorter name"),
        (errno.ENOTDIR, "move it away"),
        (errno.EEXIST, "move it away"),
        (errno.ELOOP, "circle"),
        (errno.EIO, "disk or its connection fails"),
    ],
)
def test_each_error_of_a_disk_has_its_own_fix(number: int, fix: str, tmp_path: Path) -> None:
    error = OSError(number, os.strerror(number))
    told = refusal(error)
    assert told is not None
    assert fix in told
    assert os.strerror(number).lower() in told.lower()
    assert ("free some space" in told) == (number == errno.ENOSPC)
    assert refusal(RuntimeError(f"writer failed: {error}"), folder=tmp_path) == told
    wrapped = RuntimeError("writer failed")
    wrapped.__cause__ = error
    assert refusal(wrapped, folder=tmp_path) == told


def test_what_is_no_refusal_of_a_disk_is_none(tmp_path: Path) -> None:
    assert refusal(OSError(errno.ECHILD, "no child")) is None
    assert refusal(FileNotFoundError(errno.ENOENT, "gone")) is None
    gone = refusal(FileNotFoundError(errno.ENOENT, "gone"), folder=tmp_path)
    assert gone is not None
    assert "the folder was removed" in gone


def test_a_writer_that_hides_the_reason_is_asked_about_the_disk(tmp_path: Path) -> None:
    code = (
        "import resource; from pathlib import Path; from gspo_mm.runtime.disk import refusal\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        f"print(refusal(RuntimeError('unexpected pos 704 vs 598'), folder=Path({str(tmp_path)!r})))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "file too large; raise the limit" in told


@pytest.mark.parametrize("step", ["3", None, 3.0, [], True])
def test_a_step_that_is_no_number_makes_no_checkpoint(step: object, store: Store) -> None:
    whole = save(store, 2)
    (store.path(3) / "policy").mkdir(parents=True)
    (store.path(3) / "policy" / "weights").write_text("3")
    (store.path(3) / "state.json").write_text(json.dumps({"step": step}))
    assert store.latest() == whole


@pytest.mark.parametrize("left", ["nothing", "an empty folder"])
def test_a_checkpoint_that_lost_its_weights_is_not_gone_on_from(left: str, store: Store) -> None:
    whole, newer = save(store, 2), save(store, 3)
    shutil.rmtree(newer / "policy")
    if left != "nothing":
        (newer / "policy").mkdir()
    assert store.latest() == whole


def test_a_network_that_fails_is_no_disk_unless_files_were_written(tmp_path: Path) -> None:
    fault = OSError(errno.ETIMEDOUT, "Connection timed out")
    assert refusal(fault) is None
    assert "the file server does not answer" in str(refusal(fault, folder=tmp_path))


@pytest.mark.parametrize("refused", [False, True])
def test_a_file_past_the_cache_holds_all_that_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    """`refused`: by a disk that has no way past the cache."""
    original = os.open

    def opened(path: Path, flags: int, mode: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return original(path, flags, mode)

    monkeypatch.setattr(disk, "_BLOCK", 8192)
    if refused:
        monkeypatch.setattr(disk.os, "open", opened)
    data = [os.urandom(size) for size in (0, 3, 5000, 8192, 1, 40000, 4096)]
    with disk.UncachedFile(tmp_path / "file") as file:
        for part in data:
            assert file.write(part) == len(part)
        assert file.tell() == sum(map(len, data))
    assert (tmp_path / "file").read_bytes() == b"".join(data)
