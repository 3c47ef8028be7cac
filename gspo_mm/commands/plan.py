"""`gspo-mm plan`: the plan as a table to read, or as JSON."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from gspo_mm.config import Config
from gspo_mm.config.layout import PlanError
from gspo_mm.plan.advice import changes_that_fit, sides
from gspo_mm.plan.memory import Memory
from gspo_mm.plan.model import UnplannedError
from gspo_mm.plan.search import Found
from gspo_mm.plan.setup import Job, job_of
from gspo_mm.plan.step import Plan, plan_of

# a plan's memory may be wrong by so much: tools/bench/plan_memory.py
_MARGIN = 1.15
_SHOWN = 3  # changes that make a run fit
# uses of memory with a column of their own
_USES = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "log-probs",
    "vision",
    "cache",
    "cache, at least",
    "policy",
)


def formats(job: Job) -> dict[str, Plan]:
    """The job with all matrices in BF16, and with those of policy and servers in FP8; none where FP8 cannot be had."""
    if job.policy.width != 2:
        return {}
    found = {}
    for name, fp8 in (("bf16", False), ("fp8", True)):
        policy = replace(job.policy, fp8=fp8, fp8_weights=fp8 and job.policy.fp8_weights)
        # servers that share GPUs cannot have FP8 (rollout.sglang.colocate)
        servers = job.servers and replace(job.servers, fp8=fp8 and not job.servers.colocated)
        found[name] = plan_of(replace(job, policy=policy, servers=servers))
    return found


def check_fits(config: Config, *, nodes: int, rollout_nodes: int, per_node: int, gpu: str) -> None:
    """Raise PlanError for a run that cannot fit: it needs more by more than a plan may be wrong. One that may not is warned of.

    Models that cannot be planned pass.
    """
    try:
        job = job_of(config, nodes=nodes, rollout_nodes=rollout_nodes, per_node=per_node, gpu=gpu)
    except UnplannedError:
        return
    plan = plan_of(job)
    if plan.fits:
        return
    told = refusal(plan)
    if any(memory.total > _MARGIN * memory.limit for memory in plan.memory):
        raise PlanError(f"{told}; `gspo-mm plan` shows more, and GSPO_GPU= submits it all the same")
    Console(stderr=True, soft_wrap=True).print(
        f"warning: this may not fit: {told}", markup=False, highlight=False
    )


def as_json(plan: Plan, found: list[Found]) -> dict[str, Any]:
    """Bytes, seconds and tokens; null for a rollout that never ends."""
    job, training, rollout = plan.job, plan.training, plan.rollout
    return _finite({
        "model": {"name": job.model.name, "parameters": job.model.parameters, "active": job.model.active},
        "gpu": job.gpu.name,
        "gpus": {"trainer": job.policy.sizes.world_size, "servers": job.servers.gpus if job.servers else 0, "all": job.gpus},
        "layout": asdict(job.policy.sizes),
        "lengths": asdict(job.work.lengths),
        "answers": job.work.answers,
        "memory": [asdict(memory) | {"total": memory.total, "fits": memory.fits} for memory in plan.memory],
        "answers_at_once": plan.capacity.answers if plan.capacity else None,
        "seconds": _seconds(plan) | {"rollout_in_turn": rollout.in_turn if rollout else None},
        "update": training.parts,
        "mfu": training.mfu(job),
        "tokens_per_second_per_gpu": plan.tokens_per_second,
        "bottleneck": plan.bottleneck,
        "fits": plan.fits,
        "changes": {
            side: [change.settings for change in changes] for side, changes in changes_that_fit(plan).items()
        },
        "formats": {
            name: {"step": other.step, "fits": other.fits, "memory": {m.kind: m.total for m in other.memory}}
            for name, other in formats(job).items()
        },
        "search": [
            {"nodes": each.nodes, "rollout_nodes": each.rollout_nodes, "settings": each.settings, "step": each.plan.step}
            for each in found
        ],
    })  # fmt: skip


def _finite(value: Any) -> Any:
    """With null for seconds without end, which JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if value == float("inf") else value


def show(plan: Plan, found: list[Found] | None, console: Console) -> None:
    """`found`: what a search came up with; None: there was none."""
    parts: list[RenderableType] = [
        _head(plan),
        "",
        _memory(plan),
        "",
        _times(plan),
        Text(f"waits for  {plan.bottleneck}"),
    ]
    if others := formats(plan.job):
        parts += ["", _formats(others)]
    if not plan.fits:
        parts += ["", _misfit(plan)]
    if found is not None:
        parts += ["", _found(found)]
    console.print(Group(*parts))


def refusal(plan: Plan) -> str:
    """What does not fit: on each side the rank that needs most, what takes most there, and the change that helps."""
    told = []
    for side, changes in changes_that_fit(plan).items():
        worst = max(sides(plan)[side], key=lambda memory: memory.total / memory.limit)
        most = max(worst.uses, key=lambda use: worst.uses[use])
        fix = (
            f"fits with {changes[0].settings}"
            if changes
            else "no single change helps; take more nodes, or --search"
        )
        told.append(
            f"{worst.kind} needs {worst.total / 1e9:.0f} GB of the {worst.limit / 1e9:.0f} GB of a {plan.job.gpu.name}, most of "
            f"them for {most} ({worst.uses[most] / 1e9:.0f} GB): {fix}"
        )
    return "; ".join(told)


