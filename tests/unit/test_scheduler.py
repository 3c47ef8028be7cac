"""Whatever order answers come in: whole batches, none too stale, no prompt lost or twice, and never a deadlock."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import cycle
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_mm.config import RolloutConfig
from gspo_mm.rollout import scheduler as module
from gspo_mm.rollout.saved import encode_answers
from gspo_mm.rollout.scheduler import Pause, Scheduler, staleness, staleness_metrics
from gspo_mm.types import (
    Completion,
    EncodedPrompt,
    Finish,
    GspoError,
    Prompt,
    RolloutGroup,
    SamplingParams,
    Score,
)


def scored(group: RolloutGroup) -> Future[RolloutGroup]:
    """As if the rewards were there at once."""
    future: Future[RolloutGroup] = Future()
    future.set_result(group)
    return future


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
    """A group that a scheduler started."""

    prompt: EncodedPrompt
    version: int  # at its start
    future: Future[list[Completion]]

    @property
    def number(self) -> int:
        return self.prompt.token_ids[0]


@dataclass
class Books:
    """What became of the prompts; a crash takes it back to the last checkpoint."""

    version: int = 0
    handed: list[int] = field(default_factory=list)  # numbers of prompts
    ids: list[int] = field(default_factory=list)  # of groups
    dropped: int = 0


class World:
    """Servers and trainer: a clock of versions, and answers that end when they are told to."""

    def __init__(self, config: RolloutConfig, *, dead: Callable[[int], bool] = lambda _: False) -> None:
        self.config = config
        self.dead = dead
        self.books = Books()
        self.on_wait: Callable[[], bool] = self._nothing_may_be_missing
        self.start_anew()

    def start_anew(self, state: dict[str, Any] | None = None) -> None:
        """A scheduler in a new process."""
        self.jobs: list[Job] = []
        self.given_up: list[int] = []  # numbers of prompts whose answers were not waited for
        self.restored: set[int] = set()  # numbers of prompts that were answered before a crash
        self.open = 0  # groups started or restored, and neither handed out, dropped nor given up
        self.dropped_for_batch = 0
        self.source = Numbers()
        self.scheduler = Scheduler(
            self.config,
            self.source,
            self,
            score=scored,
            is_dead=lambda group: self.dead(group.prompt_ids[0]),
            sampling=SamplingParams(),
        )
        if state is not None:
            self.scheduler.load(json.loads(json.dumps(state)))
            first = state["source"]["next"]
            self.restored = {first + g["place"] for g in state["pending"] if g["answers"] is not None}
            self.open = len(self.restored)

    def start(
        self, prompt: EncodedPrompt, group_size: int, sampling: SamplingParams
    ) -> Future[list[Completion]]:
        assert group_size == self.config.group_size
        job = Job(prompt, self.books.version, Future())
        started = Counter(job.number for job in self.jobs)
        assert started[job.number] < 2, f"prompt {job.number} was given up twice"
        again = started[job.number] or job.number in self.restored
        assert again or all(started[number] == 2 for number in self.given_up)
        self.jobs.append(job)
        self.open += 1
        job.future.add_done_callback(lambda future: self._note_end(job))
        return job.future

    def wants_weights(self) -> bool:
        """Asked whenever there is no batch yet: the moment for something to happen."""
        self.count()
        return self.on_wait()

    def running(self) -> list[Job]:
        return [job for job in self.jobs if not job.future.done()]

    def finish(self, *jobs: Job) -> None:
        """Their answers: one that went on over all updates since its start, one sampled just now."""
        now = self.books.version
        for job in jobs:
            job.future.set_result([completion(job.version, now), completion(now, now)])

    def next_batch(self, *, stop: Callable[[], bool] = lambda: False) -> list[RolloutGroup] | Pause:
        found = self.scheduler.next_batch(self.books.version, stopping=stop)
        self.count()
        if not isinstance(found, Pause):
            self.books.handed += numbers(found)
            self.books.ids += [group.id for group in found]
            self.open -= len(found)
            self.dropped_for_batch = 0
        return found

    def batch(self) -> list[int]:
        """Numbers of the prompts that are trained on next; the version goes up."""
        found = self.next_batch()
        assert not isinstance(found, Pause)
        self.books.version += 1
        return numbers(found)

    def count(self) -> None:
        counts = self.scheduler.take_counts()
        dropped = int(counts["rollout/dropped"])
        self.open -= dropped + int(counts["rollout/given_up"])
        self.dropped_for_batch += dropped
        self.books.dropped += dropped

    def pending(self) -> list[int]:
        """Prompts that a scheduler resumed now would start first."""
        state = self.scheduler.state()
        return [state["source"]["next"] + group["place"] for group in state["pending"]]

    def _note_end(self, job: Job) -> None:
        if job.future.cancelled():
            self.given_up.append(job.number)

    def _nothing_may_be_missing(self) -> bool:
        raise AssertionError("the scheduler waits although all that a batch needs is finished")


def numbers(groups: list[RolloutGroup]) -> list[int]:
    return [group.prompt_ids[0] for group in groups]


def completion(first: int, last: int) -> Completion:
    versions = tuple(range(first, last + 1))
    zeros = (0,) * len(versions)
    return Completion.of_one_turn(
        token_ids=zeros, logprobs=zeros, versions=versions, finish=Finish.STOP, text=""
    )


def rollout(**settings: Any) -> RolloutConfig:
    return RolloutConfig(engine="sglang", group_size=2, **settings)


CONFIGS = st.builds(
    rollout,
    prompts_per_step=st.integers(1, 5),
    max_staleness=st.integers(0, 3),
    oversample=st.sampled_from([1.0, 1.2, 1.5, 2.0]),
    drop_dead_groups=st.booleans(),
    start_ahead=st.sampled_from(["early", "late"]),
    on_update=st.sampled_from(["retract", "finish"]),
)


class Run:
    """A whole run in which `random` decides what happens when; checks all along."""

    def __init__(self, config: RolloutConfig, random: Random, dead_share: float) -> None:
        self.random = random
        self.config = config
        # some prompts are slow wherever they are asked, and dead or alive for good
        self.pace = [random.choice([0.0, 1.0, random.random()]) for _ in range(2000)]
        verdicts = [random.random() < dead_share for _ in range(2000)]
        self.world = World(config, dead=verdicts.__getitem__)
        self.world.on_wait = self.something_happens
        self.fickle = random.random()  # how often answers come out of their order
        self.pauses = random.choice([0.0, 0.0, 0.1])
        self.stuck = 0
        self.paused = False
        self.checkpoint: tuple[dict[str, Any], Books] | None = None

    def something_happens(self) -> bool:
        self.check_capacity()
        self.answer(self.random.randrange(3))
        self.stuck = 0 if self.world.running() else self.stuck + 1
        assert self.stuck < 50, "every open group is finished, and still there is no batch"
        return self.pause()

    def pause(self) -> bool:
        self.paused = self.random.random() < self.pauses
        return self.paused

    def answer(self, count: int) -> None:
        for _ in range(count):
            if running := self.world.running():
                if self.random.random() < self.fickle:
                    self.world.finish(self.random.choice(running))
                else:
                    self.world.finish(min(running, key=lambda job: self.pace[job.number]))

    def step(self) -> None:
        """One batch and its update, perhaps with stops, crashes and resumptions on the way."""
        world, config = self.world, self.config
        while isinstance(groups := world.next_batch(stop=self.pause), Pause):
            if self.random.random() < 0.3:  # stopped in order, and resumed
                self.save()
                self.resume()
        assert len(groups) == config.prompts_per_step
        assert max(staleness(group, world.books.version) for group in groups) <= config.max_staleness
        self.check_tail()
        self.check_books()
        self.answer(self.random.randrange(4))
        if config.on_update == "finish":
            world.scheduler.finish(stopping=self.pause)
            assert self.paused or not world.running()
        world.books.version += 1
        if self.random.random() < 0.5:
            self.save()
        self.answer(self.random.randrange(4))
        if self.checkpoint and self.random.random() < 0.2:  # killed, and resumed
            self.resume()

    def save(self) -> None:
        self.checkpoint = self.world.scheduler.state(), copy.deepcopy(self.world.books)

    def resume(self) -> None:
        assert self.checkpoint
        state, books = self.checkpoint
        self.world.books = copy.deepcopy(books)
        self.world.start_anew(state)

    def check_capacity(self) -> None:
        """(η + v) B + f B, of which v B were handed out."""
        size = self.config.prompts_per_step
        room = self.config.max_staleness * size + math.ceil(self.config.oversample * size)
        assert 0 <= self.world.open <= room
        assert self.world.dropped_for_batch <= 4 * size

    def check_tail(self) -> None:
        """What goes on running is trained on in time, even if not a single group is started any more."""
        world, config = self.world, self.config
        deadlines = sorted(job.version + config.max_staleness for job in world.running())
        size = config.prompts_per_step
        assert len(deadlines) <= config.max_staleness * size
        assert all(d >= world.books.version + 1 + i // size for i, d in enumerate(deadlines))

    def check_books(self) -> None:
        """Every prompt that was taken is handed out once, or was dropped as dead, or is on its way."""
        world = self.world
        handed = set(world.books.handed)
        assert len(handed) == len(world.books.handed)
        assert len(set(world.books.ids)) == len(world.books.ids)
        if self.config.max_staleness == 0 and self.config.oversample == 1:
            assert world.books.ids == sorted(world.books.ids)
        pending = world.pending()
        assert len(set(pending)) == len(pending)
        assert not set(pending) & handed
        missing = set(range(world.source.next)) - set(pending) - handed
        assert len(missing) == world.books.dropped
        assert all(world.dead(number) for number in missing)
        assert not missing or self.config.drop_dead_groups


@settings(max_examples=300)
@given(CONFIGS, st.integers(0, 2**32), st.sampled_from([0.0, 0.2, 0.7, 1.0]))
def test_the_rules_hold_whatever_comes_when(config: RolloutConfig, seed: int, dead_share: float) -> None:
    run = Run(config, Random(seed), dead_share)
    for _ in range(8):
        run.step()


def test_without_staleness_nothing_runs_while_the_trainer_trains() -> None:
    world = World(rollout(prompts_per_step=3))
    world.on_wait = lambda: world.finish(*world.running()) is not None
    for step in range(3):
        assert world.batch() == [3 * step, 3 * step + 1, 3 * step + 2]
        assert not world.running()


def test_groups_of_the_next_steps_are_started_at_once() -> None:
    world = World(rollout(prompts_per_step=2, max_staleness=3))
    world.on_wait = lambda: bool(world.finish(*world.running()[:1]))
    world.next_batch()
    assert len(world.jobs) == 2 * (3 + 1)


def test_answers_end_before_a_push_and_their_faults_wait_for_the_next_batch() -> None:
    world = World(rollout(prompts_per_step=2, max_staleness=1, on_update="finish"))
    world.on_wait = lambda: bool(world.finish(*world.running()[:1]))
    world.next_batch()
    (other, _) = world.running()
    other.future.set_exception(GspoError("no server answers"))
    world.scheduler.finish(stopping=lambda: False)
    assert not world.running()
    with pytest.raises(GspoError, match="no server answers"):
        world.next_batch()


@pytest.mark.parametrize("stopped", [True, False])
def test_a_stop_or_a_server_without_weights_ends_the_wait_for_answers(stopped: bool) -> None:
    world = World(rollout(prompts_per_step=2, max_staleness=1, on_update="finish"))
    world.on_wait = lambda: bool(world.finish(*world.running()[:1]))
    world.next_batch()
    world.on_wait = lambda: not stopped
    world.scheduler.finish(stopping=lambda: stopped)
    assert len(world.running()) == 2


def test_a_batch_waits_for_a_long_answer_whose_time_has_come() -> None:
    world = World(rollout(prompts_per_step=2, max_staleness=1))
    waits = 0

    def all_but_the_first_prompt() -> bool:
        nonlocal waits
        waits += 1
        late = [job for job in world.running() if job.number == 0]
        world.finish(*(job for job in world.running() if job.number != 0))
        if world.books.version == 1 and waits > 20:
            world.finish(*late)
        return False

    world.on_wait = all_but_the_first_prompt
    assert world.batch() == [1, 2]  # the first prompt may still come with the next batch
    waits = 0
    assert world.batch() == [0, 3]
    assert waits > 20, "a batch was made although prompt 0 would have been too old after it"


def test_the_slowest_are_given_up_and_come_first_in_the_next_batch() -> None:
    world = World(rollout(prompts_per_step=2, oversample=2.0))
    world.on_wait = lambda: bool(world.finish(*world.running()[2:]))
    assert world.batch() == [2, 3]
    assert world.given_up == [0, 1]
    world.on_wait = lambda: bool(world.finish(*world.running()))
    assert world.batch() == [0, 1]
    assert [job.number for job in world.jobs] == [0, 1, 2, 3, 0, 1, 4, 5]


def test_who_was_given_up_once_is_waited_for() -> None:
    world = World(rollout(prompts_per_step=2, oversample=2.0))
    world.on_wait = lambda: bool(world.finish(*world.running()[2:]))
    world.batch()
    waits = iter(range(30))

    def the_given_up_last() -> bool:
        world.finish(*(job for job in world.running() if job.number > 3 or next(waits, None) is None))
        return False

    world.on_wait = the_given_up_last
    assert world.batch() == [0, 1]


def test_dead_groups_are_replaced_by_others() -> None:
    world = World(rollout(prompts_per_step=2, drop_dead_groups=True), dead=lambda number: number < 3)
    world.on_wait = lambda: bool(world.finish(*world.running()))
    assert world.batch() == [3, 4]
    assert world.books.dropped == 3


def test_a_group_is_judged_dead_or_not_once() -> None:
    asked: list[int] = []
    world = World(
        rollout(prompts_per_step=6, max_staleness=1, drop_dead_groups=True),
        dead=lambda number: asked.append(number) is not None,
    )
    world.on_wait = lambda: bool(world.finish(*world.running()[:1]))
    for _ in range(4):
        world.batch()
    assert len(asked) == len(set(asked)) >= 4 * 6


def test_dead_groups_are_kept_when_there_is_nothing_else() -> None:
    world = World(rollout(prompts_per_step=2, drop_dead_groups=True), dead=lambda number: True)
    world.on_wait = lambda: bool(world.finish(*world.running()))
    assert world.batch() == [8, 9]
    assert world.books.dropped == 4 * 2


def test_a_pause_does_not_make_room_for_more_dropped_groups() -> None:
    world = World(rollout(prompts_per_step=1, drop_dead_groups=True), dead=lambda number: True)
    answered = cycle([False, True])

    def answer_then_pause() -> bool:
        world.finish(*world.running())
        return next(answered)

    world.on_wait = answer_then_pause
    while isinstance(found := world.next_batch(), Pause):
        assert len(world.jobs) < 50, "it never ends"
    assert numbers(found) == [4]


def test_dead_groups_count_where_they_are_not_dropped() -> None:
    world = World(rollout(prompts_per_step=2), dead=lambda number: True)
    world.on_wait = lambda: bool(world.finish(*world.running()))
    assert world.batch() == [0, 1]


def test_a_pause_loses_nothing_that_runs() -> None:
    world = World(rollout(prompts_per_step=2))
    world.on_wait = lambda: True
    assert world.next_batch() is Pause.WEIGHTS
    assert world.next_batch(stop=lambda: True) is Pause.STOP
    assert len(world.running()) == 2
    world.finish(*world.running())
    world.on_wait = lambda: False
    assert world.batch() == [0, 1]
    assert len(world.jobs) == 2


def test_a_finished_batch_is_handed_out_before_any_pause() -> None:
    world = World(rollout(prompts_per_step=1, max_staleness=1))
    world.on_wait = lambda: bool(world.finish(*world.running()))
    assert world.batch() == [0]
    world.scheduler._finish(world.scheduler._open[0])
    assert not isinstance(world.next_batch(stop=lambda: True), Pause)


def test_a_fault_of_the_engine_ends_the_wait() -> None:
    world = World(rollout(prompts_per_step=2))

    def break_down() -> bool:
        world.running()[0].future.set_exception(GspoError("no server"))
        return False

    world.on_wait = break_down
    with pytest.raises(GspoError, match="no server"):
        world.next_batch()


def test_closing_gives_up_what_runs() -> None:
    world = World(rollout(prompts_per_step=2, max_staleness=1))
    world.on_wait = lambda: True
    world.next_batch()
    world.scheduler.close()
    assert all(job.future.cancelled() for job in world.jobs)


def test_a_resumed_run_starts_what_was_under_way_first_and_numbers_on() -> None:
    world = World(rollout(prompts_per_step=2, max_staleness=1))
    world.on_wait = lambda: bool(world.finish(*(job for job in world.running() if job.number in (1, 3))))
    assert world.batch() == [1, 3]
    state = world.scheduler.state()
    world.start_anew(state)
    world.on_wait = lambda: bool(world.finish(*world.running()))
    found = world.next_batch()
    assert not isinstance(found, Pause)
    assert [job.number for job in world.jobs] == [0, 2, 4, 5]
    assert numbers(found) == [0, 2]
    assert min(group.id for group in found) >= 4, "ids of the first process were given again"


def test_answers_that_are_there_are_not_asked_for_again() -> None:
    world = World(rollout(prompts_per_step=2, max_staleness=1))
    world.on_wait = lambda: bool(world.finish(*(job for job in world.running() if job.number in (0, 1, 3))))
    assert world.batch() == [0, 1]
    (two,) = world.running()
    assert two.number == 2
    state = world.scheduler.state()
    world.start_anew(state)
    world.on_wait = lambda: bool(world.finish(*world.running()))
    found = world.next_batch()
    assert not isinstance(found, Pause)
    assert [job.number for job in world.jobs] == [2, 4, 5]
    assert sorted(numbers(found)) == [2, 3]
    (three,) = (group for group in found if group.prompt_ids == (3,))
    assert json.dumps(encode_answers(three)) == json.dumps(state["pending"][1]["answers"])
    assert staleness(three, world.books.version) == 1


def test_a_batch_that_was_not_trained_on_is_sampled_again_by_a_resumed_run() -> None:
    world = World(rollout(prompts_per_step=2, max_staleness=1))
    world.on_wait = lambda: bool(world.finish(*(job for job in world.running() if job.number in (0, 1, 3))))
    assert world.batch() == [0, 1]
    world.on_wait = lambda: bool(world.finish(*world.running()))
    assert world.batch() == [2, 3]
    state = world.scheduler.state(untrained=True)
    again = [state["source"]["next"] + group["place"] for group in state["pending"]]
    assert again[:2] == [2, 3], "the last batch alone: the one before was trained on"
    assert [group["answers"] for group in state["pending"]][:2] == [None, None]
    assert not {2, 3} & set(world.pending())
    world.books.version -= 1
    world.start_anew(state)
    assert sorted(world.batch() + world.batch()) == [2, 3, 4, 5]


def test_answers_that_could_not_be_scored_are_asked_for_again() -> None:
    world = World(rollout(prompts_per_step=1, max_staleness=2))
    world.on_wait = lambda: bool(world.finish(*world.running()))
    world.batch()
    fine, failed = world.scheduler._open
    for group, error in ((fine, None), (failed, "the judge cannot be reached")):
        assert group.scoring
        assert not group.scoring.exception()
        score = Score(value=0.0, parts={}, accuracy=None, error=error)
        group.done = replace(group.scoring.result(), scores=(score, score))
    first, second = world.scheduler.state()["pending"]
    assert first["answers"] is not None
    assert second["answers"] is None


@pytest.mark.parametrize("oversample", [1.0, 1.5, 2.0])
@pytest.mark.parametrize(("prompts", "stale"), [(1, 0), (2, 1), (4, 0), (4, 1), (4, 2), (8, 3)])
@pytest.mark.parametrize("seed", range(4))
def test_a_run_resumed_with_other_sizes_trains_every_prompt_once_and_none_too_stale(
    prompts: int, stale: int, oversample: float, seed: int
) -> None:
    random, stuck = Random(seed), 0

    def some_finish() -> bool:
        nonlocal stuck
        running = world.running()
        stuck = 0 if running else stuck + 1
        assert stuck < 50, "every open group is finished, and still there is no batch"
        world.finish(*random.sample(running, min(len(running), random.randint(1, 5))))
        return False

    world = World(rollout(prompts_per_step=4, max_staleness=2, oversample=2.0))
    world.on_wait = some_finish
    for _ in range(3):
        world.batch()
    world.on_wait = lambda: bool(world.finish(*random.sample(world.running(), len(world.running()) // 2)))
    world.next_batch(stop=lambda: not world.running())
    state = world.scheduler.state()
    world.config = rollout(prompts_per_step=prompts, max_staleness=stale, oversample=oversample)
    world.start_anew(state)
    world.on_wait = some_finish
    for _ in range(12):
        groups = world.next_batch()
        assert not isinstance(groups, Pause)
        assert len(groups) == prompts
        assert max(staleness(group, world.books.version) for group in groups) <= stale
        world.books.version += 1
    handed = Counter(world.books.handed)
    assert set(handed.values()) == {1}
    assert set(range(max(handed))) <= set(handed) | set(world.pending())


def test_staleness_is_that_of_tokens() -> None:
    group = RolloutGroup(
        id=0,
        prompt=Numbers().take(1)[0].prompt,
        prompt_ids=(0,),
        completions=(completion(3, 5), completion(5, 5)),
    )
    assert staleness(group, 6) == 3
    metrics = staleness_metrics([group], 6)
    assert metrics == {"rollout/staleness_mean": (3 + 2 + 1 + 1) / 4, "rollout/staleness_max": 3.0}
