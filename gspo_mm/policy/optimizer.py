"""AdamW through megatron-core's distributed optimizer, and the learning rate over steps.

Every data-parallel rank keeps the float32 copies and moments of its share of the parameters, steps them, and the
parameters are gathered again. One rank takes the same path with a share of everything.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from gspo_mm.config import OptimizerConfig
from gspo_mm.policy.compat import own_range
from gspo_mm.policy.model import quiet_megatron
from gspo_mm.policy.precision import PrecisionError
from gspo_mm.policy.skips import Skips
from gspo_mm.policy.spec import has_fused_modules

_STATE = ("params", "step")  # of a parameter group; the rest of it are settings
_SCHEDULE = ("max_lr", "min_lr", "start_wd", "end_wd")  # of megatron's own scheduler, which we do not use


def learning_rate(done: float, config: OptimizerConfig, total_steps: int) -> float:
    """Rate of the update with which `done` of `total_steps` training steps are done: warm-up, then a cosine to the floor.

    Update k of the K of training step s (both from 0) ends at s + (k + 1) / K: a step moves the schedule by one, however
    many updates its live groups make, or none. The warm-up is linear, lr * done / warmup_steps; the step after it is at
    lr, the last step of the run at lr * min_lr_ratio; a run of one step stays at lr. What happened before does not
    matter: a run that is continued with another number of steps goes on along the curve of that number.
    """
    if done < config.warmup_steps:
        return config.lr * done / config.warmup_steps
    low = config.lr * config.min_lr_ratio
    if total_steps > 1 and done > total_steps - 1 and total_steps > config.warmup_steps:
        return low
    progress = max(0.0, (done - 1 - config.warmup_steps) / max(1, total_steps - 1 - config.warmup_steps))
    return low + 0.5 * (config.lr - low) * (1.0 + math.cos(math.pi * min(1.0, progress)))


class Optimizer:
    """One AdamW step at a time over the parameters of `chunks` that require gradients."""

    def __init__(
        self,
        chunks: list[DistributedDataParallel],
        config: OptimizerConfig,
        *,
        total_steps: int,
        dtype: torch.dtype,
        fp8: str | None = None,
        overlap: bool = False,
    ) -> None:
        """`fp8`: the recipe that FP8 primary weights are rounded by. `overlap`: the next forward gathers the parameters."""
        self._config = config
        self._total_steps = total_steps
        self.step_count = 0  # updates made
        self.skips = Skips(config.skip)
        with quiet_megatron():
            self._inner: Any = get_megatron_optimizer(
                MegatronOptimizerConfig(
                    optimizer="adam",
                    lr=config.lr,
                    weight_decay=config.weight_decay,  # of matrices only: norms and biases are never decayed
                    adam_beta1=config.beta1,
                    adam_beta2=config.beta2,
                    adam_eps=config.eps,
                    clip_grad=config.grad_clip,
                    bf16=dtype is torch.bfloat16,
                    params_dtype=dtype,
                    fp8_recipe=fp8,
                    use_distributed_optimizer=True,
                    overlap_param_gather=overlap,
                    **_memory_arguments(config),
                ),
                list(chunks),
                use_gloo_process_groups=False,
            )
        for part in self._inner.chained_optimizers:
            # what megatron takes where there is neither apex nor Transformer Engine
            if isinstance(part.optimizer, torch.optim.Adam):
                for group in part.optimizer.param_groups:
                    group["fused"] = True

    @torch.no_grad()
    def step(self, done: float | None = None) -> tuple[float, float]:
        """Clip and update; returns the global gradient norm before clipping and the learning rate used.

        `done` training steps with this update, see `learning_rate`; None: every update is a training step.

        Raises NonFiniteError, with the parameters untouched, when the norm is NaN, infinite or a spike.
        """
        rate = learning_rate(self.step_count + 1 if done is None else done, self._config, self._total_steps)
        for group in self._inner.param_groups:
            group["lr"] = rate * group.get("lr_mult", 1.0)
            # megatron leaves both multipliers to its scheduler; wd_mult is 0 for norms and biases
            group["weight_decay"] = self._config.weight_decay * group.get("wd_mult", 1.0)
        self._inner.prepare_grads()
        norm = float(self._inner.get_grad_norm())
        self.skips.judge(norm, self.step_count + 1)
        if self._config.grad_clip > 0:
            for part in self._inner.chained_optimizers:
                clip_grad_by_total_norm_fp32(
                    part.get_parameters(),
                    max_norm=self._config.grad_clip,
                    total_norm=norm,
                    use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
                )
        self._inner.step_with_ready_grads()
        self.step_count += 1
        return norm, rate

    def zero_grad(self) -> None:
        """Drop each parameter's `grad`: after a step it is its `main_grad`, which backward would then fill twice."""
        with warnings.catch_warnings():  # it looks at `grad` of the shares, which are views
            warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
            self._inner.zero_grad()

    @torch.no_grad()
    def take_over_parameters(self, exact: Mapping[torch.Tensor, torch.Tensor] | None = None) -> None:
        """Refresh the float32 copies after the module's parameters were set from outside.

        `exact`: values of parameters that are rounded (FP8 primary weights). Without them the copies would start from
        the rounded weights, and, not refreshed at all, from the module's arbitrary first values.
        """
        self._inner.reload_model_params()
        for parameter, value in (exact or {}).items():
            for part in self._inner.chained_optimizers:
                if own := own_range(part, parameter):
                    cast(Any, parameter).main_param.copy_(value.reshape(-1)[own])

    def load_state(self, state: Any) -> None:
        """Moments, float32 copies and the count of steps of a checkpoint; all settings stay those of the config.

        A checkpoint's parameter groups hold the settings of the run that wrote it (betas, eps ...): torch takes them
        over with the state, and megatron knows groups again by some of them, the learning rate among these.
        """
        own = self._inner.param_groups
        settings = [{k: v for k, v in group.items() if k not in _STATE} for group in own]
        parts = [state] if "optimizer" in state else state.values()
        for group in [*own, *(group for part in parts for group in part["optimizer"]["param_groups"])]:
            for key in _SCHEDULE:
                group.pop(key, None)
        self._inner.load_state_dict(state)
        for group, before in zip(self._inner.param_groups, settings, strict=True):
            group.update(before)

    @property
    def inner(self) -> Any:
        """megatron's optimizer, for sharded checkpoints."""
        return self._inner


def _memory_arguments(config: OptimizerConfig) -> dict[str, Any]:
    """What makes the state smaller, or lets it live on the host. Raises PrecisionError where it cannot be had."""
    arguments: dict[str, Any] = {}
    for setting, plain in ((f"offload={config.offload}", "false"), (f"moments={config.moments}", "float32")):
        key, _, value = setting.partition("=")
        if value.lower() != plain and not has_fused_modules():
            raise PrecisionError(
                f"policy.optimizer.{setting} needs CUDA and Transformer Engine, which this machine has not; set "
                f"policy.optimizer.{key}={plain}"
            )
    if config.offload:
        arguments |= {
            "optimizer_cpu_offload": True,
            "optimizer_offload_fraction": 1.0,
            "overlap_cpu_optimizer_d2h_h2d": True,
        }
    if config.moments != "float32":
        arguments |= {
            "use_precision_aware_optimizer": True,
            "exp_avg_dtype": torch.bfloat16,
            "exp_avg_sq_dtype": torch.bfloat16,
        }
    return arguments
