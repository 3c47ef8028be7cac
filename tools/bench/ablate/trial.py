"""One run: the stages of `gspo_mm/train.py` in their order, with batches that wait, and more looked at.

A batch waits `staleness` steps between sampling and training. Its old log-probs are those of the policy that sampled it,
computed when it was sampled, so that the ratio holds all that has changed since.
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from gspo_mm.advantage import group_advantages
from gspo_mm.batch import pack
from gspo_mm.config import Config
from gspo_mm.config.load import load_config
from gspo_mm.evaluate import evaluate
from gspo_mm.loss.gspo import policy_loss
from gspo_mm.loss.metrics import Metrics, reduce_metrics, summarize
from gspo_mm.observe.answers import rollout_metrics, sampled_tokens
from gspo_mm.policy.engine import LossFn
from gspo_mm.policy.routing_audit import RoutingAudit
from gspo_mm.policy.shares import share_out
from gspo_mm.policy.update import loss_config
from gspo_mm.rollout.engine import sample_groups
from gspo_mm.runtime.dist import Ranks
from gspo_mm.runtime.seeds import derive_seed
from gspo_mm.stages import Stages, build_stages
from gspo_mm.train import sequences_of_updates
from gspo_mm.types import GspoError, MicroBatch, Share
from tools.bench.ablate.arms import ARMS, Run, Scale
from tools.bench.ablate.ratios import Ratios
from tools.bench.ablate.replay import SETTING, Replay

CONFIGS = Path(__file__).parents[3] / "configs"


def settings(folder: Path, name: str, seed: int, scale: Scale) -> list[str]:
    """Overrides of a config of the digits that a warm start and the runs after it share."""
    return [
        f"run.dir={folder / 'runs'}",
        f"run.name={name}",
        f"run.seed={seed}",
        f"data.train=[{folder}/digits/train-*.tar]",
        f"data.validation=[{folder}/digits/validation-*.tar]",
        f"reward.file={CONFIGS / 'rewards/digits.yaml'}",
        f"train.eval_prompts={scale.eval_prompts}",
    ]


def trial(run: Run, scale: Scale, folder: Path, start: Path) -> dict[str, Any]:
    """All numbers of one run, which begins with the weights of the folder `start`."""
    replays = ARMS[run.arm].replays
    config = load_config(
        CONFIGS / ARMS[run.arm].config,
        [
            *settings(folder, str(run), run.seed, scale),
            f"model.path={start}",
            f"rollout.prompts_per_step={scale.prompts}",
            f"rollout.group_size={scale.group}",
            "rollout.sampling.temperature=1.0",
            "rollout.drop_dead_groups=false",
            f"train.steps={scale.steps}",
            f"train.updates_per_batch={scale.updates}",
            f"policy.optimizer.lr={scale.lr}",
            *([SETTING] if replays else []),
        ],
    )
    config.run.path.mkdir(parents=True, exist_ok=True)
    stages = build_stages(config, Ranks(), total_steps=scale.steps)
    with stages.closing():
        return Trial(config, stages, run, scale).run()


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The answers of a step, with what the policy that sampled them made of them."""

    metrics: dict[str, float]
    shares: list[Share]
    packed: list[list[MicroBatch]]  # of each share
    old: dict[tuple[str, ...], torch.Tensor]  # [R] nats, by the names of a micro-batch
    audit: RoutingAudit | None


