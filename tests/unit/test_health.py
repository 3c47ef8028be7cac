"""Each rule holds on the sickness that it is of, and on nothing that is sound."""

import json
import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gspo_mm.config import ConfigError, parse_config
from gspo_mm.config.run import RuleName
from gspo_mm.observe.health import RULES, Health, at_start, rules_table


def config(**sections: Any) -> Any:
    base = {"run": {"name": "a"}, "model": {"path": "m"}, "data": {"train": ["a"]}, "reward": {"file": "r"}}
    return parse_config(base | sections)


type Line = dict[str, float]


def judged(lines: list[Line]) -> dict[RuleName, str]:
    return Health(lines).found()


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A run that took place, in a line of health_runs.jsonl: every so many steps of it, and all evaluations."""

    name: str
    lines: list[Line]
    # what it suffers from
    ill: list[RuleName]


def recorded() -> list[Recorded]:
    found = []
    for text in Path(__file__).with_name("health_runs.jsonl").read_text().splitlines():
        run = json.loads(text)
        rows = [dict(zip(run["metrics"], values, strict=True)) for values in run["lines"]]
        lines = [{name: value for name, value in row.items() if value is not None} for row in rows]
        found.append(Recorded(name=run["run"], lines=lines, ill=run["ill"]))
    return found


RUNS = recorded()


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_of_runs_that_took_place_the_sound_ones_raise_no_rule_and_the_others_their_own(run: Recorded) -> None:
    health = Health()
    told = [rule for line in run.lines for rule in health.look(line)]
    assert sorted(told) == run.ill


def steps(count: int = 12, **other: list[float]) -> list[Line]:
    """Steps of a sound run, with other values of some metrics; `__` stands for a slash."""
    (digits,) = (run for run in RUNS if run.name == "digits")
    sound = [line for line in digits.lines if "entropy" in line][:count]
    changed = {name.replace("__", "/"): values for name, values in other.items()}
    return [
        line | {name: values[i % len(values)] for name, values in changed.items()}
        for i, line in enumerate(sound)
    ]


def evaluated(*accuracies: float) -> list[Line]:
    """Lines of evaluations of 256 answers."""
    return [{"eval/accuracy": accuracy, "eval/judged": 256.0} for accuracy in accuracies]


def ramp(first: float, last: float, count: int = 12) -> list[float]:
    """Half of the steps each."""
    return [first] * (count // 2) + [last] * (count // 2)


def test_a_run_without_a_rule_is_called_healthy_when_it_is_long_enough() -> None:
    assert Health(steps(10)).verdict() == "The run looks healthy: no rule holds."
    passing = [*steps(8, groups__dead=[15.0], groups__live=[1.0]), *steps(8)]
    health = Health([line | {"step": float(i)} for i, line in enumerate(passing, 1)])
    assert health.verdict() == "No rule holds at the end, but for a time did dead_groups (from step 5)."
    assert health.passed()["dead_groups"].startswith("from step 5: 75 of 80 groups of the last 5 steps")
    assert not health.found()
    assert Health(steps(9)).verdict() == "No rule holds, but 9 steps are few to judge by."


SICK: dict[RuleName, tuple[list[Line], list[Line], str]] = {
    # rule: a run on which it holds, one just short of that, words of what was seen
    "accuracy_fell": (
        evaluated(0.521, 0.404),
        evaluated(0.521, 0.44),
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
        steps(20, clip_low_fraction=[0.0], clip_high_fraction=[0.0], ratio_max=[1.1, 7.0]),
        steps(20, clip_low_fraction=[0.0], clip_high_fraction=[0.0], ratio_max=[1.1, 5.0]),
        "ratios rose to 7 and nothing was clipped in 20 steps",
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
        [
            {"reward/part/short": s, "reward/part/right": r}
            for s, r in zip(ramp(0.2, 0.9, 40), ramp(0.5, 0.3, 40), strict=True)
        ],
        [
            {"reward/part/short": s, "reward/part/right": r}
            for s, r in zip(ramp(0.2, 0.9, 40), ramp(0.5, 0.4, 40), strict=True)
        ],
        "part short rose by 0.7 while right fell by 0.2",
    ),
    "no_effect": (
        steps(30, approx_kl=[0.0, 1e-9]),
        steps(30, approx_kl=[0.0, 1e-6]),
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
    assert rule in Health(ill).verdict()
    assert judged(sound) == {}


def test_an_environment_that_fails_is_a_failure_too() -> None:
    assert list(judged(steps(turns__failed=[0.05]))) == ["failures"]
    assert judged(steps(turns__failed=[0.05, 0.0, 0.0])) == {}


def test_with_one_update_per_batch_equal_evaluations_show_that_nothing_is_learned() -> None:
    stuck = steps(30, approx_kl=[0.0])
    assert (
        judged(stuck) == judged([*stuck, *({"eval/reward": reward} for reward in (0.4, 0.4, 0.4, 0.5))]) == {}
    )
    assert list(judged([*stuck, *[{"eval/reward": 0.4}] * 4])) == ["no_effect"]


def test_an_accuracy_below_its_best_is_told_though_it_is_above_its_start() -> None:
    found = judged(evaluated(0.2, 0.7, 0.5))
    assert "fell from its best, 70.0%, to 50.0%" in found["accuracy_fell"]


def test_a_fall_by_chance_is_seldom_taken_for_one() -> None:
    told = 0
    for seed in range(300):
        rng = random.Random(seed)
        draws = [sum(rng.random() < 0.4 for _ in range(256)) / 256 for _ in range(2)]
        told += len(judged(evaluated(*draws)))
    assert told <= 15  # of 300 pairs with nothing between them but chance


def test_a_rule_is_said_once_and_no_longer_found_when_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    health = Health()
    with caplog.at_level(logging.WARNING):
        new = [list(health.look(line)) for line in steps(20, reward__std=[0.0])]
    assert new == [[], [], ["constant_reward"], *[[]] * 17]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["constant_reward"]
    health.look(steps(1)[0])
    assert health.found() == {}


def test_nothing_is_said_of_a_run_without_steps_or_of_what_is_no_number() -> None:
    assert judged([]) == judged(evaluated(0.5)) == judged([{"approx_kl": float("nan")}]) == {}


def test_a_run_can_be_stopped_on_every_rule_and_on_no_other() -> None:
    assert config(train={"stop_on": list(RULES)}).train.stop_on == list(RULES)
    with pytest.raises(ConfigError, match=r"train\.stop_on"):
        config(train={"stop_on": ["accuracy_fel"]})


def test_the_readme_of_the_configs_holds_the_rules() -> None:
    assert rules_table() in (Path(__file__).parents[2] / "configs" / "README.md").read_text()


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
