"""Supervised warm start: the usual cold start before reinforcement learning.

The same data, packing and policy as `train.py`, with the cross-entropy of each prompt's reference response in
place of a rollout and its loss. Its Hugging Face folder (RUN/hf) is what a GSPO run then starts from.
"""

from __future__ import annotations

import asyncio
from functools import cached_property, partial
from typing import Any

import torch

from gspo_mm.batch import answered, demonstrated, pack_ahead
from gspo_mm.config import Config
from gspo_mm.data.processor import Processor
from gspo_mm.environment.conversation import Conversation, Conversations, conversations_of
from gspo_mm.harness import Training, run_training
from gspo_mm.policy.engine import Policy
from gspo_mm.policy.shares import share_out
from gspo_mm.runtime.preempt import StopRequest
from gspo_mm.types import Completion, DataError, EncodedPrompt, Finish, MicroBatch, Share, TrainSequence


def sft(config: Config, stop: StopRequest) -> dict[str, Any]:
    """Run or resume supervised training as `config.sft` says: see `run_training`."""
    return run_training(Supervised, config, stop)


class Supervised(Training):
    """Samples in the order of the shards, `sft.batch_size` a step."""

    command = "sft"

    @staticmethod
    def steps_of(config: Config) -> int:
        return config.sft.steps

    @cached_property
    def conversations(self) -> Conversations | None:
        """What answers the calls of reference answers in turns."""
        return conversations_of(self.config.rollout, self.stages.processor)

    def train_step(self, stop: StopRequest) -> None:
        """One batch of samples, dealt over the ranks, one optimizer step."""
        stages = self.stages
        updates: list[list[TrainSequence]] = []
        with self.ranks.together(), self.phases("data"):
            if self.ranks.main:
                prompts = stages.source.take(self.config.sft.batch_size)
                every_turn = self.config.sft.every_turn
                updates = [supervised(prompts, stages.processor, self.conversations, every_turn=every_turn)]
        with self.phases("share"):
            (share,), *_ = share_out(
                stages.policy, updates, processor=stages.processor, config=self.config.policy
            )
        with self.phases("pack"), self.ranks.together():
            batches = pack_ahead(
                share.micro_batches, stages.processor, passes=1, waiting=partial(self.phases, "pack")
            )
        with self.phases("update"):
            values = supervised_step(stages.policy, share, batches, self.step)
        self.step_is_done()
        values |= self.phases.take()
        with self.run.written_together(f"step {self.step}"):
            if self.ranks.main:
                self.record(values)
        self.keep()

    def begin(self) -> None:
        """Held-out accuracy before the first step, which the one after the last is compared with."""
        if self.step == 0 and not self.is_evaluated():
            self.judge_weights()
            self.stages.weights.make_room()

    def end(self) -> None:
        if self.conversations:
            self.conversations.close()
        if not self.is_evaluated():
            self.judge_weights()

    def judge_weights(self) -> None:
        """Held-out accuracy into the step's line, through the engine and weight sync of GSPO. A collective."""
        if not self.ranks.any(bool(self.stages.held_out)):
            return
        with self.phases("sync"):
            self.stages.weights.push(version=self.step)
        metrics = self.evaluate()
        times = self.phases.take() if self.step == 0 else {}  # the last step's line has its own
        if metrics and self.metrics:
            self.metrics.amend(self.step, {**metrics, **times})

    def summary(self, lines: list[dict[str, Any]]) -> dict[str, Any]:
        first, last = lines[0], lines[-1]
        return {
            "accuracy_before": first.get("eval/accuracy") if first["step"] == 0 else None,
            "accuracy_after": last.get("eval/accuracy"),
            "loss_last": next(line["sft/loss"] for line in reversed(lines) if "sft/loss" in line),
            "steps": last["step"],
            "seconds": sum(line["time/step"] for line in lines),
            "skipped_samples": self.stages.source.skipped,
        }


def supervised(
    prompts: list[EncodedPrompt],
    processor: Processor,
    conversations: Conversations | None,
    *,
    every_turn: bool = True,
) -> list[TrainSequence]:
    """Each prompt followed by its reference answer, whose calls the environment answers.

    With `every_turn` the assistant's turns among the prompt's messages are trained as well. Raises DataError for a sample
    that has no reference answer, whose turns the environment does not lead on, or with a message that cannot be trained on.
    """

    async def everything() -> list[TrainSequence]:
        return await asyncio.gather(*(_supervised(prompt, processor, conversations) for prompt in prompts))

    sequences = asyncio.run(everything())
    if every_turn:
        for prompt, sequence in zip(prompts, sequences, strict=True):
            for place in processor.said(prompt):
                sequence.trained[place] = True
    return sequences


async def _supervised(
    prompt: EncodedPrompt, processor: Processor, conversations: Conversations | None
) -> TrainSequence:
    key, last, first = prompt.prompt.key, prompt.prompt.response, prompt.prompt.first_turns
    if last is None:
        raise DataError(f"{key} has no `response`; supervised training needs one in every sample")
    if not first:
        return answered(prompt, processor.encode_response(last))
    if conversations is None:
        raise DataError(
            f"{key} has a response in {len(first) + 1} turns, and no rollout.environment that would answer them; set it"
        )

    def said(text: str) -> Completion:
        return Completion.of_one_turn(
            token_ids=tuple(processor.encode_response(text)),
            logprobs=(),
            versions=(),
            finish=Finish.STOP,
            text=text,
        )

    led = Conversation.of(prompt, said(first[0]))
    for number, text in enumerate((*first[1:], last), start=1):
        found = await conversations.follow(led)
        if not isinstance(found, Conversation):
            why = (
                found.fault or f"nothing came back, or more than rollout.environment allows ({found.finish})"
            )
            raise DataError(
                f"{key}: after turn {number} of its response: {why}; correct `response`, or the environment"
            )
        led = found.with_turn(said(text))
    return demonstrated(prompt, led.answer.turns)


def supervised_step(policy: Policy, share: Share, batches: list[MicroBatch], step: int) -> dict[str, float]:
    """One optimizer step on the mean cross-entropy (nats) of the response tokens of all ranks."""

    def loss_fn(_: int, logprobs_R: torch.Tensor, __: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        return -logprobs_R.sum() / share.num_tokens, {}

    stats = policy.optimizer.skips.attempt(partial(policy.update, batches, loss_fn, done=step + 1))
    if stats is None:
        return {"updates/skipped": 1.0}
    return {"sft/loss": stats.loss, "grad_norm": stats.grad_norm, "lr": stats.lr, "updates/skipped": 0.0}
