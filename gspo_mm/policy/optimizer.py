"""AdamW through megatron-core (bf16 parameters keep float32 copies), and the learning rate over steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from gspo_mm.config import OptimizerConfig
from gspo_mm.policy.model import quiet_megatron
from gspo_mm.types import NonFiniteError


def learning_rate(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Rate of update `step` (from 0): linear warm-up, then a cosine that ends at lr * min_lr_ratio."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - 1 - config.warmup_steps))
    low = config.lr * config.min_lr_ratio
    return low + 0.5 * (config.lr - low) * (1.0 + math.cos(math.pi * progress))


class Optimizer:
    """One AdamW step at a time over the parameters of `module` that require gradients."""

    def __init__(
        self,
        module: DistributedDataParallel,
        config: OptimizerConfig,
        *,
        total_steps: int,
        dtype: torch.dtype,
    ) -> None:
        self._config = config
        self._total_steps = total_steps
        self.step_count = 0
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
                    use_distributed_optimizer=False,
                ),
                [module],
            )

    @torch.no_grad()
    def step(self) -> tuple[float, float]:
        """Clip and update; returns the global gradient norm before clipping and the learning rate used.

        Raises NonFiniteError, with the parameters untouched, when the norm is NaN or infinite.
        """
        rate = learning_rate(self.step_count, self._config, self._total_steps)
        for group in self._inner.param_groups:
            group["lr"] = rate * group.get("lr_mult", 1.0)
            # megatron leaves both multipliers to its scheduler; wd_mult is 0 for norms and biases
            group["weight_decay"] = self._config.weight_decay * group.get("wd_mult", 1.0)
        self._inner.prepare_grads()
        norm = float(self._inner.get_grad_norm())
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"the gradient norm of update {self.step_count + 1} is {norm}; the weights were left as they were; "
                "lower policy.optimizer.lr, or look at the sequences of this step"
            )
        if self._config.grad_clip > 0:
            for part in self._inner.chained_optimizers:
                clip_grad_by_total_norm_fp32(
                    part.get_parameters(), max_norm=self._config.grad_clip, total_norm=norm
                )
        self._inner.step_with_ready_grads()
        self.step_count += 1
        return norm, rate

    def zero_grad(self) -> None:
        """Drop each parameter's `grad`: after a step it is its `main_grad`, which backward would then fill twice."""
        self._inner.zero_grad()

    def take_over_parameters(self) -> None:
        """Refresh the float32 copies after the module's parameters were set from outside."""
        self._inner.reload_model_params()

    def state_dict(self) -> dict[str, Any]:
        return {"step_count": self.step_count, "inner": self._inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._inner.load_state_dict(state["inner"])
        self.step_count = state["step_count"]
