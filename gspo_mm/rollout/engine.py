"""What a rollout engine is, and the stage that turns prompts into groups with one.

An engine is three things, and a line in `config/engines.py`: an `Opening` and a `RolloutEngine` in this package, and
in `sync/` a `WeightPush` that brings it the policy's weights. Whoever calls them knows no more than what stands here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from itertools import count
from typing import Protocol, runtime_checkable

from gspo_mm.config import Config
from gspo_mm.config.engines import ENGINES
from gspo_mm.data.processor import Processor
from gspo_mm.runtime.preempt import StopRequest
from gspo_mm.types import Completion, EncodedPrompt, RolloutGroup, SamplingParams

MAX_DROPPED = 4  # batches' worth of dead groups dropped for one batch before dead ones are kept


class TokenSide(Protocol):
    """What engines need of `data.Processor`."""

    stop_token_ids: tuple[int, ...]
    image_token_id: int | None

    def decode(self, token_ids: Iterable[int], /) -> str:
        """Text of sampled tokens, special tokens left out. It can be sent to another process."""
        ...


class RolloutEngine(Protocol):
    """Samples answers with a copy of the policy's weights, which `sync/` brings."""

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
        """Free memory, stop servers; `reason` is reported to those that run elsewhere. May be called again."""
        ...


@runtime_checkable
class ServingEngine(RolloutEngine, Protocol):
    """An engine of servers, which answer while the policy trains: what `Scheduler` and the comparisons need of it."""

    def start(
        self, prompt: EncodedPrompt, group_size: int, sampling: SamplingParams
    ) -> Future[list[Completion]]:
        """Begin to sample one group; cancelling the future gives it up on the server as well."""
        ...

    def wants_weights(self) -> bool:
        """Whether a server came back and waits for the current weights."""
        ...

    def logprobs_of(self, prompt: EncodedPrompt, *, tokens: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """A greedy answer of at most `tokens`, and the log-probs of all tokens but the prompt's first, in nats."""
        ...

    def take_busy(self) -> float:
        """Share of the time since the last call during which servers had something to answer."""
        ...

    def take_counts(self) -> dict[str, float]:
        """What is to be counted in metrics, since the last call: see `observe/metrics.py`, rollout/*."""
        ...


class Opening(Protocol):
    """One rank's part in opening an engine. Made before the model is loaded: what cannot work is reported at once."""

    def __init__(self, config: Config, stop: StopRequest, *, main: bool) -> None:
        """`main`: on rank 0, which will have the engine. Raises a GspoError naming what a user can fix."""
        ...

    def open(self, processor: Processor) -> RolloutEngine | None:
        """When the model is loaded, on every rank: the engine on rank 0, which samples only after a first push."""
        ...

    def close(self, reason: str) -> None:
        """End what `open` began on a rank that has no engine; where there is one, its own `close` ends all."""
        ...


def opening_of(config: Config, stop: StopRequest, *, main: bool) -> Opening:
    """The opening of `rollout.engine`."""
    return ENGINES[config.rollout.engine].opening()(config, stop, main=main)


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


def replace_dead(
    sample: Callable[[int, int], list[RolloutGroup]], is_dead: Callable[[RolloutGroup], bool], *, wanted: int
) -> tuple[list[RolloutGroup], int]:
    """`wanted` groups in the order they came, and how many dead ones were dropped: others were sampled in their place.

    `sample` is asked for a number of scored groups, and told how often it was before: each time for as many as should
    do, by the share of dead ones so far, and for `wanted` at most. What is too many is left out. After `MAX_DROPPED`
    batches' worth of dead ones they are kept.
    """
    kept: list[RolloutGroup] = []
    dropped = 0
    for again in count():
        missing, so_far = wanted - len(kept), len(kept) + dropped
        ask = min(wanted, math.ceil(missing * so_far / max(len(kept), 1))) if again else wanted
        for group in sample(ask, again):
            if dropped < MAX_DROPPED * wanted and is_dead(group):
                dropped += 1
            else:
                kept.append(group)
        if len(kept) >= wanted:
            break
    return kept[:wanted], dropped
