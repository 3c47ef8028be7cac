"""The whole: every section, and what they must agree on with each other and with the ranks that were started."""

from __future__ import annotations

import os
from typing import Any

from pydantic import ValidationInfo, model_validator

from gspo_mm.config.base import Section
from gspo_mm.config.loss import AdvantageConfig, LossConfig, RewardConfig
from gspo_mm.config.policy import PolicyConfig, check_world, data_parallel_size
from gspo_mm.config.rollout import RolloutConfig, SyncConfig
from gspo_mm.config.run import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    ObserveConfig,
    RunConfig,
    SftConfig,
    TrainConfig,
)


class Config(Section):
    """Everything a run is decided by. `RUN/config.yaml` holds it resolved."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    sync: SyncConfig = SyncConfig()
    reward: RewardConfig
    advantage: AdvantageConfig = AdvantageConfig()
    loss: LossConfig = LossConfig()
    policy: PolicyConfig = PolicyConfig()
    train: TrainConfig = TrainConfig()
    sft: SftConfig = SftConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    observe: ObserveConfig = ObserveConfig()

    @property
    def longest(self) -> int:
        """Tokens of a prompt with its answer, at most: what is sampled, and what an environment gives back."""
        rollout = self.rollout
        read = rollout.environment.most_read if rollout.environment else 0
        return self.data.max_prompt_tokens + rollout.sampling.max_new_tokens + read

    @model_validator(mode="before")
    @classmethod
    def _advantage_of_dr_grpo(cls, values: Any) -> Any:
        sections = values if isinstance(values, dict) else {}
        loss, advantage = sections.get("loss"), sections.get("advantage", {})
        if isinstance(loss, dict) and loss.get("type") == "dr_grpo" and isinstance(advantage, dict):
            return {**sections, "advantage": {"std": "none", **advantage}}
        return values

    @model_validator(mode="after")
    def _served_in_fp8(self) -> Config:
        if self.rollout.sglang.fp8 and self.policy.dtype != "bfloat16":
            raise ValueError(
                f"rollout.sglang.fp8=true with policy.dtype={self.policy.dtype}: SGLang wants what is not FP8 in "
                "bfloat16; set policy.dtype=bfloat16, or rollout.sglang.fp8=false"
            )
        return self

    @model_validator(mode="after")
    def _sections_agree(self, info: ValidationInfo) -> Config:
        if (info.context or {}).get("any_world"):
            return self
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        check_world(self.policy.parallel, world_size=world_size)
        dp = data_parallel_size(self.policy.parallel, world_size)
        updates, prompts = self.train.updates_per_batch, self.rollout.prompts_per_step
        if prompts % (updates * dp):
            raise ValueError(
                f"rollout.prompts_per_step={prompts} cannot be split into train.updates_per_batch={updates} updates "
                f"over {dp} data-parallel ranks; use a multiple of {updates * dp}"
            )
        return self
