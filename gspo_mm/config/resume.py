"""What becomes of a key that has another value when a run is continued. Every key of the schema stands here once.

    APPLIED     the new value holds from the next step on
    REFUSED     the run would silently be another experiment, or could not be read; the reason goes into the sentence
    UNDER_WAY   refused while prompts are on servers or their answers wait to be trained on, applied otherwise
    IGNORED     nothing reads it, which the log says

What a command does not use it ignores: `gspo-mm sft` samples no groups and `gspo-mm train` reads nothing of `sft`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import BaseModel

from gspo_mm.config.run import SourceConfig
from gspo_mm.config.schema import Config

type Command = Literal["train", "sft"]

_APPLIED = """
run.name run.dir run.resume run.hang_timeout data.train.shards data.train.reward data.validation.name data.validation.reward
data.max_bad_fraction data.prefetch_mb data.image_cache_mb rollout.prompts_per_step rollout.group_size
rollout.sampling.max_new_tokens rollout.environment.max_turns rollout.environment.max_observation_tokens
rollout.environment.timeout rollout.environment.workers rollout.environment.memory_gib
rollout.environment.on_failure rollout.environment.max_failed_fraction
rollout.max_batch rollout.max_in_flight rollout.max_staleness
rollout.start_ahead rollout.oversample rollout.drop_dead_groups rollout.on_update rollout.sglang.start
rollout.sglang.servers rollout.sglang.urls rollout.sglang.python rollout.sglang.host rollout.sglang.colocate
rollout.sglang.tp rollout.sglang.ep rollout.sglang.dp rollout.sglang.fp8 rollout.sglang.mem_fraction
rollout.sglang.max_tokens rollout.sglang.context_length rollout.sglang.max_running rollout.sglang.max_images
rollout.sglang.extra_args rollout.sglang.start_timeout rollout.sglang.request_timeout
rollout.sglang.down_timeout rollout.sglang.max_restarts rollout.sglang.max_logprob_gap
rollout.sglang.max_group_gap sync.mode sync.folder sync.bucket_mb sync.verify sync.timeout reward.file
reward.on_failure reward.max_failed_fraction reward.workers reward.timeout reward.memory_gib advantage.std
advantage.max_dead_steps loss.type loss.python loss.args loss.level loss.aggregation loss.clip_low loss.clip_high
loss.allow_wide_clip loss.dual_clip loss.tau_positive loss.tau_negative loss.kl_coef loss.dr_grpo_length
loss.correction.kind loss.correction.low loss.correction.high policy.parallel.tp policy.parallel.pp policy.parallel.vpp
policy.parallel.first_stage_layers policy.parallel.last_stage_layers policy.parallel.cp policy.parallel.ep
policy.parallel.etp policy.parallel.dp policy.optimizer.lr policy.optimizer.min_lr_ratio
policy.optimizer.warmup_steps policy.optimizer.beta1 policy.optimizer.beta2 policy.optimizer.eps
policy.optimizer.weight_decay policy.optimizer.grad_clip policy.optimizer.overlap policy.optimizer.skip.in_a_row
policy.optimizer.skip.spike_factor policy.micro_batch_tokens policy.share_prompts train.stop_on checkpoint.keep_best
policy.recompute policy.moe.dispatcher policy.moe.aux_loss policy.vision_cache_mb policy.megatron train.steps
train.updates_per_batch train.eval_every train.canary_prompts sft.steps sft.batch_size sft.every_turn checkpoint.every
checkpoint.keep checkpoint.keep_every checkpoint.background checkpoint.export_hf observe.tensorboard observe.wandb
observe.save_rollouts_every observe.rollouts_per_save observe.probe_every observe.routing_audit
observe.report
"""
APPLIED = frozenset(_APPLIED.split())

_LORA = "the checkpoint holds adapters of that kind"
_FP8 = "the checkpoint holds the state of the layers that are in FP8"
_CURRICULUM = "it decides which prompts of an epoch are left"
REFUSED = {
    "run.seed": "it decides the order of the prompts",
    "model.path": "tokenizer, picture processor and the reference of loss.kl_coef come from there",
    "model.experts_layout": "the weights that the run began with were read in that order",
    "data.shuffle_buffer": "it decides the order of the prompts",
    "data.curriculum.key": _CURRICULUM,
    "data.curriculum.start": _CURRICULUM,
    "data.curriculum.end": _CURRICULUM,
    "data.curriculum.samples": _CURRICULUM,
    "policy.dtype": "weights and optimizer are stored in it",
    "policy.freeze": "the optimizer has no moments of parts that were frozen",
    "policy.optimizer.offload": "the optimizer's state is stored in another form",
    "policy.optimizer.moments": "the optimizer's moments are stored in another format",
    "policy.lora.rank": _LORA,
    "policy.lora.alpha": _LORA,
    "policy.lora.targets": _LORA,
    "policy.lora.dropout": _LORA,
    "policy.fp8.recipe": _FP8,
    "policy.fp8.primary_weights": _FP8,
    "policy.fp8.bf16_layers_at_start": _FP8,
    "policy.fp8.bf16_layers_at_end": _FP8,
}

_CHOSEN = "the prompts under way were chosen by it"
_ENCODED = "the prompts under way were chosen and encoded with it"
_SAMPLED = "the answers under way were sampled with it"
UNDER_WAY = {
    "data.train.name": _CHOSEN,
    "data.train.weight": _CHOSEN,
    "data.validation.shards": _CHOSEN,  # what is held out is not trained on
    "train.eval_prompts": _CHOSEN,
    "data.max_prompt_tokens": _CHOSEN,
    "data.min_image_pixels": _CHOSEN,
    "data.max_image_pixels": _CHOSEN,
    "data.max_aspect_ratio": _CHOSEN,
    "data.min_pixels": _ENCODED,
    "data.max_pixels": _ENCODED,
    "rollout.environment.type": _ENCODED,
    "rollout.environment.python": _ENCODED,
    "rollout.environment.args": _ENCODED,
    "rollout.environment.role": _SAMPLED,
    "rollout.engine": "the prompts under way would be lost",
    "rollout.replay": "the prompts under way would be lost",
    "rollout.sampling.temperature": _SAMPLED,
    "rollout.sampling.top_p": _SAMPLED,
    "rollout.sampling.top_k": _SAMPLED,
}

IGNORED = {"data.validation.weight": "held-out shards are read one after the other"}

# sections and keys that a command never reads
UNUSED: dict[Command, tuple[str, ...]] = {
    "train": ("sft.",),
    "sft": (
        "advantage.",
        "loss.",
        "train.steps",
        "train.updates_per_batch",
        "train.eval_every",
        "rollout.prompts_per_step",
        "rollout.group_size",
        "rollout.sampling.temperature",
        "rollout.sampling.top_p",
        "rollout.sampling.top_k",
        "rollout.max_staleness",
        "rollout.start_ahead",
        "rollout.oversample",
        "rollout.drop_dead_groups",
        "checkpoint.keep_best",
        "checkpoint.export_hf",
        "observe.rollouts_per_save",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What another config means for a run: `refusals` forbid to continue it, `notes` are for the log."""

    refusals: list[str]
    notes: list[str]


