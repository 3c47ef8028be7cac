"""`policy`: the trained model's number formats, its optimizer, and how it is spread over ranks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from gspo_mm.config.base import ConfigError, Fraction, NonNegative, Positive, Section


class ParallelConfig(Section):
    tp: Positive = Field(default=1, description="tensor- and sequence-parallel size")
    pp: Positive = Field(default=1, description="pipeline-parallel size")
    vpp: Positive = Field(
        default=1, description="model chunks per pipeline stage (interleaved schedule, a smaller bubble)"
    )
    first_stage_layers: Positive | None = Field(
        default=None, description="decoder layers beside the vision tower; null: spread evenly"
    )
    last_stage_layers: Positive | None = Field(
        default=None, description="decoder layers beside the output weight; null: spread evenly"
    )
    cp: Positive = Field(default=1, description="context-parallel size")
    ep: Positive = Field(default=1, description="expert-parallel size")
    etp: Positive | None = Field(default=None, description="expert-tensor-parallel size; null: tp")
    dp: Positive | None = Field(default=None, description="data-parallel size; null: world size / (tp*pp*cp)")

    @model_validator(mode="after")
    def _pipeline_exists(self) -> ParallelConfig:
        if self.pp == 1 and (self.vpp > 1 or self.first_stage_layers or self.last_stage_layers):
            raise ValueError(
                f"policy.parallel.pp=1 has no stages for vpp={self.vpp}, first_stage_layers={self.first_stage_layers}, "
                f"last_stage_layers={self.last_stage_layers}; raise pp, or leave them out"
            )
        return self


class SkipConfig(Section):
    in_a_row: NonNegative = Field(
        default=0,
        description="updates that may be left out one after the other, weights as they were, because their gradient is "
        "not finite or a spike; one more stops the run",
    )
    spike_factor: float | None = Field(
        default=None,
        gt=1,
        allow_inf_nan=False,
        description="a gradient norm above so many times the median of the last 64 is a spike; null: none is",
    )


class OptimizerConfig(Section):
    lr: Annotated[float, Field(gt=0.0)] = Field(default=1e-6, description="largest learning rate")
    min_lr_ratio: Fraction = Field(
        default=1.0,
        description="learning rate of the last training step, as a part of lr; cosine over the steps of the run",
    )
    warmup_steps: NonNegative = Field(
        default=0, description="training steps, each with all its updates, over which the rate rises to lr"
    )
    beta1: Fraction = Field(default=0.9, description="Adam's decay of gradients, per update")
    beta2: Fraction = Field(default=0.98, description="Adam's decay of squared gradients, per update")
    eps: Annotated[float, Field(gt=0.0)] = Field(default=1e-8, description="Adam's term beside the root")
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0, description="lr times this share of a matrix is taken away per update"
    )
    grad_clip: Annotated[float, Field(ge=0.0)] = Field(
        default=1.0, description="largest global gradient norm; 0: off"
    )
    offload: bool = Field(
        default=False, description="keep optimizer state in host memory and step there (needs CUDA)"
    )
    moments: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="format of Adam's moments; bfloat16 by Transformer Engine's, which needs CUDA",
    )
    overlap: bool | None = Field(
        default=None,
        description="reduce gradients during backward and gather parameters during forward; null: on GPUs",
    )
    skip: SkipConfig = Field(default_factory=SkipConfig)

    @field_validator("moments", mode="before")
    @classmethod
    def _can_be_read_again(cls, moments: Any) -> Any:
        if moments == "fp8":
            raise ValueError(
                "policy.optimizer.moments=fp8: Transformer Engine 2.20 makes NaN of a moment of zeros, as that of an expert "
                "without tokens is, and megatron-core 0.19 reads moments in FP8 without their scale, so that a run could not be "
                "continued; use bfloat16, or policy.lora, whose optimizer state is small"
            )
        return moments


class Fp8Config(Section):
    recipe: Literal["tensorwise", "blockwise", "mxfp8"] | None = Field(
        default=None, description="Transformer Engine recipe of the decoder's matrix products; null: off"
    )
    primary_weights: bool = Field(
        default=False,
        description="keep the decoder's weights in FP8 only, beside the optimizer's float32 ones",
    )
    bf16_layers_at_start: NonNegative = Field(default=0, description="first decoder layers left in BF16")
    bf16_layers_at_end: NonNegative = Field(default=0, description="last decoder layers left in BF16")

    @field_validator("recipe", mode="before")
    @classmethod
    def _can_be_continued(cls, recipe: Any) -> Any:
        if recipe == "delayed":
            raise ValueError(
                "policy.fp8.recipe=delayed scales by a history of values that Transformer Engine hands to no checkpoint of "
                "ours, so that a run could not be continued; use tensorwise"
            )
        return recipe

    @model_validator(mode="after")
    def _recipe_fits(self) -> Fp8Config:
        if self.recipe is None and self.primary_weights:
            raise ValueError("policy.fp8.primary_weights=true needs policy.fp8.recipe; set one, or false")
        return self


class MoeConfig(Section):
    dispatcher: Literal["alltoall", "flex"] = Field(
        default="alltoall",
        description="how tokens reach their experts; flex: DeepEP, which must be installed",
    )
    aux_loss: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0,
        description="weight of the loss that evens out the experts' load; 0: off, as is usual in RL",
    )


class LoraConfig(Section):
    rank: Positive = Field(description="inner size of the trained products")
    alpha: Annotated[float, Field(gt=0.0)] = Field(
        default=16.0, description="what is added is scaled by alpha / rank"
    )
    targets: list[Literal["attention", "mlp", "experts", "projector"]] = Field(
        default=["attention", "mlp"],
        description="matrices that have one: attention (linear attention too), mlp (dense and shared experts), experts, "
        "projector (of image features)",
    )
    dropout: float = Field(
        default=0.0, description="0 alone: another would change the importance ratio at random"
    )

    @field_validator("dropout")
    @classmethod
    def _none(cls, dropout: float) -> float:
        if dropout:
            raise ValueError(
                f"policy.lora.dropout={dropout} would make the log-probs of each pass others, and so the importance ratio; use 0"
            )
        return dropout

    @field_validator("targets")
    @classmethod
    def _some(cls, targets: list[str]) -> list[str]:
        if not targets:
            raise ValueError(
                "policy.lora.targets=[] leaves nothing to train; name attention, mlp, experts or projector"
            )
        return targets


class PolicyConfig(Section):
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="parameters and activations"
    )
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    freeze: list[Literal["vision", "projector", "router", "language"]] = Field(
        default=[], description="parts that are not trained"
    )
    lora: LoraConfig | None = Field(
        default=None,
        description="train small products beside the weights, which stay as they are; null: the weights",
    )
    micro_batch_tokens: Positive = Field(default=16384, description="packed tokens per forward/backward pass")
    share_prompts: bool | None = Field(
        default=None,
        description="compute a prompt once for all answers of a micro-batch to it; null: where attention is torch's, cp=1, and "
        "nothing else forbids it",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        description="activations recomputed in backward; selective: norms and experts' activations (without Transformer "
        "Engine attention's scores), full: whole layers",
    )
    fp8: Fp8Config = Fp8Config()
    moe: MoeConfig = MoeConfig()
    vision_cache_mb: NonNegative = Field(
        default=2048,
        description="memory per rank for features of images, where vision and projector are frozen",
    )
    megatron: dict[str, Any] = Field(
        default={},
        description="settings of megatron-core's TransformerConfig by their names there, over those that `gspo-mm doctor "
        "CONFIG` shows",
    )

    @property
    def frozen(self) -> list[str]:
        """Parts whose weights get no gradients."""
        return ["vision", "projector", "router", "language"] if self.lora else list(self.freeze)

    @property
    def keeps_features(self) -> bool:
        """Whether the features of an image stay the same over updates."""
        return {"vision", "projector"} <= {*self.frozen} - {*(self.lora.targets if self.lora else [])}

    @model_validator(mode="after")
    def _adapters_alone(self) -> PolicyConfig:
        if self.lora and self.freeze:
            raise ValueError(
                f"policy.freeze={self.freeze} with policy.lora: all weights are frozen beside adapters; take freeze out, and "
                "say in policy.lora.targets what has adapters"
            )
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> PolicyConfig:
        if self.fp8.recipe is not None and self.dtype != "bfloat16":
            raise ValueError(
                f"policy.fp8.recipe={self.fp8.recipe} with policy.dtype={self.dtype}: what is not FP8 must be "
                "bfloat16; set policy.dtype=bfloat16"
            )
        if "language" in self.freeze and self.fp8.primary_weights:
            raise ValueError(
                f"policy.freeze={self.freeze} with policy.fp8.primary_weights=true would keep the decoder's weights rounded to "
                "FP8 and nowhere else, so that they would be exported otherwise than they came; set "
                "policy.fp8.primary_weights=false"
            )
        if "language" in self.freeze and self.parallel.pp > 1:
            raise ValueError(
                f"policy.freeze={self.freeze} with policy.parallel.pp={self.parallel.pp} leaves later pipeline stages "
                "nothing to train; use pp=1"
            )
        return self


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    return parallel.dp or world_size // (parallel.tp * parallel.pp * parallel.cp)


def check_world(parallel: ParallelConfig, *, world_size: int) -> None:
    """Raise ConfigError unless tp*pp*cp*dp is the number of ranks that were started."""
    inner = parallel.tp * parallel.pp * parallel.cp
    sizes = f"policy.parallel tp={parallel.tp} pp={parallel.pp} cp={parallel.cp}"
    if parallel.dp is None and world_size % inner:
        raise ConfigError(
            f"{sizes} needs a multiple of {inner} ranks but {world_size} started; start {inner}, or lower them"
        )
    if parallel.dp is not None and inner * parallel.dp != world_size:
        raise ConfigError(
            f"{sizes} dp={parallel.dp} needs {inner * parallel.dp} ranks but {world_size} started; "
            f"start {inner * parallel.dp}, or set dp=null to fill the world"
        )
    etp = parallel.etp or parallel.tp
    if world_size % (parallel.ep * etp * parallel.pp):
        raise ConfigError(
            f"policy.parallel ep={parallel.ep} etp={etp} pp={parallel.pp} needs a multiple of "
            f"{parallel.ep * etp * parallel.pp} ranks but {world_size} started; lower ep or etp"
        )
