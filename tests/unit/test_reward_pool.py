"""Rewards that hang, die, or eat all memory fail alone; nothing else waits for them or goes wrong."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as NotYet
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from gspo_mm.config import RewardConfig
from gspo_mm.reward.part import PartType
from gspo_mm.reward.parts import PARTS
from gspo_mm.reward.rewards import Rewards, check_failures, failed_fraction, load_rewards
from gspo_mm.reward.spec import RewardFileError
from gspo_mm.reward.text import ExactArgs
from gspo_mm.runtime.workers import default_workers
from gspo_mm.types import Completion, EncodedImage, Finish, GspoError, Prompt, RolloutGroup
from tests.waiting import eventually

type Make = Callable[..., Rewards]


def group(*texts: str, number: int = 0, task: str = "t") -> RolloutGroup:
    image = EncodedImage(data=b"picture", key="k", width=3, height=2)
    prompt = Prompt(key=f"shard/{number}", messages=(), images=(image,), answer="", task=task)
    answers = tuple(
        Completion.of_one_turn(token_ids=(1,), logprobs=(-0.5,), versions=(0,), finish=Finish.STOP, text=text)
        for text in texts
    )
    return RolloutGroup(id=number, prompt=prompt, prompt_ids=(1,), completions=answers)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Rewards] = []

    def load(function: str = "judge", *, args: dict[str, Any] | None = None, **limits: Any) -> Rewards:
        part = {
            "name": "own",
            "python": f"tests.unit.failing_rewards:{function}",
            "args": args or {},
            "tasks": ["t"],
        }
        path = tmp_path / f"reward-{len(made)}.yaml"
        path.write_text(yaml.safe_dump({"name": "own", "parts": [part]}))
        made.append(
            load_rewards(RewardConfig(file=str(path), **({"workers": 2, "timeout": 2.0} | limits)), {})
        )
        return made[-1]

    yield load
    for rewards in made:
        rewards.close()


def errors(scored: RolloutGroup) -> list[str | None]:
    return [score.error for score in scored.scores]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hang", "took more than reward.timeout=2 s"),
        ("die", "its process died with exit status 3"),
        ("segfault", f"its process died with exit status {-signal.SIGSEGV}"),
        ("eat", "part own: MemoryError"),
        ("raise", "part own: RuntimeError: no idea"),
        ("nan", "part own: ValueError: value nan is outside [-1, 1]"),
    ],
)
def test_only_what_goes_wrong_fails(text: str, message: str, make: Make) -> None:
    rewards = make(memory_gib=2.0)
    before = threading.active_count()
    scored = rewards.score_groups([group("2", text, "3"), group("4", "5", number=1)])
    assert message in str(scored[0].scores[1].error)
    assert [
        g.scores[i].value for g, i in ((scored[0], 0), (scored[0], 2), (scored[1], 0), (scored[1], 1))
    ] == [
        1.0,
        0.0,
        1.0,
        0.0,
    ]
    assert failed_fraction(scored) == pytest.approx(1 / 5)
    assert rewards.score_groups([group("6")])[0].scores[0].value == 1.0, "the next worker works"
    rewards.close()
    assert threading.active_count() <= before


def test_each_completion_has_the_whole_time(make: Make) -> None:
    scored = make(workers=1).score_groups([group(*["nap"] * 5)])
    assert errors(scored[0]) == [None] * 5, "five times 0.7 s are more than the 2 s of one"


def test_stuck_workers_are_gone(make: Make, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    rewards = make(args={"notes": str(notes)}, timeout=1.0)
    future = rewards.start(group("hang"))
    with pytest.raises(NotYet):
        future.result(timeout=0.2)
    assert "took more than" in str(errors(future.result())[0])
    stuck = {int(line.split()[0]) for line in notes.read_text().splitlines()}
    eventually(lambda: not any(psutil.pid_exists(pid) for pid in stuck))


def test_many_bad_ones_do_not_stop_the_good_ones(make: Make) -> None:
    rewards = make(timeout=1.0, memory_gib=2.0)
    texts = ["hang", "2", "die", "4", "raise", "6"]
    scored = rewards.score_groups([group(*texts, number=i) for i in range(4)])
    for each in scored:
        assert [s.error is None for s in each.scores] == [False, True] * 3
        assert [s.value for s in each.scores if s.error is None] == [1.0] * 3


def test_parts_see_pictures_only_where_they_ask(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make("sees").score_groups([group("x")])[0].scores[0].value == 1.0
    rewards = make()
    assert rewards._default.reads_images
    monkeypatch.setitem(
        PARTS, "sized", PartType(judge=lambda *_, size: 1.0, args=ExactArgs, context=("size",))
    )
    from gspo_mm.reward.spec import parse_reward

    assert not parse_reward({"name": "n", "parts": [{"name": "s", "type": "sized"}]}, file="s").reads_images


def test_a_task_that_no_part_covers_is_an_error(make: Make) -> None:
    with pytest.raises(RewardFileError, match="has task='other', which no part covers"):
        make().score_groups([group("2"), group("2", task="other", number=1)])


def test_workers_end_with_the_process_that_asked_for_them(tmp_path: Path) -> None:
    part = {
        "name": "own",
        "python": "tests.unit.failing_rewards:judge",
        "args": {"notes": str(tmp_path / "notes")},
    }
    (tmp_path / "reward.yaml").write_text(yaml.safe_dump({"name": "own", "parts": [part]}))
    code = (
        "from tests.unit.test_reward_pool import *\n"
        f"rewards = load_rewards(RewardConfig(file={str(tmp_path / 'reward.yaml')!r}, workers=2, timeout=600.0), {{}})\n"
        "rewards.score_groups([group('2')])\n"
        "rewards.start(group('hang')).result()\n"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", code], cwd=root, stderr=subprocess.DEVNULL) as process:
        eventually(lambda: "hang" in notes_of(tmp_path))
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2
        os.kill(process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


def notes_of(folder: Path) -> str:
    path = folder / "notes"
    return path.read_text() if path.exists() else ""


def test_signals_that_stop_the_trainer_in_order_do_not_stop_its_rewards(tmp_path: Path) -> None:
    """Slurm and terminals send them to all processes; in a process of its own, as that which forks is one per process."""
    part = {"name": "own", "python": "tests.unit.failing_rewards:judge"}
    (tmp_path / "reward.yaml").write_text(yaml.safe_dump({"name": "own", "parts": [part]}))
    code = f"""
