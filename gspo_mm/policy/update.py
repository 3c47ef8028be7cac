"""Train the policy on scored groups: micro-batches, old log-probs, loss, optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

import torch

from gspo_mm.batch import make_micro_batches, sequences_of
from gspo_mm.batch.packing import Pixels
from gspo_mm.config import Config, LossConfig
from gspo_mm.loss.gspo import policy_loss, reduce_metrics
from gspo_mm.policy.engine import Policy
from gspo_mm.policy.reference import Reference
from gspo_mm.runtime.phases import Phases
from gspo_mm.types import MicroBatch, RolloutGroup


def update_policy(
    policy: Policy,
    groups: Sequence[RolloutGroup],
    *,
    processor: Pixels,
    reference: Reference | None,
    config: Config,
    phases: Phases,
) -> dict[str, float]:
    """`train.updates_per_batch` optimizer steps, each on its own share of the groups; returns their metrics.

    Old log-probs are the policy's own, from one pass before the first step and shared by all of them. With a
    single step that pass is left out: the ratio is then exactly 1 in value, while its gradient is not 0.
    """
    shares = split_evenly(groups, config.train.updates_per_batch)
    batches_of_share = [
        make_micro_batches(sequences_of(share), processor, config.policy.micro_batch_tokens)
        for share in shares
    ]
    temperature = config.rollout.sampling.temperature
    every_batch = [batch for batches in batches_of_share for batch in batches]
    with phases("old_logprobs"):
        olds = (
            policy.logprobs(every_batch, temperature=temperature)
            if len(shares) > 1
            else [None] * len(every_batch)
        )
        refs = reference.logprobs(every_batch, temperature) if reference else [None] * len(every_batch)
    metrics: list[dict[str, float]] = []
    with phases("update"):
        start = 0
        for batches in batches_of_share:
            window = slice(start, start + len(batches))
            metrics.append(
                _step(policy, batches, olds[window], refs[window], loss_config(config), temperature)
            )
            start += len(batches)
    return {
        **_over_updates(metrics),
        # the first step after a rollout sees the weights that the old log-probs were computed with
        "first_update_ratio_error": abs(metrics[0]["ratio_mean"] - 1.0),
    }


def loss_config(config: Config) -> LossConfig:
    """`config.loss` with the constant length of Dr. GRPO filled in."""
    length = config.loss.dr_grpo_length or config.rollout.sampling.max_new_tokens
    return config.loss.model_copy(update={"dr_grpo_length": length})


def split_evenly[T](items: Sequence[T], parts: int) -> list[Sequence[T]]:
    """At most `parts` runs of consecutive items whose sizes differ by at most one; none is empty."""
    assert items
    parts = min(parts, len(items))
    edges = [len(items) * i // parts for i in range(parts + 1)]
    return [items[a:b] for a, b in pairwise(edges)]


def _step(
    policy: Policy,
    batches: list[MicroBatch],
    olds: list[torch.Tensor] | list[None],
    refs: list[torch.Tensor] | list[None],
    config: LossConfig,
    temperature: float,
) -> dict[str, float]:
    # denominators of the whole optimizer step, so that its split into micro-batches cannot matter
    num_sequences = sum(b.num_sequences for b in batches)
    num_tokens = sum(b.num_response_tokens for b in batches)

    def loss_fn(
        index: int, logprobs_R: torch.Tensor, entropy_R: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, float]]:
        batch, old_R = batches[index], olds[index]
        output = policy_loss(
            logprobs_R,
            logprobs_R.detach() if old_R is None else old_R,
            batch.advantages.to(logprobs_R),
            batch.response_cu_seqlens,
            config=config,
            num_sequences=num_sequences,
            num_tokens=num_tokens,
            entropy=entropy_R,
            ref_logprobs=refs[index],
            rollout_logprobs=batch.rollout_logprobs,
            names=batch.names,
        )
        return output.loss, output.metrics

    stats = policy.update(batches, loss_fn, temperature=temperature)
    return {**reduce_metrics(stats.metrics), "loss": stats.loss, "grad_norm": stats.grad_norm, "lr": stats.lr}


def _over_updates(metrics: list[dict[str, float]]) -> dict[str, float]:
    """One value per name over the step's updates: extremes stay extremes, the rest is averaged."""
    combine = {"_min": min, "_max": max}
    return {name: combine.get(name[-4:], fmean)([m[name] for m in metrics]) for name in metrics[0]}
