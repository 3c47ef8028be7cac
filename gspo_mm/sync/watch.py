"""Do servers and policy stay the same model while a run goes on? What each answer's tokens differ by, watched by group.

    gap of a group = mean over the tokens of its answers of |log-prob of the server − log-prob of the policy|, nats

Groups, since what a server sees or computes otherwise moves all answers to a prompt: a mean over some tens or hundreds
of tokens. Single tokens and short answers differ by a nat now and then in a healthy run in bfloat16 or FP8 (an expert
that was chosen on one side only), and the mean of a step hides a picture in eight. Two bounds:

    rollout.sglang.max_logprob_gap  above it a group is suspected, and its prompt asked again as before the first step
                                    (parity.py), both sides holding the same weights. Only what differs then stops the
                                    run: tokens that were sampled with older weights differ for that reason alone, by
                                    as much as the policy has moved.
    rollout.sglang.max_group_gap    above it the run stops at once, for groups of the policy's own version throughout.

A few prompts are asked again at a time, each once, and ever more rarely while nothing is found: after 1, 2, 4 ... 64
steps. Answers of the policy's own version come first: no step explains what they differ by.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

from gspo_mm.batch.packing import sequence_name
from gspo_mm.config import Config
from gspo_mm.data.odd import describe
from gspo_mm.policy.engine import Policy
from gspo_mm.rollout.engine import ServingEngine
from gspo_mm.sync.parity import ParityError, PromptEncoder, check_parity
from gspo_mm.types import Prompt, RolloutGroup

logger = logging.getLogger(__name__)

_LONGEST_WAIT = 64  # steps
_AT_ONCE = 4  # prompts


class GapWatch:
    """A run's watch; see the top of this file. Nothing of it is kept in checkpoints."""

    def __init__(
        self, config: Config, policy: Policy, engine: ServingEngine | None, processor: PromptEncoder
    ) -> None:
        """Rank 0 has the engine, which has servers."""
        self._policy, self._engine, self._processor = policy, engine, processor
        self._bound = config.rollout.sglang.max_logprob_gap
        self._hard_bound = config.rollout.sglang.max_group_gap
        self._asked: set[str] = set()  # keys of prompts that agreed when they were asked again
        self._wait, self._next_step = 1, 0

    def check(self, step: int, groups: Sequence[RolloutGroup], gaps: Mapping[str, float]) -> None:
        """Judge a step whose weights the servers hold by now. A collective; rank 0 has `groups`.

        `gaps`: mean gap of each trained answer, by its sequence's name. Raises ParityError.
        """
        suspects: list[Prompt] = []
        with self._policy.ranks.together():
            suspects = self.suspects(step, groups, gaps)
        if self._policy.ranks.any(bool(suspects)):
            prompts = [self._processor.encode(prompt) for prompt in suspects]
            # the means of a few prompts, chosen for their gaps: twice what the mean of many may be
            with self._policy.ranks.together():
                check_parity(
                    self._policy, self._engine, self._processor, prompts, threshold=self._bound, times=2
                )

    def suspects(self, step: int, groups: Sequence[RolloutGroup], gaps: Mapping[str, float]) -> list[Prompt]:
        """The prompts to ask again after this step. Raises ParityError for a group above the hard bound."""
        of_group = [(gap, group) for group in groups if (gap := group_gap(group, gaps)) is not None]
        fresh = {group.id for group in groups if _is_fresh(group, version=step - 1)}
        for gap, group in of_group:
            if not gap <= self._hard_bound and group.id in fresh:
                raise ParityError(f"step {step}: {_named(group.prompt)} {self._advice(gap)}")
        found = [
            (gap, g) for gap, g in of_group if not gap <= self._bound and g.prompt.key not in self._asked
        ]
        if not found or step < self._next_step:
            return []
        self._next_step, self._wait = step + self._wait, min(2 * self._wait, _LONGEST_WAIT)
        found.sort(
            key=lambda pair: (pair[1].id in fresh, not pair[0] <= self._hard_bound, pair[0]), reverse=True
        )
        chosen = {group.prompt.key: (gap, group.prompt) for gap, group in found[:_AT_ONCE]}
        self._asked.update(chosen)
        listed = ", ".join(f"{_named(prompt)} by {gap:.2g}" for gap, prompt in chosen.values())
        logger.info("step %d: asking again what differs most, in nats a token: %s", step, listed)
        return [prompt for _, prompt in chosen.values()]

    def _advice(self, gap: float) -> str:
        return (
            f"was answered with log-probs that are {gap:.2g} nats a token from the policy's in the mean, above "
            f"rollout.sglang.max_group_gap={self._hard_bound:g}; run gspo-mm preflight, see that rollout.sglang.extra_args "
            "change neither precision nor model, and look at this sample's pictures"
        )


def group_gap(group: RolloutGroup, gaps: Mapping[str, float]) -> float | None:
    """Mean over the tokens of the group's trained answers; None where there are none."""
    found = [
        (gaps[name], len(completion.token_ids))
        for number, completion in enumerate(group.completions)
        if (name := sequence_name(group, number)) in gaps
    ]
    if not found:
        return None
    return math.fsum(gap * tokens for gap, tokens in found) / sum(tokens for _, tokens in found)


def _is_fresh(group: RolloutGroup, *, version: int) -> bool:
    """Whether the policy that computed the other log-probs had sampled all of it."""
    return all(v == version for completion in group.completions for v in completion.versions)


def _named(prompt: Prompt) -> str:
    images = ", ".join(describe(image) for image in prompt.images)
    return f"{prompt.key} ({images})" if images else prompt.key
