"""ms-swift's `swift rlhf --rlhf_type grpo`, whose arguments are TRL's with other defaults and some of its own.

Source: docs/source_en/Instruction/Command-line-parameters.md of ms-swift 3.10 to 4.4.
"""

from __future__ import annotations

from gspo_mm.config import ConfigError
from gspo_mm.importing import trl
from gspo_mm.importing.translation import Format, Translation


def _translate(made: Translation) -> None:
    if (kind := made.take("rlhf_type")) != "grpo":
        raise ConfigError(f"rlhf_type={kind} is another algorithm; import takes rlhf_type=grpo")
    full = "full" in (made.take("tuner_type"), made.take("train_type"))
    if full and "learning_rate" not in made.given:
        made.put("policy.optimizer.lr", 1e-5, note="learning_rate=1e-05 by default")
    if made.take("dynamic_sample"):
        made.put("rollout.drop_dead_groups", True, "dynamic_sample")
    trl.translate(made, taus=("tau_pos", "tau_neg"), rank="lora_rank", dtype="torch_dtype", adapters=not full)


FORMAT = Format(
    name="ms-swift",
    defaults={
        **trl.FORMAT.defaults,
        "rlhf_type": "grpo",
        "torch_dtype": "bfloat16",
        "per_device_train_batch_size": 1,
        "temperature": 0.9,
        "loss_type": "grpo",
        "beta": 0.04,
        "tau_pos": 1.0,
        "tau_neg": 1.05,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine",
        "adam_beta2": 0.95,
        "weight_decay": 0.1,
        "lora_rank": 8,
    },
    direct={**trl.DIRECT, "max_length": "data.max_prompt_tokens", "max_pixels": "data.max_pixels"},
    reasons={
        "rlhf_type": "the only one that is read here",
        "tuner_type": "policy.lora names adapters; without it the weights are trained",
        "train_type": "policy.lora names adapters; without it the weights are trained",
        "max_resample_times": "see rollout.drop_dead_groups",
        "overlong_filter": trl.REASONS["mask_truncated_completions"],
        "truncation_strategy": "prompts that are too long are skipped and counted, never cut",
        "kl_in_reward": "KL is a term of the loss: loss.kl_coef",
        "advantage_estimator": "the advantage is that within a prompt's own answers",
        "rollout_importance_sampling_*": "see loss.correction",
        "multi_turn_scheduler": "see gspo_mm/environment/README.md",
        "max_turns": "see rollout.environment.max_turns",
        "freeze_*": "see policy.freeze",
        "external_plugins": "see configs/rewards/README.md",
        "sleep_level": "see rollout.sglang.colocate",
        "offload_*": "see rollout.sglang.colocate and policy.optimizer.offload",
        "split_dataset_ratio": "name held-out shards in data.validation",
        "load_from_cache_file": "data is read from shards",
        "system": "a message of role system in the shards' samples",
        "attn_impl": "see gspo-mm doctor",
        "padding_free": "sequences are always packed",
        "target_modules": "see policy.lora.targets",
        "sglang_*": "see rollout.sglang",
        **trl.REASONS,
    },
    about={
        "model": ("model",),
        "data": ("dataset", "val_dataset"),
        "reward": ("reward_funcs", "reward_model"),
    },
    translate=_translate,
)
