"""The loop. One step takes one batch along this line:

    WebDataset shards -> Prompt -> RolloutGroup -> + scores -> + advantages -> MicroBatch -> optimizer step
         data/          rollout/     reward/      advantage.py      batch/    policy/ + loss/     |
                           ^                                                                      |
                           +----------------------------- sync/ ----------------------------------+

and leaves a line in metrics.jsonl, now and then a checkpoint, and at the end a Hugging Face folder, a
summary and a report (harness.py). This is the only module that sees all stages.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path
from typing import Any

from gspo_mm.advantage import AdvantageResult, DeadStepGuard, group_advantages, is_dead
from gspo_mm.batch import sequences_of
from gspo_mm.checkpoint.manager import RunDir
from gspo_mm.config import Config
from gspo_mm.environment.conversation import check_faults
from gspo_mm.harness import Training, run_training
from gspo_mm.loss.gspo import check_clip_can_act
from gspo_mm.loss.table import surrogate_of
from gspo_mm.observe.answers import rollout_metrics, sampled_tokens, turn_metrics
from gspo_mm.observe.explained import note
from gspo_mm.observe.metrics import summarize
from gspo_mm.observe.throughput import peak_flops, peak_memory, throughput
from gspo_mm.policy.near_ties import NearTies
from gspo_mm.policy.routing_audit import RoutingAudit
from gspo_mm.policy.shares import share_out, split_evenly
from gspo_mm.policy.update import update_policy
from gspo_mm.reward.rewards import check_failures
from gspo_mm.rollout.engine import replace_dead, sample_groups
from gspo_mm.rollout.saved import save_rollouts
from gspo_mm.rollout.scheduler import Pause, staleness_metrics
from gspo_mm.runtime.preempt import StopRequest
from gspo_mm.runtime.seeds import derive_seed
from gspo_mm.stages import Stages, check_servers
from gspo_mm.sync.parity import table
from gspo_mm.sync.watch import GapWatch
from gspo_mm.types import GspoError, RolloutGroup, Share, TrainSequence, Work

logger = logging.getLogger(__name__)


def train(config: Config, stop: StopRequest) -> dict[str, Any]:
    """Run or resume GSPO training as `config` says: see `run_training`."""
    surrogate_of(config.loss)  # a loss of the user's is imported before anything heavy starts
    return run_training(Gspo, config, stop)


class Gspo(Training):
    """Rank 0 samples, scores and deals; every rank trains on its share."""

    command = "train"

    def __init__(self, config: Config, run: RunDir, stages: Stages, stack: ExitStack) -> None:
        super().__init__(config, run, stages, stack)
        self.next_group = 0
        self.dropped = 0  # dead groups that the step's others replace
        self.dead_steps = DeadStepGuard(config.advantage.max_dead_steps)
        self.gap_watch = (
            GapWatch(config, stages.policy, stages.servers, stages.processor)
            if config.rollout.serves
            else None
        )
        self.near_ties = NearTies(stages.policy, stages.processor)
        self.under_way = False  # whether a batch was taken since the last step was done
        self.beside = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        stack.callback(self.beside.shutdown)
        self.saved: Future[Path] | None = None  # the last rollouts that were saved, or are being

    def train_step(self, stop: StopRequest) -> None:
        """One batch through the whole pipeline, in the order of the picture above.

        A signal while answers are awaited ends it early, with nothing changed. A fault on all ranks leaves a step done,
        with its line in the metrics, or not begun.
        """
        groups = self.next_groups(stop)
        if groups is None:
            return
        self.under_way = True
        groups, result = self.judge(groups)
        shares, balance, work = self.share_out(result)
        self.stages.weights.make_room()
        gaps: dict[str, float] = {}  # of servers and policy, by sequence
        update = balance | self.update(shares, gaps) if shares else {}
        self.finish_rollouts(stop)
        self.step_is_done()
        faults: list[GspoError] = []
        with self.kept_for_later(faults):
            update |= self.hand_over()
        memory = {"memory/peak_gib": max(self.ranks.gather(peak_memory()))}
        with self.run.written_together(f"step {self.step}"):
            if self.ranks.main:
                sampled = rollout_metrics(groups, result) | self.staleness(groups)
                if self.config.rollout.environment:
                    sampled |= turn_metrics(groups)
                self.write_line(sampled | update | memory, work, groups)
                self.save_rollouts(groups, result)
        for fault in faults:
            raise fault
        # after the step's line is on disk, so that a resumed run misses none; its time counts in the next line
        with self.phases("checkpoint"):
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
        if not config.rollout.drop_dead_groups:
            return self.answers(config.rollout.prompts_per_step)
        groups, self.dropped = replace_dead(
            lambda count, again: stages.reward.score_groups(self.answers(count, again)),
            lambda group: is_dead(group, config.advantage),
            wanted=config.rollout.prompts_per_step,
        )
        return groups

    def answers(self, count: int, again: int = 0) -> list[RolloutGroup]:
        """The embedded engine's to the next `count` prompts; the step asked for others `again` times before."""
        assert self.stages.engine is not None
        labels = ("rollout", self.step, *([again] if again else []))
        groups = sample_groups(
            self.stages.engine,
            self.stages.source.take(count),
            group_size=self.config.rollout.group_size,
            sampling=self.stages.sampling,
            seed=derive_seed(self.config.run.seed, *labels),
            first_id=self.next_group,
        )
        self.next_group += len(groups)
        return groups

    def judge(self, groups: list[RolloutGroup]) -> tuple[list[RolloutGroup], AdvantageResult]:
        """On rank 0 the groups with scores, and those of them with advantages that are worth training on."""
        result = group_advantages((), self.config.advantage)
        with self.ranks.together():
            if self.ranks.main:
                with self.phases("reward"):
                    groups = self.score(groups)
                environment = self.config.rollout.environment
                result = group_advantages(
                    groups,
                    self.config.advantage,
                    drop_failed=self.config.reward.on_failure == "drop_group",
                    drop_faulty=environment is not None and environment.on_failure == "drop_group",
                )
                self.dead_steps.update(len(result.live))
        return groups, result

    def score(self, groups: list[RolloutGroup]) -> list[RolloutGroup]:
        if not all(group.scores for group in groups):  # servers' answers were scored as they came
            groups = self.stages.reward.score_groups(groups)
        if environment := self.config.rollout.environment:
            check_faults(groups, environment, what=f"step {self.step + 1}")
        check_failures(
            groups, self.config.reward, what=f"step {self.step + 1}", logged=self.stages.reward.logged
        )
        return groups

    def share_out(self, result: AdvantageResult) -> tuple[list[Share], dict[str, float], Work]:
        """This rank's share of each of the step's updates."""
        updates = sequences_of_updates(result, self.config.train.updates_per_batch)
        with self.phases("share"):
            return share_out(
                self.stages.policy, updates, processor=self.stages.processor, config=self.config.policy
            )

    def update(self, shares: list[Share], gaps: dict[str, float]) -> dict[str, float]:
        """All updates of the step; whether routers still choose the same experts after them, when that is due."""
        stages, every = self.stages, self.config.observe.routing_audit
        audit = None
        if every and (self.step + 1) % every == 0:
            with self.phases("routing_audit"):
                audit = RoutingAudit.of(stages.policy, shares[0], stages.processor)
        metrics = update_policy(
            stages.policy,
            shares,
            processor=stages.processor,
            reference=stages.reference,
            config=self.config,
            phases=self.phases,
            step=self.step,
            gaps=gaps,
            ties=self.near_ties,
        )
        if self.ranks.main:
            note(self.run.path, self.step + 1, self.near_ties.said)
        if audit:
            with self.phases("routing_audit"):
                metrics |= audit.compare()
        return metrics

    def finish_rollouts(self, stop: StopRequest) -> None:
        """Answers that were begun with the weights of before, where rollout.on_update says so."""
        if self.stages.scheduler and self.config.rollout.on_update == "finish":
            with self.phases("rollout"):
                self.stages.scheduler.finish(stopping=lambda: stop.requested)

    def hand_over(self) -> dict[str, float]:
        """The step's weights to the engine; how well they answer when that is due."""
        with self.phases("sync"):
            self.stages.weights.push(version=self.step)
        return self.evaluate() if self.is_evaluation_step() else {}

    def is_evaluation_step(self) -> bool:
        every = self.config.train.eval_every
        return self.step == self.steps or bool(every and self.step % every == 0)

    def staleness(self, groups: list[RolloutGroup]) -> dict[str, float]:
        """How old the tokens were when they were trained on, and what else scheduler and servers did."""
        scheduler, servers = self.stages.scheduler, self.stages.servers
        if scheduler is None or servers is None:
            return {"rollout/dropped": self.dropped} if self.config.rollout.drop_dead_groups else {}
        return staleness_metrics(groups, self.step - 1) | scheduler.take_counts() | servers.take_counts()

    def write_line(self, metrics: dict[str, float], work: Work, groups: list[RolloutGroup]) -> None:
        """The step's line of metrics.jsonl."""
        times = self.phases.take()
        if self.stages.servers:
            metrics["busy/trainer"] = 1 - times.get("time/rollout", 0.0) / times["time/step"]
            metrics["busy/servers"] = self.stages.servers.take_busy()
        peak = peak_flops(fp8=self.config.policy.fp8.recipe is not None)
        self.record(
            {
                **metrics,
                **times,
                **throughput(work, times, devices=self.ranks.size, peak=peak),
                "tokens_per_second": sampled_tokens(groups) / times["time/step"],
                "weight_version": self.step,
            }
        )

    def save_rollouts(self, groups: list[RolloutGroup], result: AdvantageResult) -> None:
        """When they are due, beside training: there can be gigabytes of them."""
        observe = self.config.observe
        if observe.save_rollouts_every and (self.step - 1) % observe.save_rollouts_every == 0:
            self.await_rollouts()
            trained = {group.id: group for group in result.live}
            chosen = [trained.get(group.id, group) for group in groups][: observe.rollouts_per_save or None]
            self.saved = self.beside.submit(save_rollouts, self.run.path, self.step, chosen)

    def await_rollouts(self) -> None:
        """Raises what saving them raised."""
        if self.saved:
            self.saved.result()
        self.saved = None

    # --- around the steps

    @staticmethod
    def steps_of(config: Config) -> int:
        return config.train.steps

    def exports(self) -> bool:
        return self.config.checkpoint.export_hf

    @classmethod
    def warnings(cls, config: Config) -> list[str]:
        clip = check_clip_can_act(config.loss, config.train.updates_per_batch)
        return [*filter(None, [clip]), *super().warnings(config)]

    def compare_servers(self) -> None:
        """The policy's weights to the engine; servers must then compute what the policy computes."""
        self.stages.weights.push(version=self.step)
        if self.gap_watch:
            logger.info("servers against the policy:\n%s", table(check_servers(self.config, self.stages)))

    def begin(self) -> None:
        """Evaluate before the first step; or after the last one, when its evaluation was due and servers were lost."""
        is_due = self.step == 0 or self.is_evaluation_step()
        metrics = self.evaluate() if is_due and not self.is_evaluated() else {}
        times = self.phases.take()
        if metrics and self.metrics:
            self.metrics.amend(self.step, {**metrics, **times})
        if self.stages.servers:
            self.stages.servers.take_busy()

    def step_is_done(self) -> None:
        super().step_is_done()
        self.under_way = False

    def end(self) -> None:
        with self.run.written_together(f"the rollouts of step {self.step}"):
            self.await_rollouts()

    def state(self) -> dict[str, Any]:
        return {"next_group": self.next_group, "dead_steps": self.dead_steps.state()}

    def late_state(self) -> dict[str, Any]:
        if self.stages.scheduler is None:
            return {"scheduler": None}
        state = self.stages.scheduler.state(untrained=self.under_way)
        answers = [group.pop("answers") for group in state["pending"]]
        return {"scheduler": state, "answers": answers if any(answers) else []}

    def load_state(self, state: dict[str, Any]) -> None:
        if self.stages.scheduler and state.get("scheduler"):
            pending = state["scheduler"]["pending"]
            for group, answers in zip_longest(pending, state.get("answers", [])):
                group.setdefault("answers", answers)  # checkpoints of before have them there
            self.stages.scheduler.load(state["scheduler"])
        self.dead_steps.load(state["dead_steps"])
        self.next_group = state["next_group"]

    def summary(self, lines: list[dict[str, Any]]) -> dict[str, Any]:
        return summarize(lines)


def sequences_of_updates(result: AdvantageResult, updates: int) -> list[list[TrainSequence]]:
    """The sequences of each optimizer step: the live groups, in order, spread over the updates."""
    return [sequences_of(part) for part in split_evenly(result.live, updates)] if result.live else []
