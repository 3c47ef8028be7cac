"""`rollout.environment`: what answers a model's turn, so that an answer has several."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from gspo_mm.config.base import Fraction, Positive, Section


class EnvironmentConfig(Section):
    type: Literal["image_tools", "http"] | None = Field(
        default=None,
        description="image_tools: the model looks again at its pictures; http: a server of your own; null: see python",
    )
    python: str | None = Field(
        default=None,
        description="your own, as package.module:factory; gspo_mm/environment/README.md says how",
    )
    args: dict[str, Any] = Field(default={}, description="what the environment is made with")
    role: Literal["tool", "user"] = Field(
        default="tool", description="whose message it is that comes back, in the chat template's words"
    )
    max_turns: Annotated[int, Field(ge=2)] = Field(
        default=4, description="turns of an answer; one that wants more ends as if it were too long"
    )
    max_observation_tokens: Positive = Field(
        default=1024, description="tokens that may come back after one turn, image tokens counted"
    )
    timeout: Annotated[float, Field(gt=0.0)] = Field(default=60.0, description="seconds for what comes back")
    workers: Positive | None = Field(
        default=None, description="processes; null: half of the cores, at most 8"
    )
    memory_gib: Annotated[float, Field(gt=0.0)] = Field(default=4.0, description="memory of one process")
    on_failure: Literal["mask", "drop_group", "fail"] = Field(
        default="mask",
        description="an environment that fails: mask leaves the answer out, drop_group its group, fail stops the run",
    )
    max_failed_fraction: Fraction = Field(
        default=0.5,
        description="a step with a larger fraction of answers whose environment failed stops the run",
    )

    @model_validator(mode="after")
    def _one(self) -> EnvironmentConfig:
        if (self.type is None) == (self.python is None):
            raise ValueError(
                f"rollout.environment.type={self.type} and rollout.environment.python={self.python}: one of them names the "
                "environment; set it, and the other to null"
            )
        return self

    @property
    def most_read(self) -> int:
        """Tokens that may come back in all over the turns of an answer."""
        return (self.max_turns - 1) * self.max_observation_tokens
