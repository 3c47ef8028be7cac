"""Seconds of the policy's passes over a batch of answers: per layer and micro-batch, products + memory + transfers, or the
launching of their kernels where that takes longer.

A sum and not a maximum of the first three: within a layer each waits for the other, and megatron hides little of a mixture's
dispatch. Backward is twice the products (a gradient of the input, one of the weight), the same transfers, twice the launches;
`recompute=full` adds a forward. Sequences lie in micro-batches one behind the other; attention sees pairs within a sequence
alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from gspo_mm.plan.activations import layer_bytes
from gspo_mm.plan.hardware import HOST, HOST_MEMORY
from gspo_mm.plan.memory import held_by, micro_batches, optimizer_bytes, stages
from gspo_mm.plan.setup import Job

# how often what a layer keeps goes through memory beside the products: written, read, and its like that is not kept
_TRAFFIC = 4
_BYTES = 2  # of a number that travels between ranks


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds of a pass, by what takes them. The host launches kernels while earlier ones compute: the longer of both counts."""

    products: float = 0.0
    memory: float = 0.0
    transfers: float = 0.0
    # all that the host needs to launch them, hidden or not
    launches: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.products + self.memory + self.transfers, self.launches)

    def __add__(self, other: Cost) -> Cost:
        return Cost(**{name: getattr(self, name) + getattr(other, name) for name in _NAMES})

    def times(self, products: float, others: float) -> Cost:
        """Products and memory so often, transfers and launches so often."""
        return Cost(
            products=self.products * products,
            memory=self.memory * products,
            transfers=self.transfers * others,
            launches=self.launches * others,
        )

    def parts(self) -> dict[str, float]:
        """What `seconds` is made of; launches are those that nothing hides."""
        device = {name: getattr(self, name) for name in _NAMES[:-1]}
        return device | {"launches": self.seconds - sum(device.values())}


_NAMES = tuple(Cost.__dataclass_fields__)


@dataclass(frozen=True, kw_only=True)
class Training:
    """Seconds of one step's passes."""

    old: float
    reference: float
    update: float
    # of the update: by what takes it, waiting of pipeline stages, gradients and parameters between ranks, the optimizer itself
    parts: dict[str, float]
    # FLOPs that the model needs for the update; recomputation and padding not counted
    flops: float

    @property
    def seconds(self) -> float:
        return self.old + self.reference + self.update

    def mfu(self, job: Job) -> float:
        """Of the update, of the dense BF16 peak, or of that of FP8 in FP8."""
        peak = job.gpu.peak(fp8=job.policy.fp8)
        return self.flops / self.update / job.policy.sizes.world_size / peak if self.update else 0.0


def training_of(job: Job) -> Training:
    work, sizes = job.work, job.policy.sizes
    number = micro_batches(job)
    tokens = work.answers / work.updates / sizes.dp / number * work.lengths.sequence
    forward = [_stage(job, layers, tokens, stage) for stage, layers in enumerate(stages(job))]
    slowest = max(forward, key=lambda cost: cost.seconds)
    backward = _backward(job, slowest)
    one = slowest.seconds * work.updates * (number + (sizes.pp - 1) / sizes.vpp)
    both = slowest + backward
    waiting = both.seconds * (sizes.pp - 1) / sizes.vpp
    reduce, step = _reduce(job), _optimizer(job)
    # gradients travel while the last micro-batch goes backward
    exposed = max(0.0, reduce - backward.seconds)
    parts = {name: seconds * number * work.updates for name, seconds in both.parts().items()}
    parts |= {
        "pipeline": waiting * work.updates,
        "gradients": exposed * work.updates,
        "optimizer": step * work.updates,
    }
    return Training(
        old=one if work.old else 0.0,
        reference=one if work.reference else 0.0,
        update=sum(parts.values()),
        parts=parts,
        flops=update_flops(job),
    )


def update_flops(job: Job) -> float:
    """Of forward and backward of all answers."""
    model, work, lengths = job.model, job.work, job.work.lengths
    each = model.flops_token * lengths.sequence + model.flops_pair * model.pairs(lengths.sequence)
    backward = 2 if "language" not in job.policy.frozen else 1
    towers = 1 if job.policy.keeps_features else 3
    images = work.prompts * model.flops_image(lengths.image) * towers
    return work.answers * (each + model.flops_row * lengths.answer) * (1 + backward) + images


def _stage(job: Job, layers: range, tokens: float, stage: int) -> Cost:
    """Forward of one micro-batch of `tokens` on a pipeline stage."""
    model = job.model
    kinds: dict[tuple[bool, bool, int], list[int]] = {}
    for number in layers:
        kind = model.mixtures[number], model.linears[number], model.windows[number]
        kinds.setdefault(kind, []).append(number)
    found = Cost()
    for alike in kinds.values():
        found += _layer(job, alike[0], tokens).times(len(alike), len(alike))
    if stage == job.policy.sizes.pp - 1:
        found += _head(job, tokens)
    if stage == 0:
        found += _tower(job, tokens)
    return found


