"""A run folder is published whole, continued exactly, and refuses what would silently be another experiment."""

import contextlib
import errno
import json
import os
import resource
from pathlib import Path

import pytest
import torch

from gspo_mm.checkpoint.manager import ResumeError, RunDir
from gspo_mm.checkpoint.owner import OwnerError, owner_of
from gspo_mm.config import Config, parse_config
from gspo_mm.runtime.dist import Ranks
from gspo_mm.types import GspoError


def config(tmp_path: Path, *, background: bool = True, **run: object) -> Config:
    return parse_config(
        {
            "run": {"name": "a", "dir": str(tmp_path), **run},
            "model": {"path": "m"},
            "data": {"train": ["a.tar"]},
            "reward": {"file": "r.yaml"},
            "checkpoint": {"background": background},
        }
    )


class Write:
    """Stands for the policy, whose own checkpoint is tested in tests/parallel."""

    def __init__(self, weight: float, size: int = 2) -> None:
        self.weight, self.size, self.written = weight, size, False

    def __call__(self, folder: Path, *, background: bool) -> "Write":
        self.folder, self.background = folder, background
        folder.mkdir()
        return self

    def finish(self) -> None:
        torch.save({"w": torch.full((self.size,), self.weight)}, self.folder / "weights.pt")


def save(run: RunDir, step: int) -> Path:
    run.save(step, Write(float(step)), {"next_group": 10 * step})
    run.settle()
    return run.path / "checkpoints" / f"step-{step:08d}"


def test_the_newest_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    run = RunDir.open(config(tmp_path), Ranks())
    assert run.latest() is None
    save(run, 9)
    save(run, 10)
    latest = run.latest()
    assert latest is not None
    read: list[Path] = []
    state = run.load(latest, read.append)
    assert torch.load(read[0] / "weights.pt")["w"].tolist() == [10.0, 10.0]
    assert state == {"step": 10, "next_group": 100}


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run = RunDir.open(config(tmp_path), Ranks())
    for step in range(1, 6):
        save(run, step)
    assert sorted(p.name for p in (run.path / "checkpoints").iterdir()) == ["step-00000004", "step-00000005"]


def test_a_checkpoint_that_was_cut_off_is_not_seen(tmp_path: Path) -> None:
    run = RunDir.open(config(tmp_path), Ranks())
    whole = save(run, 1)
    cut = run.path / "checkpoints" / ".tmp-step-00000002"
    cut.mkdir()
    (cut / "weights.pt").write_bytes(b"half")
    headless = run.path / "checkpoints" / "step-00000003"
    headless.mkdir()
    assert run.latest() == whole
    save(run, 2)  # the leftovers of the crash are no obstacle
    assert run.load(run.path / "checkpoints" / "step-00000002", lambda _: None)["step"] == 2


def test_answers_that_wait_are_written_beside_and_come_back(tmp_path: Path) -> None:
    run, answers = RunDir.open(config(tmp_path), Ranks()), [{"logprobs": [0.1 + 0.2, -1e-300]}, None]
    run.save(1, Write(1.0), {"next_group": 3}, answers)
    run.settle()
    latest = run.latest()
    assert latest is not None
    assert "logprobs" not in (latest / "state.json").read_text(), (
        "it is read whenever a checkpoint is looked for"
    )
    assert run.load(latest, lambda _: None) == {"step": 1, "next_group": 3, "answers": answers}
    save(run, 2)
    assert "answers" not in run.load(latest.with_name("step-00000002"), lambda _: None)


def test_a_failing_write_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    run = RunDir.open(config(tmp_path, background=False), Ranks())
    whole = save(run, 1)
    with pytest.raises(TypeError):
        run.save(2, Write(1.0), {"not json": object()})
    assert run.latest() == whole


