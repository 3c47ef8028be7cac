"""Rewards of a group -> one advantage per completion. A pure function of floats (Python's are float64).

    A_i = (r_i − mean(r)) / std(r)            GSPO eq. 6, GRPO; std with divisor n−1 (unbiased) or n (biased)
    A_i =  r_i − mean(r)                      std none: Dr. GRPO

over the n completions of one group whose reward is known. The paper adds no ε to the divisor, and none is
needed: a group whose rewards are all equal has no advantage at all and is dropped *before* the division
("dead"), found by comparing the largest with the smallest reward, because the mean of six rewards of 0.9 is
not 0.9 in floating point. What is left has std > 0. An ε would instead bend the advantages of groups whose
rewards lie close together.

A completion whose reward failed (`Score.error`) is no evidence about the policy: it is left out of the
statistics, and `batch.sequences_of` leaves it out of training. Its place in `advantages` holds 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from gspo_mm.config import AdvantageConfig
from gspo_mm.types import DeadRunError, NonFiniteError, RolloutGroup


@dataclass(frozen=True, kw_only=True)
class AdvantageResult:
    """Groups to train on, and how many were not."""

    live: tuple[RolloutGroup, ...]  # with advantages [G], in the order they came
    dead: int  # groups dropped because all their rewards are equal
    failed: (
        int  # groups dropped because too few of their completions have a reward: fewer than two, or not all
    )


def group_advantages(
    groups: Iterable[RolloutGroup],
    config: AdvantageConfig,
    *,
    drop_failed: bool = False,
    drop_faulty: bool = False,
) -> AdvantageResult:
    """Normalise rewards within each group; groups may differ in size.

    `drop_failed` drops a group of which any reward failed, instead of the completion (reward.on_failure=drop_group), and
    `drop_faulty` one of which any environment failed (rollout.environment.on_failure=drop_group).

    Raises NonFiniteError naming group and completion for a reward that is NaN or infinite, ValueError for a
    group that was not scored.
    """
    live: list[RolloutGroup] = []
    dead = failed = 0
    for group in groups:
        if len(group.scores) != len(group.completions):
            raise ValueError(
                f"group {group.id} has {len(group.scores)} scores for {len(group.completions)} completions; "
                "score it first"
            )
        rewards = {i: score.value for i, score in enumerate(group.scores) if score.error is None}
        for i, reward in rewards.items():
            if not math.isfinite(reward):
                raise NonFiniteError(
                    f"reward of group {group.id} completion {i} ({group.prompt.key}) is {reward:g}; a reward "
                    "part must return a finite number, or fail with an error"
                )
        drop = drop_failed and any(
            s.error and not c.fault for s, c in zip(group.scores, group.completions, strict=True)
        )
        drop |= drop_faulty and any(c.fault for c in group.completions)
        if len(rewards) < 2 or drop:
            failed += 1
        elif min(rewards.values()) == max(rewards.values()):
            dead += 1
        else:
            normalised = dict(zip(rewards, normalise(list(rewards.values()), config.std), strict=True))
            advantages = tuple(normalised.get(i, 0.0) for i in range(len(group.scores)))
            live.append(replace(group, advantages=advantages))
    return AdvantageResult(live=tuple(live), dead=dead, failed=failed)


def is_dead(group: RolloutGroup, config: AdvantageConfig) -> bool:
    """Whether a scored group teaches nothing, because all its rewards are equal."""
    return group_advantages([group], config).dead > 0


def normalise(rewards: list[float], std: str) -> list[float]:
    """Advantages of one group whose rewards differ; sums are exactly rounded, so order cannot matter."""
    span = max(rewards) - min(rewards)
    scaled = [reward / span for reward in rewards]  # std cannot underflow to 0 where rewards nearly agree
    mean = math.fsum(scaled) / len(scaled)
    centred = [value - mean for value in scaled]
    if std == "none":
        return [value * span for value in centred]
    divisor = len(centred) - 1 if std == "unbiased" else len(centred)
    deviation = math.sqrt(math.fsum(value * value for value in centred) / divisor)
    return [value / deviation for value in centred]


class DeadStepGuard:
    """Counts steps in a row without a live group and stops the run when they are too many."""

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps
        self.dead_steps = 0

    def update(self, live: int) -> None:
        """Take a step's number of live groups; raises DeadRunError at `max_steps` dead steps in a row."""
        self.dead_steps = 0 if live else self.dead_steps + 1
        if self.dead_steps >= self.max_steps:
            raise DeadRunError(
                f"{self.dead_steps} steps in a row (advantage.max_dead_steps={self.max_steps}) had no group "
                "whose rewards differ, so there is nothing to learn from: look at the saved rollouts; if "
                "all answers are wrong, warm up with `gspo-mm sft` or take easier prompts, if all are "
                "right, take harder ones, and if all are alike, raise rollout.sampling.temperature or "
                "group_size"
            )

    def state(self) -> dict[str, int]:
        return {"dead_steps": self.dead_steps}

    def load(self, state: dict[str, int]) -> None:
        self.dead_steps = state["dead_steps"]
