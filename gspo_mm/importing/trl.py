"""TRL's GRPOConfig, and Unsloth's, which is TRL's with other habits.

Names and defaults are those of trl/trainer/grpo_config.py and base_config.py of TRL 1.16, and of transformers 5's
training_args.py. `max_steps`, `save_steps` and `eval_steps` count updates there, rollout batches here.
"""

from __future__ import annotations

from math import ceil
from typing import Any

from gspo_mm.importing.translation import Format, Translation

_SERVERS = "servers here are SGLang's: rollout.sglang"
_SAMPLING = "answers would be of another distribution than the one whose log-probs are trained on"
_EPOCHS = "set train.steps: epochs x samples / rollout.prompts_per_step"

# loss_type, at token level -> loss.type
_TOKEN = {
    "grpo": "grpo",
    "dapo": "dapo",
    "bnpo": "dapo",
    "dr_grpo": "dr_grpo",
    "cispo": "cispo",
    "sapo": "sapo",
}
# the same at sequence level -> loss.aggregation of GSPO
_SEQUENCE = {"grpo": None, "dapo": "token_mean", "bnpo": "token_mean", "dr_grpo": "dr_grpo"}

DIRECT = {
    "num_generations": "rollout.group_size",
    "max_completion_length": "rollout.sampling.max_new_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "temperature": "rollout.sampling.temperature",
    "top_p": "rollout.sampling.top_p",
    "beta": "loss.kl_coef",
    "delta": "loss.dual_clip",
    "learning_rate": "policy.optimizer.lr",
    "adam_beta1": "policy.optimizer.beta1",
    "adam_beta2": "policy.optimizer.beta2",
    "adam_epsilon": "policy.optimizer.eps",
    "weight_decay": "policy.optimizer.weight_decay",
    "max_grad_norm": "policy.optimizer.grad_clip",
    "router_aux_loss_coef": "policy.moe.aux_loss",
    "save_total_limit": "checkpoint.keep",
    "seed": "run.seed",
    "run_name": "run.name",
}
REASONS = {
    "num_train_epochs": _EPOCHS,
    "epsilon*": "the clip range of this loss is not that of PPO",
    "min_p": _SAMPLING,
    "repetition_penalty": _SAMPLING,
    "generation_kwargs": _SAMPLING,
    "use_vllm": _SERVERS,
    "vllm_importance_sampling_*": "see loss.correction",
    "vllm_*": _SERVERS,
    "use_transformers_*": _SERVERS,
    "*gpu_memory_utilization": _SERVERS,
    "optim": "AdamW; policy.optimizer.moments says in which format its moments are",
    "gradient_checkpointing_kwargs": "see policy.recompute",
    "use_liger_kernel": "see gspo-mm doctor",
    "mask_truncated_completions": "cut off answers are trained on; a reward part of type overlong makes them worse",
    "multi_objective_aggregation": "parts of a reward file are summed",
    "reward_weights": "set weight of each part in the reward file",
    "reward_*": "see configs/rewards/README.md",
    "output_dir": "runs are kept in run.dir",
    "report_to": "TensorBoard is on; observe.wandb names a project of Weights & Biases",
    "log*": "every step is logged",
    "num_completions_to_print": "the report shows answers",
    "*eval_batch_size": "evaluation answers one prompt once, greedily",
    "num_generations_eval": "evaluation answers one prompt once, greedily",
    "*_strategy": "see checkpoint.every and train.eval_every; 0 is never",
    "dataset_*": "data is read from shards",
    "dataloader_*": "data is read from shards",
    "remove_unused_columns": "data is read from shards",
    "shuffle_dataset": "see data.shuffle_buffer",
    "lora_dropout": "0 alone: another would change the importance ratio at random",
    "lora_*": "see policy.lora",
    "use_peft": "see policy.lora",
    "*entropy*": "there is no term of entropy in the loss",
    "sync_ref_model": "the reference is the model that the run starts from",
    "ref_model_*": "the reference is the model that the run starts from",
    "fp16": "see policy.dtype; float16 is not trained in",
    "load_in_*": "quantised weights are not trained",
    "*deepspeed*": "the policy is Megatron's: policy.parallel",
    "fsdp*": "the policy is Megatron's: policy.parallel",
    "ds3_*": "the policy is Megatron's: policy.parallel",
    "push_to_hub": "gspo-mm export writes a folder",
    "hub_*": "gspo-mm export writes a folder",
    "use_cpu": "a machine without GPUs trains on its CPU",
}


def translate(
    made: Translation,
    *,
    taus: tuple[str, str] = ("sapo_temperature_pos", "sapo_temperature_neg"),
    rank: str = "lora_r",
    dtype: str = "bf16",
    whole_groups: bool = False,
    adapters: bool = False,
) -> None:
    """All that takes more than a table. What ms-swift calls otherwise: `taus` of SAPO, `rank` of adapters, `dtype`.

    `whole_groups`: a GPU's batch is rounded up to the answers of whole prompts. `adapters` are trained without being asked for.
    """
    _steps(made, _batch(made, whole_groups))
    _loss(made, taus)
    scale = {True: "group", False: "none"}.get(made.take("scale_rewards"), made.take("scale_rewards"))
    made.put("advantage.std", "none" if scale == "none" else "unbiased", "scale_rewards")
    if scale not in ("group", "none"):
        made.leave("scale_rewards", "the spread is that of a prompt's own answers here")
    if top_k := made.take("top_k", int):
        made.put("rollout.sampling.top_k", max(top_k, 0), "top_k")
    if made.take("use_vllm"):
        made.put("rollout.engine", "sglang", "use_vllm")
    made.put("policy.dtype", "bfloat16" if made.take(dtype) in (True, "bfloat16") else "float32", dtype)
    if made.take("gradient_checkpointing"):
        made.put("policy.recompute", "full", "gradient_checkpointing")
    if adapters or made.take("use_peft") or rank in made.given:
        made.put_lora(rank, "lora_alpha")


