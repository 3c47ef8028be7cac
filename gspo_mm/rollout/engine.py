"""What a rollout engine is, and the stage that turns prompts into groups with one."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from typing import Protocol

import torch

from gspo_mm.types import Completion, EncodedPrompt, RolloutGroup, SamplingParams


class RolloutEngine(Protocol):
    """Samples answers with a copy of the policy's weights. SGLang servers and in-process transformers both fit."""

    @property
    def version(self) -> int:
        """Version of the weights now loaded: the number of training steps that made them."""
        ...

    def generate(
        self, prompts: list[EncodedPrompt], *, group_size: int, sampling: SamplingParams, seed: int
    ) -> list[list[Completion]]:
        """Sample `group_size` completions of every prompt; equal arguments and weights give equal answers."""
        ...

    def load_weights(self, tensors: Iterable[tuple[str, torch.Tensor]], *, version: int) -> None:
        """Replace all weights by HF-named tensors (transformers' in-memory layout). Raises ValueError on a gap."""
        ...

    def close(self) -> None:
        """Free memory, stop servers."""
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
