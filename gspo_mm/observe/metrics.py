"""One line of numbers per step: metrics.jsonl, TensorBoard and, if wanted, Weights & Biases.

metrics.jsonl is the record that everything else is drawn from. Each line is flushed to disk before the next step, a
half-written last line (the process was killed) is ignored, and a resumed run first drops the lines that are newer
than its checkpoint, so that every step stands there once. A run that starts again at step 0 keeps them in metrics-1.jsonl.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
import warnings
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from statistics import fmean, median
from typing import Any, Self

from gspo_mm.config import ObserveConfig
from gspo_mm.runtime.disk import written_whole
from gspo_mm.types import GspoError

logger = logging.getLogger(__name__)

FILE = "metrics.jsonl"

# every name that a run may write; a trailing * stands for any ending
METRICS = {
    "reward/mean": "mean reward of the step's completions",
    "reward/std": "standard deviation of the rewards of the step's completions",
    "reward/failed": "fraction of the step's completions whose reward failed",
    "reward/part/*": "mean unweighted value of one part of the reward file, where it applied",
    "accuracy": "fraction of the sampled completions that the reward file calls correct",
    "eval/accuracy": "fraction of the judged held-out prompts answered correctly, greedily",
    "eval/accuracy/*": "the same for one task",
    "eval/judged": "held-out answers that eval/accuracy is the mean of",
    "eval/reward": "mean reward of the held-out answers that were judged",
    "eval/failed": "fraction of held-out answers whose reward failed; no mean counts them",
    "loss": "loss that loss.type names, averaged over the step's updates",
    "loss/gate": "sapo: how much of the gradient the gate lets through, mean over tokens; 1 at ratio 1",
    "loss/*": "metric of the function that loss.python names, mean over tokens",
    "grad_norm": "global gradient norm before clipping",
    "updates/skipped": "updates of the step that were left out (policy.optimizer.skip)",
    "lr": "learning rate, mean over the step's updates",
    "ratio_mean": "importance ratio (sequence or token, by loss.level), mean",
    "ratio_min": "smallest importance ratio",
    "ratio_max": "largest importance ratio",
    "clip_low_fraction": "sequences (tokens by loss.level) clipped at the lower bound: without gradient, with cispo bounded",
    "clip_high_fraction": "the same at the upper bound",
    "clip_dual_fraction": "sequences bounded by loss.dual_clip",
    "clip_token_fraction": "tokens that are clipped, or in clipped sequences",
    "approx_kl": "k3 estimate of KL(old policy, policy), nats per token",
    "entropy": "entropy of the policy's next-token distribution, nats per token",
    "kl_ref": "k3 estimate of KL(policy, reference), nats per token",
    "first_update_ratio_error": "|mean ratio - 1| on the first update after a rollout; must be 0 up to rounding",
    "logprob_gap_mean": "mean |log-prob of the rollout engine - log-prob of the policy|, nats",
    "logprob_gap_max": "largest such difference",
    "near_ties/odd": "tokens of the step whose difference is far above the step's median, and that were looked at",
    "near_ties/explained": "those of them whose router, in some layer, scored two experts so alike that rounding chooses",
    "mismatch/k1": "k1 estimate of KL(rollout engine, policy): mean log-prob of the engine - of the policy, nats per token",
    "mismatch/k3": "k3 estimate of the same, never negative",
    "mismatch/ratio_mean": "ratio policy / rollout engine of a sequence (geometric mean over its tokens), mean",
    "mismatch/ratio_min": "smallest such ratio of the step's sequences",
    "mismatch/ratio_max": "largest such ratio",
    "mismatch/ratio_p01": "1st percentile of these ratios, exact over the step's sequences",
    "mismatch/ratio_p50": "their median",
    "mismatch/ratio_p99": "their 99th percentile",
    "mismatch/corrected_fraction": "sequences that loss.correction truncated, or masked",
    "length/mean": "response tokens per completion, mean",
    "length/max": "response tokens of the longest completion",
    "length/truncated_fraction": "completions cut off at rollout.sampling.max_new_tokens, or at rollout.environment.max_turns",
    "turns/mean": "turns per completion, mean",
    "turns/max": "turns of the completion that has most",
    "turns/called": "fraction of the completions to which the environment gave something back, as they called for it",
    "turns/reward_called": "their mean reward",
    "turns/reward_uncalled": "mean reward of the completions to which nothing came back",
    "turns/accuracy_called": "fraction of the completions with a call that the reward file calls correct",
    "turns/accuracy_uncalled": "the same of those without one",
    "eval/turns/*": "turns/called, reward_... and accuracy_... of the held-out answers",
    "turns/read_tokens": "tokens per completion that the environment gave back, mean",
    "turns/failed": "fraction of the completions that are left out because their environment failed",
    "turns/image_token_fraction": "completions that ended because a turn held a sampled image token",
    "turns/cached_fraction": "tokens of earlier turns that a server still had when the next one was asked for",
    "groups/live": "groups that were trained on",
    "groups/dead": "groups dropped because all their rewards are equal",
    "groups/failed": "groups dropped because their rewards failed",
    "rollout/staleness_mean": "weight versions between sampling and training on a token, mean",
    "rollout/staleness_max": "largest such difference; never above rollout.max_staleness",
    "rollout/dropped": "dead groups replaced by others (rollout.drop_dead_groups)",
    "rollout/given_up": "groups given up because enough others were finished (rollout.oversample)",
    "rollout/in_flight": "groups on the servers, or answered and waiting, while the step trained",
    "rollout/asked_again": "requests sent again: a server failed, broke an answer off or gave one that cannot be used",
    "rollout/servers_up": "servers that answered when the step ended",
    "rollout/servers_back": "servers that had been lost and came back since the last step",
    "busy/trainer": "fraction of the step that the trainer did not wait for answers",
    "busy/servers": "fraction of the step that servers had something to answer, or stood still for new weights meanwhile",
    "batch/imbalance": "estimated cost of the costliest data-parallel rank above the mean rank",
    "batch/slot_imbalance": "the same where ranks meet at every micro-batch, as with experts spread over them",
    "batch/padding": "fraction of the tokens that only rounds sequences up for context parallelism",
    "batch/micro_batches": "micro-batches per data-parallel rank and step",
    "data/epoch": "passes over the training shards, counted from 0; in a mixture those of the source furthest behind",
    "data/skipped": "unusable samples skipped so far: RUN/quarantine-train.jsonl lists them",
    "data/left_out": "sound samples that data's size limits and curriculum did not let through so far",
    "weight_version": "steps that made the weights now in the rollout engine",
    "tokens_per_second": "prompt and response tokens of the step, per second of it",
    "tokens_per_second/*": "tokens trained on per second of one phase: update, old_logprobs",
    "tflops_per_device/*": "model FLOPs of one phase per second and device, in units of 10^12",
    "mfu/*": "model-FLOPs utilisation of one phase: observe/throughput.py; on known devices only",
    "memory/peak_gib": "largest memory use of any rank so far: device memory, or resident memory on a CPU",
    "ranks/slowest": "speed of the slowest rank's device, alone, over the median rank's (observe.probe_every)",
    "moe/load_max": "tokens of the busiest expert over an even spread, worst layer; 1 is even",
    "moe/load_max/*": "the same for one decoder layer",
    "moe/unused": "fraction of all experts that got no token in the step's updates",
    "routing/agree": "fraction of routers' choices of experts that a step's updates left as they were (observe.routing_audit)",
    "routing/agree/*": "the same for one decoder layer",
    "time/pack": "seconds until micro-batches were packed, those waited for within the policy's passes included",
    "time/*": "seconds of the step spent in one phase; time/step is all of it",
    "sft/loss": "cross-entropy of the reference responses, nats per token",
}


class UnexplainedMetricWarning(UserWarning):
    """A metric that has no entry in METRICS. Tests treat it as an error; a run goes on."""


class MetricsWriter:
    """Appends a run's metrics. Use as a context manager."""

    def __init__(self, run_dir: Path, config: ObserveConfig, run_config: Mapping[str, Any]) -> None:
        """Raises GspoError when W&B is asked for and not installed."""
        self._path = run_dir / FILE
        self._unexplained: set[str] = set()
        self._tensorboard: Any = None
        self._wandb: Any = None
        if config.tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"))
        if config.wandb:
            self._wandb = _start_wandb(config.wandb, run_dir, run_config)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record a step. A name that METRICS does not explain is written all the same, with a warning."""
        for name in values:
            if not is_documented(name) and name not in self._unexplained:
                self._unexplained.add(name)
                warnings.warn(
                    f"metric {name} is not explained in METRICS", UnexplainedMetricWarning, stacklevel=2
                )
        line = {"step": step, "time": round(time.time(), 3), **values}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(dict(values), step=step)

    def amend(self, step: int, values: Mapping[str, float]) -> None:
        """Record what was found out only after the line of `step` was written, if it was; what stands there stays."""
        written = [line for line in read_metrics(self._path.parent) if line["step"] == step]
        known = {name: value for line in written for name, value in line.items() if is_documented(name)}
        self._keep(step - 1)
        self.write(step, {**values, **known})

    def rewind(self, step: int) -> None:
        """Drop what was written after `step` and say so; -1 drops everything, and what was trained stays in another file."""
        newer = [line["step"] for line in read_metrics(self._path.parent) if line["step"] > max(step, 0)]
        if newer and step <= 0:
            files = (self._path.with_name(f"metrics-{n}.jsonl") for n in count(1))
            aside = next(file for file in files if not file.exists())
            self._path.rename(aside)
            logger.warning(
                "%s held steps %d to %d of an earlier start, of which there is no checkpoint: they are kept in %s",
                self._path,
                min(newer),
                max(newer),
                aside.name,
            )
        elif newer:
            logger.warning(
                "%s: steps %d to %d are dropped and run again, as they are newer than the checkpoint",
                self._path,
                min(newer),
                max(newer),
            )
        elif step < 0 and read_metrics(self._path.parent):
            logger.info("%s held no trained step: the evaluation before training is made again", self._path)
        self._keep(step)

    def _keep(self, step: int) -> None:
        """Only the lines up to `step`."""
        kept = [line for line in read_metrics(self._path.parent) if line["step"] <= step]
        with written_whole(self._path) as file:
            file.write_text("".join(json.dumps(line) + "\n" for line in kept))


def check_run(run_dir: Path) -> None:
    """Raise GspoError unless it is the folder of a run that has begun."""
    if not (run_dir / FILE).exists():
        raise GspoError(f"{run_dir} is no run folder (no {FILE} in it)")


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All whole lines of a run, oldest first; empty when there are none."""
    path = Path(run_dir) / FILE
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]  # what follows the last line end was cut off by a crash
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError:  # a loss of power leaves zeros
            logger.warning("line %d of %s cannot be read and is passed over", number, path)
    return found


