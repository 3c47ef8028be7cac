"""How an answer goes on after a turn. Both engines ask here: see `Conversations.follow`."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from gspo_mm.config import RolloutConfig
from gspo_mm.config.environment import EnvironmentConfig
from gspo_mm.data.faults import BadSample
from gspo_mm.data.processor import Processor
from gspo_mm.environment.pool import EnvironmentFailedError, Environments
from gspo_mm.types import (
    Completion,
    EncodedImage,
    EncodedPrompt,
    Finish,
    GspoError,
    Look,
    Observation,
    Prompt,
    RolloutGroup,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """An answer on its way."""

    prompt: Prompt  # the question
    read: EncodedPrompt  # all that the last turn was sampled for, or that the next one is
    answer: Completion  # so far
    session: str  # names the answer to its environment
    most: int = 0  # tokens that the next turn may have

    @classmethod
    def of(cls, question: EncodedPrompt, answer: Completion) -> Conversation:
        """Of an answer in one turn."""
        return cls(prompt=question.prompt, read=question, answer=answer, session=uuid.uuid4().hex)

    def with_turn(self, sampled: Completion) -> Conversation:
        """With the one turn that was sampled for `read`."""
        turns = (*self.answer.turns, *sampled.turns)
        return replace(self, answer=replace(self.answer, turns=turns, finish=sampled.finish))


class Conversations:
    """Leads answers from turn to turn."""

    def __init__(
        self,
        config: EnvironmentConfig,
        processor: Processor,
        environments: Environments,
        *,
        max_new_tokens: int,
    ) -> None:
        """`max_new_tokens` is of all turns of an answer together."""
        self._config, self._processor, self._environments = config, processor, environments
        self._most = max_new_tokens

    def close(self) -> None:
        self._environments.close()

    def probe(self) -> EncodedPrompt | None:
        """See `Processor.probe`."""
        return self._processor.probe()

    async def follow(self, led: Conversation) -> Completion | Conversation:
        """What becomes of an answer whose last turn has just been sampled: it is complete, or another turn is to be sampled.

        Raises GspoError where the run is to stop for it.
        """
        answer = led.answer
        if answer.finish is not Finish.STOP:
            return answer
        if any(token in self._processor.placeholder_ids for token in answer.turns[-1].token_ids):
            # servers would take it for a picture; a last turn, which nothing follows, may have it
            return replace(answer, finish=Finish.IMAGE_TOKEN)
        try:
            sizes = {image.key: self._processor.size_seen(image) for image in led.read.prompt.images}
            found = await self._environments.step(led.session, led.prompt, answer.turns, sizes)
            if found is None:
                return answer
            if len(answer.turns) == self._config.max_turns or len(answer.token_ids) >= self._most:
                return replace(answer, finish=Finish.LENGTH)
            # pictures are decoded, which must not hold up the loop
            return await asyncio.to_thread(self._continued, led, *found)
        except EnvironmentFailedError as fault:
            if self._config.on_failure == "fail":
                raise GspoError(
                    f"rollout.environment.on_failure=fail, and over {led.prompt.key}: {fault}; mend the environment, or set "
                    "on_failure=mask"
                ) from None
            return replace(answer, fault=str(fault))

    def _continued(
        self, led: Conversation, text: str, images: tuple[EncodedImage, ...], look: Look | None
    ) -> Completion | Conversation:
        answer, read, turns = led.answer, led.read, led.answer.turns
        try:
            new = self._processor.encode_turn(
                led.prompt.messages, turns, text, images, role=self._config.role
            )
        except BadSample as bad:
            raise EnvironmentFailedError(f"what came back cannot be shown to the model: {bad}") from None
        if new is None:
            return answer
        most = self._config.max_observation_tokens
        if len(new.token_ids) > most:
            raise EnvironmentFailedError(
                f"what came back has {len(new.token_ids)} tokens, rollout.environment.max_observation_tokens={most}"
            )
        seen = Observation(token_ids=new.token_ids, images=images, text=text, look=look)
        return replace(
            led,
            answer=replace(answer, turns=(*turns[:-1], replace(turns[-1], observation=seen))),
            read=EncodedPrompt(
                prompt=replace(read.prompt, images=(*read.prompt.images, *images)),
                token_ids=(*read.token_ids, *turns[-1].token_ids, *new.token_ids),
                pixel_values=_joined(read.pixel_values, new.pixel_values),
                image_grid_thw=_joined(read.image_grid_thw, new.image_grid_thw),
            ),
            most=self._most - len(answer.token_ids),
        )


def conversations_of(config: RolloutConfig, processor: Processor) -> Conversations | None:
    """Those of `rollout.environment`."""
    if config.environment is None:
        return None
    return Conversations(
        config.environment,
        processor,
        Environments(config.environment, processor.box_unit),
        max_new_tokens=config.sampling.max_new_tokens,
    )


def check_faults(groups: Iterable[RolloutGroup], config: EnvironmentConfig, *, what: str) -> None:
    """Log environments that failed. Raises GspoError for more of them than `config` allows."""
    faults = [completion.fault for group in groups for completion in group.completions]
    reasons = Counter(fault for fault in faults if fault)
    if not reasons:
        return
    (reason, times), *_ = reasons.most_common()
    said = f"the environment of {reasons.total()} of {len(faults)} answers of {what} failed, of {times} so: {reason}"
    if reasons.total() > config.max_failed_fraction * len(faults):
        raise GspoError(
            f"more than rollout.environment.max_failed_fraction={config.max_failed_fraction:g}: {said}; mend the environment"
        )
    logger.warning(said)


def _joined(*parts: torch.Tensor | None) -> torch.Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.cat(found) if found else None
