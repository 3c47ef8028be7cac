"""verl's Hydra keys, as overrides of `verl.trainer.main_ppo` or as YAML.

Names and defaults: verl/trainer/config/ppo_trainer.yaml, actor/actor.yaml and rollout/rollout.yaml of verl 0.5 to 0.7. A step
there is a rollout batch, as here, and its sizes are of all GPUs together. `loss_mode=gspo` ignores `loss_agg_mode` and
averages over answers (core_algos.py, compute_policy_loss_gspo).
"""

from __future__ import annotations

from math import ceil

from gspo_mm.importing.translation import Format, Translation

_ACTOR, _ROLLOUT, _DATA = "actor_rollout_ref.actor.", "actor_rollout_ref.rollout.", "data."
_MEGATRON = f"{_ACTOR}megatron."
_LOSS_MODE, _AGGREGATION = f"{_ACTOR}policy_loss.loss_mode", f"{_ACTOR}loss_agg_mode"
# loss_agg_mode of the vanilla loss -> loss.type
_VANILLA = {"token-mean": "dapo", "seq-mean-token-mean": "grpo", "seq-mean-token-sum-norm": "dr_grpo"}
_MODES = {"gspo": "gspo", "sapo": "sapo", "geo_mean": "gmpo", "cispo": "cispo"}
_PARALLEL = {
    "tensor_model_parallel_size": "tp",
    "pipeline_model_parallel_size": "pp",
    "virtual_pipeline_model_parallel_size": "vpp",
    "context_parallel_size": "cp",
    "expert_model_parallel_size": "ep",
    "expert_tensor_parallel_size": "etp",
}
_OPTIM = f"{_ACTOR}optim."


def _translate(made: Translation) -> None:
    _batch(made)
    _loss(made)
    for name, key in (("save_freq", "checkpoint.every"), ("test_freq", "train.eval_every")):
        if (every := made.take(f"trainer.{name}", int)) is not None:
            made.put(key, max(every, 0), f"trainer.{name}")
    betas = made.take(f"{_OPTIM}betas", list)
    for number, beta in enumerate(betas, 1):
        made.put(f"policy.optimizer.beta{number}", beta, f"{_OPTIM}betas")
    warmup = made.take(f"{_OPTIM}lr_warmup_steps", int)
    if warmup and warmup > 0:
        made.put("policy.optimizer.warmup_steps", warmup, f"{_OPTIM}lr_warmup_steps")
    else:
        made.put_warmup(f"{_OPTIM}lr_warmup_steps_ratio", made.take(f"{_OPTIM}lr_warmup_steps_ratio", float))
    least = f"{_OPTIM}min_lr_ratio"
    for name in ("lr_scheduler_type", "lr_decay_style", "warmup_style"):
        if kind := made.take(f"{_OPTIM}{name}"):
            made.put_schedule(str(kind), f"{_OPTIM}{name}", least, least=made.take(least, float) or 0.0)
    top_k = made.take(f"{_ROLLOUT}top_k", int)
    if top_k and top_k > 0:
        made.put("rollout.sampling.top_k", top_k, f"{_ROLLOUT}top_k")
    made.put("rollout.engine", "sglang", f"{_ROLLOUT}name", note="servers")
    if made.take("actor_rollout_ref.model.enable_gradient_checkpointing"):
        made.put("policy.recompute", "full", "actor_rollout_ref.model.enable_gradient_checkpointing")
    if made.take("actor_rollout_ref.model.lora_rank", int):
        made.put_lora("actor_rollout_ref.model.lora_rank", "actor_rollout_ref.model.lora_alpha")


def _batch(made: Translation) -> None:
    of, by, epochs = f"{_DATA}train_batch_size", f"{_ACTOR}ppo_mini_batch_size", f"{_ACTOR}ppo_epochs"
    prompts, mini, times = (made.take(name, int) for name in (of, by, epochs))
    made.put_batch(prompts, ceil(prompts / mini) * times, of=(of,), by=(by, epochs) if times > 1 else (by,))
    if times > 1:
        made.leave(
            epochs, "that many times the updates, each on a share of the prompts: none is trained on twice"
        )
    if steps := made.take("trainer.total_training_steps", int):
        made.put("train.steps", steps, "trainer.total_training_steps")