def test_a_disk_that_is_full_is_one_sentence_and_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    run = RunDir.open(config(tmp_path, background=False), Ranks())
    whole = save(run, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # no file may grow beyond: EFBIG
    try:
        with pytest.raises(ResumeError, match="checkpoint 2 cannot be written"):
            run.save(2, Write(1.0, 100_000), {})
        with pytest.raises(ResumeError, match="checkpoint 2 cannot be written"):
            run.save(2, Write(1.0), {}, answers=[{"token_ids": list(range(10_000))}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run.latest() == whole


def test_resume_never_refuses_an_existing_run_and_must_requires_one(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match=r"resume=must.*no checkpoint"):
        RunDir.open(config(tmp_path, resume="must"), Ranks())
    save(RunDir.open(config(tmp_path, resume="never"), Ranks()), 1)
    with pytest.raises(ResumeError, match=r"resume=never.*holds a run"):
        RunDir.open(config(tmp_path, resume="never"), Ranks())
    RunDir.open(config(tmp_path, resume="must"), Ranks())


def test_another_seed_under_the_same_name_is_refused(tmp_path: Path) -> None:
    RunDir.open(config(tmp_path, seed=1), Ranks())
    with pytest.raises(ResumeError, match=r"run\.seed=1 but the config now says 2"):
        RunDir.open(config(tmp_path, seed=2), Ranks())


def test_a_changed_setting_is_told_and_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    RunDir.open(config(tmp_path), Ranks())
    values = config(tmp_path).model_dump()
    values["train"]["steps"] = 7
    RunDir.open(parse_config(values), Ranks()).log_notes()
    assert "train.steps=7 (was 100)" in caplog.text


def test_a_folder_without_write_permission_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResumeError, match=r"run\.dir=.*cannot be written.*choose"):
        RunDir.open(config(tmp_path / "file"), Ranks())


def test_a_checkpoint_is_published_when_it_is_written_and_not_before(tmp_path: Path) -> None:
    run = RunDir.open(config(tmp_path), Ranks())
    write = Write(1.0)
    run.save(1, write, {})
    assert write.background
    run.settle(wait=False)
    assert run.latest() is None, "nobody has written it"
    write.written = True
    run.settle(wait=False)
    assert run.latest() == run.path / "checkpoints" / "step-00000001"
    run.settle(wait=False)  # nothing is under way


def test_the_next_checkpoint_waits_for_the_one_under_way(tmp_path: Path) -> None:
    run = RunDir.open(config(tmp_path), Ranks())
    run.save(1, Write(1.0), {})
    run.save(2, Write(2.0), {})
    assert run.latest() == run.path / "checkpoints" / "step-00000001"


def test_without_background_a_checkpoint_is_there_on_return(tmp_path: Path) -> None:
    run = RunDir.open(config(tmp_path, background=False), Ranks())
    write = Write(1.0)
    run.save(1, write, {})
    assert not write.background
    assert run.latest() is not None


def test_a_fault_that_all_ranks_share_leaves_the_checkpoint_under_way_published(tmp_path: Path) -> None:
    run = RunDir.open(config(tmp_path), Ranks())

    def train(step: int, fault: contextlib.AbstractContextManager[None]) -> None:
        with run.settled():
            run.save(step, Write(1.0), {})
            with fault:
                raise GspoError("stop")

    with pytest.raises(GspoError, match="stop"):
        train(1, Ranks().together())
    assert run.latest() == run.path / "checkpoints" / "step-00000001"
    with pytest.raises(GspoError, match="stop"):
        train(2, contextlib.nullcontext())  # of one rank: the others would not come to publish
    assert run.latest() == run.path / "checkpoints" / "step-00000001"


def test_a_step_that_is_saved_is_not_written_again(tmp_path: Path) -> None:
    run = RunDir.open(config(tmp_path), Ranks())
    run.save(1, Write(1.0), {"next_group": 1})
    saved = save(run, 1)  # the first is still under way
    again = Write(2.0)
    run.save(1, again, {})
    run.settle()
    assert not hasattr(again, "folder")
    assert torch.load(saved / "policy" / "weights.pt")["w"].tolist() == [1.0, 1.0]
    assert run.load(saved, lambda _: None) == {"step": 1, "next_group": 1}


def test_a_checkpoint_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    run = RunDir.open(config(tmp_path, background=False), Ranks())
    (run.path / "checkpoints").write_text("a file of a user's")
    with pytest.raises(
        ResumeError, match=r"checkpoint 1 cannot be written.*not a directory; something else stands"
    ):
        run.save(1, Write(1.0), {})
    (run.path / "checkpoints").unlink()

    class Full(Write):
        def finish(self) -> None:
            (self.folder / "half").write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder / "half"))

    with pytest.raises(ResumeError, match=r"half.*no space left on device; free some space"):
        run.save(1, Full(1.0), {})
    assert list((run.path / "checkpoints").iterdir()) == []


