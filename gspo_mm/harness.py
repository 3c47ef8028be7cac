"""What every kind of training does around its steps: open the run, resume, obey signals, write lines, save, finish.

`train.py` and `sft.py` say what one step is. A step is *done* when its updates are made: what a checkpoint holds beside
the policy is what stood then, so that a fault in the step after it loses nothing (`save_whole`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, ClassVar

from gspo_mm.checkpoint.distributed import load_policy, save_policy
from gspo_mm.checkpoint.export import export_adapters, export_hf
from gspo_mm.checkpoint.manager import RunDir
from gspo_mm.config import Config
from gspo_mm.config.resume import Command
from gspo_mm.evaluate import describe_accuracy, evaluate
from gspo_mm.observe.health import Health, at_start
from gspo_mm.observe.metrics import MetricsWriter, read_metrics
from gspo_mm.observe.progress import Progress
from gspo_mm.observe.report import write_report
from gspo_mm.observe.slow import SlowRanks
from gspo_mm.policy.canary import check_sight
from gspo_mm.policy.speed import prepare_process
from gspo_mm.rollout.saved import save_rollouts
from gspo_mm.runtime.dist import Ranks
from gspo_mm.runtime.log import setup_logging
from gspo_mm.runtime.net import machine_name
from gspo_mm.runtime.phases import Phases
from gspo_mm.runtime.preempt import StopRequest
from gspo_mm.runtime.probe import matmul_rate
from gspo_mm.runtime.watchdog import Watchdog
from gspo_mm.stages import Stages, build_stages
from gspo_mm.types import GspoError, IllRunError

logger = logging.getLogger(__name__)


def run_training(kind: type[Training], config: Config, stop: StopRequest) -> dict[str, Any]:
    """Run or resume a training of `kind`; returns what RUN/summary.json then holds.

    Raises a GspoError with one sentence for anything a user can fix, and for a stop that was asked for.
    """
    prepare_process(config)
    ranks = Ranks()
    run = RunDir.open(config, ranks, command=kind.command)
    setup_logging(run.path, rank=ranks.rank)
    run.log_notes()
    for warning in kind.warnings(config):
        logger.warning(warning)
    steps = kind.steps_of(config)
    stages = build_stages(config, ranks, total_steps=steps, resumed=run.state, stop=stop)
    with stages.closing(), ExitStack() as stack:
        training = kind(config, run, stages, stack)
        stack.enter_context(run.settled(training.save_whole))
        training.resume()
        check_sight(stages.policy, stages.processor, stages.canary)
        training.compare_servers()
        stop.obey(ranks, f"at step {training.step}")
        stack.enter_context(training.progress)
        stack.enter_context(training.watchdog)
        training.begin()
        training.look_back()
        while training.step < steps and not ranks.any(stop.requested):
            training.train_step(stop)
            training.stop_if_ill()
            training.look_for_slow_ranks()
        if training.step < steps:
            stop.obey(ranks, f"at step {training.step}")
        run.settle()
        training.end()
        return training.finish()


class Training:
    """A run in progress: its stages, where it stands, and what becomes of its steps."""

    command: ClassVar[Command]

    def __init__(self, config: Config, run: RunDir, stages: Stages, stack: ExitStack) -> None:
        self.config, self.run, self.stages, self.ranks = config, run, stages, stages.ranks
        self.step = 0  # training steps done; also the weight version
        self.steps = self.steps_of(config)
        self.health = Health()
        self._ill = ""  # what rules of train.stop_on say that began to hold
        self._accuracy: float | None = None  # held-out, of the weights of `step`; on rank 0
        self._best = -1.0  # of those since the first step
        self._is_best = False
        self.metrics: MetricsWriter | None = None
        if self.ranks.main:
            values = config.model_dump(mode="json")
            self.metrics = stack.enter_context(MetricsWriter(run.path, config.observe, values))
        self.progress = Progress(total=self.steps, title=config.run.name, shown=self.ranks.main)
        self.watchdog = Watchdog(run.path, self.ranks, timeout=config.run.hang_timeout)
        self.phases = Phases(on_enter=self._enter)
        self.slow = SlowRanks()
        self._began = 0  # the step that the checkpoint was of
        self._updates = 0  # made when the last step was done
        self._state: dict[str, Any] = {}  # of that moment

    # --- what a kind of training says

    @staticmethod
    def steps_of(config: Config) -> int:
        raise NotImplementedError

    def exports(self) -> bool:
        """Whether the run ends with a Hugging Face folder."""
        return True

    @classmethod
    def warnings(cls, config: Config) -> list[str]:
        """What a user should look twice at before the run."""
        return at_start(config, steps=cls.steps_of(config))

    def train_step(self, stop: StopRequest) -> None:
        """One batch; calls `step_is_done` when its updates are made."""
        raise NotImplementedError

    def summary(self, lines: list[dict[str, Any]]) -> dict[str, Any]:
        """The run in a few numbers, from its metrics."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the policy and the place in the data, when a step is done."""
        return {}

    def late_state(self) -> dict[str, Any]:
        """The same, of the moment when the checkpoint is saved. "answers", a list, is written beside training."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` and `late_state` gave."""

    def compare_servers(self) -> None:
        """Before the first step of this process: do servers compute what the policy does?"""

    def begin(self) -> None:
        """The last thing before the first step of this process."""

    def end(self) -> None:
        """The first thing after the last step of the run."""

    # --- what becomes of a step

    def look_back(self) -> None:
        """Take in what was written before this process began."""
        for line in read_metrics(self.run.path) if self.metrics else []:
            self.health.look(line)
            if line["step"] > 0:
                self._best = max(self._best, line.get("eval/accuracy", -1.0))

    def step_is_done(self) -> None:
        self.step += 1
        self._accuracy, self._is_best = None, False
        self._note_state()

    def record(self, values: dict[str, float]) -> None:
        """Write the step's line of metrics.jsonl, with where the data stands, and show it; on rank 0."""
        assert self.metrics
        source = self.stages.source
        values = {
            **values,
            "data/epoch": source.epoch,
            "data/skipped": source.skipped,
            "data/left_out": source.left_out,
            "ranks/slowest": self.slow.slowest,
        }
        self.metrics.write(self.step, values)
        new = self.health.look(values)
        self._ill = "; ".join(f"{name}: {new[name]}" for name in self.config.train.stop_on if name in new)
        self._accuracy = values.get("eval/accuracy")
        if self._accuracy is not None and self._accuracy >= self._best:
            self._best, self._is_best = self._accuracy, True
        self.progress.step(self.step, values)

    def stop_if_ill(self) -> None:
        """Raise IllRunError on all ranks when a rule of train.stop_on began to hold. A collective where there are any."""
        if not self.config.train.stop_on or self.step == self.steps:
            return
        if said := self.ranks.from_main(self._ill):
            self.end()
            self.summarize()
            fault = IllRunError(f"train.stop_on ended the run after step {self.step}: {said}")
            fault.on_all_ranks = True
            raise fault

    def look_for_slow_ranks(self) -> None:
        """Now and then. A collective."""
        every = self.config.observe.probe_every
        if self.ranks.size > 1 and every and self.step % every == 0:
            rates, nodes = zip(*self.ranks.gather((matmul_rate(), machine_name())), strict=True)
            self.slow.look(rates, nodes)

    def keep(self) -> None:
        """Save a checkpoint when one is due, after the last step, and of the best one."""
        every = self.config.checkpoint.every
        is_best = self.config.checkpoint.keep_best and self.ranks.any(self._is_best)
        if is_best or (every and self.step % every == 0) or self.step == self.steps:
            self.save()
        else:
            self.run.settle(wait=False)

    @contextmanager
    def kept_for_later(self, faults: list[GspoError]) -> Iterator[None]:
        """A fault that all ranks share is put aside: the step is done, and its line and checkpoint come first."""
        try:
            yield
        except GspoError as fault:
            if not fault.on_all_ranks:
                raise
            faults.append(fault)

    # --- checkpoints

    def save(self) -> None:
        state = {"command": self.command, "accuracy": self._accuracy, **self._state, **self.late_state()}
        answers = state.pop("answers", [])
        self.run.save(self.step, partial(save_policy, self.stages.policy), state, answers)

    def save_whole(self) -> None:
        """A checkpoint of all steps that are done, unless a step was cut off among its updates. A collective."""
        made = self.stages.policy.optimizer.step_count - self._updates
        if made:
            logger.error(
                "step %d was cut off after %d of its updates: nothing is saved of what was trained since the last checkpoint",
                self.step + 1,
                made,
            )
        elif self.step > self._began:
            self.save()
            logger.info("what was trained until step %d is saved", self.step)

    def resume(self) -> None:
        """Continue from the newest checkpoint, if there is one: weights, optimizer, place in the data, counters."""
        checkpoint = self.ranks.from_main(self.run.latest())
        if checkpoint is not None:
            state = self.run.load(checkpoint, partial(load_policy, self.stages.policy))
            self._updates = self.stages.policy.optimizer.step_count
            self.stages.policy.optimizer.skips.load(state.get("norms", ()))
            self.stages.source.load(state["source"])
            self.load_state(state)
            self.step = state["step"]
            logger.info("resuming %s after step %d", self.run.path, self.step)
        self._began = self.step
        self._note_state()
        if self.metrics:
            self.metrics.rewind(self.step if checkpoint is not None else -1)
        self.progress.start_at(self.step)

    def _enter(self, phase: str) -> None:
        self.progress.phase(phase)
        self.watchdog.place |= {"step": self.step, "steps": self.steps, "phase": phase}

    def _note_state(self) -> None:
        self._updates = self.stages.policy.optimizer.step_count
        norms = self.stages.policy.optimizer.skips.state()
        self._state = {"source": self.stages.source.state(), "norms": norms, **self.state()}

    # --- held-out accuracy, and the end

    def evaluate(self) -> dict[str, float]:
        """Greedy accuracy on held-out prompts, on rank 0; nothing of it reaches training."""
        stages = self.stages
        metrics: dict[str, float] = {}
        with self.ranks.together(), self.phases("eval"):
            if stages.engine is not None and stages.held_out:
                metrics, answers = evaluate(
                    stages.engine,
                    stages.held_out,
                    stages.reward,
                    max_new_tokens=stages.sampling.max_new_tokens,
                    in_turns=self.config.rollout.environment is not None,
                )
                if self.config.observe.save_rollouts_every:
                    save_rollouts(self.run.path, self.step, answers, kind="held-out")
        if metrics:
            logger.info("step %d: %s", self.step, describe_accuracy(metrics))
        return metrics

    def is_evaluated(self) -> bool:
        """Whether the line of this step has an evaluation, from before the run was stopped. A collective."""
        known = False
        if self.ranks.main:
            line = (read_metrics(self.run.path) or [{"step": 0}])[-1]
            known = line["step"] != self.step or any(name.startswith("eval/") for name in line)
        return self.ranks.any(known)

    def finish(self) -> dict[str, Any]:
        """Export the model and `summarize`."""
        if self.exports():
            export_hf(self.stages.policy, self.run.path / "hf", self.config.model)
            if self.stages.policy.adapters:
                export_adapters(self.stages.policy, self.run.path / "adapter", self.config.model)
        return self.summarize()

    def summarize(self) -> dict[str, Any]:
        """Write the summary and draw the report; the summary is returned on every rank."""
        summary: dict[str, Any] = {}
        with self.ranks.together():
            if self.ranks.main:
                summary = self.summary(read_metrics(self.run.path)) | {
                    "verdict": self.health.verdict(),
                    "rules": self.health.found(),
                    "warnings": at_start(self.config, steps=self.steps),
                }
                self.run.write_json("summary.json", summary)
                if self.config.observe.report:
                    write_report(self.run.path)
        return self.ranks.from_main(summary)
