"""Bytes of a training rank, by what they are for. Ranks of one pipeline stage are alike; each stage is a kind of its own.

weights      2 bytes each (4 in float32); FP8 recipes keep two copies of 1 byte beside them, or in their place
gradients    4 bytes of each trained one: megatron-core adds them up in float32
optimizer    12 bytes (float32 copy, two moments) of each trained one, over the data-parallel ranks that hold it:
             all for what every rank has, those with the same experts for experts (Rajbhandari et al., 2020, ZeRO stage 1)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

from gspo_mm.plan import activations
from gspo_mm.plan.hardware import ASLEEP, COMMUNICATOR, CONTEXT, FRAGMENTS
from gspo_mm.plan.model import Model, Part
from gspo_mm.plan.setup import Job, Policy


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one kind of rank, by use."""

    kind: str
    uses: dict[str, float]
    # of the GPU
    limit: float

    @property
    def total(self) -> float:
        return sum(self.uses.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.limit


@dataclass(frozen=True, kw_only=True)
class Held:
    """Numbers of one rank, by how many data-parallel ranks share their optimizer state."""

    # weights, all and those of decoder matrices that a recipe has in FP8
    weights: float
    in_fp8: float
    # trained, of what all data-parallel ranks have, and of experts
    dense: float
    experts: float


def stages(job: Job) -> list[range]:
    """Decoder layers of each pipeline stage."""
    ends = [0, *accumulate(job.policy.sizes.layers_of_stages(job.model.layers))]
    return [range(a, b) for a, b in pairwise(ends)]


def training_memory(job: Job) -> list[Memory]:
    """Of each pipeline stage that differs from the one before."""
    found: list[Memory] = []
    ranges = stages(job)
    for stage, layers in enumerate(ranges):
        name = "trainer" if len(ranges) == 1 else f"trainer, stage {stage + 1} of {len(ranges)}"
        memory = _rank(job, name, stage, layers, last=stage == len(ranges) - 1)
        if not found or stage == len(ranges) - 1 or memory.total > found[-1].total:
            found.append(memory)
    return found


def _rank(job: Job, name: str, stage: int, layers: range, *, last: bool) -> Memory:
    policy, held = job.policy, held_by(job, layers, first=stage == 0, last=last)
    state = optimizer_bytes(policy, held)
    uses = {
        "weights": weight_bytes(policy, held),
        "gradients": 4.0 * (held.dense + held.experts),
        "optimizer": 0.0 if policy.offload else state,
        "activations": activations.decoder_bytes(job, stage, layers, micro_batches=micro_batches(job)),
        "log-probs": activations.head_bytes(job) if last else 0.0,
        "vision": activations.vision_bytes(job) if stage == 0 else 0.0,
        "push": 2 * job.bucket if job.servers else 0.0,
        # of servers that have given their weights and cache back
        "servers": ASLEEP if job.servers and job.servers.colocated else 0.0,
    }
    uses["CUDA and NCCL"] = CONTEXT + COMMUNICATOR * _communicators(policy)
    uses["fragments"] = (FRAGMENTS - 1) * sum(uses[x] for x in ("activations", "log-probs", "vision"))
    return Memory(kind=name, uses=uses, limit=job.gpu.memory)


def held_by(job: Job, layers: range, *, first: bool, last: bool) -> Held:
    """What one rank of a stage holds."""
    policy, model = job.policy, job.model
    weights = in_fp8 = dense = experts = 0.0
    for part in _parts(job, layers, first=first, last=last):
        own = part.number / ways(policy, part)
        weights += own
        in_fp8 += own if part.in_fp8 else 0
        if part.group in policy.frozen:
            continue
        if part.cut == "experts":
            experts += own
        else:
            dense += own
    if policy.lora:
        more_dense, more_experts = _adapters(model, policy, layers, first=first)
        dense, experts, weights = (
            dense + more_dense,
            experts + more_experts,
            weights + more_dense + more_experts,
        )
    return Held(weights=weights, in_fp8=in_fp8, dense=dense, experts=experts)


def _parts(job: Job, layers: range, *, first: bool, last: bool) -> Iterator[Part]:
    model, vocab = job.model, job.padded_vocab
    if first:
        yield model.embedding(vocab)
        yield from model.tower()
    for number in layers:
        yield from model.layer(number)
    if last:
        yield from model.output(vocab)
        if model.tied and not first:
            yield model.embedding(vocab)  # a copy of the embedding is the output layer


def ways(policy: Policy, part: Part) -> int:
    """Over how many ranks a part is cut."""
    sizes = policy.sizes
    return {"tp": sizes.tp, "experts": sizes.ep * sizes.etp, "whole": 1}[part.cut]


def weight_bytes(policy: Policy, held: Held) -> float:
    if not policy.fp8:
        return held.weights * policy.width
    # Transformer Engine keeps each FP8 weight as it is and transposed, for the two products of backward
    kept = 0 if policy.fp8_weights else policy.width
    return (held.weights - held.in_fp8) * policy.width + held.in_fp8 * (kept + 2)


def optimizer_bytes(policy: Policy, held: Held) -> float:
    """Of a rank, wherever it is kept."""
    sizes = policy.sizes
    # weights in float32 are stepped themselves
    each = (0 if policy.width == 4 else 4) + 2 * policy.moment_bytes
    replicas = sizes.world_size / (sizes.pp * sizes.ep * sizes.etp)
    return each * (held.dense / (sizes.dp * sizes.cp) + held.experts / replicas)


def micro_batches(job: Job) -> int:
    """Of one update on a data-parallel rank."""
    work, sizes = job.work, job.policy.sizes
    answers = work.answers / work.updates / sizes.dp
    fit = max(1, int(job.policy.micro_tokens // work.lengths.sequence)) if job.policy.packed else 1
    return max(1, -(-int(answers) // fit))


def _communicators(policy: Policy) -> int:
    """Groups of more than one rank that a rank is in; data-parallel ones twice, with and without context parallelism."""
    sizes = policy.sizes
    wide = [
        sizes.tp,
        sizes.pp,
        sizes.cp,
        sizes.ep,
        sizes.etp,
        sizes.dp,
        sizes.dp,
        sizes.tp * sizes.cp,
        sizes.ep * sizes.etp,
    ]
    return 1 + sum(size > 1 for size in wide)


def _adapters(model: Model, policy: Policy, layers: range, *, first: bool) -> tuple[float, float]:
    """Numbers in pairs, of what all ranks have and of experts. A rank of a tensor-parallel group holds pairs whole."""
    lora = policy.lora
    assert lora is not None
    hidden, dense, experts = model.hidden, 0, 0
    for number in layers:
        if "attention" in lora.targets:
            dense += sum(i + o for i, o in _attention_matrices(model, number))
        inner = model.shared_ffn if model.mixtures[number] else model.dense_ffn
        if "mlp" in lora.targets and inner:
            dense += 3 * (hidden + inner)
        if "experts" in lora.targets and model.mixtures[number]:
            # gate and up share a pair
            experts += model.experts * ((hidden + 2 * model.expert_ffn) + (hidden + model.expert_ffn))
    if "projector" in lora.targets and first and (it := model.vision):
        dense += sum(i + o for i, o in it.matrices)
    return lora.rank * dense, lora.rank * experts / policy.sizes.ep


def _attention_matrices(model: Model, number: int) -> list[tuple[int, int]]:
    """(inputs, outputs) of each matrix of a Hugging Face folder."""
    hidden = model.hidden
    if not model.linears[number]:
        out = (model.queries * (1 + model.traits.gated), model.keys, model.keys)
        return [*((hidden, width) for width in out), (model.queries, hidden)]
    it = model.linear
    assert it is not None
    out = (2 * it.key + it.value, it.value, it.heads, it.heads)
    return [*((hidden, width) for width in out), (it.value, hidden)]
