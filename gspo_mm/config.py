"""The one schema of a run. YAML -> OmegaConf (`${...}`, `key=value` overrides) -> strict pydantic models.

Loading never imports torch, so a mistake is told in well under a second, in one sentence that names the key,
the value and the fix. Sections follow the pipeline; `train.py` passes each stage its own section.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from gspo_mm.types import GspoError

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class ConfigError(GspoError, ValueError):
    """The configuration cannot run; the message names the key, its value and the fix."""


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are not silently converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class RunConfig(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the run's folder under `dir`")
    dir: str = Field(default="runs", description="where run folders are kept")
    seed: NonNegative = Field(
        default=0, description="one seed decides data order, sampling and initialisation"
    )
    resume: Literal["auto", "never", "must"] = Field(
        default="auto",
        description="auto: continue a run of this name if there is one; never: refuse to; must: require it",
    )

    @property
    def path(self) -> Path:
        return Path(self.dir) / self.name


class ModelConfig(Section):
    path: str = Field(description="Hugging Face folder: config.json, *.safetensors, tokenizer, processor")
    experts_layout: Literal["auto", "published", "transformers"] = Field(
        default="auto",
        description="axis order of fused experts on disk; auto decides by their dims and refuses to guess",
    )


class DataConfig(Section):
    train: list[str] = Field(min_length=1, description="training shards: paths, {000..031} braces, globs")
    validation: list[str] = Field(default=[], description="held-out shards, only ever evaluated on")
    shuffle_buffer: NonNegative = Field(
        default=1000, description="samples in the shuffle buffer; 0 keeps shard order"
    )
    max_prompt_tokens: Positive = Field(
        default=2048, description="longer prompts are skipped and counted, never cut"
    )
    min_pixels: Positive | None = Field(
        default=None, description="passed to the image processor; null: its own"
    )
    max_pixels: Positive | None = Field(
        default=None, description="passed to the image processor; null: its own"
    )
    max_bad_fraction: Fraction = Field(
        default=0.01, description="of samples read; more unusable ones stop the run"
    )
    image_cache_mb: NonNegative = Field(default=512, description="host memory for pixels of recent images")


class SamplingConfig(Section):
    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: NonNegative = Field(default=0, description="0: off")
    max_new_tokens: Positive = 64


class SGLangConfig(Section):
    """`rollout.sglang`: the servers that answer, where rollout.engine=sglang."""

    start: Literal["here", "elsewhere"] = Field(
        default="here",
        description="here: rank 0 starts them on its machine; elsewhere: `gspo-mm serve` does, on any machine that "
        "shares run.dir",
    )
    servers: Positive = Field(default=1, description="servers to start here, or to wait for")
    urls: list[str] = Field(
        default=[],
        description="servers that somebody else keeps running, instead of starting any; their keys are read from "
        "GSPO_MM_API_KEY and GSPO_MM_ADMIN_KEY",
    )
    python: str | None = Field(
        default=None, description="interpreter of the environment that has sglang; null: this one"
    )
    host: str = Field(
        default="127.0.0.1",
        description="address that servers listen on; for start=elsewhere that of the cluster's own network",
    )
    tp: Positive = Field(default=1, description="GPUs of one server: its tensor-parallel size")
    ep: Positive = Field(default=1, description="expert-parallel size within tp")
    dp: Positive = Field(default=1, description="data-parallel attention groups within tp")
    fp8: bool = Field(
        default=False,
        description="the decoder's matrices in FP8 with a scale per 128 x 128 block; router, vision tower, output layer "
        "and embeddings stay in policy.dtype",
    )
    mem_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.8, description="GPU memory for weights and key/value cache"
    )
    max_tokens: Positive | None = Field(
        default=None, description="tokens in the key/value cache; null: what mem_fraction allows"
    )
    context_length: Positive | None = Field(
        default=None, description="null: data.max_prompt_tokens + rollout.sampling.max_new_tokens"
    )
    max_running: Positive | None = Field(
        default=None, description="sequences decoded together; null: sglang's own"
    )
    max_images: Positive | None = Field(default=None, description="images per prompt; null: no limit")
    extra_args: dict[str, bool | int | float | str] = Field(
        default={}, description="further options of sglang.launch_server, by name: {attention-backend: fa3}"
    )
    start_timeout: Positive = Field(default=1800, description="seconds until a started server must be ready")
    request_timeout: Positive = Field(default=1800, description="seconds until a group must be answered")
    down_timeout: Positive = Field(
        default=1800, description="seconds without any server, or without a trainer, before giving up"
    )
    max_restarts: NonNegative = Field(default=5, description="of one server in a row before it is left out")
    max_logprob_gap: Annotated[float, Field(gt=0.0)] = Field(
        default=0.1,
        description="mean |log-prob of server - of policy| in nats above which `gspo-mm preflight` stops the run",
    )

    @model_validator(mode="after")
    def _fp8_is_ours(self) -> SGLangConfig:
        for name in (
            {"load-format", "quantization", "model-path"} & self.extra_args.keys() if self.fp8 else ()
        ):
            raise ValueError(
                f"rollout.sglang.extra_args.{name}={self.extra_args[name]} contradicts rollout.sglang.fp8=true, which "
                "decides what servers load; leave it out, or set fp8=false"
            )
        return self

    @model_validator(mode="after")
    def _sizes_fit(self) -> SGLangConfig:
        for name, size in (("ep", self.ep), ("dp", self.dp)):
            if self.tp % size:
                raise ValueError(
                    f"rollout.sglang.{name}={size} does not divide rollout.sglang.tp={self.tp}; both share one server's "
                    "GPUs"
                )
        return self


class RolloutConfig(Section):
    engine: Literal["embedded", "sglang"] = Field(
        default="embedded", description="embedded: transformers, in this process; sglang: servers"
    )
    prompts_per_step: Positive = Field(default=16, description="groups sampled for one step")
    group_size: Annotated[int, Field(ge=2)] = Field(default=8, description="completions per prompt (G)")
    sampling: SamplingConfig = SamplingConfig()
    max_batch: Positive = Field(default=256, description="sequences decoded together by the embedded engine")
    max_in_flight: Positive = Field(default=256, description="groups asked of servers at a time")
    max_staleness: NonNegative = Field(
        default=0,
        description="versions that weights may be ahead of a trained token; 0: sample, then train, in turn",
    )
    oversample: Annotated[float, Field(ge=1.0, le=2.0)] = Field(
        default=1.0,
        description="groups started per group trained on; the slowest are given up, and come first in the next step",
    )
    drop_dead_groups: bool = Field(
        default=False, description="start another group for each whose rewards are all equal (DAPO)"
    )
    on_update: Literal["retract", "in_place"] = Field(
        default="retract",
        description="answers under way while weights change: retract computes their cache anew, in_place keeps it",
    )
    sglang: SGLangConfig = SGLangConfig()
    replay: str | None = Field(
        default=None, description="a run folder whose saved rollouts are trained on instead of sampling"
    )

    @model_validator(mode="after")
    def _sampling_explores(self) -> RolloutConfig:
        if self.sampling.temperature == 0:
            raise ValueError(
                "rollout.sampling.temperature=0 makes all completions of a group equal, so no advantage can exist; "
                "use 1.0"
            )
        return self

    @model_validator(mode="after")
    def _engine_can(self) -> RolloutConfig:
        if self.engine == "embedded":
            if self.sglang.fp8:
                raise ValueError(
                    "rollout.sglang.fp8=true with rollout.engine=embedded: only servers hold weights in FP8; set "
                    "rollout.engine=sglang, or rollout.sglang.fp8=false"
                )
            for name, off in (("max_staleness", 0), ("oversample", 1.0), ("drop_dead_groups", False)):
                if getattr(self, name) != off:
                    raise ValueError(
                        f"rollout.{name}={getattr(self, name)} needs servers that sample beside the trainer; set "
                        f"rollout.engine=sglang, or rollout.{name}={off}"
                    )
        return self


class SyncConfig(Section):
    """How new weights reach SGLang servers; the embedded engine is in the same process and copies."""

    mode: Literal["disk", "tensor", "distributed"] = Field(
        default="distributed",
        description="distributed: NCCL (gloo without GPUs) straight to the servers; tensor: through the memory of "
        "the GPUs that trainer and servers share; disk: through a folder that all machines see",
    )
    folder: str | None = Field(
        default=None,
        description="where mode=disk writes; null: the run folder. /dev/shm for servers on one machine",
    )
    bucket_mb: Positive = Field(default=512, description="weights under way at a time, in MiB")
    verify: bool = Field(
        default=True,
        description="compare checksums of some tensors, the vision tower's among them, after each push",
    )
    timeout: Positive = Field(default=600, description="seconds that one push may take")


class RewardConfig(Section):
    file: str = Field(description="YAML reward file, see configs/rewards/")
    max_failed_fraction: Fraction = Field(
        default=0.05, description="of completions in a step; more failed rewards stop the run"
    )


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


class OptimizerConfig(Section):
    lr: Annotated[float, Field(gt=0.0)] = 1e-6
    min_lr_ratio: Fraction = Field(
        default=1.0, description="learning rate at the last step, as a part of lr (cosine)"
    )
    warmup_steps: NonNegative = 0
    beta1: Fraction = 0.9
    beta2: Fraction = 0.98
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    grad_clip: Annotated[float, Field(ge=0.0)] = Field(
        default=1.0, description="largest global gradient norm; 0: off"
    )
    offload: bool = Field(
        default=False, description="keep optimizer state in host memory and step there (needs CUDA)"
    )
    precision_aware: bool = Field(
        default=False, description="moments in BF16 instead of float32 (Transformer Engine's or apex's Adam)"
    )
    overlap: bool = Field(
        default=False, description="reduce gradients during backward and gather parameters during forward"
    )


class Fp8Config(Section):
    recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] | None = Field(
        default=None, description="Transformer Engine recipe of the decoder's matrix products; null: off"
    )
    primary_weights: bool = Field(
        default=False,
        description="keep the decoder's weights in FP8 only, beside the optimizer's float32 ones",
    )
    bf16_layers_at_start: NonNegative = Field(default=0, description="first decoder layers left in BF16")
    bf16_layers_at_end: NonNegative = Field(default=0, description="last decoder layers left in BF16")

    @model_validator(mode="after")
    def _recipe_fits(self) -> Fp8Config:
        if self.recipe == "delayed" and self.bf16_layers_at_start + self.bf16_layers_at_end:
            raise ValueError(
                "policy.fp8.recipe=delayed keeps one scaling state over all layers and cannot leave some in BF16; use "
                "tensorwise, or bf16_layers_at_start=0 and bf16_layers_at_end=0"
            )
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


class PolicyConfig(Section):
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="parameters and activations"
    )
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    freeze: list[Literal["vision", "projector", "router", "language"]] = Field(
        default=[], description="parts that are not trained"
    )
    micro_batch_tokens: Positive = Field(default=16384, description="packed tokens per forward/backward pass")
    recompute: Literal["none", "selective", "full"] = Field(
        default="none", description="activations recomputed in backward: none, attention only, whole layers"
    )
    fp8: Fp8Config = Fp8Config()
    moe: MoeConfig = MoeConfig()
    vision_cache_mb: NonNegative = Field(
        default=2048,
        description="memory per rank for features of images, where vision and projector are frozen",
    )

    @model_validator(mode="after")
    def _parts_fit(self) -> PolicyConfig:
        if self.fp8.recipe is not None and self.dtype != "bfloat16":
            raise ValueError(
                f"policy.fp8.recipe={self.fp8.recipe} with policy.dtype={self.dtype}: what is not FP8 must be "
                "bfloat16; set policy.dtype=bfloat16"
            )
        if "language" in self.freeze and self.parallel.pp > 1:
            raise ValueError(
                f"policy.freeze={self.freeze} with policy.parallel.pp={self.parallel.pp} leaves later pipeline stages "
                "nothing to train; use pp=1"
            )
        return self


class TrainConfig(Section):
    steps: Positive = 100
    updates_per_batch: Positive = Field(
        default=2, description="optimizer steps per rollout batch, each on its own share of the groups"
    )
    eval_every: NonNegative = Field(
        default=0, description="steps between evaluations; 0: only first and last"
    )
    eval_prompts: Positive = Field(
        default=256, description="held-out prompts per evaluation, answered greedily"
    )
    canary_prompts: Positive = Field(
        default=4, description="prompts with images that the blind-run canary looks at"
    )


class SftConfig(Section):
    steps: Positive = 100
    batch_size: Positive = Field(default=32, description="sequences per optimizer step")


class CheckpointConfig(Section):
    every: NonNegative = Field(default=50, description="steps between checkpoints; 0: only the last")
    keep: Positive = Field(default=2, description="checkpoints kept; older ones are removed")
    background: bool = Field(
        default=True, description="train on while one is written, from a copy in host memory"
    )
    export_hf: bool = Field(default=True, description="write the trained model to RUN/hf at the end")


class ObserveConfig(Section):
    tensorboard: bool = True
    wandb: str | None = Field(default=None, description="Weights & Biases project; null: off")
    save_rollouts_every: NonNegative = Field(default=10, description="steps between saved rollouts; 0: never")
    rollouts_per_save: NonNegative = Field(
        default=0, description="groups kept per save; 0: all (needed for replay)"
    )
    report: bool = Field(default=True, description="write RUN/report.html at the end")


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


def load_config(path: str | Path, overrides: list[str] | None = None, *, any_world: bool = False) -> Config:
    """Read a YAML config, apply `key=value` overrides, resolve `${...}` and validate.

    `any_world`: it may be for another number of ranks than were started, as the one of a run to be continued.

    Raises ConfigError: one sentence per fault, naming the key, the value and the fix.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist; try configs/quickstart.yaml")
    changes = [_parse_override(item) for item in overrides or []]
    try:
        loaded = OmegaConf.load(path)
        if not OmegaConf.is_dict(loaded) or not loaded:
            raise ConfigError(f"{path} holds no mapping of sections; start from configs/quickstart.yaml")
        raw = OmegaConf.merge(loaded, *changes)
        values = OmegaConf.to_container(raw, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from None
    except Exception as error:  # YAML's own scanner and parser errors share no public base with OmegaConf's
        if type(error).__module__.startswith("yaml"):
            raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
        raise
    return parse_config(values, source=str(path), any_world=any_world)


def _parse_override(item: str) -> Any:
    if "=" not in item or item.startswith("-"):
        raise ConfigError(f"override {item!r} is not of the form key=value, as in train.steps=10")
    try:
        return OmegaConf.from_dotlist([item])
    except Exception as error:
        if type(error).__module__.startswith(("yaml", "omegaconf")):
            key, _, value = item.partition("=")
            raise ConfigError(
                f"override {key}={value} has a value that YAML cannot read; put text with braces or colons in "
                f"quotes of its own, as in '{key}=[\"{value.strip('[]')}\"]'"
            ) from None
        raise


def parse_config(values: Any, *, source: str = "config", any_world: bool = False) -> Config:
    """Validate plain values; raises ConfigError as `load_config` does."""
    try:
        return Config.model_validate(values, context={"any_world": any_world})
    except ValidationError as error:
        raise ConfigError("\n".join(_sentences(error, source))) from None


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML; `load_config` reads it back to an equal value."""
    OmegaConf.save(OmegaConf.create(config.model_dump(mode="json")), path)


def _sentences(error: ValidationError, source: str) -> list[str]:
    return [f"{source}: {_sentence(fault)}" for fault in error.errors(include_url=False)]


def _sentence(fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    kind, value = fault["type"], fault.get("input")
    if kind == "extra_forbidden":
        return f"unknown key {key}={value!r}; {_known_keys(fault['loc'])}"
    if kind == "missing":
        return f"key {key} is missing; add it"
    message = fault["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return message
    return f"{key}={value!r} is refused: {message[0].lower()}{message[1:]}{_hint(kind, value)}"


def _hint(kind: str, value: Any) -> str:
    if kind in ("float_type", "int_type") and isinstance(value, str):
        return (
            "; YAML reads 1e-6 as text: write 1.0e-6" if "e" in value.lower() else "; write it without quotes"
        )
    if kind == "int_from_float" or (kind == "int_type" and isinstance(value, float)):
        return "; write a whole number"
    return ""


def _known_keys(location: tuple[Any, ...]) -> str:
    """Name the keys that the section at `location[:-1]` has, the nearest in spelling first."""
    import difflib

    section: type[BaseModel] = Config
    for part in location[:-1]:
        annotation = section.model_fields[part].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, BaseModel)
        section = annotation
    names = list(section.model_fields)
    near = difflib.get_close_matches(str(location[-1]), names, n=1)
    return f"did you mean {near[0]}?" if near else f"known keys here: {', '.join(names)}"
