"""Train the policy on its shares of the scored groups: micro-batches, old log-probs, loss, optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import fmean
from typing import Any

import torch

from gspo_mm.batch import Pixels, pack_ahead
from gspo_mm.config import Config, LossConfig
from gspo_mm.loss.gspo import policy_loss
from gspo_mm.loss.metrics import Metrics, reduce_metrics, summarize
from gspo_mm.policy.engine import Policy
from gspo_mm.policy.near_ties import NearTies
from gspo_mm.policy.reference import Reference
from gspo_mm.runtime.phases import Phases
from gspo_mm.types import MicroBatch, Share

_NAMES, _GAPS = "sequences", "sequence_gaps"  # lists beside the metrics of micro-batches


def update_policy(
    policy: Policy,
    shares: Sequence[Share],
    *,
    processor: Pixels,
    reference: Reference | None,
    config: Config,
    phases: Phases,
    step: int = 0,
    gaps: dict[str, float] | None = None,
    ties: NearTies | None = None,
) -> dict[str, float]:
    """One optimizer step per share; returns their metrics, which are those of all ranks. A collective.

    Updates that `policy.optimizer.skip` leaves out have no metrics.

    `step` training steps were done before, which together with the share's number decides the learning rate.
    `gaps` is filled with each sequence's mean |log-prob of the rollout engine − of the policy|, nats, by its name.
    `ties` looks at what differs most, where there are old log-probs.

    Old log-probs are the policy's own, from one pass before the first step and shared by all of them. With a
    single step that pass is left out: the ratio is then exactly 1 in value, while its gradient is not 0.
    """
    with phases("pack"), policy.ranks.together():
        every_batch = pack_ahead(
            [members for share in shares for members in share.micro_batches],
            processor,
            passes=1 + (len(shares) > 1) + (reference is not None),
            waiting=partial(phases, "pack"),
            shares_prompts=policy.shares_prompts,
        )
    temperature = config.rollout.sampling.temperature
    with phases("old_logprobs"):
        olds = (
            policy.logprobs(every_batch, temperature=temperature)
            if len(shares) > 1
            else [None] * len(every_batch)
        )
        refs = reference.logprobs(every_batch, temperature) if reference else [None] * len(every_batch)
    found: dict[str, float] = {}
    if ties and len(shares) > 1:
        with phases("near_ties"):
            found = ties.look([m for share in shares for m in share.micro_batches], every_batch, olds)
    metrics: list[dict[str, Any]] = []
    with phases("update"):
        start = 0
        for number, share in enumerate(shares):
            window = slice(start, start + len(share.micro_batches))
            done = step + (number + 1) / len(shares)
            update = partial(
                _step,
                policy,
                share,
                every_batch[window],
                olds[window],
                refs[window],
                loss_config(config),
                temperature,
                done,
                last=share is shares[-1],
            )
            if (made := policy.optimizer.skips.attempt(update)) is not None:
                metrics.append(made)
            start = window.stop
    _take_gaps(metrics, gaps)
    found |= {"updates/skipped": float(len(shares) - len(metrics)), **policy.expert_load()}
    if not metrics:
        return found
    return {
        **found,
        **_over_updates(metrics),
        # the first step after a rollout sees the weights that the old log-probs were computed with
        "first_update_ratio_error": abs(_over_updates(metrics[:1])["ratio_mean"] - 1.0),
    }


def _take_gaps(metrics: Sequence[dict[str, Any]], gaps: dict[str, float] | None) -> None:
    """Out of the metrics, into `gaps`."""
    for of_step in metrics:
        names, values = of_step.pop(_NAMES), of_step.pop(_GAPS)
        if gaps is not None:
            gaps |= zip(names, values, strict=True)


def loss_config(config: Config) -> LossConfig:
    """`config.loss` with the constant length of Dr. GRPO filled in."""
    length = config.loss.dr_grpo_length or config.rollout.sampling.max_new_tokens
    return config.loss.model_copy(update={"dr_grpo_length": length})


def _step(
    policy: Policy,
    share: Share,
    batches: list[MicroBatch],
    olds: list[torch.Tensor] | list[None],
    refs: list[torch.Tensor] | list[None],
    config: LossConfig,
    temperature: float,
    done: float,
    *,
    last: bool,
) -> dict[str, Any]:
    def loss_fn(
        index: int, logprobs_R: torch.Tensor, entropy_R: torch.Tensor
    ) -> tuple[torch.Tensor, Metrics]:
        batch, old_R = batches[index], olds[index]
        if old_R is None:
            old_R = logprobs_R.detach()
        output = policy_loss(
            logprobs_R,
            old_R,
            batch.advantages.to(logprobs_R),
            batch.response_cu_seqlens.to(logprobs_R.device),
            config=config,
            # of the whole optimizer step, so that its split over ranks and micro-batches cannot matter
            num_sequences=share.num_sequences,
            num_tokens=share.num_tokens,
            entropy=entropy_R,
            ref_logprobs=refs[index],
            rollout_logprobs=None
            if batch.rollout_logprobs is None
            else batch.rollout_logprobs.to(logprobs_R.device),
            names=batch.names,
        )
        return output.loss, {**output.metrics, **_sequence_gaps(batch, old_R)}

    stats = policy.update(batches, loss_fn, temperature=temperature, done=done, last=last)
    return {**reduce_metrics(stats.metrics), "loss": stats.loss, "grad_norm": stats.grad_norm, "lr": stats.lr}


def _sequence_gaps(batch: MicroBatch, old_R: torch.Tensor) -> dict[str, Any]:
    """Two lists, of names and of mean gaps; empty where the rollouts came without log-probs."""
    if batch.rollout_logprobs is None:
        return {_NAMES: [], _GAPS: []}
    gap_R = (old_R.double() - batch.rollout_logprobs.to(old_R.device)).abs()
    lengths_S = batch.response_cu_seqlens.diff().long().to(old_R.device)
    return {
        _NAMES: list(batch.names),
        _GAPS: torch.segment_reduce(gap_R, "mean", lengths=lengths_S, axis=0).tolist(),
    }


def _over_updates(metrics: Sequence[Metrics]) -> dict[str, float]:
    """One value per name over the step's updates: extremes stay extremes, lists are joined, the rest is averaged."""
    return summarize(reduce_metrics(metrics, others=fmean))
