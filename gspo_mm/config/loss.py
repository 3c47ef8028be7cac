"""`reward`, `advantage` and `loss`: what answers are worth, and what is made of it."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

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
        default="unbiased",
        description="divisor of the centred reward; none: mean only, the default with loss.type=dr_grpo",
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


# widest clip range that acts where a ratio is that of a whole answer
WIDEST_OF_ANSWERS = 0.01

type LossType = Literal["gspo", "gspo_token", "grpo", "dr_grpo", "dapo", "gmpo", "cispo", "sapo"]

_SET = ("level", "aggregation", "clip_low", "clip_high", "tau_positive", "tau_negative")
# loss.type -> what it sets where the config does not; None: loss.python. Sources: gspo_mm/loss/README.md
_ROWS: dict[str | None, tuple[str | float | None, ...]] = {
    "gspo": ("sequence", "sequence_mean", 3e-4, 4e-4, None, None),
    "gspo_token": ("sequence_token", "sequence_mean", 3e-4, 4e-4, None, None),
    "grpo": ("token", "sequence_mean", 0.2, 0.2, None, None),
    "dr_grpo": ("token", "dr_grpo", 0.2, 0.2, None, None),  # and advantage.std: schema.py
    "dapo": ("token", "token_mean", 0.2, 0.28, None, None),
    "gmpo": ("token", "sequence_mean", -math.expm1(-0.4), math.expm1(0.4), None, None),
    "cispo": ("token", "token_mean", None, 4.0, None, None),
    "sapo": ("token", "sequence_mean", None, None, 1.0, 1.05),
    None: ("token", "sequence_mean", None, None, None, None),
}
# keys of a variant: a file or command line that names a loss takes none of them from the config that it builds on
VARIANT_KEYS = (
    "advantage.std",
    *(f"loss.{key}" for key in ("type", "python", "args", "allow_wide_clip", "dual_clip", *_SET)),
)
_TAUS = ("tau_positive", "tau_negative")
# what a variant does not use, where it is not just the temperatures of sapo
_UNREAD = {
    "gmpo": ("dual_clip", *_TAUS),
    "cispo": ("dual_clip", *_TAUS),
    "sapo": ("clip_low", "clip_high", "dual_clip"),
}
# gmpo clips tokens before it takes the mean of their ratios: clipped afterwards, that is gspo
_LEVELS = {"gmpo": ("token",), "cispo": ("token", "sequence_token")}


class LossConfig(Section):
    type: LossType | None = Field(
        default="gspo",
        description="variant of the loss, gspo_mm/loss/README.md; sets level, aggregation, clip_low, clip_high and tau_*, each "
        "unless it is given; null: see python",
    )
    python: str | None = Field(
        default=None, description="a loss of yours in place of type: package.module:function"
    )
    args: dict[str, Any] = Field(default={}, description="keyword arguments of python's function")
    level: Literal["sequence", "token", "sequence_token"] = Field(
        default="sequence",
        description="importance ratio: sequence = GSPO, token = GRPO/PPO, sequence_token = GSPO-token",
    )
    aggregation: Literal["sequence_mean", "token_mean", "dr_grpo"] = Field(
        default="sequence_mean",
        description="sequence_mean is the paper's; dr_grpo divides by a constant length",
    )
    clip_low: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        default=3e-4, description="ratio clipped below 1 - clip_low; null: not clipped"
    )
    clip_high: Annotated[float, Field(gt=0.0)] | None = Field(
        default=4e-4, description="ratio clipped above 1 + clip_high; null: not clipped"
    )
    allow_wide_clip: bool = Field(default=False, description="accept a sequence-level clip range above 0.01")
    dual_clip: Annotated[float, Field(gt=1.0)] | None = Field(
        default=None, description="bound of ratio x advantage for negative advantages; null: off"
    )
    tau_positive: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None, description="sapo: steepness of the gate where the advantage is positive"
    )
    tau_negative: Annotated[float, Field(gt=0.0)] | None = Field(
        default=None,
        description="sapo: where it is negative; above tau_positive, as such updates are less stable",
    )
    kl_coef: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0, description="weight of the k3 KL to the reference"
    )
    dr_grpo_length: Positive | None = Field(
        default=None,
        description="constant length of aggregation=dr_grpo; null: rollout.sampling.max_new_tokens",
    )
    correction: CorrectionConfig = CorrectionConfig()

    @property
    def clip(self) -> str:
        """The bounds that there are, for messages."""
        bounds = {"clip_low": self.clip_low, "clip_high": self.clip_high}
        return ", ".join(f"loss.{key}={bound:g}" for key, bound in bounds.items() if bound is not None)

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        """Keys that are not given are those of the variant."""
        if not isinstance(values, dict):
            return values
        named = values.get("type", None if values.get("python") else "gspo")
        row = _ROWS.get(named, ()) if named is None or isinstance(named, str) else ()
        return {"type": named, **dict(zip(_SET, row, strict=False)), **values}

    @model_validator(mode="after")
    def _one_loss(self) -> LossConfig:
        if (self.type is None) == (self.python is None):
            raise ValueError(
                f"loss.type={self.type} and loss.python={self.python}: one of them names the loss, the other is left out"
            )
        if self.args and self.type:
            raise ValueError(
                f"loss.args={self.args} with loss.type={self.type}: only a function that loss.python names takes them; "
                "leave them out"
            )
        return self

    @model_validator(mode="after")
    def _keys_fit_type(self) -> LossConfig:
        if self.type is None:
            return self
        for key in _UNREAD.get(self.type, _TAUS):
            if (value := getattr(self, key)) is not None:
                raise ValueError(f"loss.{key}={value:g} is not used by loss.type={self.type}; leave it out")
        if self.type == "sapo" and None in (self.tau_positive, self.tau_negative):
            raise ValueError(
                "loss.type=sapo needs loss.tau_positive and loss.tau_negative; leave them out for 1.0 and 1.05"
            )
        if self.level not in (levels := _LEVELS.get(self.type, (self.level,))):
            raise ValueError(
                f"loss.level={self.level} with loss.type={self.type}, which takes {' or '.join(levels)}; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _clip_fits_level(self) -> LossConfig:
        widest = max(self.clip_low or 0.0, self.clip_high or 0.0)
        if self.level != "token" and widest > WIDEST_OF_ANSWERS and not self.allow_wide_clip:
            raise ValueError(
                f"{self.clip} with loss.level={self.level}: a sequence-level range above 0.01 never clips (it is a "
                "token-level habit; the GSPO paper uses 3e-4 and 4e-4); lower it, or set loss.allow_wide_clip=true"
            )
        return self