def _batch(made: Translation, whole_groups: bool) -> int:
    """The rollout batch; updates of one there."""
    of = ("per_device_train_batch_size", "generation_batch_size", "num_generations")
    by = ("steps_per_generation", "gradient_accumulation_steps", "num_iterations")
    device, whole, group = (made.take(name, int) for name in of)
    steps, accumulated, iterations = (made.take(name, int) for name in by)
    if whole_groups:
        device = ceil(device / group) * group
    one = device * made.gpus  # answers of a backward pass on all GPUs
    # an update may need more answers than one generation gives
    answers = max(whole or one * (steps or accumulated), one * accumulated)
    updates = answers // (one * accumulated) * iterations
    note = f"on {made.gpus} GPUs" if made.gpus > 1 else ""
    made.put_batch(ceil(answers / group), updates, of=(*of, *by[:2]), by=by, note=note)
    if iterations > 1:
        made.leave(
            "num_iterations",
            "that many times the updates, each on a share of the prompts: none is trained on twice",
        )
    return updates


def _steps(made: Translation, updates: int) -> None:
    steps = made.take("max_steps", int)
    if steps and steps > 0:
        made.put(
            "train.steps",
            ceil(steps / updates),
            "max_steps",
            note=f"of {updates} updates" if updates > 1 else "",
        )
    for name, key in (("save_steps", "checkpoint.every"), ("eval_steps", "train.eval_every")):
        if (every := made.take(name, int)) is not None:
            made.put(key, ceil(every / updates), name)
    warmup = made.take("warmup_steps", float)
    if warmup and warmup >= 1:
        made.put("policy.optimizer.warmup_steps", ceil(warmup / updates), "warmup_steps")
    elif warmup:
        made.put_warmup("warmup_steps", warmup)
    made.put_warmup("warmup_ratio", made.take("warmup_ratio", float) or 0.0)
    options: Any = made.take("lr_scheduler_kwargs")
    options = options if isinstance(options, dict) else {}
    least = options.get("min_lr_rate", options.get("min_lr", 0.0) / made.take("learning_rate", float))
    made.put_schedule(
        str(made.take("lr_scheduler_type")), "lr_scheduler_type", "lr_scheduler_kwargs", least=float(least)
    )


def _loss(made: Translation, taus: tuple[str, str]) -> None:
    level, kind = made.take("importance_sampling_level"), made.take("loss_type")
    names = ("importance_sampling_level", "loss_type")
    if level == "token" or kind in ("cispo", "sapo"):
        made.put("loss.type", _TOKEN.get(kind, "grpo"), *names)
        if kind not in _TOKEN:
            made.leave("loss_type", f"there is no such loss here; others: {', '.join(_TOKEN)}")
        if level == "sequence" and kind == "sapo":
            made.put("loss.level", "sequence", "importance_sampling_level")
        elif level != "token":
            made.leave("importance_sampling_level", f"the ratio of {kind} is that of tokens")
    else:
        made.put("loss.type", "gspo_token" if level == "sequence_token" else "gspo", *names)
        if kind not in _SEQUENCE:
            made.leave("loss_type", "there is no such loss here")
        elif aggregation := _SEQUENCE[kind]:
            note = "long answers weigh more; leave it out for the paper's objective"
            made.put("loss.aggregation", aggregation, "loss_type", note=note)
    low, high = made.take("epsilon", float), made.take("epsilon_high", float)
    if kind == "sapo":
        for ours, theirs in zip(("tau_positive", "tau_negative"), taus, strict=True):
            made.put(f"loss.{ours}", made.take(theirs, float), theirs)
    elif kind == "cispo":
        if (high or low) > 1:
            made.put(
                "loss.clip_high",
                (high or low) - 1,
                "epsilon_high",
                note="the bound itself there, what is above 1 here",
            )
    else:
        names = ("epsilon",) if high is None else ("epsilon", "epsilon_high")
        made.put_clip(low, low if high is None else high, *names)


FORMAT = Format(
    name="TRL",
    defaults={
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_generations": 8,
        "num_iterations": 1,
        "max_completion_length": 512,
        "temperature": 1.0,
        "importance_sampling_level": "token",
        "loss_type": "dapo",
        "epsilon": 0.2,
        "beta": 0.0,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "scale_rewards": "group",
        "learning_rate": 1e-6,
        "lr_scheduler_type": "linear",
        "adam_beta2": 0.999,
        "bf16": True,
        "gradient_checkpointing": True,
        "lora_r": 16,
        "lora_alpha": 32,
    },
    direct=DIRECT,
    reasons=REASONS,
    about={
        "model": ("model_name_or_path",),
        "data": ("dataset_name", "datasets"),
        "reward": ("reward_funcs", "reward_model_name_or_path"),
    },
    translate=translate,
)
