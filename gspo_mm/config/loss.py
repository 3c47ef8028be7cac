"""`reward`, `advantage` and `loss`: what answers are worth, and what is made of it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from gspo_mm.config.base import Fraction, Positive, Section


class RewardConfig(Section):
    file: str = Field(description="YAML reward file, see configs/rewards/")
    on_failure: Literal["mask", "drop_group", "fail"] = Field(
        default="mask",
        description="a completion whose reward failed is left out of training; drop_group: so is its whole group; fail: "
        "the first one stops the run",
    )
    max_failed_fraction: Fraction = Field(
        default=0.05, description="of completions in a step; more failed rewards stop the run"
    )
    workers: Positive | None = Field(
        default=None, description="processes that judge answers; null: half of the cores, 8 at most"
    )
    timeout: Annotated[float, Field(gt=0.0)] = Field(
        default=10.0, description="seconds that the parts of one completion may take; services have their own"
    )
    memory_gib: Annotated[float, Field(gt=0.0)] = Field(default=4.0, description="memory of one worker")


class AdvantageConfig(Section):
    std: Literal["unbiased", "biased", "none"] = Field(
        default="unbiased", description="divisor of the centred reward; none: mean only (Dr. GRPO)"
    )
    max_dead_steps: Positive = Field(
        default=20, description="steps in a row without a live group before the run stops"
    )


class CorrectionConfig(Section):
    kind: Literal["none", "truncate", "mask"] = Field(
        default="none",
        description="weight of a sequence by its mismatch ratio c: truncate = min(c, high), mask = 1 within bounds, else 0",
    )
    low: float = Field(
        default=0.98, description="lower bound of c, the geometric mean of policy / engine; mask only"
    )
    high: float = Field(
        default=1.02, description="upper bound of c; short answers need wider bounds than long ones"
    )

    @model_validator(mode="after")
    def _bounds_hold_one(self) -> CorrectionConfig:
        bounds = f"loss.correction.low={self.low:g}, loss.correction.high={self.high:g}"
        if not 0 <= self.low <= 1 <= self.high:
            raise ValueError(
                f"{bounds} do not hold 1, the ratio of an engine that agrees with the policy; use 0 <= low <= 1 <= high"
            )
        if self.kind == "mask" and self.low == self.high:
            raise ValueError(
                f"{bounds} with loss.correction.kind=mask masks every sequence that differs at all; leave room between "
                "them, as in 0.98 and 1.02"
            )
        return self


class LossConfig(Section):
    level: Literal["sequence", "token", "sequence_token"] = Field(
        default="sequence",
        description="importance ratio: sequence = GSPO, token = GRPO/PPO, sequence_token = GSPO-token",
    )
    aggregation: Literal["sequence_mean", "token_mean", "dr_grpo"] = Field(
        default="sequence_mean",
        description="sequence_mean is the paper's; dr_grpo divides by a constant length",
    )
    clip_low: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=3e-4, description="ratio clipped below 1 - clip_low"
    )
    clip_high: Annotated[float, Field(gt=0.0)] = Field(
        default=4e-4, description="ratio clipped above 1 + clip_high"
    )
    allow_wide_clip: bool = Field(default=False, description="accept a sequence-level clip range above 0.01")
    dual_clip: Annotated[float, Field(gt=1.0)] | None = Field(
        default=None, description="bound of ratio x advantage for negative advantages; null: off"
    )
    kl_coef: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0, description="weight of the k3 KL to the reference"
    )
    dr_grpo_length: Positive | None = Field(
        default=None,
        description="constant length of aggregation=dr_grpo; null: rollout.sampling.max_new_tokens",
    )
    correction: CorrectionConfig = CorrectionConfig()

    @model_validator(mode="after")
    def _clip_fits_level(self) -> LossConfig:
        widest = max(self.clip_low, self.clip_high)
        if self.level != "token" and widest > 0.01 and not self.allow_wide_clip:
            raise ValueError(
                f"loss.clip_low={self.clip_low:g}, loss.clip_high={self.clip_high:g} with loss.level={self.level}: a "
                "sequence-level range above 0.01 never clips (it is a token-level habit; the GSPO paper uses 3e-4 and "
                "4e-4); lower it, or set loss.allow_wide_clip=true"
            )
        return self
