"""Which single change of a config makes a run fit, or makes it faster: each is tried, by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from gspo_mm.config.layout import PlanError, Sizes
from gspo_mm.plan.memory import Memory
from gspo_mm.plan.setup import Job, Servers
from gspo_mm.plan.step import Plan, plan_of


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change and the plan with it."""

    # as it is written on the command line
    settings: str
    plan: Plan


def sides(plan: Plan) -> dict[str, list[Memory]]:
    """Kinds of ranks of the trainer, and of servers."""
    found: dict[str, list[Memory]] = {"trainer": [], "server": []}
    for memory in plan.memory:
        found[memory.kind.partition(",")[0]].append(memory)
    return found


def changes_that_fit(plan: Plan) -> dict[str, list[Change]]:
    """Of each side that does not fit the single changes with which it does; fastest first."""
    made = [Change(settings=settings, plan=plan_of(job)) for settings, job in single_changes(plan.job)]
    made.sort(key=lambda change: (not change.plan.fits, change.plan.step, change.plan.training.seconds))
    return {
        side: [change for change in made if all(memory.fits for memory in sides(change.plan)[side])]
        for side, memories in sides(plan).items()
        if not all(memory.fits for memory in memories)
    }


def single_changes(job: Job) -> Iterator[tuple[str, Job]]:
    """All that are tried, and the job with each."""
    policy = job.policy
    for kind in ("selective", "full"):
        if policy.recompute != kind and policy.recompute != "full":
            yield f"policy.recompute={kind}", replace(job, policy=replace(policy, recompute=kind))
    longest = job.work.lengths.prompt + job.work.lengths.longest
    for part in (2, 4):
        if (tokens := policy.micro_tokens // part) >= longest:
            yield (
                f"policy.micro_batch_tokens={tokens}",
                replace(job, policy=replace(policy, micro_tokens=tokens)),
            )
    if not policy.offload:
        yield "policy.optimizer.offload=true", replace(job, policy=replace(policy, offload=True))
    if policy.moment_bytes == 4 and policy.width == 2:
        yield "policy.optimizer.moments=bfloat16", replace(job, policy=replace(policy, moment_bytes=2))
    if policy.fp8 and not policy.fp8_weights and "language" not in policy.frozen:
        yield "policy.fp8.primary_weights=true", replace(job, policy=replace(policy, fp8_weights=True))
    for settings, sizes in _layouts(job):
        yield settings, replace(job, policy=replace(policy, sizes=sizes))
    if job.servers:
        for settings, servers in _servers(job, job.servers):
            yield settings, replace(job, servers=servers)


def is_possible(job: Job, sizes: Sizes) -> bool:
    """Whether a layout fits model, GPUs and batch."""
    try:
        sizes.check_model(job.model.dims)
    except PlanError:
        return False
    shared = sizes.ep * sizes.etp * sizes.pp
    return sizes.world_size % shared == 0 and job.work.prompts % (job.work.updates * sizes.dp) == 0


def _layouts(job: Job) -> Iterator[tuple[str, Sizes]]:
    """One axis longer, data parallelism shorter where it takes its place."""
    sizes = job.policy.sizes
    for axis in ("ep", "tp", "pp", "cp"):
        for factor in (2, 4, 8):
            size = getattr(sizes, axis) * factor
            dp = sizes.dp if axis == "ep" else sizes.dp // factor
            longer = replace(sizes, **{axis: size, "dp": dp})
            if longer.world_size == sizes.world_size and dp and is_possible(job, longer):
                yield f"policy.parallel.{axis}={size}", longer
                break


def _servers(job: Job, servers: Servers) -> Iterator[tuple[str, Servers]]:
    if servers.colocated:
        for fraction in (0.7, 0.6, 0.5, 0.4, 0.3):
            if fraction < servers.fraction:
                yield f"rollout.sglang.mem_fraction={fraction}", replace(servers, fraction=fraction)
    elif not servers.fp8:
        yield "rollout.sglang.fp8=true", replace(servers, fp8=True)
    for tp in (2 * servers.tp, 4 * servers.tp):
        if tp <= job.per_node and servers.gpus % tp == 0 and job.model.heads % tp == 0:
            number = servers.gpus // tp
            each = f"rollout.sglang.tp={tp} rollout.sglang.servers={job.per_node // tp}"
            yield each, replace(servers, tp=tp, number=number)
