"""Supervised warm start: the usual cold start before reinforcement learning.

The same data, packing and policy as `train.py`, with the cross-entropy of each prompt's reference response in
place of a rollout and its loss. Its Hugging Face folder (RUN/hf) is what a GSPO run then starts from.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any

import torch

from gspo_mm.batch import make_micro_batches
from gspo_mm.checkpoint.hf import write_hf
from gspo_mm.checkpoint.manager import RunDir
from gspo_mm.config import Config
from gspo_mm.data.processor import Processor
from gspo_mm.evaluate import evaluate
from gspo_mm.observe.metrics import MetricsWriter, read_metrics
from gspo_mm.observe.progress import Progress
from gspo_mm.observe.report import write_report
from gspo_mm.policy.canary import check_sight
from gspo_mm.policy.engine import Policy
from gspo_mm.runtime.log import setup_logging
from gspo_mm.runtime.phases import Phases
from gspo_mm.runtime.preempt import StopRequest
from gspo_mm.stages import Stages, build_stages
from gspo_mm.sync.push import push_weights
from gspo_mm.types import DataError, EncodedPrompt, GspoError, MicroBatch, Sequence

logger = logging.getLogger(__name__)


def sft(config: Config) -> dict[str, Any]:
    """Run or resume supervised training as `config.sft` says; returns what RUN/summary.json then holds."""
    run = RunDir.open(config)
    setup_logging(run.path)
    stages = build_stages(config, total_updates=config.sft.steps)
    policy, source = stages.policy, stages.source
    step = resume(run, stages)
    check_sight(policy, stages.processor, stages.canary)
    with ExitStack() as stack:
        metrics = stack.enter_context(MetricsWriter(run.path, config.observe, config.model_dump(mode="json")))
        progress = stack.enter_context(Progress(total=config.sft.steps, title=config.run.name))
        stop = stack.enter_context(StopRequest())
        phases = Phases(on_enter=progress.phase)
        metrics.rewind(step if step else -1)
        progress.start_at(step)
        while step < config.sft.steps and not stop.requested:
            with phases("data"):
                sequences = [supervised(p, stages.processor) for p in source.take(config.sft.batch_size)]
                batches = make_micro_batches(sequences, stages.processor, config.policy.micro_batch_tokens)
            with phases("update"):
                values = supervised_step(policy, batches)
            step += 1
            last = step == config.sft.steps
            if last:
                values |= held_out(stages, step, phases)
            values |= {"data/epoch": source.epoch, "data/skipped": source.skipped} | phases.take()
            metrics.write(step, values)
            progress.step(step, values)
            if last or stop.requested or (config.checkpoint.every and step % config.checkpoint.every == 0):
                run.save(step, policy.state_dict(), {"source": source.state()})
        if step < config.sft.steps:
            raise GspoError(
                f"stopped by a signal at step {step}; start again with run.resume=auto to continue"
            )
    lines = read_metrics(run.path)
    summary = {
        "accuracy_after": lines[-1].get("eval/accuracy"),
        "loss_last": lines[-1]["sft/loss"],
        "steps": step,
        "seconds": sum(line["time/step"] for line in lines),
        "skipped_samples": source.skipped,
    }
    run.write_json("summary.json", summary)
    write_hf(
        run.path / "hf",
        source=config.model.path,
        tensors=policy.export(),
        experts_layout=config.model.experts_layout,
    )
    if config.observe.report:
        write_report(run.path)
    return summary


def resume(run: RunDir, stages: Stages) -> int:
    """Load the newest checkpoint, if there is one; returns the steps already done."""
    checkpoint = run.latest()
    if checkpoint is None:
        return 0
    model_state, state = run.load(checkpoint)
    stages.policy.load_state_dict(model_state)
    stages.source.load(state["source"])
    logger.info("resuming %s after step %d", run.path, state["step"])
    return state["step"]


def supervised(prompt: EncodedPrompt, processor: Processor) -> Sequence:
    """Prompt followed by its reference response; raises DataError when the sample has none."""
    if prompt.prompt.response is None:
        raise DataError(
            f"{prompt.prompt.key} has no `response`; supervised training needs one in every sample"
        )
    return Sequence(
        name=prompt.prompt.key,
        prompt=prompt.prompt,
        token_ids=prompt.token_ids + tuple(processor.encode_response(prompt.prompt.response)),
        prompt_length=len(prompt.token_ids),
    )


def supervised_step(policy: Policy, batches: list[MicroBatch]) -> dict[str, float]:
    """One optimizer step on the mean cross-entropy (nats) of the response tokens of all micro-batches."""
    num_tokens = sum(b.num_response_tokens for b in batches)

    def loss_fn(_: int, logprobs_R: torch.Tensor, __: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        return -logprobs_R.sum() / num_tokens, {}

    stats = policy.update(batches, loss_fn)
    return {"sft/loss": stats.loss, "grad_norm": stats.grad_norm, "lr": stats.lr}


def held_out(stages: Stages, step: int, phases: Phases) -> dict[str, float]:
    """Greedy accuracy on the validation shards, through the engine and the weight sync that GSPO will use."""
    if stages.engine is None or not stages.held_out:
        return {}
    with phases("eval"):
        push_weights(stages.policy, stages.engine, version=step)
        values, _ = evaluate(
            stages.engine, stages.held_out, stages.reward, max_new_tokens=stages.sampling.max_new_tokens
        )
    return values