def test_unfinished_checkpoints_are_removed_when_the_run_is_opened_and_that_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDir.open(config(tmp_path), Ranks())
    whole = save(run, 1)
    for step in (2, 3, 4):
        (run.path / "checkpoints" / f".tmp-step-{step:08d}").mkdir()
    RunDir.open(config(tmp_path), Ranks()).log_notes()
    assert list((run.path / "checkpoints").iterdir()) == [whole]
    assert caplog.text.count("was left unfinished by an earlier run and is removed") == 3


@pytest.mark.parametrize("shared", [True, False])
def test_a_fault_of_all_ranks_saves_what_is_worth_it_and_goes_on_its_way(
    shared: bool, tmp_path: Path
) -> None:
    """In a job of one rank every fault is one of all ranks."""
    run = RunDir.open(config(tmp_path), Ranks())
    fault = Ranks().together() if shared else contextlib.nullcontext()
    with pytest.raises(GspoError, match="stop"), run.settled(lambda: run.save(3, Write(3.0), {})), fault:
        raise GspoError("stop")
    assert run.latest() == run.path / "checkpoints" / "step-00000003"
    assert owner_of(run.path) == ("", False)


def test_a_fault_stays_the_reason_when_nothing_can_be_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunDir.open(config(tmp_path), Ranks())
    (run.path / "checkpoints").write_text("")
    with pytest.raises(GspoError, match="stop"), run.settled(lambda: run.save(3, Write(3.0), {})):
        raise GspoError("stop")
    assert "the steps since the last checkpoint are lost: checkpoint 3 cannot be written" in caplog.text


def test_a_run_that_was_taken_over_writes_nothing_more(tmp_path: Path) -> None:
    run = RunDir.open(config(tmp_path), Ranks())
    (file,) = (run.path / "owners").iterdir()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"token": "another"}))
    with pytest.raises(OwnerError, match="was taken over"):
        run.save(1, Write(1.0), {})
    with pytest.raises(OwnerError, match="was taken over"), run.written_together("step 1"):
        pytest.fail("it wrote")
    assert not (run.path / "checkpoints").exists()


def test_a_reward_file_or_function_that_changed_is_named_when_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    reward, module = tmp_path / "r.yaml", tmp_path / "own_judge_of_run_dir.py"
    module.write_text("def judge(text, prompt, completion):\n    return 1.0\n")
    text = "name: r\nparts: [{name: own, python: 'own_judge_of_run_dir:judge'}]\n"
    reward.write_text(text)
    values = config(tmp_path).model_dump()
    values["reward"]["file"] = str(reward)

    def told() -> str:
        caplog.clear()
        run = RunDir.open(parse_config(values), Ranks())
        run.log_notes()
        if run.latest() is None:
            save(run, 1)
        return caplog.text

    assert not told()
    assert not told()
    reward.write_text(text + "# another\n")
    assert f"{reward} has changed since the run was here last" in told()
    assert f"{reward} has changed" in told(), "nothing was trained since"
    run = RunDir.open(parse_config(values), Ranks())
    save(run, 2)
    assert not told()
    module.write_text("def judge(text, prompt, completion):\n    return 0.5\n")
    assert f"{module} has changed since" in told()
