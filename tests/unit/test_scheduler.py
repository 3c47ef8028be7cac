"""Whatever order answers come in: whole batches, none too stale, no prompt lost or twice, and never a deadlock."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_mm.config import RolloutConfig
from gspo_mm.rollout import scheduler as module
from gspo_mm.rollout.scheduler import Pause, Scheduler, staleness, staleness_metrics
from gspo_mm.types import Completion, EncodedPrompt, Finish, Prompt, RolloutGroup, SamplingParams


@pytest.fixture(autouse=True, scope="module")
def _no_waiting() -> Iterator[None]:
    """Nothing happens beside the test's own thread, so there is nothing to wait for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_POLL", 0.0)
        yield


class Numbers:
    """A source of prompts 0, 1, 2, ..."""

    def __init__(self) -> None:
        self.next = 0

    def take(self, count: int) -> list[EncodedPrompt]:
        taken = range(self.next, self.next + count)
        self.next += count
        return [
            EncodedPrompt(
                prompt=Prompt(key=str(n), messages=(), images=(), answer=n, task=""),
                text="",
                token_ids=(n,),
                pixel_values=None,
                image_grid_thw=None,
            )
            for n in taken
        ]

    def state(self) -> dict[str, Any]:
        return {"next": self.next}

    def load(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


@dataclass(eq=False)
class Job:
    number: int  # of the prompt
    version: int  # at its start
    future: Future[list[Completion]]


class World:
    """Servers and trainer: a clock of versions, answers that end when they are told to, and a count of everything."""

    def __init__(self, config: RolloutConfig, *, dead: Callable[[int], bool] = lambda _: False) -> None:
        self.config = config
        self.dead = dead
        self.version = 0
        self.jobs: list[Job] = []
        self.handed: Counter[int] = Counter()
        self.ids: list[int] = []
        self.given_up_at: dict[int, int] = {}
        self.dropped = 0
        self.dropped_for_batch = 0
        self.on_wait: Callable[[], bool] = self._nothing_may_be_missing
        self.restart(None)

    def restart(self, state: dict[str, Any] | None) -> None:
        """A new scheduler, as after a crash; what ran is lost."""
        if state is not None:
            self.scheduler.close()
            self.jobs.clear()
        self.source = Numbers()
        self.scheduler = Scheduler(
            self.config,
            self.source,
            self,
            score=lambda group: group,
            is_dead=lambda group: self.dead(group.prompt_ids[0]),
            sampling=SamplingParams(),
        )
        if state is not None:
            self.scheduler.load(json.loads(json.dumps(state)))

    def start(
        self, prompt: EncodedPrompt, group_size: int, sampling: SamplingParams
    ) -> Future[list[Completion]]:
        job = Job(prompt.token_ids[0], self.version, Future())
        self.jobs.append(job)
        job.future.add_done_callback(lambda future: self._note_end(job, future))
        return job.future

    def wants_weights(self) -> bool:
        """Asked whenever there is no batch yet: the moment for something to happen."""
        self.count()
        return self.on_wait()

    def running(self) -> list[Job]:
        return [job for job in self.jobs if not job.future.done()]

    def finish(self, job: Job) -> None:
        """Its answers: one that went on over all updates since its start, one sampled just now."""
        job.future.set_result([completion(job.version, self.version), completion(self.version, self.version)])

    def next_batch(self, *, stop: Callable[[], bool] = lambda: False) -> list[RolloutGroup] | Pause:
        found = self.scheduler.next_batch(self.version, stopping=stop)
        self.count()
        if not isinstance(found, Pause):
            self.handed.update(group.prompt_ids[0] for group in found)
            self.ids += [group.id for group in found]
            self.dropped_for_batch = 0
        return found

    def update(self) -> None:
        """The trainer trained on the batch."""
        self.version += 1

    def count(self) -> None:
        dropped = int(self.scheduler.take_counts()["rollout/dropped"])
        self.dropped += dropped
        self.dropped_for_batch += dropped

    def pending(self) -> list[int]:
        """Prompts that a scheduler resumed now would start first."""
        state = self.scheduler.state()
        return [state["source"]["next"] + place for place in state["pending"]]

    def _note_end(self, job: Job, future: Future[list[Completion]]) -> None:
        if future.cancelled() and job in self.jobs:
            assert job.number not in self.given_up_at, f"prompt {job.number} was given up twice"
            self.given_up_at[job.number] = self.version

    def _nothing_may_be_missing(self) -> bool:
        raise AssertionError("the scheduler waits although the test has finished what a batch needs")


def completion(first: int, last: int) -> Completion:
    versions = tuple(range(first, last + 1))
    zeros = (0,) * len(versions)
    return Completion(token_ids=zeros, logprobs=zeros, versions=versions, finish=Finish.STOP, text="")


def rollout(**settings: Any) -> RolloutConfig:
    return RolloutConfig(engine="sglang", group_size=2, **settings)


CONFIGS = st.builds(
    rollout,
    prompts_per_step=st.integers(1, 5),
    max_staleness=st.integers(0, 3),
    oversample=st.sampled_from([1.0, 1.2, 1.5, 2.0]),
    drop_dead_groups=st.booleans(),
)


class Run:
    """A whole run in which `random` decides what happens when; checks all along."""

    def __init__(self, config: RolloutConfig, random: Random, dead_share: float) -> None:
        self.random = random
        # some prompts are slow wherever they are asked, and dead or alive for good
        self.pace = [random.choice([0.0, 1.0, random.random()]) for _ in range(4000)]
        verdicts = [random.random() < dead_share for _ in range(4000)]
        self.world = World(config, dead=verdicts.__getitem__)
        self.world.on_wait = self.something_happens
        self.fickle = random.random()  # how often answers come out of their order
        self.pauses = random.choice([0.0, 0.0, 0.1])
        self.stuck = 0

    def something_happens(self) -> bool:
        self.check_capacity()
        self.answer(self.random.randrange(3))
        self.stuck = 0 if self.world.running() else self.stuck + 1
        assert self.stuck < 50, "every open group is finished, and still there is no batch"
        return self.random.random() < self.pauses

    def answer(self, count: int) -> None:
        for _ in range(count):
            if running := self.world.running():
                if self.random.random() < self.fickle:
                    self.world.finish(self.random.choice(running))
                else:
                    self.world.finish(min(running, key=lambda job: self.pace[job.number]))

    def check_capacity(self) -> None:
        world, config = self.world, self.world.config
        size = config.prompts_per_step
        kept = [job for job in world.jobs if not job.future.cancelled()]
        before_restarts = sum(world.handed.values()) - self.handed_by_these()
        limit = (config.max_staleness + world.version) * size + math.ceil(config.oversample * size)
        assert len(kept) + before_restarts - self.dropped_here() <= limit

    def handed_by_these(self) -> int:
        return sum(self.world.handed[job.number] > 0 for job in self.world.jobs if not job.future.cancelled())

    def dropped_here(self) -> int:
        return self.world.dropped - self.dropped_before

    dropped_before = 0

    def batch(self) -> None:
        world, config = self.world, self.world.config
        stop = lambda: self.random.random() < self.pauses
        while isinstance(groups := world.next_batch(stop=stop), Pause):
            assert self.pauses
            if self.random.random() < 0.3:
                self.restart()
        assert len(groups) == config.prompts_per_step
        assert max(staleness(group, world.version) for group in groups) <= config.max_staleness
        for group in groups:
            given_up = world.given_up_at.get(group.prompt_ids[0])
            assert given_up is None or world.version <= given_up + 1 + config.max_staleness
        self.check_books()
        if config.max_staleness == 0:
            assert not world.running()

    def train(self) -> None:
        self.answer(self.random.randrange(4))
        self.world.update()
        self.answer(self.random.randrange(4))

    def restart(self) -> None:
        self.world.restart(self.world.scheduler.state())
        self.dropped_before = self.world.dropped

    def check_books(self) -> None:
        """Every prompt that was taken is handed out once, or was dropped as dead, or is on its way."""
        world = self.world
        assert set(world.handed.values()) <= {1}
        assert world.ids == sorted(set(world.ids)) or world.config.max_staleness + world.config.oversample > 1
        assert len(set(world.ids)) == len(world.ids)
        pending = world.pending()
        assert len(set(pending)) == len(pending)
        assert not set(pending) & set(world.handed)
        missing = set(range(world.source.next)) - set(pending) - set(world.handed)
        assert len(missing) == world.dropped
        assert all(world.dead(number) for number in missing)
        assert not missing or world.config.drop_dead_groups


@settings(max_examples=400, deadline=None)
@given(CONFIGS, st.randoms(use_true_random=True), st.sampled_from([0.0, 0.2, 0.7, 1.0]), st.booleans())
def test_the_rules_hold_whatever_comes_when(
    config: RolloutConfig, random: Random, dead_share: float, restarts: bool
) -> None:
    run = Run(config, random, dead_share)
    for _ in range(8):
        run.batch()
        assert run.world.dropped_for_batch == 0
        if restarts and random.random() < 0.4:
            if random.random() < 0.5:
                run.world.update()
            run.restart()
        else:
            run.train()


