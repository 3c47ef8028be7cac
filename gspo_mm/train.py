"""The loop. One step takes one batch along this line:

    WebDataset shards -> Prompt -> RolloutGroup -> + scores -> + advantages -> MicroBatch -> optimizer step
         data/          rollout/     reward/      advantage.py      batch/    policy/ + loss/     |
                           ^                                                                      |
                           +----------------------------- sync/ ----------------------------------+

and leaves a line in metrics.jsonl, now and then a checkpoint, and at the end a Hugging Face folder, a
summary and a report. This is the only module that sees all stages.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from functools import partial
from statistics import fmean, median, pstdev
from typing import Any

from gspo_mm.advantage import AdvantageResult, DeadStepGuard, group_advantages
from gspo_mm.batch import sequences_of, split_evenly
from gspo_mm.checkpoint.distributed import load_policy, save_policy
from gspo_mm.checkpoint.manager import RunDir
from gspo_mm.config import Config
from gspo_mm.evaluate import describe_accuracy, evaluate
from gspo_mm.families.write import export_hf
from gspo_mm.loss.gspo import check_clip_can_act
from gspo_mm.observe.health import Health, at_start
from gspo_mm.observe.metrics import MetricsWriter, read_metrics
from gspo_mm.observe.progress import Progress
from gspo_mm.observe.report import write_report
from gspo_mm.observe.rollouts import save_rollouts
from gspo_mm.observe.throughput import peak_flops, peak_memory, throughput
from gspo_mm.policy.canary import check_sight
from gspo_mm.policy.update import share_out, update_policy
from gspo_mm.reward.sources import check_failures, failed_fraction
from gspo_mm.rollout.engine import sample_groups
from gspo_mm.rollout.scheduler import Pause, staleness_metrics
from gspo_mm.rollout.sglang import SGLangEngine
from gspo_mm.runtime.dist import Ranks
from gspo_mm.runtime.log import setup_logging
from gspo_mm.runtime.phases import Phases
from gspo_mm.runtime.preempt import StopRequest
from gspo_mm.runtime.seeds import derive_seed
from gspo_mm.stages import Stages, build_stages, check_servers
from gspo_mm.sync.parity import table
from gspo_mm.sync.watch import GapWatch
from gspo_mm.types import GspoError, RolloutGroup, TrainSequence, Work

logger = logging.getLogger(__name__)


def train(config: Config, stop: StopRequest) -> dict[str, Any]:
    """Run or resume GSPO training as `config` says; returns what RUN/summary.json then holds.

    Raises a GspoError with one sentence for anything a user can mend, and for a stop that was asked for.
    """
    ranks = Ranks()
    run = RunDir.open(config, ranks, command="train")
    setup_logging(run.path, rank=ranks.rank)
    run.log_notes()
    clip = check_clip_can_act(config.loss, config.train.updates_per_batch)
    for warning in filter(None, (clip, *at_start(config, steps=config.train.steps))):
        logger.warning(warning)
    stages = build_stages(config, ranks, total_steps=config.train.steps, resumed=run.state, stop=stop)
    with stages.closing(), ExitStack() as stack:
        loop = Loop(config, run, stages, stack)
        stack.enter_context(run.settled(loop.save_whole))
        loop.resume()
        check_sight(stages.policy, stages.processor, stages.canary)
        loop.bring_first_weights()
        stop.obey(ranks, f"at step {loop.step}")
        loop.evaluate_before_training()
        while loop.step < config.train.steps and not ranks.any(stop.requested):
            loop.train_step(stop)
        if loop.step < config.train.steps:
            stop.obey(ranks, f"at step {loop.step}")
        return loop.finish()


class Loop:
    """A run in progress: the stages, where it stands, and what one step does."""

    def __init__(self, config: Config, run: RunDir, stages: Stages, stack: ExitStack) -> None:
        self.config = config
        self.run = run
        self.stages = stages
        self.step = 0  # training steps done; also the weight version
        self.next_group = 0
        self.dead_steps = DeadStepGuard(config.advantage.max_dead_steps)
        self.health = Health(eval_prompts=config.train.eval_prompts)
        has_servers = config.rollout.engine == "sglang" and not config.rollout.replay
        self.gap_watch = (
            GapWatch(config, stages.policy, stages.engine, stages.processor) if has_servers else None
        )
        self.ranks = stages.ranks
        self.metrics: MetricsWriter | None = None
        if self.ranks.main:
            self.metrics = stack.enter_context(
                MetricsWriter(run.path, config.observe, config.model_dump(mode="json"))
            )
        self.progress = Progress(total=config.train.steps, title=config.run.name, shown=self.ranks.main)
        self.phases = Phases(on_enter=self.progress.phase)
        self._stack = stack
        self.began = 0  # the step that the checkpoint was of
        # of the last step that is done: see `note_whole`
        self.updates = 0
        self.cursor: dict[str, Any] = {}
        self.under_way = False  # whether a batch was taken since

    def train_step(self, stop: StopRequest) -> None:
        """One batch through the whole pipeline, in the order of the picture above.

        Rank 0 samples, scores and deals; every rank trains on its share. A signal while answers are awaited ends it
        early, with nothing changed. A fault on all ranks leaves a step done, with its line in the metrics, or not
        begun: see `save_whole`.
        """
        stages, config, phases = self.stages, self.config, self.phases
        groups = self.next_groups(stop)
        if groups is None:
            return
        self.under_way = True
        result = group_advantages((), config.advantage)
        updates: list[list[TrainSequence]] = []
        with self.ranks.together():
            if self.ranks.main:
                with phases("reward"):
                    groups = self.score(groups)
                result = group_advantages(
                    groups, config.advantage, drop_failed=config.reward.on_failure == "drop_group"
                )
                self.dead_steps.update(len(result.live))
                updates = sequences_of_updates(result, config.train.updates_per_batch)
        with phases("share"):
            shares, balance, work = share_out(
                stages.policy, updates, processor=stages.processor, config=config.policy
            )
        stages.weights.make_room()
        update: dict[str, float] = {}
        gaps: dict[str, float] = {}  # of servers and policy, by sequence
        if shares:
            update = balance | update_policy(
                stages.policy,
                shares,
                processor=stages.processor,
                reference=stages.reference,
                config=config,
                phases=phases,
                step=self.step,
                gaps=gaps,
            )
        if stages.scheduler and config.rollout.on_update == "finish":
            with phases("rollout"):
                stages.scheduler.finish(stopping=lambda: stop.requested)
        self.step += 1
        self.note_whole()
        evaluation, fault = self.hand_over()
        memory = {"memory/peak_gib": max(self.ranks.gather(peak_memory()))}
        with self.run.written_together(f"step {self.step}"):
            if self.ranks.main:
                sampled = rollout_metrics(groups, result) | self.staleness(groups)
                self.record({**sampled, **update, **evaluation, **memory}, work, sampled_tokens(groups))
                self.save_rollouts(groups, result)
        if fault:
            raise fault
        # after the step's line is on disk, so that a resumed run misses none; its time counts in the next line
        with phases("checkpoint"):
            self.keep()
        if self.gap_watch:
            self.gap_watch.check(self.step, groups, gaps)

    def next_groups(self, stop: StopRequest) -> list[RolloutGroup] | None:
        """The step's groups on rank 0, an empty list on other ranks; None when a signal came first.

        A server that comes back meanwhile is brought the weights that the others sample with.
        """
        while True:
            found: list[RolloutGroup] | Pause = []
            with self.ranks.together(), self.phases("rollout"):
                if self.ranks.main:
                    found = self.sample(stop)
            pause = self.ranks.from_main(found if isinstance(found, Pause) else None)
            if pause is None:
                assert not isinstance(found, Pause)
                return found
            if pause is Pause.STOP:
                return None
            with self.phases("sync"):
                self.stages.weights.push(version=self.step)

    def sample(self, stop: StopRequest) -> list[RolloutGroup] | Pause:
        """Answers from servers, from the embedded engine, or from a saved run when replaying."""
        stages, config = self.stages, self.config
        if stages.replay:
            return stages.replay.groups(self.step)
        assert stages.engine is not None
        assert stages.engine.version == self.step, "the engine samples with the weights of the last step"
        if stages.scheduler:
            return stages.scheduler.next_batch(self.step, stopping=lambda: stop.requested)
        groups = sample_groups(
            stages.engine,
            stages.source.take(config.rollout.prompts_per_step),
            group_size=config.rollout.group_size,
            sampling=stages.sampling,
            seed=derive_seed(config.run.seed, "rollout", self.step),
            first_id=self.next_group,
        )
        self.next_group += len(groups)
        return groups

    def score(self, groups: list[RolloutGroup]) -> list[RolloutGroup]:
        if not all(group.scores for group in groups):  # servers' answers were scored as they came
            groups = self.stages.reward.score_groups(groups)
        check_failures(groups, self.config.reward, what=f"step {self.step + 1}", told=self.stages.reward.told)
        return groups

    def staleness(self, groups: list[RolloutGroup]) -> dict[str, float]:
        """How old the tokens were when they were trained on, and what else scheduler and servers did."""
        scheduler, engine = self.stages.scheduler, self.stages.engine
        if scheduler is None:
            return {}
        assert isinstance(engine, SGLangEngine)
        return staleness_metrics(groups, self.step - 1) | scheduler.take_counts() | engine.take_counts()

    def hand_over(self) -> tuple[dict[str, float], GspoError | None]:
        """The step's weights to the engine, and how well they answer when that is due.

        A fault that all ranks share is returned: the step is done all the same.
        """
        try:
            with self.phases("sync"):
                self.stages.weights.push(version=self.step)
            return (self.evaluate() if self.is_evaluation_step() else {}), None
        except GspoError as fault:
            if not fault.on_all_ranks:
                raise
            return {}, fault

    def is_evaluation_step(self) -> bool:
        every = self.config.train.eval_every
        return self.step == self.config.train.steps or bool(every and self.step % every == 0)

    def evaluate(self) -> dict[str, float]:
        """Greedy accuracy on held-out prompts, on rank 0; nothing of it reaches training."""
        stages = self.stages
        metrics: dict[str, float] = {}
        with self.ranks.together(), self.phases("eval"):
            if stages.engine is not None and stages.held_out:
                metrics, _ = evaluate(
                    stages.engine,
                    stages.held_out,
                    stages.reward,
                    max_new_tokens=stages.sampling.max_new_tokens,
                )
        if not metrics:
            return {}
        logger.info("step %d: %s", self.step, describe_accuracy(metrics))
        return metrics

    def bring_first_weights(self) -> None:
        """The policy's weights to the engine; servers must then compute what the policy computes."""
        self.stages.weights.push(version=self.step)
        if self.gap_watch:
            logger.info("servers against the policy:\n%s", table(check_servers(self.config, self.stages)))

    def evaluate_before_training(self) -> None:
        """Before the first step; or after the last one, when its evaluation was due and servers were lost."""
        self._stack.enter_context(self.progress)
        owed = False
        if self.ranks.main and (self.step == 0 or self.is_evaluation_step()):
            line = (read_metrics(self.run.path) or [{"step": 0}])[-1]
            owed = line["step"] == self.step and not any(name.startswith("eval/") for name in line)
        metrics = self.evaluate() if self.ranks.from_main(owed) else {}
        times = self.phases.take()
        if metrics and self.metrics:
            self.metrics.amend(self.step, {**metrics, **times})
        for line in read_metrics(self.run.path) if self.metrics else []:
            self.health.look(line)
        if isinstance(self.stages.engine, SGLangEngine):
            self.stages.engine.busy.take()

    def record(self, metrics: dict[str, float], work: Work, tokens: int) -> None:
        """Write the step's line of metrics.jsonl and show it; `tokens` were sampled or read in it."""
        source, engine = self.stages.source, self.stages.engine
        times = self.phases.take()
        if isinstance(engine, SGLangEngine):
            metrics["busy/trainer"] = 1 - times.get("time/rollout", 0.0) / times["time/step"]
            metrics["busy/servers"] = engine.busy.take()
        metrics = {
            **metrics,
            **times,
            **throughput(
                work,
                times,
                devices=self.ranks.size,
                peak=peak_flops(fp8=self.config.policy.fp8.recipe is not None),
            ),
            "tokens_per_second": tokens / times["time/step"],
            "data/epoch": source.epoch,
            "data/skipped": source.skipped,
            "data/left_out": source.left_out,
            "weight_version": self.step,
        }
        assert self.metrics
        self.metrics.write(self.step, metrics)
        self.health.look(metrics)
        self.progress.step(self.step, metrics)

    def save_rollouts(self, groups: list[RolloutGroup], result: AdvantageResult) -> None:
        """When they are due."""
        observe = self.config.observe
        if observe.save_rollouts_every and (self.step - 1) % observe.save_rollouts_every == 0:
            trained = {group.id: group for group in result.live}
            chosen = [trained.get(group.id, group) for group in groups]
            save_rollouts(self.run.path, self.step, chosen[: observe.rollouts_per_save or None])

    def keep(self) -> None:
        """Save a checkpoint when one is due, and after the last step."""
        every = self.config.checkpoint.every
        if (every and self.step % every == 0) or self.step == self.config.train.steps:
            self.save()
        else:
            self.run.settle(wait=False)

    def note_whole(self) -> None:
        """A step is done: what a checkpoint holds beside the policy is what stands here, until the next is done."""
        self.updates = self.stages.policy.optimizer.step_count
        self.under_way = False
        self.cursor = {
            "next_group": self.next_group,
            "source": self.stages.source.state(),
            "dead_steps": self.dead_steps.state(),
        }

    def save_whole(self) -> None:
        """A checkpoint of all steps that are done, unless a step was cut off among its updates. A collective."""
        made = self.stages.policy.optimizer.step_count - self.updates
        if made:
            logger.error(
                "step %d was cut off after %d of its updates: nothing is saved of what was trained since the last checkpoint",
                self.step + 1,
                made,
            )
        elif self.step > self.began:
            self.save()
            logger.info("what was trained until step %d is saved", self.step)

    def save(self) -> None:
        scheduler = self.stages.scheduler
        pending = scheduler.state(untrained=self.under_way) if scheduler else None
        state = {"command": "train", **self.cursor, "scheduler": pending}
        self.run.save(self.step, partial(save_policy, self.stages.policy), state)

    def resume(self) -> None:
        """Continue from the newest checkpoint, if there is one: weights, optimizer, data cursor, counters."""
        checkpoint = self.ranks.from_main(self.run.latest())
        if checkpoint is not None:
            state = self.run.load(checkpoint, partial(load_policy, self.stages.policy))
            self.stages.source.load(state["source"])
            if self.stages.scheduler and state.get("scheduler"):
                self.stages.scheduler.load(state["scheduler"])
            self.dead_steps.load(state["dead_steps"])
            self.step, self.next_group = state["step"], state["next_group"]
            logger.info("resuming %s after step %d", self.run.path, self.step)
        self.began = self.step
        self.note_whole()
        if self.metrics:
            self.metrics.rewind(self.step if checkpoint is not None else -1)
        self.progress.start_at(self.step)

    def finish(self) -> dict[str, Any]:
        """Export the model, write the summary and draw the report; the summary is returned on every rank."""
        self.run.settle()
        if self.config.checkpoint.export_hf:
            export_hf(self.stages.policy, self.run.path / "hf", self.config.model)
        summary: dict[str, Any] = {}
        with self.ranks.together():
            if self.ranks.main:
                warnings = [*at_start(self.config, steps=self.config.train.steps), *self.health.finish()]
                summary = summarize(read_metrics(self.run.path)) | {"warnings": warnings}
                self.run.write_json("summary.json", summary)
                if self.config.observe.report:
                    write_report(self.run.path)
        return self.ranks.from_main(summary)


