"""`Policy`: the trained model with its passes, on however many ranks. What `train.py` and `sft.py` hold of it.

Policy.from_hf(...)   a Hugging Face folder through the family's weight map
.logprobs(batches)    no gradient
.update(batches, fn)  forward, the caller's loss, backward over all micro-batches, then one optimizer step
.export()             Hugging Face names and layout, for weight sync and checkpoints

Every method is a collective: all ranks call it. Ranks that share a micro-batch (tensor, context and pipeline
parallel) are given the same ones; data-parallel ranks have their own, and equally many of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func

from gspo_mm.config import PolicyConfig
from gspo_mm.families.base import Family
from gspo_mm.families.folder import HfFolder, read_hf
from gspo_mm.families.table import family_of
from gspo_mm.loss.metrics import Metrics
from gspo_mm.policy import cpu
from gspo_mm.policy.expert_load import ExpertLoad
from gspo_mm.policy.frozen import check_frozen, freeze
from gspo_mm.policy.layout import padded_tokens
from gspo_mm.policy.lora import Adapters, add_adapters, check_targets
from gspo_mm.policy.model import PolicyModel, padded_vocab, quiet_megatron
from gspo_mm.policy.optimizer import Optimizer
from gspo_mm.policy.parallel import Groups, ParallelPlan
from gspo_mm.policy.precision import DTYPES, check_attention, check_fp8, check_widths
from gspo_mm.policy.spec import has_fused_modules
from gspo_mm.policy.speed import overlaps_reduction, shares_prompts
from gspo_mm.policy.weights import Weights, gradient_of
from gspo_mm.runtime.dist import Ranks, device
from gspo_mm.runtime.watchdog import beat
from gspo_mm.types import GspoError, MicroBatch

# (micro-batch number, log-probs [R] float32, entropy [R] detached) -> (loss, metrics)
type LossFn = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, Metrics]]


@dataclass(frozen=True, kw_only=True)
class UpdateStats:
    """What one optimizer step reports, the same on every rank."""

    loss: float  # sum over micro-batches of all data-parallel ranks
    grad_norm: float  # global, before clipping
    lr: float
    metrics: list[Metrics]  # one per micro-batch of any rank, as the loss function gave them


class Policy:
    """A vision-language model under training on all ranks of the job. Build it with `from_hf`."""

    def __init__(
        self,
        family: Family,
        hf: Any,
        config: PolicyConfig,
        plan: ParallelPlan,
        *,
        total_steps: int,
        ranks: Ranks | None = None,
    ) -> None:
        """Needs `plan.initialize` to have run. Weights are arbitrary until `load_hf` or a checkpoint is loaded."""
        self.family = family
        self.hf = hf
        self.config = config
        self.plan = plan
        self.ranks = ranks or Ranks()
        self.groups = Groups.current()
        self.dp_rank_of = self.ranks.gather(self.groups.dp.rank())  # data-parallel rank of every rank
        self.chunks = build_chunks(family, hf, config, plan, self.groups)
        for chunk in self.chunks:
            freeze(chunk, config.frozen)
        self.weights = Weights(
            self.chunks,
            family.weight_map(
                hf,
                padded_vocab=padded_vocab(hf.get_text_config().vocab_size, plan),
                fused=has_fused_modules(),
            ),
            plan,
            self.groups,
        )
        self.adapters: list[Adapters] = []
        if config.lora:
            self.adapters = add_adapters(self.chunks, self.weights, config.lora, self.groups)
        if not self.ranks.any(any(p.requires_grad for p in self.parameters())):
            raise ValueError(
                f"policy.freeze={config.freeze} leaves nothing to train; take a part off the list"
            )
        # whether its micro-batches may be trees: see batch/packing.py
        self.shares_prompts = shares_prompts(config, plan, family.transformer_arguments(hf))
        self._overlaps = overlaps_reduction(config, plan)
        self._gathered = not self._overlaps  # whether all of a parameter is up to date on this rank
        with quiet_megatron():
            self._ddp = [self._with_gradient_buffers(chunk) for chunk in self.chunks]
        self.optimizer = Optimizer(
            self._ddp,
            config.optimizer,
            total_steps=total_steps,
            dtype=DTYPES[config.dtype],
            fp8=config.fp8.recipe,
            overlap=self._overlaps,
        )
        self._load = ExpertLoad(self.chunks)
        self._prepare_schedule()

    def _with_gradient_buffers(self, chunk: PolicyModel) -> DistributedDataParallel:
        return DistributedDataParallel(
            chunk.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=True,
                overlap_grad_reduce=self._overlaps,
                overlap_param_gather=self._overlaps,
                # without it the optimizer steps its float32 copies, and FP8 weights stay as they were
                fp8_param_gather=self.config.fp8.primary_weights,
                # gradients that experts compute after their backward are waited for
                delay_wgrad_compute=chunk.config.overlap_dispatch_backward_with_experts_wgrad,
            ),
            chunk,
        )

    @classmethod
    def from_hf(
        cls,
        path: str,
        config: PolicyConfig,
        *,
        seed: int,
        total_steps: int,
        experts_layout: str = "auto",
        ranks: Ranks | None = None,
    ) -> Self:
        """Build the model of the Hugging Face folder `path` and load its weights.

        `total_steps` counts training steps, for the learning-rate schedule. `experts_layout`: see `read_hf`. `ranks`: those
        of the program, where it has them already.
        Raises ValueError when the folder, the family, the parallel sizes or the number format do not fit.
        """
        folder = read_hf(path, experts_layout)  # before anything is built
        family, hf, plan = prepare(path, config, seed=seed)
        policy = cls(family, hf, config, plan, total_steps=total_steps, ranks=ranks)
        policy.load_hf(folder)
        return policy

    @torch.no_grad()
    def logprobs(self, micro_batches: list[MicroBatch], temperature: float = 1.0) -> list[torch.Tensor]:
        """Log-probs [R] float32 nats of each micro-batch's response tokens, on every rank that has the micro-batch."""

        if not micro_batches:
            return []
        self._gather_parameters()

        def keep(_: int, output: Any) -> tuple[torch.Tensor, dict[str, Any]]:
            return output[0].new_zeros(()), {"logprobs": output[0]}

        outputs = self._run(micro_batches, keep, temperature=temperature, entropy=False, forward_only=True)
        counts = [batch.num_response_tokens for batch in micro_batches]
        if self.plan.pp == 1:
            return [output["logprobs"] for output in outputs]
        flat = torch.empty(sum(counts), device=device())
        if outputs:
            flat = torch.cat([output["logprobs"] for output in outputs])
        last = dist.get_global_rank(self.groups.pp, self.plan.pp - 1)
        dist.broadcast(flat, src=last, group=self.groups.pp)
        return list(flat.split(counts))

    def update(
        self,
        micro_batches: list[MicroBatch],
        loss_fn: LossFn,
        *,
        temperature: float = 1.0,
        done: float | None = None,
        last: bool = True,
    ) -> UpdateStats:
        """One optimizer step on the sum of all micro-batches' losses, whose denominators are the whole step's.

        `done` training steps with this update, which decides the learning rate: see `Optimizer.step`. Not `last`: another
        update is the next thing that reads the weights, so that they may be gathered in its forward.

        `loss_fn` is called on the last pipeline stage. Raises NonFiniteError, on every rank and with the weights
        untouched, when the gradient norm is NaN or infinite, or whatever GspoError `loss_fn` raised on any rank.
        """
        try:
            loss, metrics = self.backward(micro_batches, loss_fn, temperature=temperature)
            with self.ranks.together():
                grad_norm, rate = self.optimizer.step(done)
        except GspoError:
            self._gather_parameters()
            raise
        if last:
            self._gather_parameters()
        return UpdateStats(loss=loss, grad_norm=grad_norm, lr=rate, metrics=metrics)

    def backward(
        self, micro_batches: list[MicroBatch], loss_fn: LossFn, *, temperature: float = 1.0
    ) -> tuple[float, list[Metrics]]:
        """Gradients of the summed loss, left in the gradient buffers; returns the sum and the metrics."""
        for chunk in self._ddp:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._weigh_aux_loss(micro_batches)
        self._gathered = not self._overlaps
        faults: list[GspoError] = []

        def loss_of(index: int, output: Any) -> tuple[torch.Tensor, dict[str, Any]]:
            logprobs_R, entropy_R = output
            if faults or not micro_batches[index].num_sequences:
                return logprobs_R.sum() * 0.0, {}
            try:
                loss, metrics = loss_fn(index, logprobs_R, entropy_R)
            except (
                GspoError
            ) as fault:  # reported to all ranks once the schedule is through: none may be left waiting
                faults.append(fault)
                return logprobs_R.sum() * 0.0, {}
            return loss, {"loss": loss.detach().clone(), "metrics": metrics}

        outputs = self._run(micro_batches, loss_of, temperature=temperature, entropy=True, forward_only=False)
        speaks = self.groups.is_last_stage and self.groups.tp_cp.rank() == 0
        own = [(float(o["loss"]), o["metrics"]) for o in outputs if o] if speaks else []
        with self.ranks.together():
            if faults:
                raise faults[0]
        everything = [item for of_rank in self.ranks.gather(own) for item in of_rank]
        return math.fsum(loss for loss, _ in everything), [metrics for _, metrics in everything]

    def export(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight under its Hugging Face name, in the layout that transformers keeps in memory: `Weights.export`."""
        return self.weights.export()

    @torch.no_grad()
    def export_gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        """As `export`, with the gradients that `backward` left; frozen parameters are 0."""
        for chunk in self._ddp:
            for buffer in [*cast(list[Any], chunk.buffers), *chunk.expert_parallel_buffers]:
                _gather_buffer(buffer)
        return self.weights.export(gradient_of)

    def load_hf(self, folder: HfFolder) -> None:
        """Replace all weights by those of a Hugging Face folder of the same architecture."""
        exact = self.weights.load(folder)
        self.optimizer.take_over_parameters(exact)
        self.forget_features()

    def expert_load(self) -> dict[str, float]:
        """How evenly the updates since the last call used the experts: see `ExpertLoad.take`."""
        return self._load.take(self.groups)

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """This rank's parameters, in a fixed order."""
        return (parameter for chunk in self.chunks for parameter in chunk.parameters())

    def forget_features(self) -> None:
        """Drop kept image features: the tower's weights were set from outside."""
        for chunk in self.chunks:
            if chunk.features:
                chunk.features.forget()

    @torch.no_grad()
    def _gather_parameters(self) -> None:
        """Finish what the optimizer's step leaves to the next forward of a training pass.

        In other passes ranks may differ in which modules they run, and so in the order of what they gather.
        """
        if not self._gathered:
            for chunk in self._ddp:
                chunk.start_param_sync(force_sync=True)
            self._gathered = True

    def _prepare_schedule(self) -> None:
        config: Any = self.chunks[0].config
        # denominators are in the loss already, so megatron's own count of tokens is left out
        config.finalize_model_grads_func = lambda chunks, num_tokens=None, **kwargs: finalize_model_grads(
            chunks, None, **kwargs
        )
        if self._overlaps:
            config.no_sync_func = [chunk.no_sync for chunk in self._ddp]
            if len(self._ddp) == 1:
                config.no_sync_func = config.no_sync_func[0]

    def _weigh_aux_loss(self, micro_batches: list[MicroBatch]) -> None:
        """Make the balancing loss of `policy.moe.aux_loss` the mean over the update's tokens, on all ranks.

        It joins the gradients inside the routers, per micro-batch times its tokens; the reported loss is without it.
        """
        if not self.config.moe.aux_loss:
            return
        own = sum(batch.num_tokens for batch in micro_batches)
        sharing = self.plan.tp * self.plan.cp * self.plan.pp  # ranks that were given the same micro-batches
        tokens = sum(self.ranks.gather(own)) // sharing
        config: Any = self.chunks[0].config
        config.moe_grad_scale_func = lambda: torch.tensor([1.0 / max(tokens, 1)], device=device())

    def _run(
        self,
        micro_batches: list[MicroBatch],
        finish: Callable[[int, Any], tuple[torch.Tensor, dict[str, Any]]],
        *,
        temperature: float,
        entropy: bool,
        forward_only: bool,
    ) -> list[dict[str, Any]]:
        """All micro-batches through megatron's schedule; `finish(number, model output)` runs on the last stage.

        Returns the second halves of what `finish` gave: one per micro-batch there, none on other stages.
        """
        for chunk in self._ddp:
            if chunk.training == forward_only:
                chunk.train(not forward_only)  # there is no dropout; recomputation of activations asks for it

        def forward_step(
            numbered: Iterator[tuple[int, MicroBatch]], chunk: torch.nn.Module
        ) -> tuple[Any, Callable[[Any], tuple[torch.Tensor, torch.Tensor, dict[str, Any]]]]:
            index, batch = next(numbered)
            beat()
            output = chunk(batch, temperature=temperature, entropy=entropy, total=total)

            def with_count(output: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
                loss, kept = finish(index, output)
                return loss, torch.zeros((), dtype=torch.int, device=loss.device), kept

            return output, with_count

        total = None
        if self.plan.vpp > 1:  # this schedule wants one shape
            multiple = self.chunks[0].token_multiple
            total = max(padded_tokens(batch, self.plan, multiple=multiple) for batch in micro_batches)
        assert micro_batches, "a rank without sequences is given empty micro-batches, not none"
        iterators: Any = [iter(enumerate(micro_batches)) for _ in self._ddp]
        chunks: Any = self._ddp
        if len(chunks) == 1:
            (iterators,), (chunks,) = iterators, chunks
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators,
            model=chunks,
            num_microbatches=len(micro_batches),
            seq_length=total or 1,  # read with plan.vpp > 1 only
            micro_batch_size=1,
            forward_only=forward_only,
        )


def prepare(path: str, config: PolicyConfig, *, seed: int) -> tuple[Family, Any, ParallelPlan]:
    """Family, Hugging Face config and plan of a folder, checked against each other; starts megatron's groups."""
    family = family_of(path)
    hf = family.load_config(path)
    check_frozen(family, hf, config.freeze)
    if config.lora:
        check_targets(family, hf, config.lora.targets)
    plan = ParallelPlan.from_config(config.parallel)
    plan.check_model(family.dims(hf))
    check_fp8(config)
    check_attention(config)
    check_widths(config, family.transformer_arguments(hf), tp=plan.tp, etp=plan.etp)
    cpu.install()
    plan.initialize(seed)
    return family, hf, plan


def build_chunks(
    family: Family, hf: Any, config: PolicyConfig, plan: ParallelPlan, groups: Groups
) -> list[PolicyModel]:
    """This rank's part of the model: one module, or plan.vpp of them. Weights are arbitrary."""
    stages = list(range(plan.vpp)) if plan.vpp > 1 else [None]
    return [PolicyModel(family, hf, config, plan, groups, vp_stage=stage).to(device()) for stage in stages]


def _gather_buffer(buffer: Any) -> None:
    """Fill each bucket of gradients with the shares that its data-parallel ranks have reduced."""
    group = buffer.data_parallel_group
    for bucket in buffer.buckets:
        own = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
        dist.all_gather_into_tensor(bucket.grad_data, own, group=group)
