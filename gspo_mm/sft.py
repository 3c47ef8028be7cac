"""Supervised warm start: the usual cold start before reinforcement learning.

The same data, packing and policy as `train.py`, with the cross-entropy of each prompt's reference response in
place of a rollout and its loss. Its Hugging Face folder (RUN/hf) is what a GSPO run then starts from.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from gspo_mm.batch import answered, pack
from gspo_mm.checkpoint.distributed import load_policy, save_policy
from gspo_mm.checkpoint.manager import RunDir
from gspo_mm.config import Config
from gspo_mm.data.processor import Processor
from gspo_mm.evaluate import evaluate
from gspo_mm.families.write import export_hf
from gspo_mm.observe.health import Health, at_start
from gspo_mm.observe.metrics import MetricsWriter, read_metrics
from gspo_mm.observe.progress import Progress
from gspo_mm.observe.report import write_report
from gspo_mm.policy.canary import check_sight
from gspo_mm.policy.engine import Policy
from gspo_mm.policy.update import share_out
from gspo_mm.runtime.dist import Ranks
from gspo_mm.runtime.log import setup_logging
from gspo_mm.runtime.phases import Phases
from gspo_mm.runtime.preempt import StopRequest
from gspo_mm.stages import Stages, build_stages
from gspo_mm.types import DataError, EncodedPrompt, MicroBatch, Share, TrainSequence

logger = logging.getLogger(__name__)


def sft(config: Config, stop: StopRequest) -> dict[str, Any]:
    """Run or resume supervised training as `config.sft` says; returns what RUN/summary.json then holds."""
    ranks = Ranks()
    run = RunDir.open(config, ranks, command="sft")
    setup_logging(run.path, rank=ranks.rank)
    run.log_notes()
    for warning in at_start(config, steps=config.sft.steps):
        logger.warning(warning)
    stages = build_stages(config, ranks, total_steps=config.sft.steps, resumed=run.state, stop=stop)
    with stages.closing(), ExitStack() as stack:
        began = step = resume(run, stages)
        cursor = stages.source.state()

        def save() -> None:
            """A checkpoint of all steps that are done, if there are new ones."""
            if step > began:
                state = {"command": "sft", "source": cursor}
                run.save(step, partial(save_policy, stages.policy), state)

        stack.enter_context(run.settled(save))
        check_sight(stages.policy, stages.processor, stages.canary)
        metrics: MetricsWriter | None = None
        if ranks.main:
            metrics = stack.enter_context(
                MetricsWriter(run.path, config.observe, config.model_dump(mode="json"))
            )
            metrics.rewind(step if step else -1)
        progress = stack.enter_context(
            Progress(total=config.sft.steps, title=config.run.name, shown=ranks.main)
        )
        phases = Phases(on_enter=progress.phase)
        progress.start_at(step)
        stop.obey(ranks, f"at step {step}")
        while step < config.sft.steps and not ranks.any(stop.requested):
            values = train_step(stages, config, phases, step)
            step += 1
            source = stages.source
            cursor = source.state()
            values |= {
                "data/epoch": source.epoch,
                "data/skipped": source.skipped,
                "data/left_out": source.left_out,
            }
            values |= phases.take()
            with run.written_together(f"step {step}"):
                if metrics:
                    metrics.write(step, values)
            progress.step(step, values)
            if step == config.sft.steps or (config.checkpoint.every and step % config.checkpoint.every == 0):
                save()
            else:
                run.settle(wait=False)
        if step < config.sft.steps:
            stop.obey(ranks, f"at step {step}")
        run.settle()
        held_out(run, stages, step, phases, metrics)
        return finish(run, stages, config)


def finish(run: RunDir, stages: Stages, config: Config) -> dict[str, Any]:
    """Export the model, write the summary and draw the report; the summary is returned on every rank."""
    export_hf(stages.policy, run.path / "hf", config.model)
    summary: dict[str, Any] = {}
    with stages.ranks.together():
        if stages.ranks.main:
            lines = read_metrics(run.path)
            health = Health(eval_prompts=config.train.eval_prompts)
            for line in lines:
                health.look(line)
            summary = {
                "accuracy_after": lines[-1].get("eval/accuracy"),
                "loss_last": lines[-1]["sft/loss"],
                "steps": lines[-1]["step"],
                "seconds": sum(line["time/step"] for line in lines),
                "skipped_samples": stages.source.skipped,
                "warnings": [*at_start(config, steps=config.sft.steps), *health.finish()],
            }
            run.write_json("summary.json", summary)
            if config.observe.report:
                write_report(run.path)
    return stages.ranks.from_main(summary)


def resume(run: RunDir, stages: Stages) -> int:
    """Load the newest checkpoint, if there is one; returns the steps already done."""
    checkpoint = stages.ranks.from_main(run.latest())
    if checkpoint is None:
        return 0
    state = run.load(checkpoint, partial(load_policy, stages.policy))
    stages.source.load(state["source"])
    logger.info("resuming %s after step %d", run.path, state["step"])
    return state["step"]


def train_step(stages: Stages, config: Config, phases: Phases, step: int) -> dict[str, float]:
    """One batch of samples, dealt over the ranks, one optimizer step; `step` were done before."""
    ranks = stages.ranks
    updates: list[list[TrainSequence]] = []
    with ranks.together(), phases("data"):
        if ranks.main:
            prompts = stages.source.take(config.sft.batch_size)
            updates = [[supervised(prompt, stages.processor) for prompt in prompts]]
    with phases("share"):
        (share,), *_ = share_out(stages.policy, updates, processor=stages.processor, config=config.policy)
    with phases("pack"), ranks.together():
        batches = [pack(list(members), stages.processor) for members in share.micro_batches]
    with phases("update"):
        return supervised_step(stages.policy, share, batches, step)


def supervised(prompt: EncodedPrompt, processor: Processor) -> TrainSequence:
    """Prompt followed by its reference response; raises DataError when the sample has none."""
    if prompt.prompt.response is None:
        raise DataError(
            f"{prompt.prompt.key} has no `response`; supervised training needs one in every sample"
        )
    return answered(prompt, processor.encode_response(prompt.prompt.response))


def supervised_step(policy: Policy, share: Share, batches: list[MicroBatch], step: int) -> dict[str, float]:
    """One optimizer step on the mean cross-entropy (nats) of the response tokens of all ranks."""

    def loss_fn(_: int, logprobs_R: torch.Tensor, __: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        return -logprobs_R.sum() / share.num_tokens, {}

    stats = policy.update(batches, loss_fn, done=step + 1)
    return {"sft/loss": stats.loss, "grad_norm": stats.grad_norm, "lr": stats.lr}


def held_out(run: RunDir, stages: Stages, step: int, phases: Phases, metrics: MetricsWriter | None) -> None:
    """Greedy accuracy on the validation shards, into the last step's line, through the engine and weight sync of GSPO.

    One that was made before the run was stopped is not made again.
    """
    ranks = stages.ranks
    known = ranks.main and any(name.startswith("eval/") for name in read_metrics(run.path)[-1])
    if ranks.any(known):
        return
    with phases("eval"):
        stages.weights.push(version=step)
        with ranks.together():
            if metrics and stages.engine and stages.held_out:
                values, _ = evaluate(
                    stages.engine,
                    stages.held_out,
                    stages.reward,
                    max_new_tokens=stages.sampling.max_new_tokens,
                )
                metrics.amend(step, values)
