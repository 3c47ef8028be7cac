"""Layouts of the trainer, sizes of servers and the split of nodes between both, tried one by one; the fastest that fit.

Both sides are worked out apart, as neither depends on the other but through the number of its nodes: so that thousands of
layouts for thousands of GPUs take seconds. Only servers on the trainer's own GPUs depend on its layout, whose weights lie
beside theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from gspo_mm.config.layout import Sizes
from gspo_mm.plan.advice import is_possible
from gspo_mm.plan.memory import training_memory
from gspo_mm.plan.rollout import rollout_of
from gspo_mm.plan.serving import server_capacity
from gspo_mm.plan.setup import Job, Servers
from gspo_mm.plan.step import Plan, plan_of
from gspo_mm.plan.training import training_of

_SPLITS = 16  # of the nodes, at most


@dataclass(frozen=True, kw_only=True)
class Found:
    """A job that fits, as it is asked for."""

    nodes: int
    rollout_nodes: int
    settings: str
    plan: Plan


def search(job: Job, *, nodes: int, keep: int = 5) -> list[Found]:
    """The fastest on `nodes` nodes in all, trainer's and servers'; none where nothing fits. Servers that share the trainer's
    GPUs keep doing so."""
    shared = job.servers is None or job.servers.colocated
    best: list[tuple[float, int, int, Job]] = []
    for serving in [0] if shared else _splits(nodes):
        gpus = (serving or nodes) * job.per_node
        apart = None if shared else _fastest_servers(job, gpus)
        if not (shared or apart):
            continue
        made: list[Job] = []
        for trainer in _fastest_trainers(job, (nodes - serving) * job.per_node):
            servers = _fastest_servers(trainer, gpus) if shared and job.servers else apart
            if servers or not job.servers:
                made.append(replace(trainer, servers=servers))
            if len(made) == keep:
                break
        best += [(plan_of(each).step, nodes - serving, serving, each) for each in made]
    best.sort(key=lambda found: found[0])
    return [
        Found(nodes=trains, rollout_nodes=serves, settings=_settings(each, job), plan=plan_of(each))
        for _, trains, serves, each in best[:keep]
    ]


def _splits(nodes: int) -> list[int]:
    """Nodes of the servers: all numbers, or evenly spread ones."""
    step = max(1, nodes // _SPLITS)
    return list(range(step, nodes, step))


def _fastest_trainers(job: Job, gpus: int) -> list[Job]:
    """Those that fit, fastest first, each with the least recomputation with which it does."""
    found = []
    for sizes in _layouts(job, gpus):
        for recompute in ("none", "selective", "full"):
            made = replace(job, policy=replace(job.policy, sizes=sizes, recompute=recompute))
            if all(memory.fits for memory in training_memory(made)):
                found.append((training_of(made).seconds, made))
                break
    found.sort(key=lambda each: each[0])
    return [made for _, made in found]


def _layouts(job: Job, gpus: int) -> Iterator[Sizes]:
    model, own = job.model, job.policy.sizes
    powers = [2**n for n in range(11)]
    # stages as long as the model's layers allow, or of the config's own lengths
    stages = [pp for pp in powers[:6] if pp == 1 or model.layers % pp == 0]
    for tp, pp, cp in product(powers[:4], {*stages, own.pp}, {1, 2, own.cp}):
        if tp > job.domain or gpus % (tp * pp * cp):
            continue
        ends = (own.first_stage_layers, own.last_stage_layers) if pp == own.pp else (None, None)
        for ep in powers if model.experts else [1]:
            sizes = Sizes(
                tp=tp, pp=pp, cp=cp, ep=ep, etp=1 if model.experts else tp, dp=gpus // (tp * pp * cp),
                vpp=own.vpp if pp == own.pp else 1, first_stage_layers=ends[0], last_stage_layers=ends[1],
            )  # fmt: skip
            if is_possible(job, sizes):
                yield sizes


def _fastest_servers(job: Job, gpus: int) -> Servers | None:
    assert job.servers is not None
    best: tuple[float, Servers] | None = None
    for tp in (1, 2, 4, 8, 16):
        if tp > job.per_node or job.model.heads % tp:
            continue
        servers = replace(job.servers, tp=tp, number=gpus // tp, dp=min(job.servers.dp, tp))
        made = replace(job, servers=servers)
        if not server_capacity(made, servers).memory.fits:
            continue
        seconds = rollout_of(made).seconds(overlaps=job.work.staleness > 0)
        if best is None or seconds < best[0]:
            best = seconds, servers
    return best[1] if best else None


def _settings(job: Job, asked: Job) -> str:
    """What differs from the config, as words of the command line."""
    sizes, own = job.policy.sizes, asked.policy.sizes
    words = [
        f"policy.parallel.{axis}={getattr(sizes, axis)}"
        for axis in ("tp", "pp", "vpp", "cp", "ep", *(["etp"] if job.model.experts else []))
        # an etp that the config leaves open is its tp
        if getattr(sizes, axis) != getattr(own, axis) or (axis == "etp" and sizes.tp != own.tp)
    ]
    if job.policy.recompute != asked.policy.recompute:
        words.append(f"policy.recompute={job.policy.recompute}")
    if job.servers and job.servers != asked.servers:
        words += [
            f"rollout.sglang.tp={job.servers.tp}",
            f"rollout.sglang.servers={job.per_node // job.servers.tp}",
        ]
    for end in ("first", "last"):
        key = f"{end}_stage_layers"
        if getattr(sizes, key) != getattr(own, key):
            words.append(f"policy.parallel.{key}=null")
    return " ".join(words) or "as in the config"