import psutil, signal
from tests.unit.test_reward_pool import *
rewards = load_rewards(RewardConfig(file={str(tmp_path / "reward.yaml")!r}, workers=2, timeout=1.0), {{}})
rewards.score_groups([group("2")])
helpers = psutil.Process().children(recursive=True)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    for helper in helpers:
        helper.send_signal(number)
scored = rewards.score_groups([group("2", "hang", "4"), group("die", "6", number=1)])
assert [[s.error is None for s in g.scores] for g in scored] == [[True, False, True], [False, True]], scored
rewards.close()
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True, timeout=120)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"max_failed_fraction": 0.3},
            "more than reward.max_failed_fraction=0.3: 1 of 2 rewards of step 3 failed",
        ),
        ({"on_failure": "fail"}, "reward.on_failure=fail, and 1 of 2 rewards of step 3 failed"),
        ({"max_failed_fraction": 0.5}, None),
        ({"max_failed_fraction": 0.5, "on_failure": "drop_group"}, None),
    ],
)
def test_failures_are_bounded_and_told(
    settings: dict[str, Any], message: str | None, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    scored = make().score_groups([group("2", "raise")])
    limits = RewardConfig(file="r.yaml", **settings)
    if message is None:
        with caplog.at_level(logging.WARNING):
            check_failures(scored, limits, what="step 3")
        assert "1 of 2 rewards of step 3 failed, 1 of them so: part own: RuntimeError: no idea" in caplog.text
        return
    with pytest.raises(GspoError, match=message) as error:
        check_failures(scored, limits, what="step 3")
    assert "no idea" in str(error.value)


def test_nothing_is_said_where_nothing_failed(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    check_failures(
        make().score_groups([group("2")]), RewardConfig(file="r.yaml", on_failure="fail"), what="step 1"
    )
    assert not caplog.text
    assert failed_fraction([]) == 0.0


def test_half_of_the_cores_judge() -> None:
    assert 1 <= default_workers() <= max(1, len(os.sched_getaffinity(0)) // 2)


def test_groups_are_scored_side_by_side_from_any_thread(make: Make) -> None:
    rewards = make(timeout=30.0)
    results: list[float] = []

    def ask(number: int) -> None:
        results.append(rewards.start(group(str(number), number=number)).result().scores[0].value)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(results) == [0.0] * 6 + [1.0] * 6


def test_closing_does_not_wait_for_what_hangs(make: Make) -> None:
    rewards = make(timeout=600.0)
    future = rewards.start(group("hang"))
    time.sleep(0.5)
    rewards.close()
    assert future.cancelled()