def _layer(job: Job, number: int, tokens: float) -> Cost:
    model, sizes, gpu, share = job.model, job.policy.sizes, job.gpu, job.efficiency
    ranks = sizes.tp * sizes.cp
    mixture = model.mixtures[number]
    chosen = 6 * model.hidden * model.expert_ffn * model.chosen if mixture else 0
    others = model.flops_layer(number) - chosen
    length = job.work.lengths.sequence
    pairs = model.flops_pair * model.layer_pairs(number, length) / length
    peak = gpu.peak(fp8=job.policy.fp8)
    # the busiest rank's experts are waited for
    busiest = job.imbalance if sizes.ep > 1 else 1.0
    flops = (
        others / (peak * share.products)
        + chosen * busiest / (peak * share.experts)
        + pairs / (gpu.bf16 * share.products)
    )
    products = tokens / ranks * flops
    traffic = _TRAFFIC * layer_bytes(job, number) * tokens / sizes.cp / (gpu.bandwidth * share.decode)
    return Cost(
        products=products,
        memory=traffic,
        transfers=_transfers(job, tokens, mixture=mixture, linear=model.linears[number]),
        launches=share.expert_layer if mixture else share.dense_layer,
    )


def _transfers(job: Job, tokens: float, *, mixture: bool, linear: bool) -> float:
    """Seconds of a layer's collectives in forward."""
    model, sizes = job.model, job.policy.sizes
    row = model.hidden * _BYTES
    found = 0.0
    if sizes.tp > 1:  # gathered before a block's matrices and scattered after them, attention's and the MLP's
        blocks = 2 if not mixture or model.shared_ffn or sizes.etp > 1 else 1
        sent = tokens / sizes.cp * row * (sizes.tp - 1) / sizes.tp
        found += 2 * blocks * (sent / job.link(sizes.tp) + job.latency(sizes.tp))
    if sizes.cp > 1 and not linear:  # keys and values go around
        sent = tokens / sizes.cp * 2 * model.keys * _BYTES / sizes.tp * (sizes.cp - 1)
        found += sent / job.link(sizes.tp * sizes.cp) + (sizes.cp - 1) * job.latency(sizes.tp * sizes.cp)
    if mixture and sizes.ep > 1:  # to the experts and back
        found += 2 * _dispatch(job, tokens / (sizes.tp * sizes.cp) * row * job.imbalance)
    return found


def _dispatch(job: Job, rows: float) -> float:
    """Seconds until `rows` bytes of a rank's tokens are at the K experts of each. DeepEP sends a token once to each node."""
    sizes, chosen = job.policy.sizes, job.model.chosen
    group = sizes.ep * sizes.etp
    domains = max(1, group // job.domain)
    away = 1 - 1 / domains
    near = chosen * ((sizes.ep - 1) / sizes.ep - away)
    copies = domains * (1 - (1 - 1 / domains) ** chosen) if job.policy.flex else chosen
    far = rows * away * copies / job.link(job.domain + 1) if away else 0.0
    return rows * near / job.link(1) + far + job.latency(group)


def _head(job: Job, tokens: float) -> Cost:
    """Log-probs of the answers' tokens."""
    lengths = job.work.lengths
    rows = tokens * lengths.answer / lengths.sequence / (job.policy.sizes.tp * job.policy.sizes.cp)
    return Cost(products=rows * job.model.flops_row / (job.gpu.bf16 * job.efficiency.products))


def _tower(job: Job, tokens: float) -> Cost:
    """Images of a micro-batch. Frozen, their features are computed once a step."""
    work, lengths = job.work, job.work.lengths
    flops = job.model.flops_image(lengths.image)
    if not flops:
        return Cost()
    # answers to one prompt share its image where they lie in one micro-batch
    sequences = tokens / lengths.sequence
    images = sequences / min(work.group, max(1.0, sequences))
    passes = work.old + work.reference + 1 if job.policy.keeps_features else 1
    return Cost(products=images * flops / passes / (job.gpu.bf16 * job.efficiency.products))


def _backward(job: Job, forward: Cost) -> Cost:
    trained = "language" not in job.policy.frozen
    again = {"none": 0.0, "selective": 0.05, "full": 1.0}[job.policy.recompute]
    # log-probs' logits are made again in any case; that small part is left out
    return forward.times(1 + trained + again, 1 + (again == 1.0)) + Cost(launches=forward.launches)


def _reduce(job: Job) -> float:
    """Seconds that gradients and parameters of an update need between data-parallel ranks: 4 bytes there, 2 back."""
    sizes, layers = job.policy.sizes, max(stages(job), key=len)
    held = held_by(job, layers, first=True, last=sizes.pp == 1)
    replicas = sizes.world_size // (sizes.pp * sizes.ep * sizes.etp)
    found = 0.0
    # numbers, ranks that have the same ones, and how far apart they are
    for trained, group, apart in (
        (held.dense, sizes.dp * sizes.cp, sizes.tp),
        (held.experts, replicas, sizes.ep * sizes.etp),
    ):
        if group > 1:
            found += trained * (4 + _BYTES) * (group - 1) / group / job.link(group * apart)
    return found


def _optimizer(job: Job) -> float:
    """Seconds of Adam: gradients, state read and written; on the host, over its link and in its memory."""
    held = held_by(job, max(stages(job), key=len), first=True, last=job.policy.sizes.pp == 1)
    state = optimizer_bytes(job.policy, held)
    if job.policy.offload:
        return 2 * state / HOST_MEMORY + state / 2 / HOST
    return 2.5 * state / (job.gpu.bandwidth * job.efficiency.decode)
