"""The step that sampling, training and the push of weights make, and which of them it waits for."""

from __future__ import annotations

from dataclasses import dataclass

from gspo_mm.plan.hardware import FILES
from gspo_mm.plan.memory import Memory, training_memory
from gspo_mm.plan.rollout import Rollout, rollout_of
from gspo_mm.plan.serving import Capacity, served_bytes, server_capacity
from gspo_mm.plan.setup import Job
from gspo_mm.plan.training import Training, training_of


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is said about a job."""

    job: Job
    memory: list[Memory]
    capacity: Capacity | None
    training: Training
    rollout: Rollout | None
    push: float

    @property
    def fits(self) -> bool:
        return all(memory.fits for memory in self.memory)

    @property
    def sampling(self) -> float:
        """Seconds that servers need for a step."""
        return self.rollout.seconds(overlaps=self.overlaps) if self.rollout else 0.0

    @property
    def overlaps(self) -> bool:
        return self.job.work.staleness > 0

    @property
    def step(self) -> float:
        sides = (self.sampling, self.training.seconds)
        both = max(sides) if self.overlaps else sum(sides)
        return both + self.push

    @property
    def tokens_per_second(self) -> float:
        """Of each GPU, trainer's and servers', prompts and answers."""
        return self.job.work.tokens / self.step / self.job.gpus

    @property
    def bottleneck(self) -> str:
        """What the step waits for most, and what that is made of."""
        training = self.training
        if self.sampling >= training.seconds:
            rollout = self.rollout
            assert rollout is not None
            if not self.overlaps and rollout.in_turn > 1.5 * rollout.steady:
                return "rollout: the longest answers, which nearly empty servers decode"
            if rollout.limit == "cache":
                return f"rollout: the servers' cache, which holds {rollout.at_once} answers at once"
            return f"rollout: decoding {rollout.at_once} answers at once on each server"
        stage = max(
            ("old", training.old),
            ("reference", training.reference),
            ("update", training.update),
            key=lambda x: x[1],
        )
        part = max(training.parts, key=lambda name: training.parts[name])
        return f"training: {stage[0]}, of which most is {_WORDS.get(part, part)}"


_WORDS = {
    "products": "matrix products",
    "memory": "traffic with the GPU's memory",
    "transfers": "transfers between ranks within layers",
    "launches": "launching kernels: micro-batches are too small",
    "pipeline": "pipeline stages that wait",
    "gradients": "gradients between data-parallel ranks",
    "optimizer": "the optimizer's own step",
}


def plan_of(job: Job) -> Plan:
    capacity = server_capacity(job, job.servers) if job.servers else None
    memory = training_memory(job)
    return Plan(
        job=job,
        memory=[*memory, capacity.memory] if capacity else memory,
        capacity=capacity,
        training=training_of(job),
        rollout=rollout_of(job) if job.servers else None,
        push=push_seconds(job),
    )


def push_seconds(job: Job) -> float:
    """Of all weights to all servers. Owners take turns: whatever their number, one adapter's bandwidth counts."""
    if job.servers is None:
        return 0.0
    size = served_bytes(job.model, job.servers)
    match job.push:
        case "distributed":
            speed = job.gpu.network * job.efficiency.push
        case "tensor":  # gathered by each rank over NVLink, of which it keeps its part
            speed = job.gpu.nvlink * job.efficiency.push
        case "disk":
            speed = FILES / 2  # written, then read
    return job.efficiency.push_start + size / speed