def changes(before: Config, now: Config, *, command: Command, under_way: int) -> Changes:
    """Judge every key whose value differs. `under_way`: prompts that the checkpoint holds on their way."""
    old, new = settings(before), settings(now)
    applied: list[str] = []
    ignored: list[str] = []
    refusals: list[str] = []
    for key in sorted(new):
        if old[key] == new[key]:
            continue
        if key.startswith(UNUSED[command]):
            ignored.append(f"{key}={new[key]!r} (gspo-mm {command} does not use it)")
        elif key in IGNORED:
            ignored.append(f"{key}={new[key]!r} ({IGNORED[key]})")
        elif key in REFUSED or (key in UNDER_WAY and under_way):
            reason = REFUSED.get(key) or f"{UNDER_WAY[key]} ({under_way} in the checkpoint)"
            refusals.append(f"{key}={old[key]!r} but the config now says {new[key]!r}, and {reason}")
        else:
            applied.append(f"{key}={new[key]!r} (was {old[key]!r})")
    notes = [f"changed settings: {', '.join(applied)}"] if applied else []
    notes += [f"changed and ignored: {', '.join(ignored)}"] if ignored else []
    return Changes(refusals=refusals, notes=notes)


def settings(config: Config) -> dict[str, Any]:
    """Every key's value by its full name; of sources a list, one entry for each."""
    values = _flat(config, "")
    for split in ("train", "validation"):
        del values[f"data.{split}"]
        sources = config.data.sources(split)
        for field in SourceConfig.model_fields:
            values[f"data.{split}.{field}"] = [getattr(source, field) for source in sources]
    values["model.path"] = os.path.realpath(config.model.path)  # the same folder by another way is no change
    return values


def _flat(section: BaseModel, prefix: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            values |= _flat(value, f"{prefix}{name}.")
        elif value is None and (left_out := [a for a in get_args(field.annotation) if _is_section(a)]):
            values |= {f"{prefix}{name}.{key}": None for key in left_out[0].model_fields}
        else:
            values[f"{prefix}{name}"] = value
    return values


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
