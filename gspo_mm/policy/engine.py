"""`Policy`: the trained model with its passes. What `train.py` and `sft.py` hold of it.

Policy.from_hf(...)   a Hugging Face folder through the family's weight map
.logprobs(batches)    no gradient
.update(batches, fn)  forward, the caller's loss, backward over all micro-batches, then one optimizer step
.export()             Hugging Face names and layout, for weight sync and checkpoints
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)

from gspo_mm.config import PolicyConfig
from gspo_mm.families import Entry, Family, family_of, read_hf
from gspo_mm.policy import cpu
from gspo_mm.policy.model import PolicyModel, padded_vocab, quiet_megatron
from gspo_mm.policy.optimizer import Optimizer
from gspo_mm.policy.parallel import ParallelPlan, device
from gspo_mm.policy.spec import has_fused_modules
from gspo_mm.types import MicroBatch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# (micro-batch number, log-probs [R] float32, entropy [R] detached) -> (loss, metrics)
type LossFn = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, dict[str, float]]]


@dataclass(frozen=True, kw_only=True)
class UpdateStats:
    """What one optimizer step reports."""

    loss: float  # sum over micro-batches
    grad_norm: float  # global, before clipping
    lr: float
    metrics: list[dict[str, float]]  # one per micro-batch, as the loss function gave them


class Policy:
    """A vision-language model under training in this process. Build it with `from_hf`."""

    def __init__(
        self, family: Family, hf: Any, config: PolicyConfig, plan: ParallelPlan, *, total_steps: int
    ) -> None:
        """Needs `plan.initialize` to have run. Weights are arbitrary until `load_hf` or `load_state_dict`."""
        dtype = DTYPES[config.dtype]
        self.family = family
        self.hf = hf
        self.config = config
        self.plan = plan
        self.device = device()
        self.module = PolicyModel(family, hf, plan, dtype).to(self.device)
        self.module.eval()  # no dropout: the log-probs of a rollout must be those of its update
        self.weight_map: list[Entry] = family.weight_map(
            hf, padded_vocab=padded_vocab(hf.text_config.vocab_size, plan), fused=has_fused_modules()
        )
        freeze(self.module, config.freeze)
        with quiet_megatron():
            self._ddp = DistributedDataParallel(
                self.module.config,
                DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False),
                self.module,
            )
        self._optimizer = Optimizer(self._ddp, config.optimizer, total_steps=total_steps, dtype=dtype)

    @classmethod
    def from_hf(
        cls,
        path: str,
        config: PolicyConfig,
        *,
        seed: int,
        total_steps: int,
        experts_layout: str = "auto",
    ) -> Self:
        """Build the model of the Hugging Face folder `path` and load its weights.

        `total_steps` counts optimizer steps, for the learning-rate schedule. `experts_layout`: see `read_hf`.
        Raises ValueError when the folder, the family or the parallel sizes do not fit.
        """
        family = family_of(path)
        hf = family.load_config(path)
        plan = ParallelPlan.from_config(config.parallel)
        plan.check_model(family.dims(hf))
        plan.check_supported()
        cpu.install()
        plan.initialize(seed)
        policy = cls(family, hf, config, plan, total_steps=total_steps)
        policy.load_hf(path, experts_layout=experts_layout)
        return policy

    @torch.no_grad()
    def logprobs(self, micro_batches: list[MicroBatch], temperature: float = 1.0) -> list[torch.Tensor]:
        """Log-probs [R] float32 nats of each micro-batch's response tokens."""
        return [self.module(on(batch, self.device), temperature=temperature)[0] for batch in micro_batches]

    def update(
        self, micro_batches: list[MicroBatch], loss_fn: LossFn, *, temperature: float = 1.0
    ) -> UpdateStats:
        """One optimizer step on the sum of the micro-batches' losses, whose denominators are the whole step's.

        Raises NonFiniteError, with the weights untouched, when the gradient norm is NaN or infinite.
        """
        loss, metrics = self.backward(micro_batches, loss_fn, temperature=temperature)
        grad_norm, rate = self._optimizer.step()
        return UpdateStats(loss=loss, grad_norm=grad_norm, lr=rate, metrics=metrics)

    def backward(
        self, micro_batches: list[MicroBatch], loss_fn: LossFn, *, temperature: float = 1.0
    ) -> tuple[float, list[dict[str, float]]]:
        """Gradients of the summed loss, left in each parameter's `main_grad`; returns the sum and the metrics."""
        self._ddp.zero_grad_buffer()
        self._optimizer.zero_grad()
        losses: list[torch.Tensor] = []
        metrics: list[dict[str, float]] = []
        for index, batch in enumerate(micro_batches):
            logprobs_R, entropy_R = self._ddp(on(batch, self.device), temperature=temperature, entropy=True)
            loss, values = loss_fn(index, logprobs_R, entropy_R)
            if (
                loss.requires_grad
            ):  # it may not: only the vision tower trains and the micro-batch has no image
                loss.backward()
            losses.append(loss.detach())
            metrics.append(values)
        finalize_model_grads([self._ddp])
        return float(torch.stack(losses).sum()), metrics

    @torch.no_grad()
    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight under its Hugging Face name, in the layout that transformers keeps in memory.

        Tensors share memory with the policy where the layout allows: use them before the next update.
        """
        parameters = dict(self.module.named_parameters())
        for entry in self.weight_map:
            tensors = [parameters[name].detach() for name in entry.megatron]
            yield from zip(entry.hf, entry.op.to_hf(tensors), strict=True)

    @torch.no_grad()
    def export_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As `export`, with the gradients that `backward` left; frozen parameters are 0."""
        parameters = dict(self.module.named_parameters())
        for entry in self.weight_map:
            tensors = [_gradient(parameters[name]) for name in entry.megatron]
            yield from zip(entry.hf, entry.op.to_hf(tensors), strict=True)

    @torch.no_grad()
    def load_hf(self, path: str, *, experts_layout: str = "auto") -> None:
        """Replace all weights by those of a Hugging Face folder of the same architecture."""
        folder = read_hf(path, experts_layout)
        parameters = dict(self.module.named_parameters())
        stale = set(parameters)
        for entry in self.weight_map:
            merged = entry.op.to_megatron([folder.tensor(name) for name in entry.hf])
            for name, whole in zip(entry.megatron, merged, strict=True):
                part = entry.op.shard(whole, *self._place(entry))
                if part.shape != parameters[name].shape:
                    raise ValueError(
                        f"{path}: {' + '.join(entry.hf)} gives {tuple(part.shape)} but {name} is "
                        f"{tuple(parameters[name].shape)}; config.json does not describe these weights"
                    )
                parameters[name].copy_(part)
                stale.discard(name)
        assert not stale, f"the weight map of {self.hf.model_type} leaves out {sorted(stale)[:3]}"
        self._optimizer.take_over_parameters()

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs of the policy; torch.load(weights_only=True) reads it."""
        parameters = {name: p.detach() for name, p in self.module.named_parameters()}
        return {"parameters": parameters, "optimizer": self._optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken. Raises ValueError for another model's state."""
        parameters = dict(self.module.named_parameters())
        if parameters.keys() != state["parameters"].keys():
            odd = sorted(parameters.keys() ^ state["parameters"].keys())
            raise ValueError(f"the checkpoint is of another model: {odd[0]} is on one side only")
        for name, tensor in state["parameters"].items():
            parameters[name].copy_(tensor)
        self._optimizer.load_state_dict(state["optimizer"])

    def _place(self, entry: Entry) -> tuple[int, int]:
        """Size and rank of the axis that an entry's megatron tensors are cut along."""
        from megatron.core import parallel_state as state

        if entry.op.axis == "tp":
            return self.plan.tp, state.get_tensor_model_parallel_rank()
        if entry.op.axis == "etp":
            return self.plan.etp, state.get_expert_tensor_parallel_rank() or 0
        return 1, 0


def freeze(module: PolicyModel, parts: Sequence[str]) -> None:
    """Switch off gradients of parts: vision (tower), projector (mergers), router, language (router included)."""
    frozen = {*parts, "router"} if "language" in parts else set(parts)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(module.family.part_of(name) not in frozen)
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError(f"policy.freeze={list(parts)} leaves nothing to train; take a part off the list")


def on(batch: MicroBatch, target: torch.device) -> MicroBatch:
    """The micro-batch with its tensors on `target`; the same object if they are there."""
    if batch.token_ids.device == target:
        return batch
    moved = {
        field.name: value.to(target, non_blocking=True)
        for field in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, field.name), torch.Tensor)
    }
    return dataclasses.replace(batch, **moved)


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    main_grad = getattr(parameter, "main_grad", None)
    return torch.zeros_like(parameter) if main_grad is None else main_grad