def _loss(made: Translation) -> None:
    mode, aggregation = made.take(_LOSS_MODE), made.take(_AGGREGATION)
    if mode == "vanilla":
        made.put("loss.type", _VANILLA.get(aggregation, "dr_grpo"), _LOSS_MODE, _AGGREGATION)
        if aggregation not in _VANILLA:
            made.leave(_AGGREGATION, f"here there are {', '.join(_VANILLA)}")
        if (dual := made.take(f"{_ACTOR}clip_ratio_c", float)) is not None:
            made.put("loss.dual_clip", dual, f"{_ACTOR}clip_ratio_c")
    else:
        made.put("loss.type", _MODES.get(str(mode), "gspo"), _LOSS_MODE)
        if mode not in _MODES:
            made.leave(
                _LOSS_MODE,
                "there is no such loss here; gspo_mm/loss/README.md says which there are, and how to add one",
            )
        if _AGGREGATION in made.given:
            made.leave(_AGGREGATION, f"the loss {mode} has an average of its own")
    if mode not in ("sapo", "cispo", "geo_mean"):
        names = [f"{_ACTOR}clip_ratio{part}" for part in ("", "_low", "_high")]
        same, low, high = (made.take(name, float) for name in names)
        named = [name for name in names[1:] if name in made.given] or names[:1]
        made.put_clip(same if low is None else low, same if high is None else high, *named)
    switch, coefficient = f"{_ACTOR}use_kl_loss", f"{_ACTOR}kl_loss_coef"
    if made.take(switch):
        made.put("loss.kl_coef", made.take(coefficient, float), switch, coefficient)
    else:
        made.put("loss.kl_coef", 0.0, switch)
    divided = made.take("algorithm.norm_adv_by_std_in_grpo")
    made.put("advantage.std", "unbiased" if divided else "none", "algorithm.norm_adv_by_std_in_grpo")


