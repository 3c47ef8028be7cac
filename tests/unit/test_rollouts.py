"""Saved rollouts come back as equal values, images included."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from gspo_mm.rollout.replay import Replay
from gspo_mm.rollout.saved import list_steps, load_rollouts, save_rollouts
from gspo_mm.types import Completion, EncodedImage, Finish, GspoError, Prompt, RolloutGroup, Score
from tests.tars import image_bytes


def group(number: int) -> RolloutGroup:
    data = image_bytes(Image.new("L", (3, 4), number % 2))
    image = EncodedImage(data=data, key=EncodedImage.key_of(data), width=3, height=4)
    content = [{"type": "image"}, {"type": "text", "text": "où est le ７?"}]
    return RolloutGroup(
        id=number,
        prompt=Prompt(
            key="../../etc/passwd",
            messages=({"role": "user", "content": content},),
            images=(image,),
            answer=[1, 2.5, None],
            task="where",
            response="r",
            meta={"a": {"b": [1]}},
        ),
        prompt_ids=(1, 2, 3),
        completions=tuple(
            Completion.of_one_turn(
                token_ids=(5, i),
                logprobs=(-0.1 / 3, -1e-17),
                versions=(0, 1),
                finish=Finish.LENGTH,
                text="a\n\u2028b",
            )
            for i in range(2)
        ),
        scores=(Score(value=1 / 3, parts={"x": 0.1}, accuracy=1.0), Score(value=0.0, parts={})),
        advantages=(0.7071067811865475, -0.7071067811865475),
    )


def test_groups_come_back_equal(tmp_path: Path) -> None:
    groups = [group(n) for n in range(4)]
    save_rollouts(tmp_path, 12, groups)
    assert load_rollouts(tmp_path, 12) == groups


def test_a_failed_score_keeps_its_error_and_its_nan(tmp_path: Path) -> None:
    failed = replace(group(0), scores=(Score(value=math.nan, parts={}, error="broke"),) * 2, advantages=())
    save_rollouts(tmp_path, 1, [failed])
    (back,) = load_rollouts(tmp_path, 1)
    assert math.isnan(back.scores[0].value)
    assert back.scores[0].error == "broke"


def test_equal_images_are_stored_once_and_no_key_leaves_the_folder(tmp_path: Path) -> None:
    save_rollouts(tmp_path / "run", 1, [group(n) for n in range(6)])
    assert len(list((tmp_path / "run/rollouts/images").iterdir())) == 2
    assert {p.name for p in tmp_path.iterdir()} == {"run"}


def test_steps_are_listed_in_order(tmp_path: Path) -> None:
    for step in (100, 2, 30):
        save_rollouts(tmp_path, step, [group(0)])
    assert list_steps(tmp_path) == [2, 30, 100]


def test_replay_hands_out_unscored_groups_and_starts_over(tmp_path: Path) -> None:
    for step in (1, 2):
        save_rollouts(tmp_path, step, [group(step)])
    replay = Replay(str(tmp_path))
    assert [replay.groups(step)[0].id for step in range(5)] == [1, 2, 1, 2, 1]
    assert replay.groups(0)[0] == replace(group(1), scores=(), advantages=())


def test_replaying_a_run_without_rollouts_is_refused() -> None:
    with pytest.raises(GspoError, match=r"rollout\.replay=runs/a holds no saved rollouts"):
        Replay("runs/a")


def test_numbers_and_letters_of_every_kind_come_back(tmp_path: Path) -> None:
    odd = replace(
        group(0), prompt=replace(group(0).prompt, answer=10**40, meta={"half": "\ud83d", "x": [0.1]})
    )
    save_rollouts(tmp_path, 1, [odd, group(1)])
    assert load_rollouts(tmp_path, 1) == [odd, group(1)]
