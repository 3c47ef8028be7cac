"""`run`, `model`, `data`, `train`, `sft`, `checkpoint`, `observe`: what is trained on what, how long, and what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from gspo_mm.config.base import ALTERNATIVES, Fraction, NonNegative, Positive, Section


class RunConfig(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the run's folder under `dir`")
    dir: str = Field(
        default="runs",
        description="where run folders are kept; like every path of a config, a relative one counts from the folder that "
        "the command is started in",
    )
    seed: NonNegative = Field(
        default=0, description="one seed decides data order, sampling and initialisation"
    )
    resume: Literal["auto", "never", "must"] = Field(
        default="auto",
        description="auto: continue a run of this name if there is one; never: refuse to; must: require it",
    )
    hang_timeout: float = Field(
        default=1800.0,
        ge=0,
        allow_inf_nan=False,
        description="seconds without progress (a phase, a micro-batch, an answer) after which the run ends, with the "
        "stacks of all ranks in RUN/hangs; 0: never",
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


class SourceConfig(Section):
    """One source of a mixture."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="stands in every prompt and its key"
    )
    shards: list[str] = Field(min_length=1, description="as in a plain list of data.train")
    weight: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="share of the samples, in proportion to the others'",
    )
    reward: str | None = Field(default=None, description="reward file of its prompts; null: reward.file")


class CurriculumConfig(Section):
    """Easy prompts first: the hardest that is let through rises evenly from `start` to `end`."""

    key: str = Field(min_length=1, description="number in a sample's meta; larger is harder")
    start: float = Field(allow_inf_nan=False, description="hardest at the beginning")
    end: float = Field(allow_inf_nan=False, description="hardest when `samples` were read, and from there on")
    samples: Positive = Field(description="samples read, left-out ones included, until `end` is reached")


_PATTERNS, _SOURCES = ALTERNATIVES


def _kind_of_list(value: Any) -> str:
    entries = value if isinstance(value, list) else []
    return _SOURCES if any(isinstance(entry, dict | SourceConfig) for entry in entries) else _PATTERNS


# a plain list of patterns, or the entries of a mixture; faults are reported of the kind that was meant
Shards = Annotated[
    Annotated[list[str], Tag(_PATTERNS)] | Annotated[list[SourceConfig], Tag(_SOURCES)],
    Discriminator(_kind_of_list),
]


class DataConfig(Section):
    train: Shards = Field(
        description="training shards: paths, URLs, pipe: commands, with {000..031} braces or globs; or a list of "
        "{name, shards, weight, reward} that are mixed. A run that is continued ends its epoch with the shards that it "
        "began with; others come in with the next one",
    )
    validation: Shards = Field(
        default=[],
        description="held-out shards, one after the other; prompts that are evaluated on are skipped in training",
    )
    shuffle_buffer: NonNegative = Field(
        default=1000, description="samples in the shuffle buffer; 0 keeps shard order"
    )
    max_prompt_tokens: Positive = Field(
        default=2048, description="longer prompts are skipped and counted, never cut"
    )
    min_pixels: Positive | None = Field(
        default=None, description="images of fewer pixels are scaled up; null: the image processor's own"
    )
    max_pixels: Positive | None = Field(
        default=None, description="images of more pixels are scaled down; null: the image processor's own"
    )
    max_bad_fraction: Fraction = Field(
        default=0.01, description="of samples read; more unusable ones stop the run"
    )
    min_image_pixels: Positive = Field(
        default=1, description="prompts with an image of fewer pixels (width x height as stored) are left out"
    )
    max_image_pixels: int = Field(
        default=64_000_000,
        ge=1,
        le=64_000_000,
        description="prompts with an image of more pixels are left out; above 64 million none is ever decoded",
    )
    max_aspect_ratio: float = Field(
        default=200.0, ge=1, le=200, description="longer over shorter side; the image processor stops at 200"
    )
    curriculum: CurriculumConfig | None = Field(default=None, description="easy training prompts first")
    prefetch_mb: NonNegative = Field(
        default=64, description="host memory for samples read ahead by a thread; 0: read when they are needed"
    )
    image_cache_mb: NonNegative = Field(default=512, description="host memory for pixels of recent images")

    @model_validator(mode="after")
    def _values_agree(self) -> DataConfig:
        if not self.train:
            raise ValueError("data.train=[] names no shards; give at least 1 pattern")
        if self.min_image_pixels > self.max_image_pixels:
            raise ValueError(
                f"data.min_image_pixels={self.min_image_pixels} is above "
                f"data.max_image_pixels={self.max_image_pixels}, which leaves no image; lower it"
            )
        if self.curriculum and self.curriculum.start > self.curriculum.end:
            raise ValueError(
                f"data.curriculum.start={self.curriculum.start:g} is above data.curriculum.end="
                f"{self.curriculum.end:g}; a curriculum goes from easy to hard: swap them"
            )
        for split in ("train", "validation"):
            names = [source.name for source in self.sources(split)]
            if twice := {name for name in names if names.count(name) > 1}:
                raise ValueError(
                    f"data.{split} has two sources with name={min(twice)}; give each a name of its own"
                )
        files: dict[str, str | None] = {}
        for source in [*self.sources("train"), *self.sources("validation")]:
            if source.name and files.setdefault(source.name, source.reward) != source.reward:
                raise ValueError(
                    f"source {source.name} has reward={files[source.name]} in data.train and reward={source.reward} in "
                    "data.validation; give both the same, or one of them another name"
                )
        return self

    def sources(self, split: Literal["train", "validation"]) -> list[SourceConfig]:
        """The split as sources. A plain list of patterns is one, and its name is empty."""
        entries = self.train if split == "train" else self.validation
        named = [entry for entry in entries if isinstance(entry, SourceConfig)]
        if len(named) == len(entries):
            return named
        return [SourceConfig.model_construct(name="", shards=list(entries), weight=1.0, reward=None)]

    def reward_files(self) -> dict[str, str]:
        """Reward files of the sources that have one of their own, by name."""
        sources = [*self.sources("train"), *self.sources("validation")]
        return {source.name: source.reward for source in sources if source.reward}