class Trial:
    """A run in progress, in one process."""

    def __init__(self, config: Config, stages: Stages, run: Run, scale: Scale) -> None:
        self.config, self.stages, self.scale = config, stages, scale
        self.staleness = run.staleness
        self.replay = Replay(stages.policy) if ARMS[run.arm].replays else None
        self.ratios = Ratios()
        self.waiting: deque[Batch] = deque()
        self.sampled = 0  # batches
        self.looking = 0.0  # seconds of processor time spent on what no training needs

    def run(self) -> dict[str, Any]:
        """Until the last step, or the first fault, which is kept."""
        self.stages.weights.push(version=0)
        lines = [{"step": 0.0, **self.evaluate()}]
        fault = None
        for step in range(self.scale.steps):
            try:
                lines.append(self.step(step))
            except GspoError as error:
                fault = str(error)
                break
        return {
            "lines": lines,
            "fault": fault,
            "ratios": self.ratios.by_length(),
            "replay": self.replay.found() if self.replay else None,
        }

    def step(self, step: int) -> dict[str, float]:
        """One line of numbers. `seconds` is processor time, of the training alone, since runs may share a machine."""
        began, self.looking = time.process_time(), 0.0
        while len(self.waiting) <= self.staleness:
            self.waiting.append(self.sample())
        batch = self.waiting.popleft()
        line = {"step": step + 1.0, **batch.metrics}
        if batch.shares:
            line |= self.update(step, batch)
        self.stages.weights.push(version=step + 1)
        line["seconds"] = time.process_time() - began - self.looking
        if batch.audit:
            line |= batch.audit.compare()
        if (step + 1) % self.scale.eval_every == 0:
            line |= self.evaluate()
        return line

    def sample(self) -> Batch:
        """Answers of the policy as it is now, judged and packed, with their log-probs by it."""
        config, stages, number = self.config, self.stages, self.sampled
        assert stages.engine
        self.sampled += 1
        groups = sample_groups(
            stages.engine,
            stages.source.take(config.rollout.prompts_per_step),
            group_size=config.rollout.group_size,
            sampling=stages.sampling,
            seed=derive_seed(config.run.seed, "rollout", number),
            first_id=number * config.rollout.prompts_per_step,
        )
        groups = stages.reward.score_groups(groups)
        result = group_advantages(groups, config.advantage)
        updates = sequences_of_updates(result, config.train.updates_per_batch)
        shares, *_ = share_out(stages.policy, updates, processor=stages.processor, config=config.policy)
        packed = [
            [
                pack(members, stages.processor, shares_prompts=stages.policy.shares_prompts)
                for members in share.micro_batches
            ]
            for share in shares
        ]
        every = [batch for of_share in packed for batch in of_share]
        with self.replay.recording() if self.replay else nullcontext():
            old = stages.policy.logprobs(every, temperature=stages.sampling.temperature)
        return Batch(
            metrics={**rollout_metrics(groups, result), "tokens": sampled_tokens(groups)},
            shares=shares,
            packed=packed,
            old={batch.names: old_R for batch, old_R in zip(every, old, strict=True)},
            audit=self.audit(shares) if number % self.scale.audit_every == 0 else None,
        )

    def audit(self, shares: list[Share]) -> RoutingAudit | None:
        if not shares:
            return None
        began = time.process_time()
        audit = RoutingAudit.of(self.stages.policy, shares[0], self.stages.processor)
        self.looking += time.process_time() - began
        return audit

    def update(self, step: int, batch: Batch) -> dict[str, float]:
        """An optimizer step on each share; means over them, extremes of all."""
        policy, found = self.stages.policy, []
        for number, (share, batches) in enumerate(zip(batch.shares, batch.packed, strict=True), 1):
            with self.replay.replaying() if self.replay else nullcontext():
                stats = policy.update(
                    batches,
                    self.loss_of(share, batches, batch.old),
                    temperature=self.stages.sampling.temperature,
                    done=step + number / len(batch.shares),
                    last=share is batch.shares[-1],
                )
            metrics = {**reduce_metrics(stats.metrics), "grad_norm": stats.grad_norm}
            found.append(metrics)
        first = {"first_ratio_mean": summarize(found[0])["ratio_mean"]}
        return summarize(reduce_metrics(found, others=fmean)) | first

    def loss_of(
        self, share: Share, batches: list[MicroBatch], old: dict[tuple[str, ...], torch.Tensor]
    ) -> LossFn:
        config = loss_config(self.config)

        def loss_fn(
            index: int, logprobs_R: torch.Tensor, entropy_R: torch.Tensor
        ) -> tuple[torch.Tensor, Metrics]:
            batch = batches[index]
            old_R = old[batch.names]
            self.ratios.add(logprobs_R.detach() - old_R, batch.response_cu_seqlens)
            made = policy_loss(
                logprobs_R,
                old_R,
                batch.advantages.to(logprobs_R),
                batch.response_cu_seqlens.to(logprobs_R.device),
                config=config,
                num_sequences=share.num_sequences,
                num_tokens=share.num_tokens,
                entropy=entropy_R,
                rollout_logprobs=None if batch.rollout_logprobs is None else batch.rollout_logprobs.to(old_R),
                names=batch.names,
            )
            return made.loss, made.metrics

        return loss_fn

    def evaluate(self) -> dict[str, float]:
        stages = self.stages
        assert stages.engine
        metrics, _ = evaluate(
            stages.engine, stages.held_out, stages.reward, max_new_tokens=stages.sampling.max_new_tokens
        )
        return metrics
