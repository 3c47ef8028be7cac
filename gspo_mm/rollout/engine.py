"""What a rollout engine is, and the stage that turns prompts into groups with one."""

from __future__ import annotations

from itertools import count
from typing import Protocol

from gspo_mm.types import Completion, EncodedPrompt, RolloutGroup, SamplingParams


class RolloutEngine(Protocol):
    """Samples answers with a copy of the policy's weights, which `sync/` brings: `EmbeddedEngine`, `SGLangEngine`."""

    @property
    def version(self) -> int:
        """Version of the weights now loaded: the number of training steps that made them."""
        ...

    def generate(
        self, prompts: list[EncodedPrompt], *, group_size: int, sampling: SamplingParams, seed: int
    ) -> list[list[Completion]]:
        """Sample `group_size` completions of every prompt. The embedded engine repeats itself, servers do not."""
        ...

    def close(self, reason: str = "the run has ended") -> None:
        """Free memory, stop servers; `reason` is told to those that run elsewhere."""
        ...


def sample_groups(
    engine: RolloutEngine,
    prompts: list[EncodedPrompt],
    *,
    group_size: int,
    sampling: SamplingParams,
    seed: int,
    first_id: int,
) -> list[RolloutGroup]:
    """One RolloutGroup per prompt, numbered from `first_id`."""
    answers = engine.generate(prompts, group_size=group_size, sampling=sampling, seed=seed)
    return [
        RolloutGroup(id=i, prompt=p.prompt, prompt_ids=p.token_ids, completions=tuple(completions))
        for i, p, completions in zip(count(first_id), prompts, answers, strict=False)
    ]