# what a run looks for in its own metrics: observe/health.py
type RuleName = Literal[
    "accuracy_fell",
    "constant_reward",
    "dead_groups",
    "failures",
    "entropy_collapsed",
    "gradient_growing",
    "policy_jumped",
    "clip_saturated",
    "clip_idle",
    "length_collapsed",
    "length_exploded",
    "truncated",
    "mismatch_growing",
    "parts_at_odds",
    "no_effect",
    "loss_rose",
]


class TrainConfig(Section):
    steps: Positive = Field(default=100, description="rollout batches of the whole run")
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
    stop_on: list[RuleName] = Field(
        default=[],
        description="rules (configs/README.md) that end the run with a checkpoint and status 4 when they begin to hold",
    )


class SftConfig(Section):
    steps: Positive = Field(default=100, description="optimizer steps")
    batch_size: Positive = Field(default=32, description="sequences per optimizer step")
    every_turn: bool = Field(
        default=True,
        description="train on the assistant's turns among a sample's messages too; false: on its response alone",
    )


class CheckpointConfig(Section):
    every: NonNegative = Field(default=50, description="steps between checkpoints; 0: only the last")
    keep: Positive = Field(
        default=2,
        description="checkpoints kept; older ones are removed, but for those with a file KEEP in their folder",
    )
    keep_every: NonNegative = Field(
        default=0, description="checkpoints of every so many steps are kept beside them; 0: none"
    )
    keep_best: bool = Field(
        default=False,
        description="save one too when held-out accuracy is the best so far, and keep the best one beside the others",
    )
    background: bool = Field(
        default=True, description="train on while one is written, from a copy in host memory"
    )
    export_hf: bool = Field(default=True, description="write the trained model to RUN/hf at the end")


class ObserveConfig(Section):
    tensorboard: bool = Field(default=True, description="write RUN/tensorboard")
    wandb: str | None = Field(default=None, description="Weights & Biases project; null: off")
    save_rollouts_every: NonNegative = Field(
        default=10, description="steps between saved rollouts; 0: never, nor the answers of evaluations"
    )
    rollouts_per_save: NonNegative = Field(
        default=0, description="groups kept per save; 0: all (needed for replay)"
    )
    probe_every: NonNegative = Field(
        default=20, description="steps between looks at each rank's speed (20 ms each); 0: never"
    )
    routing_audit: NonNegative = Field(
        default=0,
        description="steps between comparisons of the experts that routers choose before a step's updates and after them, "
        "on a few of its sequences; 0: never",
    )
    report: bool = Field(default=True, description="write RUN/report.html at the end")