def _head(plan: Plan) -> Text:
    job, lengths = plan.job, plan.job.work.lengths
    sizes = {axis: getattr(job.policy.sizes, axis) for axis in ("tp", "pp", "cp", "ep", "dp")}
    layout = " ".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1 or axis == "dp")
    lines = [
        f"{job.model.name}: {job.model.parameters / 1e9:.1f} B parameters, {job.model.active / 1e9:.1f} B active",
        f"{job.gpus} {job.gpu.name}: {job.policy.sizes.world_size} train ({layout}){_serving(job)}",
        f"a step: {job.work.prompts} prompts x {job.work.group} answers, {job.work.updates} updates; mean tokens: prompt "
        f"{lengths.prompt:,.0f}, {lengths.image:,.0f} of them image, answer {lengths.answer:,.0f} of at most {lengths.longest:,}",
    ]
    return Text("\n".join(lines))


def _serving(job: Job) -> str:
    if job.servers is None:
        return ""
    where = "the same GPUs serve in turn" if job.servers.colocated else f"{job.servers.gpus} serve"
    return f", {where} ({job.servers.number} servers, tp{job.servers.tp})"


def _memory(plan: Plan) -> Table:
    uses = [use for use in _USES if any(memory.uses.get(use) for memory in plan.memory)]
    table = Table(box=None, pad_edge=False)
    table.add_column("GB")
    for use in [*uses, "other", "total", "of", ""]:
        table.add_column(use, justify="right", overflow="fold")
    for memory in plan.memory:
        cells = [f"{memory.uses[use] / 1e9:.1f}" if use in memory.uses else "" for use in uses]
        other = sum(size for use, size in memory.uses.items() if use not in uses)
        sizes = (f"{other / 1e9:.1f}", f"{memory.total / 1e9:.0f}", f"{memory.limit / 1e9:.0f}")
        table.add_row(memory.kind, *cells, *sizes, _verdict(memory))
    return table


def _verdict(memory: Memory) -> str:
    return "[green]fits[/]" if memory.fits else "[red]does not fit[/]"


def _seconds(plan: Plan) -> dict[str, float]:
    training = plan.training
    return {
        "rollout": plan.sampling,
        "old_logprobs": training.old,
        "reference": training.reference,
        "update": training.update,
        "push": plan.push,
        "step": plan.step,
    }


def _times(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False)
    seconds = _seconds(plan)
    columns = {name.replace("_", " "): value for name, value in seconds.items() if value or name == "step"}
    table.add_column("seconds")
    for name in [*columns, "tokens/s/GPU", "update's MFU", "at once"]:
        table.add_column(name, justify="right")
    at_once = f"{plan.rollout.at_once} answers a server" if plan.rollout else ""
    table.add_row(
        "side by side" if plan.overlaps else "in turn",
        *(_rounded(value) for value in columns.values()),
        f"{plan.tokens_per_second:,.0f}",
        f"{plan.training.mfu(plan.job):.0%}",
        at_once,
    )
    return table


def _rounded(seconds: float) -> str:
    if seconds == float("inf"):
        return "∞"
    return f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.1f}"


def _formats(others: dict[str, Plan]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("format", "step", "trainer", "server", ""):
        table.add_column(name, justify="left" if name in ("format", "") else "right")
    for name, plan in others.items():
        trainer = max(m.total for m in plan.memory if m.kind.startswith("trainer"))
        server = next((m.total for m in plan.memory if m.kind == "server"), None)
        table.add_row(
            name.upper(),
            f"{_rounded(plan.step)} s",
            f"{trainer / 1e9:.0f} GB",
            "" if server is None else f"{server / 1e9:.0f} GB",
            "[green]fits[/]" if plan.fits else "[red]does not fit[/]",
        )
    return table


def _misfit(plan: Plan) -> Text:
    lines = [refusal(plan)]
    for side, changes in changes_that_fit(plan).items():
        for change in changes[:_SHOWN]:
            then = f"{_rounded(change.plan.step)} s a step" if change.plan.fits else "but not the other side"
            lines.append(f"  {change.settings}: {side} fits, {then}")
    return Text("\n".join(lines), style="red")


def _found(found: list[Found]) -> RenderableType:
    if not found:
        return Text("search: nothing fits on that many nodes", style="red")
    table = Table(box=None, pad_edge=False)
    for name in ("search", "nodes", "for servers", "step", "settings"):
        table.add_column(name, justify="left" if name in ("search", "settings") else "right", overflow="fold")
    for number, each in enumerate(found, start=1):
        table.add_row(
            str(number), str(each.nodes), str(each.rollout_nodes), f"{each.plan.step:,.0f} s", each.settings
        )
    return table
