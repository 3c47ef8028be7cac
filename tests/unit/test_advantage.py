"""Advantages against numpy, and what happens to groups that have none."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import count, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gspo_mm.advantage import DeadStepGuard, group_advantages, is_dead
from gspo_mm.config import AdvantageConfig
from gspo_mm.rollout.engine import replace_dead
from gspo_mm.types import Completion, DeadRunError, Finish, NonFiniteError, Prompt, RolloutGroup, Score

DDOF = {"unbiased": 1, "biased": 0}


def group(rewards, *, id=0, failed=()):
    completion = Completion.of_one_turn(
        token_ids=(5,), logprobs=(-0.1,), versions=(0,), finish=Finish.STOP, text="x"
    )
    scores = tuple(
        Score(value=math.nan, parts={}, error="part p: boom") if i in failed else Score(value=r, parts={})
        for i, r in enumerate(rewards)
    )
    prompt = Prompt(key=f"shard/{id}", messages=(), images=(), answer=1, task="t")
    completions = (completion,) * len(scores)
    return RolloutGroup(id=id, prompt=prompt, prompt_ids=(1, 2), completions=completions, scores=scores)


def advantages(rewards, std="unbiased", **more):
    (live,) = group_advantages([group(rewards, **more)], AdvantageConfig(std=std)).live
    return live.advantages


@pytest.mark.parametrize("std", ["unbiased", "biased", "none"])
def test_advantages_equal_numpy(std):
    rewards = [0.1, 0.9, 1.0, 0.1, 0.55]
    expected = np.array(rewards) - np.mean(rewards)
    if std != "none":
        expected /= np.std(rewards, ddof=DDOF[std])
    np.testing.assert_allclose(advantages(rewards, std), expected, rtol=1e-14)


def test_six_equal_rewards_of_nine_tenths_make_a_dead_group():
    result = group_advantages([group([0.9] * 6), group([0.3] * 7, id=1)], AdvantageConfig())
    assert (result.live, result.dead, result.failed) == ((), 2, 0)


@pytest.mark.parametrize(
    ("dead", "kept", "asked", "dropped"),
    [
        (set(), [0, 1, 2], [3], 0),
        # two thirds are dead: six should do for two; what is too many is left out
        ({0, 1}, [2, 3, 4], [3, 3], 2),
        ({0, 2, 3, 4}, [1, 5, 6], [3, 3, 3], 4),
        # twelve are dropped, four batches' worth: the rest is taken as it comes
        (set(range(100)), [12, 13, 14], [3] * 5, 12),
        ({0, *range(2, 100)}, [1, 13, 14], [3] * 5, 12),
    ],
)
def test_dead_groups_are_replaced_until_four_batches_were_dropped(dead, kept, asked, dropped):
    numbers, calls = count(), []

    def sample(wanted, again):
        assert again == len(calls)
        calls.append(wanted)
        return [
            group([1.0, 0.0 if i not in dead else 1.0], id=i)
            for _, i in zip(range(wanted), numbers, strict=False)
        ]

    groups, counted = replace_dead(sample, lambda group: is_dead(group, AdvantageConfig()), wanted=3)
    assert [g.id for g in groups] == kept
    assert (calls, counted) == (asked, dropped)


def test_dropping_a_dead_group_keeps_the_others_advantages_and_order():
    groups = [group([0.0, 1.0], id=3), group([1.0, 1.0], id=4), group([0.0, 0.0, 1.0], id=5)]
    result = group_advantages(groups, AdvantageConfig())
    assert [g.id for g in result.live] == [3, 5]
    assert result.dead == 1
    assert result.live[0].advantages == advantages([0.0, 1.0])
    assert result.live[1].advantages == advantages([0.0, 0.0, 1.0])


def test_groups_of_unequal_size_are_normalised_on_their_own():
    result = group_advantages([group([0.0, 1.0]), group([0.0, 0.0, 0.0, 1.0], id=1)], AdvantageConfig())
    assert [len(g.advantages) for g in result.live] == [2, 4]
    np.testing.assert_allclose(result.live[0].advantages, [-math.sqrt(0.5), math.sqrt(0.5)], rtol=1e-15)
    np.testing.assert_allclose(result.live[1].advantages, [-0.5, -0.5, -0.5, 1.5], rtol=1e-15)


def test_a_failed_reward_is_left_out_of_the_statistics_and_counted():
    result = group_advantages([group([0.0, 7.0, 1.0, 0.5], failed={1})], AdvantageConfig())
    assert (result.dead, result.failed) == (0, 0)
    (live,) = result.live
    assert live.advantages[1] == 0.0
    assert tuple(live.advantages[i] for i in (0, 2, 3)) == advantages([0.0, 1.0, 0.5])


def test_a_failed_reward_does_not_make_a_dead_group_alive():
    result = group_advantages([group([1.0, 0.0, 1.0], failed={1})], AdvantageConfig())
    assert (result.live, result.dead) == ((), 1)


def test_a_group_with_one_reward_left_is_dropped_as_failed():
    result = group_advantages([group([1.0, 0.0, 0.5], failed={1, 2}), group([1.0])], AdvantageConfig())
    assert (result.live, result.dead, result.failed) == ((), 0, 2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_reward_stops_with_the_name_of_its_group(value):
    with pytest.raises(NonFiniteError, match=r"group 12 completion 1 \(shard/12\)"):
        group_advantages([group([0.0, value, 1.0], id=12)], AdvantageConfig())


def test_a_group_without_scores_is_refused():
    with pytest.raises(ValueError, match="group 0 has 0 scores for 2 completions"):
        group_advantages([replace(group([0.0, 1.0]), scores=())], AdvantageConfig())


def test_groups_are_not_edited():
    before = group([0.0, 1.0])
    group_advantages([before], AdvantageConfig())
    assert before.advantages == ()


rewards_strategy = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=16)


@given(rewards=rewards_strategy, std=st.sampled_from(["unbiased", "biased", "none"]), data=st.data())
def test_any_group_is_dead_or_centred_scaled_and_ordered(rewards, std, data):
    result = group_advantages([group(rewards)], AdvantageConfig(std=std))
    if max(rewards) == min(rewards):
        assert result.dead == 1
        return
    values = result.live[0].advantages
    assert all(math.isfinite(value) for value in values)
    scale = max(map(abs, values))
    spread = max(abs(r) for r in rewards) / (max(rewards) - min(rewards))  # digits that cancel
    assert abs(math.fsum(values)) <= 1e-14 * len(values) * scale * max(1.0, spread)
    if std != "none" and spread < 1e6:
        assert np.std(values, ddof=DDOF[std]) == pytest.approx(1.0, rel=1e-8)
    pairs = sorted(zip(rewards, values, strict=True))
    assert all(a[1] <= b[1] for a, b in pairwise(pairs))
    order = data.draw(st.permutations(range(len(rewards))))
    assert advantages([rewards[i] for i in order], std) == tuple(values[i] for i in order)


def test_rewards_that_differ_by_almost_nothing_do_not_divide_by_zero():
    assert advantages([0.0, 1e-200, 0.0]) == pytest.approx((-1 / 3**0.5, 2 / 3**0.5, -1 / 3**0.5))


def test_dead_steps_in_a_row_stop_the_run():
    guard = DeadStepGuard(3)
    for live in (0, 0, 5, 0, 0):
        guard.update(live)
    with pytest.raises(DeadRunError, match=r"3 steps in a row \(advantage.max_dead_steps=3\)"):
        guard.update(0)


def test_the_dead_step_count_survives_a_resume():
    guard, resumed = DeadStepGuard(2), DeadStepGuard(2)
    guard.update(0)
    resumed.load(guard.state())
    with pytest.raises(DeadRunError):
        resumed.update(0)