def summarize(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The run in a few numbers, from its metrics; `reward_first` and `_last` are means over 5 steps."""
    steps = [line for line in lines if line["step"] > 0]
    accuracies = [line["eval/accuracy"] for line in lines if "eval/accuracy" in line]
    rewards = [line["reward/mean"] for line in steps]
    seconds = [line["time/step"] for line in steps]
    ratio_errors = [line["first_update_ratio_error"] for line in steps if "first_update_ratio_error" in line]
    gaps = [line["logprob_gap_max"] for line in steps if "logprob_gap_max" in line]
    return {
        "accuracy_before": accuracies[0] if accuracies else None,
        "accuracy_after": accuracies[-1] if accuracies else None,
        "reward_first": fmean(rewards[:5]) if rewards else None,
        "reward_last": fmean(rewards[-5:]) if rewards else None,
        "steps": len(steps),
        "seconds": sum(line["time/step"] for line in lines),
        "seconds_per_step_median": median(seconds) if seconds else None,
        "max_ratio_error_first_update": max(ratio_errors, default=None),
        "max_abs_logprob_gap": max(gaps, default=None),
        "skipped_samples": steps[-1]["data/skipped"] if steps else 0,
        "dead_groups": sum(line["groups/dead"] for line in steps),
    }


def is_documented(name: str) -> bool:
    family, slash, _ = name.rpartition("/")
    return name in METRICS or (bool(slash) and f"{family}/*" in METRICS)


def finite(value: Any) -> float | None:
    """The value for JSON and plots: None for NaN, infinity and what is no number."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _start_wandb(project: str, run_dir: Path, run_config: Mapping[str, Any]) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]  (an extra)
    except ImportError:
        raise GspoError(
            f"observe.wandb={project} needs the wandb package; pip install 'gspo-mm[wandb]', or set it to null"
        ) from None
    return wandb.init(
        project=project, name=run_dir.name, id=run_dir.name, resume="allow", config=dict(run_config)
    )
