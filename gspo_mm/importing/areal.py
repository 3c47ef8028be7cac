"""AReaL's YAML of GRPO and its relatives.

Names and defaults: areal/api/cli_args.py and examples/math/gsm8k_gspo.yaml of AReaL 0.5 to 1.0. Sizes are of all GPUs together;
a loss there is divided by the tokens of the batch, at both levels of the ratio (areal/utils/functional.py).
"""

from __future__ import annotations

import re

from gspo_mm.importing.translation import Format, Translation

_LEVEL, _OPTIMIZER = "actor.importance_sampling_level", "actor.optimizer."


def _translate(made: Translation) -> None:
    of, by = "train_dataset.batch_size", "actor.ppo_n_minibatches"
    made.put_batch(made.take(of, int), made.take(by, int), of=(of,), by=(by,))
    _loss(made)
    kind, least = f"{_OPTIMIZER}lr_scheduler_type", f"{_OPTIMIZER}min_lr_ratio"
    made.put_schedule(str(made.take(kind)), kind, least, least=made.take(least, float))
    if steps := made.take("total_train_steps", int):
        made.put("train.steps", steps, "total_train_steps")
    share = made.take(f"{_OPTIMIZER}warmup_steps_proportion", float)
    made.put_warmup(f"{_OPTIMIZER}warmup_steps_proportion", share)
    for name, key in (("saver", "checkpoint.every"), ("evaluator", "train.eval_every")):
        if every := made.take(f"{name}.freq_steps", int):
            made.put(key, every, f"{name}.freq_steps")
    made.put("rollout.engine", "sglang", note="servers")
    if made.take("actor.gradient_checkpointing"):
        made.put("policy.recompute", "full", "actor.gradient_checkpointing")
    if made.take("actor.use_lora"):
        made.put_lora("actor.lora_rank", "actor.lora_alpha")
    parts = [str(made.given[name]) for name in ("experiment_name", "trial_name") if made.given.get(name)]
    if parts:
        name = re.sub(r"[^A-Za-z0-9._-]", "-", "-".join(parts))
        made.put("run.name", name, "experiment_name", "trial_name")


def _loss(made: Translation) -> None:
    low, high = made.take("actor.eps_clip", float), made.take("actor.eps_clip_higher", float)
    if made.take("actor.use_sapo_loss"):
        made.put("loss.type", "sapo", "actor.use_sapo_loss")
        made.put("loss.tau_positive", made.take("actor.sapo_tau_pos", float), "actor.sapo_tau_pos")
        made.put("loss.tau_negative", made.take("actor.sapo_tau_neg", float), "actor.sapo_tau_neg")
    elif made.take("actor.use_cispo_loss"):
        made.put("loss.type", "cispo", "actor.use_cispo_loss")
        made.put("loss.clip_high", high, "actor.eps_clip_higher")
    else:
        made.put("loss.type", "gspo" if made.take(_LEVEL) == "sequence" else "dapo", _LEVEL)
        if made.take(_LEVEL) == "sequence":
            note = "divided by tokens there, so that long answers weigh more; leave it out for the paper's objective"
            made.put("loss.aggregation", "token_mean", note=note)
        names = ("actor.eps_clip",) if high is None else ("actor.eps_clip", "actor.eps_clip_higher")
        made.put_clip(low, low if high is None else high, *names)
        if dual := made.take("actor.c_clip", float):
            made.put("loss.dual_clip", dual, "actor.c_clip")
    levels = [f"actor.reward_norm.{part}_level" for part in ("mean", "std")]
    mean, spread = (made.take(name) for name in levels)
    made.put("advantage.std", "unbiased" if spread == "group" else "none", *levels)
    for name, value in zip(levels, (mean, spread), strict=True):
        if value == "batch":
            made.leave(name, "rewards are compared with those of a prompt's own answers")


