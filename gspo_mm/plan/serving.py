"""A server's memory: weights, and how many answers its key/value cache holds at once."""

from __future__ import annotations

from dataclasses import dataclass

from gspo_mm.plan.hardware import GB
from gspo_mm.plan.memory import Memory, training_memory
from gspo_mm.plan.model import Model
from gspo_mm.plan.setup import Job, Servers

# bytes of a key or value, and of a number of linear attention's states (float32, config/server_options.py)
_CACHE, _STATE = 2, 4
# of the memory beside weights that SGLang gives states of linear attention, where a model has them (mamba-full-memory-ratio 0.9)
_STATES = 0.9 / 1.9
# what layers that see a window get, of what others do (swa-full-tokens-ratio)
_WINDOWED = 0.8
# what a policy keeps on GPUs while servers answer there, and bytes of a server beyond weights and cache: context, CUDA graphs
_STAYS = ("weights", "gradients", "optimizer", "CUDA and NCCL")
_KERNELS = 3 * GB


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What one server can hold."""

    memory: Memory
    # tokens of its cache
    tokens: float
    # answers decoded at once, of the mean length of this work half way through
    answers: int


def server_capacity(job: Job, servers: Servers) -> Capacity:
    """Of a server as rollout.sglang says: it takes mem_fraction of each GPU, and leaves the rest to its kernels or the policy."""
    model, lengths = job.model, job.work.lengths
    weights = served_bytes(model, servers) / servers.tp
    given = servers.fraction * job.gpu.memory
    free = given - weights
    state = state_bytes(model, servers)
    cache = free * (1 - _STATES if state else 1.0)
    tokens = max(0.0, cache / cache_bytes(model, servers)) * servers.dp
    # prompts are shared by the answers of a group
    answers = tokens / (lengths.answer + lengths.prompt / job.work.group)
    if state:
        answers = min(answers, max(0.0, free * _STATES / state) * servers.dp)
    if servers.max_running:
        answers = min(answers, servers.max_running)
    # one longest answer with its prompt must have room
    least = cache_bytes(model, servers) * (lengths.prompt + lengths.longest) + state
    if servers.colocated:
        # SGLang takes all that mem_fraction allows, and the policy's states stay where they are
        policy = max(sum(memory.uses[use] for use in _STAYS) for memory in training_memory(job))
        uses = {"weights": weights, "cache": max(least, free), "policy": policy, "kernels": _KERNELS}
    else:
        uses = {"weights": weights, "cache, at least": least, "kernels": job.gpu.memory - given}
    memory = Memory(kind="server", uses=uses, limit=job.gpu.memory)
    return Capacity(memory=memory, tokens=tokens, answers=int(answers))


def served_bytes(model: Model, servers: Servers) -> float:
    """Of all weights of one server; in FP8 the decoder's matrices are 1 byte, and their scales 4 for 128 x 128."""
    parts = [part for number in range(model.layers) for part in model.layer(number)]
    parts += [model.embedding(), *model.output(), *model.tower()]
    small = 1 + 4 / 128**2 if servers.fp8 else 2
    return sum(part.number * (small if part.in_fp8 else 2) for part in parts)


def cache_bytes(model: Model, servers: Servers) -> float:
    """Of keys and values of one token in all layers on one GPU, as servers set memory aside for them."""
    windowed = sum(window > 0 for window in model.windows)
    layers = model.layers - sum(model.linears) - windowed * (1 - _WINDOWED)
    return layers * layer_cache_bytes(model, servers)


def layer_cache_bytes(model: Model, servers: Servers) -> float:
    """The same in one layer. Heads are cut over tp / dp GPUs, and copied where there are fewer."""
    return 2 * max(1.0, model.kv_heads / (servers.tp / servers.dp)) * model.head * _CACHE


def state_bytes(model: Model, servers: Servers) -> float:
    """Of linear attention's states of one sequence on one GPU."""
    return (
        sum(model.linears) * model.linear.state * _STATE / (servers.tp / servers.dp) if model.linear else 0.0
    )