_SERVERS = "see rollout.sglang; servers are SGLang's"
_SPREAD = "the policy is Megatron's: policy.parallel, policy.recompute, policy.optimizer.offload"
FORMAT = Format(
    name="verl",
    defaults={
        f"{_DATA}train_batch_size": 1024,
        f"{_DATA}max_prompt_length": 512,
        f"{_DATA}max_response_length": 512,
        f"{_ACTOR}ppo_mini_batch_size": 256,
        f"{_ACTOR}ppo_epochs": 1,
        _LOSS_MODE: "vanilla",
        _AGGREGATION: "token-mean",
        f"{_ACTOR}clip_ratio": 0.2,
        f"{_ACTOR}clip_ratio_c": 3.0,
        f"{_ACTOR}use_kl_loss": False,
        f"{_ACTOR}kl_loss_coef": 0.001,
        f"{_ACTOR}ppo_max_token_len_per_gpu": 16384,
        f"{_OPTIM}lr": 1e-6,
        f"{_OPTIM}betas": [0.9, 0.999],
        f"{_OPTIM}lr_warmup_steps_ratio": 0.0,
        f"{_OPTIM}weight_decay": 0.01,
        "actor_rollout_ref.model.lora_alpha": 16,
        "algorithm.norm_adv_by_std_in_grpo": True,
    },
    direct={
        f"{_DATA}max_prompt_length": "data.max_prompt_tokens",
        f"{_DATA}max_response_length": "rollout.sampling.max_new_tokens",
        f"{_DATA}seed": "run.seed",
        f"{_ROLLOUT}n": "rollout.group_size",
        f"{_ROLLOUT}temperature": "rollout.sampling.temperature",
        f"{_ROLLOUT}top_p": "rollout.sampling.top_p",
        f"{_ROLLOUT}tensor_model_parallel_size": "rollout.sglang.tp",
        f"{_ROLLOUT}expert_parallel_size": "rollout.sglang.ep",
        f"{_ROLLOUT}gpu_memory_utilization": "rollout.sglang.mem_fraction",
        f"{_ACTOR}ppo_max_token_len_per_gpu": "policy.micro_batch_tokens",
        f"{_ACTOR}grad_clip": "policy.optimizer.grad_clip",
        f"{_OPTIM}clip_grad": "policy.optimizer.grad_clip",
        f"{_OPTIM}lr": "policy.optimizer.lr",
        f"{_OPTIM}weight_decay": "policy.optimizer.weight_decay",
        "algorithm.filter_groups.enable": "rollout.drop_dead_groups",
        "trainer.max_actor_ckpt_to_keep": "checkpoint.keep",
        "trainer.experiment_name": "run.name",
        **{f"{_MEGATRON}{name}": f"policy.parallel.{size}" for name, size in _PARALLEL.items()},
    },
    reasons={
        "trainer.total_epochs": "set train.steps: epochs x samples / rollout.prompts_per_step",
        "trainer.n_gpus_per_node": "torchrun or Slurm says on how many GPUs a run is",
        "trainer.nnodes": "torchrun or Slurm says on how many GPUs a run is",
        "trainer.logger": "TensorBoard is on; observe.wandb names a project of Weights & Biases",
        "trainer.project_name": "observe.wandb names a project of Weights & Biases",
        "trainer.val_before_train": "held-out accuracy is always measured before and after",
        "trainer.default_local_dir": "runs are kept in run.dir",
        "trainer.resume_mode": "see run.resume",
        "trainer.log_val_generations": "the report shows answers",
        "trainer.critic_warmup": "there is no critic",
        "critic.*": "there is no critic",
        "algorithm.adv_estimator": "the advantage is that within a prompt's own answers, as with grpo",
        "algorithm.use_kl_in_reward": "KL is a term of the loss: loss.kl_coef",
        "algorithm.kl_ctrl.*": "KL is a term of the loss: loss.kl_coef",
        "algorithm.rollout_correction.*": "see loss.correction",
        f"{_ACTOR}clip_ratio_c": "the bound for negative advantages belongs to the vanilla loss",
        f"{_ACTOR}clip_ratio*": "the clip range of this loss is not that of PPO",
        f"{_ACTOR}entropy*": "there is no term of entropy in the loss",
        f"{_ACTOR}kl_loss_coef": "the loss has no KL term there: use_kl_loss is off",
        f"{_ACTOR}kl_loss_type": "the estimator is k3, verl's low_var_kl",
        f"{_ACTOR}*batch_size*": "packed by tokens: policy.micro_batch_tokens",
        f"{_ACTOR}use_dynamic_bsz": "sequences are always packed by tokens",
        f"{_ACTOR}fsdp_config.*": _SPREAD,
        f"{_ACTOR}megatron.*": _SPREAD,
        f"{_ACTOR}strategy": _SPREAD,
        f"{_ACTOR}ulysses*": "policy.parallel.cp spreads a sequence's tokens",
        "actor_rollout_ref.ref.*": "the reference is computed by the policy's own layout",
        f"{_ROLLOUT}val_kwargs.*": "evaluation answers one prompt once, greedily",
        f"{_ROLLOUT}log_prob*": "packed by tokens: policy.micro_batch_tokens",
        f"{_ROLLOUT}multi_turn.*": "see gspo_mm/environment/README.md",
        f"{_ROLLOUT}*": _SERVERS,
        "actor_rollout_ref.model.*": "see policy and gspo-mm doctor",
        "actor_rollout_ref.hybrid_engine": "see rollout.sglang.colocate",
        f"{_DATA}truncation": "prompts that are too long are skipped and counted, never cut",
        f"{_DATA}filter_overlong_prompts": "prompts that are too long are skipped and counted, never cut",
        f"{_DATA}shuffle": "see data.shuffle_buffer",
        f"{_DATA}*": "data is read from shards",
        "*reward*": "see configs/rewards/README.md",
    },
    about={
        "model": ("actor_rollout_ref.model.path",),
        "data": (f"{_DATA}train_files", f"{_DATA}val_files"),
        "reward": ("reward_model.reward_manager", "custom_reward_function.path"),
    },
    translate=_translate,
)
