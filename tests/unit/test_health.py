"""Each rule holds on the sickness that it is of, and on nothing that is sound."""

import logging
import random
from pathlib import Path
from typing import Any

import pytest

from gspo_mm.config import ConfigError, parse_config
from gspo_mm.config.run import RuleName
from gspo_mm.observe.health import RULES, Health, at_start, rules_table, verdict


def config(**sections: Any) -> Any:
    base = {"run": {"name": "a"}, "model": {"path": "m"}, "data": {"train": ["a"]}, "reward": {"file": "r"}}
    return parse_config(base | sections)


type Line = dict[str, float]


def judged(lines: list[Line], *, eval_prompts: int = 256) -> dict[RuleName, str]:
    health = Health(eval_prompts=eval_prompts)
    for line in lines:
        health.look(line)
    return health.found()


# of a run of 60 steps that learned, from 50 to 66 % held-out: 12 steps, evenly spaced
SOUND: dict[str, list[float]] = {
    "entropy": [
        0.4501,
        0.3947,
        0.2074,
        0.1564,
        0.1554,
        0.1315,
        0.1136,
        0.0977,
        0.0824,
        0.0991,
        0.1006,
        0.0875,
    ],
    "grad_norm": [0.937, 0.946, 1.05, 0.679, 0.917, 0.713, 0.845, 0.807, 0.585, 0.935, 0.79, 0.975],
    "clip_low_fraction": [0.125, 0.152, 0.107, 0.047, 0.054, 0.031, 0.031, 0.027, 0.009, 0.0, 0.009, 0.0],
    "clip_high_fraction": [0.0, 0.036, 0.0, 0.0, 0.027, 0.008, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    "length/mean": [17.9, 20.2, 27.4, 30.0, 31.6, 33.4, 32.2, 32.9, 33.0, 32.2, 32.8, 32.7],
    "length/truncated_fraction": [
        0.0,
        0.008,
        0.0,
        0.0,
        0.039,
        0.062,
        0.031,
        0.047,
        0.047,
        0.062,
        0.039,
        0.039,
    ],
    "approx_kl": [0.0, 0.0003, 0.0002, 0.0001, 0.0002, 0.0001, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    "groups/live": [15, 13, 14, 15, 14, 15, 12, 13, 13, 14, 13, 12],
    "groups/dead": [1, 3, 2, 1, 2, 1, 4, 3, 3, 2, 3, 4],
    "reward/std": [0.42, 0.38, 0.45, 0.44, 0.44, 0.46, 0.43, 0.44, 0.45, 0.46, 0.46, 0.44],
    "reward/mean": [0.3, 0.31, 0.35, 0.4, 0.42, 0.45, 0.5, 0.52, 0.55, 0.56, 0.57, 0.6],
    "reward/failed": [0.0] * 12,
    "logprob_gap_mean": [0.0] * 12,
}


def steps(count: int = 12, **other: list[float]) -> list[Line]:
    """Lines of the sound run, with other values of some metrics; `__` stands for a slash."""
    series = SOUND | {name.replace("__", "/"): values for name, values in other.items()}
    return [{name: values[i % len(values)] for name, values in series.items()} for i in range(count)]


def ramp(first: float, last: float, count: int = 12) -> list[float]:
    """Half of the steps each."""
    return [first] * (count // 2) + [last] * (count // 2)


def test_a_sound_run_raises_no_rule() -> None:
    accuracies = [{"eval/accuracy": accuracy} for accuracy in (0.5, 0.584, 0.62, 0.66)]
    found = judged([*steps(), *accuracies], eval_prompts=500)
    assert found == {}
    assert verdict(found) == "The run looks healthy: no rule holds."


SICK: dict[RuleName, tuple[list[Line], list[Line], str]] = {
    # rule: a run on which it holds, one just short of that, words of what was seen
    "accuracy_fell": (
        [{"eval/accuracy": 0.521}, {"eval/accuracy": 0.404}],
        [{"eval/accuracy": 0.521}, {"eval/accuracy": 0.44}],
        "fell from its start, 52.1%, to 40.4%",
    ),
    "constant_reward": (
        steps(3, reward__std=[0.0], reward__mean=[1.0]),
        steps(3, reward__std=[0.0, 0.0, 0.1]),
        "all answers of 3 steps got the reward 1;",
    ),
    "dead_groups": (
        steps(groups__live=[3], groups__dead=[13]),
        steps(groups__live=[4], groups__dead=[12]),
        "65 of 80 groups of the last 5 steps",
    ),
    "failures": (
        steps(reward__failed=[0.03]),
        steps(reward__failed=[0.01]),
        "rewards of 3.0% of the answers failed",
    ),
    "entropy_collapsed": (
        steps(entropy=ramp(0.5, 0.02)),
        steps(entropy=ramp(0.5, 0.04)),
        "entropy went from 0.5 to 0.02",
    ),
    "gradient_growing": (
        steps(grad_norm=ramp(1.0, 21.0)),
        steps(grad_norm=ramp(1.0, 19.0)),
        "the gradient norm went from 1 to 21",
    ),
    "policy_jumped": (steps(approx_kl=[4.2]), steps(approx_kl=[0.9]), "moved by 4.2 nats a token"),
    "clip_saturated": (
        steps(clip_low_fraction=[0.3], clip_high_fraction=[0.3]),
        steps(clip_low_fraction=[0.2], clip_high_fraction=[0.2]),
        "60% was clipped",
    ),
    "clip_idle": (
        steps(20, clip_low_fraction=[0.0], clip_high_fraction=[0.0], ratio_max=[1.1, 1.4]),
        steps(20, clip_low_fraction=[0.0], clip_high_fraction=[0.0], ratio_max=[1.1, 1.2]),
        "ratios rose to 1.4 and nothing was clipped in 20 steps",
    ),
    "length_collapsed": (
        steps(length__mean=ramp(100, 24)),
        steps(length__mean=ramp(100, 26)),
        "tokens per answer went from 100 to 24",
    ),
    "length_exploded": (
        steps(length__mean=ramp(100, 410)),
        steps(length__mean=ramp(100, 390)),
        "tokens per answer went from 100 to 410",
    ),
    "truncated": (
        steps(length__truncated_fraction=[0.35]),
        steps(length__truncated_fraction=[0.25]),
        "35% of the answers",
    ),
    "mismatch_growing": (
        steps(logprob_gap_mean=ramp(0.02, 0.07)),
        steps(logprob_gap_mean=ramp(0.02, 0.04)),
        "the gap of engine and policy went from 0.02 to 0.07",
    ),
    "parts_at_odds": (
        steps(reward__part__short=ramp(0.2, 0.9), reward__part__right=ramp(0.5, 0.3)),
        steps(reward__part__short=ramp(0.2, 0.9), reward__part__right=ramp(0.5, 0.45)),
        "part short rose by 0.7 while right fell by 0.2",
    ),
    "no_effect": (
        steps(30, approx_kl=[1e-9], entropy=[0.4]),
        steps(30, approx_kl=[1e-9], entropy=ramp(0.4, 0.38, 30)),
        "in 30 steps the policy moved by at most 1e-09",
    ),
    "loss_rose": (
        [{"sft/loss": loss} for loss in ramp(2.0, 9.0)],
        [{"sft/loss": loss} for loss in ramp(2.0, 2.1)],
        "the loss went from 2 to 9",
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_holds_on_its_sickness_alone_and_not_just_short_of_it(rule: RuleName) -> None:
    ill, sound, words = SICK[rule]
    found = judged(ill)
    assert list(found) == [rule]
    assert words in found[rule]
    assert RULES[rule].advice in found[rule]
    assert rule in verdict(found)
    assert judged(sound) == {}


def test_an_environment_that_fails_in_each_step_is_a_failure() -> None:
    assert list(judged(steps(turns__failed=[2.0]))) == ["failures"]
    assert judged(steps(turns__failed=[2.0, 0.0])) == {}


def test_an_accuracy_below_its_best_is_told_though_it_is_above_its_start() -> None:
    found = judged([{"eval/accuracy": accuracy} for accuracy in (0.2, 0.7, 0.5)])
    assert "fell from its best, 70.0%, to 50.0%" in found["accuracy_fell"]


def test_a_fall_by_chance_is_seldom_taken_for_one() -> None:
    told = 0
    for seed in range(300):
        rng = random.Random(seed)
        draws = [sum(rng.random() < 0.4 for _ in range(256)) / 256 for _ in range(2)]
        told += len(judged([{"eval/accuracy": accuracy} for accuracy in draws]))
    assert told <= 15  # of 300 pairs with nothing between them but chance


def test_a_rule_is_said_once_and_no_longer_found_when_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    health = Health(eval_prompts=100)
    with caplog.at_level(logging.WARNING):
        new = [list(health.look(line)) for line in steps(20, reward__std=[0.0])]
    assert new == [[], [], ["constant_reward"], *[[]] * 17]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["constant_reward"]
    health.look(steps(1)[0])
    assert health.found() == {}


def test_nothing_is_said_of_a_run_without_steps_or_of_what_is_no_number() -> None:
    assert judged([]) == judged([{"eval/accuracy": 0.5}]) == judged([{"approx_kl": float("nan")}]) == {}


def test_a_run_can_be_stopped_on_every_rule_and_on_no_other() -> None:
    assert config(train={"stop_on": list(RULES)}).train.stop_on == list(RULES)
    with pytest.raises(ConfigError, match=r"train\.stop_on"):
        config(train={"stop_on": ["accuracy_fel"]})


def test_the_readme_holds_the_rules() -> None:
    assert rules_table() in (Path(__file__).parents[2] / "README.md").read_text()


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
