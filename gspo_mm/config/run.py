"""`run`, `model`, `data`, `train`, `sft`, `checkpoint`, `observe`: what is trained on what, how long, and what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from gspo_mm.config.base import Fraction, NonNegative, Positive, Section


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