def sequences_of_updates(result: AdvantageResult, updates: int) -> list[list[TrainSequence]]:
    """The sequences of each optimizer step: the live groups, in order, spread over the updates."""
    return [sequences_of(part) for part in split_evenly(result.live, updates)] if result.live else []


def rollout_metrics(groups: list[RolloutGroup], result: AdvantageResult) -> dict[str, float]:
    """What the sampled answers of a step look like."""
    completions = [c for g in groups for c in g.completions]
    scores = [s for g in groups for s in g.scores if s.error is None]
    lengths = [len(c.token_ids) for c in completions]
    values = [s.value for s in scores]
    judged = [s.accuracy for s in scores if s.accuracy is not None]
    names = sorted({name for s in scores for name in s.parts})
    parts = {name: fmean(s.parts[name] for s in scores if name in s.parts) for name in names}
    return {
        "reward/mean": fmean(values) if values else 0.0,
        "reward/std": pstdev(values) if values else 0.0,
        **{f"reward/part/{name}": value for name, value in parts.items()},
        **({"accuracy": fmean(judged)} if judged else {}),
        "length/mean": fmean(lengths),
        "length/max": max(lengths),
        "length/truncated_fraction": fmean(c.finish == "length" for c in completions),
        "groups/live": len(result.live),
        "groups/dead": result.dead,
        "groups/failed": result.failed,
        "reward/failed": failed_fraction(groups),
    }


def sampled_tokens(groups: list[RolloutGroup]) -> int:
    """Tokens of all answers, with their prompts and what came back."""
    return sum(
        len(group.prompt_ids) + len(c.token_ids) + sum(len(o.token_ids) for o in c.observations)
        for group in groups
        for c in group.completions
    )


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
