"""Supervised warm start: the usual cold start before reinforcement learning.

The same data, packing and policy as `train.py`, with the cross-entropy of each prompt's reference response in
place of a rollout and its loss. Its Hugging Face folder (RUN/hf) is what a GSPO run then starts from.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from gspo_mm.batch import answered, pack_ahead
from gspo_mm.config import Config
from gspo_mm.data.processor import Processor
from gspo_mm.harness import Training, run_training
from gspo_mm.policy.engine import Policy
from gspo_mm.policy.shares import share_out
from gspo_mm.runtime.preempt import StopRequest
from gspo_mm.types import DataError, EncodedPrompt, MicroBatch, Share, TrainSequence


def sft(config: Config, stop: StopRequest) -> dict[str, Any]:
    """Run or resume supervised training as `config.sft` says: see `run_training`."""
    return run_training(Supervised, config, stop)


class Supervised(Training):
    """Samples in the order of the shards, `sft.batch_size` a step."""

    command = "sft"

    @staticmethod
    def steps_of(config: Config) -> int:
        return config.sft.steps

    def train_step(self, stop: StopRequest) -> None:
        """One batch of samples, dealt over the ranks, one optimizer step."""
        stages = self.stages
        updates: list[list[TrainSequence]] = []
        with self.ranks.together(), self.phases("data"):
            if self.ranks.main:
                prompts = stages.source.take(self.config.sft.batch_size)
                updates = [[supervised(prompt, stages.processor) for prompt in prompts]]
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

    def end(self) -> None:
        """Held-out accuracy into the last step's line, through the engine and weight sync of GSPO."""
        if self.is_evaluated():
            return
        with self.phases("sync"):
            self.stages.weights.push(version=self.step)
        metrics = self.evaluate()
        if metrics and self.metrics:
            self.metrics.amend(self.step, metrics)

    def summary(self, lines: list[dict[str, Any]]) -> dict[str, Any]:
        last = lines[-1]
        return {
            "accuracy_after": last.get("eval/accuracy"),
            "loss_last": next(line["sft/loss"] for line in reversed(lines) if "sft/loss" in line),
            "steps": last["step"],
            "seconds": sum(line["time/step"] for line in lines),
            "skipped_samples": self.stages.source.skipped,
        }


def supervised(prompt: EncodedPrompt, processor: Processor) -> TrainSequence:
    """Prompt followed by its reference response; raises DataError when the sample has none."""
    if prompt.prompt.response is None:
        raise DataError(
            f"{prompt.prompt.key} has no `response`; supervised training needs one in every sample"
        )
    return answered(prompt, processor.encode_response(prompt.prompt.response))


def supervised_step(policy: Policy, share: Share, batches: list[MicroBatch], step: int) -> dict[str, float]:
    """One optimizer step on the mean cross-entropy (nats) of the response tokens of all ranks."""

    def loss_fn(_: int, logprobs_R: torch.Tensor, __: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        return -logprobs_R.sum() / share.num_tokens, {}

    stats = policy.optimizer.skips.attempt(partial(policy.update, batches, loss_fn, done=step + 1))
    if stats is None:
        return {"updates/skipped": 1.0}
    return {"sft/loss": stats.loss, "grad_norm": stats.grad_norm, "lr": stats.lr, "updates/skipped": 0.0}
