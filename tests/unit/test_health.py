"""Runs that go wrong without stopping are told in a few words, and sound ones are left alone."""

import logging
import random
from typing import Any

import pytest

from gspo_mm.config import parse_config
from gspo_mm.observe.health import Health, at_start


def config(**sections: Any) -> Any:
    base = {"run": {"name": "a"}, "model": {"path": "m"}, "data": {"train": ["a"]}, "reward": {"file": "r"}}
    return parse_config(base | sections)


def judged(lines: list[dict[str, float]], *, eval_prompts: int = 256) -> list[str]:
    health = Health(eval_prompts=eval_prompts)
    for line in lines:
        health.look(line)
    return health.finish()


def step(live: int = 8, std: float = 0.4, mean: float = 0.3, **more: float) -> dict[str, float]:
    return {"groups/live": live, "reward/std": std, "reward/mean": mean, **more}


def test_an_accuracy_that_fell_is_told() -> None:
    lines = [{"eval/accuracy": 0.3}, *[step()] * 3, step(**{"eval/accuracy": 0.0})]
    (told,) = judged(lines)
    assert "fell from 30.0% to 0.0%" in told
    assert "policy.optimizer.lr" in told


def test_a_fall_by_chance_is_seldom_taken_for_one() -> None:
    told = 0
    for seed in range(300):
        rng = random.Random(seed)
        draws = [sum(rng.random() < 0.4 for _ in range(256)) / 256 for _ in range(2)]
        told += len(judged([{"eval/accuracy": accuracy} for accuracy in draws]))
    assert told <= 15  # of 300 pairs with nothing between them but chance


def test_a_constant_reward_is_told_as_such() -> None:
    (told,) = judged([step(live=0, std=0.0, mean=1.0)] * 3)
    assert told == (
        "3 of 3 steps had no live group and trained nothing: all answers got the reward 1; look at reward.file"
    )


def test_dead_groups_whose_rewards_differ_between_prompts_are_told_so() -> None:
    (told,) = judged([step(live=0)] * 4 + [step()] * 2)
    assert told.startswith("4 of 6 steps had no live group")
    assert "look at the saved rollouts" in told


def test_some_dead_steps_are_no_fault() -> None:
    assert judged([step(live=0)] * 3 + [step()] * 3) == []


def test_a_policy_that_jumps_is_told() -> None:
    (told,) = judged([step(approx_kl=0.001), step(approx_kl=4.2)])
    assert "moved by 4.2 nats a token" in told


def test_a_supervised_loss_that_rose_is_told() -> None:
    (told,) = judged([{"sft/loss": 2.0}, {"sft/loss": 9.0}])
    assert "rose from 2 to 9 nats" in told
    assert judged([{"sft/loss": 9.0}, {"sft/loss": 2.0}]) == []


def test_each_kind_is_said_once_while_the_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    health = Health(eval_prompts=100)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            health.look(step(live=0, std=0.0))
        assert not caplog.records
        for _ in range(20):
            health.look(step(live=0, std=0.0))
        assert len(caplog.records) == 1
        assert len(health.finish()) == 1
    assert len(caplog.records) == 1


def test_nothing_is_said_of_a_run_without_steps() -> None:
    assert judged([]) == judged([{"eval/accuracy": 0.5}]) == []


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"rollout": {"sampling": {"top_p": 0.9}}}, ["rollout.sampling.top_p=0.9, top_k=0", "off-policy"]),
        ({"rollout": {"sampling": {"top_k": 20}}}, ["top_p=1, top_k=20", "truncated"]),
        ({"policy": {"optimizer": {"lr": 0.5}}}, ["policy.optimizer.lr=0.5", "1e-7 to 1e-3"]),
        ({"policy": {"optimizer": {"warmup_steps": 10}}}, ["warmup_steps=10", "the 10 steps"]),
    ],
)
def test_settings_to_look_twice_at_are_told_at_the_start(sections: dict[str, Any], words: list[str]) -> None:
    (told,) = at_start(config(**sections), steps=10)
    assert all(word in told for word in words)
    assert "\n" not in told


def test_usual_settings_are_not() -> None:
    assert at_start(config(policy={"optimizer": {"lr": 1e-3, "warmup_steps": 5}}), steps=10) == []