FORMAT = Format(
    name="AReaL",
    defaults={
        "gconfig.n_samples": 1,
        "gconfig.max_new_tokens": 16384,
        "gconfig.temperature": 1.0,
        "train_dataset.batch_size": 1,
        "actor.ppo_n_minibatches": 4,
        "actor.eps_clip": 0.2,
        "actor.sapo_tau_pos": 1.0,
        "actor.sapo_tau_neg": 1.05,
        "actor.kl_ctl": 0.1,
        "actor.lora_rank": 32,
        "actor.lora_alpha": 16,
        _LEVEL: "token",
        f"{_OPTIMIZER}lr": 1e-3,
        f"{_OPTIMIZER}weight_decay": 0.01,
        f"{_OPTIMIZER}beta2": 0.999,
        f"{_OPTIMIZER}lr_scheduler_type": "constant",
        f"{_OPTIMIZER}min_lr_ratio": 0.0,
        f"{_OPTIMIZER}warmup_steps_proportion": 0.001,
    },
    direct={
        "seed": "run.seed",
        "gconfig.n_samples": "rollout.group_size",
        "gconfig.max_new_tokens": "rollout.sampling.max_new_tokens",
        "gconfig.temperature": "rollout.sampling.temperature",
        "gconfig.top_p": "rollout.sampling.top_p",
        "train_dataset.max_length": "data.max_prompt_tokens",
        "rollout.max_concurrent_rollouts": "rollout.max_in_flight",
        "rollout.max_head_offpolicyness": "rollout.max_staleness",
        "sglang.mem_fraction_static": "rollout.sglang.mem_fraction",
        "sglang.context_length": "rollout.sglang.context_length",
        "sglang.max_running_requests": "rollout.sglang.max_running",
        "actor.dtype": "policy.dtype",
        "actor.mb_spec.max_tokens_per_mb": "policy.micro_batch_tokens",
        f"{_OPTIMIZER}lr": "policy.optimizer.lr",
        f"{_OPTIMIZER}weight_decay": "policy.optimizer.weight_decay",
        f"{_OPTIMIZER}beta1": "policy.optimizer.beta1",
        f"{_OPTIMIZER}beta2": "policy.optimizer.beta2",
        f"{_OPTIMIZER}eps": "policy.optimizer.eps",
        f"{_OPTIMIZER}gradient_clipping": "policy.optimizer.grad_clip",
    },
    reasons={
        "total_train_epochs": "set train.steps: epochs x samples / rollout.prompts_per_step",
        "allocation_mode": "torchrun or Slurm says on how many GPUs a run is; policy.parallel and rollout.sglang spread it",
        "cluster.*": "torchrun or Slurm says on how many GPUs a run is",
        "scheduler.*": "torchrun or Slurm starts a run",
        "*.experiment_name": "the run's folder is run.dir and run.name",
        "*.trial_name": "the run's folder is run.dir and run.name",
        "*.fileroot": "the run's folder is run.dir and run.name",
        "*.scheduling_*": "torchrun or Slurm starts a run",
        "actor.kl_ctl": "a penalty within the reward there; loss.kl_coef is a term of the loss",
        "actor.kl_estimator": "the estimator is k3",
        "actor.reward_scaling": "without effect: rewards are compared with those of a prompt's own answers",
        "actor.reward_bias": "without effect: rewards are compared with those of a prompt's own answers",
        "actor.reward_norm.*": "the group is that of rollout.group_size",
        "actor.adv_norm*": "advantages are normalised within a prompt's own answers alone",
        "actor.use_decoupled_loss": "old log-probs are those of the policy; loss.correction answers for the servers'",
        "actor.recompute_logprob": "old log-probs are always computed by the policy",
        "actor.behav_imp_weight*": "see loss.correction",
        "actor.rejection_sampling*": "see loss.correction",
        "actor.eps_clip*": "the clip range of this loss is not that of PPO",
        "actor.optimizer.type": "AdamW",
        "actor.*": "see policy and gspo-mm doctor",
        "ref.*": "the reference is computed by the policy's own layout",
        "gconfig.*": "answers would be of another distribution than the one whose log-probs are trained on",
        "rollout.*": "see rollout",
        "sglang.*": "see rollout.sglang.extra_args",
        "vllm.*": "servers are SGLang's",
        "train_dataset.*": "data is read from shards",
        "valid_dataset.*": "data is read from shards",
        "saver.*": "see checkpoint.every",
        "recover.*": "see run.resume",
        "evaluator.*": "see train.eval_every",
        "stats_logger.*": "TensorBoard is on; observe.wandb names a project of Weights & Biases",
        "perf_tracer.*": "see the report's times",
        "tokenizer_path": "the tokenizer is that of model.path",
        "enable_offload": "see rollout.sglang.colocate",
    },
    about={
        "model": ("actor.path",),
        "data": ("train_dataset.path", "valid_dataset.path"),
        "reward": ("reward_fn",),
    },
    translate=_translate,
)
