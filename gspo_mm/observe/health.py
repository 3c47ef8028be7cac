"""A few sentences about a run that goes wrong without stopping: each is said once, and stands in summary.json.

They are signs, not a diagnosis, and chosen to be silent on a sound run: an accuracy below where it began by more than
chance, steps without a live group, rewards that are all the same, a policy that jumps within one step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from gspo_mm.config import Config

logger = logging.getLogger(__name__)

MAX_LR = 0.01  # Adam moves each weight by about lr a step; language models are trained with 1e-7 to 1e-3
_DEAD_STEPS = 5  # before the share of steps without a live group is judged while the run goes on
_MAX_KL = 1.0  # nats per token, between the policy before and after the updates of one step
_KEPT = ("reward/std", "reward/mean", "groups/live", "approx_kl", "eval/accuracy", "sft/loss")


def at_start(config: Config, *, steps: int) -> list[str]:
    """What the settings of a run of `steps` steps should make its user look twice at."""
    found = []
    sampling, optimizer = config.rollout.sampling, config.policy.optimizer
    if sampling.top_p < 1 or sampling.top_k:
        found.append(
            f"rollout.sampling.top_p={sampling.top_p:g}, top_k={sampling.top_k}: answers are sampled from a truncated "
            "distribution and trained with log-probs of the whole one, so training is off-policy; 1.0 and 0 are on-policy"
        )
    if optimizer.lr > MAX_LR:
        found.append(
            f"policy.optimizer.lr={optimizer.lr:g} moves every weight by about as much in each update; 1e-7 to 1e-3 are usual"
        )
    if optimizer.warmup_steps >= steps > 1:
        found.append(
            f"policy.optimizer.warmup_steps={optimizer.warmup_steps} is no less than the {steps} steps of the run, so "
            "that the rate only rises; lower it"
        )
    return found


class Health:
    """Looks at a run's lines of metrics as they come."""

    def __init__(self, *, eval_prompts: int) -> None:
        """`eval_prompts`: how many answers a held-out accuracy is the mean of, or more."""
        self._eval_prompts = eval_prompts
        self._lines: list[dict[str, float]] = []
        self._told: set[str] = set()

    def look(self, line: Mapping[str, Any]) -> None:
        """Take in one line, and log what it shows for the first time."""
        self._lines.append({name: line[name] for name in _KEPT if name in line})
        if len(self._lines) > _DEAD_STEPS:
            self._log(self.faults())

    def finish(self) -> list[str]:
        """All that is wrong with the whole run; logged where it was not yet."""
        found = self.faults()
        self._log(found)
        return list(found.values())

    def faults(self) -> dict[str, str]:
        """Sentences by kind."""
        return {**self._accuracy_fell(), **self._nothing_learned(), **self._jumped(), **self._loss_rose()}

    def _log(self, found: Mapping[str, str]) -> None:
        for kind, sentence in found.items():
            if kind not in self._told:
                logger.warning(sentence)
                self._told.add(kind)

    def _of(self, name: str) -> list[float]:
        return [line[name] for line in self._lines if name in line]

    def _accuracy_fell(self) -> dict[str, str]:
        accuracies = self._of("eval/accuracy")
        if len(accuracies) < 2:
            return {}
        first, last = accuracies[0], accuracies[-1]
        mean = (first + last) / 2
        # two standard errors of the difference of two means of n answers
        chance = 2 * math.sqrt(2 * mean * (1 - mean) / self._eval_prompts)
        if first - last <= chance:
            return {}
        return {
            "accuracy": f"held-out accuracy fell from {first:.1%} to {last:.1%}: the run makes the model worse; lower "
            "policy.optimizer.lr, and look at answers and rewards in the report"
        }

    def _nothing_learned(self) -> dict[str, str]:
        live, spread = self._of("groups/live"), self._of("reward/std")
        dead = sum(count == 0 for count in live)
        if not live or 2 * dead <= len(live):
            return {}
        why = "answers of a group get equal rewards; look at the saved rollouts"
        if max(spread, default=1.0) == 0:
            why = f"all answers got the reward {self._of('reward/mean')[-1]:g}; look at reward.file"
        return {"dead": f"{dead} of {len(live)} steps had no live group and trained nothing: {why}"}

    def _jumped(self) -> dict[str, str]:
        largest = max(self._of("approx_kl"), default=0.0)
        if not largest > _MAX_KL:
            return {}
        return {
            "jump": f"within one step the policy moved by {largest:.2g} nats a token: policy.optimizer.lr is too high, or "
            "train.updates_per_batch"
        }

    def _loss_rose(self) -> dict[str, str]:
        losses = self._of("sft/loss")
        if len(losses) < 2 or losses[-1] <= losses[0]:
            return {}
        return {
            "loss": f"the loss rose from {losses[0]:.3g} to {losses[-1]:.3g} nats a token; lower policy.optimizer.lr"
        }
