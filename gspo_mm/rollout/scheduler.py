"""Keeps groups running on the servers while the trainer trains, and never lets them grow too old.

The trainer is at version v when it takes its batch of B groups (rollout.prompts_per_step); η is
rollout.max_staleness. Three rules:

Capacity    Groups that were started and not dropped number at most (η + v) B + f B, f = rollout.oversample. With
            f = 1 this is AReaL's (η + v + 1) B (arXiv 2505.24298, eq. 3); η = 0 is synchronous. Those beyond the batch
            that the trainer waits for are started when it asks (rollout.start_ahead=early), so that servers stay full
            while the last answers end; or when it has got it (late), so that they do not hold it up.
Deadline    A group started at version s has to be trained on at version s + η or before. A batch is complete when B
            groups are finished and those left over can all still meet their deadlines; it takes the earliest
            deadlines first. So the staleness of every token is at most η, and long answers are waited for instead of
            being passed over for short ones.
Tail        Groups above η B that are left when a batch is complete (there are some only with f > 1) are given up, the
            youngest first. Their prompts go first into the next batch and are not given up again.

Groups whose rewards are all equal teach nothing: with rollout.drop_dead_groups they are dropped as they come and
others are started in their place ("dynamic sampling" of DAPO, arXiv 2503.14476).

Answers under way while the weights change go on with the new ones; each token knows its version. With
rollout.on_update=finish the trainer waits for them before it pushes.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from threading import Event
from typing import Any, Protocol

from gspo_mm.config import RolloutConfig
from gspo_mm.rollout.engine import MAX_DROPPED, ServingEngine
from gspo_mm.rollout.saved import decode_answers, encode_answers
from gspo_mm.serving.server import ServerError
from gspo_mm.types import Completion, EncodedPrompt, RolloutGroup, SamplingParams

logger = logging.getLogger(__name__)

_POLL = 0.2  # seconds between looks at what else may have happened

type Cursor = dict[str, Any]


class Source(Protocol):
    """What the scheduler needs of `data.PromptSource`."""

    def take(self, count: int) -> list[EncodedPrompt]: ...
    def state(self) -> Cursor: ...
    def load(self, state: Cursor) -> None: ...


class Pause(Enum):
    """Why there is no batch yet."""

    WEIGHTS = "a server waits for weights"
    STOP = "the run is to stop"


@dataclass(kw_only=True, eq=False)
class _Group:
    """A prompt on its way through the servers."""

    id: int
    prompt: EncodedPrompt
    cursor: Cursor  # of the source, before the prompt was taken
    place: int  # how many prompts were taken before it
    kept: bool = False  # was given up once: not again
    version: int = 0  # when it was started
    future: Future[list[Completion]] | None = None
    scoring: Future[RolloutGroup] | None = None
    arrived: Event = field(default_factory=Event)  # scored, or failed; not looked at yet
    done: RolloutGroup | None = None  # scored
    dead: bool | None = None  # its answers all got one reward; None: not looked at yet

    def state(self, *, again: bool) -> dict[str, Any]:
        """`again`: without its answers."""
        done = self.done
        if done is None and self.scoring and self.scoring.done() and not self.scoring.exception():
            done = self.scoring.result()  # arrived, and not looked at yet
        failed = done is not None and any(score.error for score in done.scores)
        answers = encode_answers(done) if done and not again and not failed else None
        return {"kept": self.kept, "version": self.version, "answers": answers}

    def restore(self, state: dict[str, Any]) -> None:
        self.kept, self.version = state["kept"], state["version"]
        if state["answers"]:
            self.done = decode_answers(self.answered(()), state["answers"])
            self.arrived.set()

    def answered(self, completions: Sequence[Completion]) -> RolloutGroup:
        return RolloutGroup(
            id=self.id,
            prompt=self.prompt.prompt,
            prompt_ids=self.prompt.token_ids,
            completions=tuple(completions),
        )

    def cancel(self) -> None:
        for future in (self.future, self.scoring):
            if future:
                future.cancel()


class Scheduler:
    """Feeds the trainer from an engine whose groups run beside it. All public methods belong to the training thread."""

    def __init__(
        self,
        config: RolloutConfig,
        source: Source,
        engine: ServingEngine,
        score: Callable[[RolloutGroup], Future[RolloutGroup]],
        is_dead: Callable[[RolloutGroup], bool],
        sampling: SamplingParams,
    ) -> None:
        self._config = config
        self._batch = config.prompts_per_step
        self._source = source
        self._engine = engine
        self._score = score
        self._is_dead = is_dead
        self._sampling = sampling
        self._open: list[_Group] = []  # started, not yet handed out
        self._waiting: list[_Group] = []  # taken from the source, to be started first
        self._handed: list[_Group] = []  # the last batch
        self._arrived: queue.SimpleQueue[_Group] = queue.SimpleQueue()
        self._taken = 0
        self._next_id = 0
        self._dropped = 0  # dead groups, for the batch to come
        self._counts = {"dropped": 0, "given_up": 0}

    def next_batch(self, version: int, *, stopping: Callable[[], bool]) -> list[RolloutGroup] | Pause:
        """B scored groups in the order of their ids, none staler than rollout.max_staleness at `version`.

        Pause when something else has to be done first; what runs goes on running, and the next call takes it up.
        """
        ahead = self._config.max_staleness * self._batch
        waiting = math.ceil(self._config.oversample * self._batch)
        if self._config.start_ahead == "early":
            waiting += ahead
        self._start_groups(version, waiting)
        while (settled := self._settle(version)) is None:
            if stopping():
                return Pause.STOP
            if self._engine.wants_weights():
                return Pause.WEIGHTS
            with suppress(queue.Empty):
                self._finish(self._arrived.get(timeout=_POLL))
            self._drop_dead()
            self._start_groups(version, waiting)
        batch, self._open, tail = settled
        self._handed = batch
        self._dropped = 0
        for group in tail:
            self._give_up(group)
        if self._config.start_ahead == "late":
            self._start_groups(version, ahead)
        groups = [group.done for group in sorted(batch, key=lambda g: g.id) if group.done]
        for group in groups:
            stale = staleness(group, version)
            # ours never are: a server does not hold what it was brought
            if stale > self._config.max_staleness:
                raise ServerError(
                    f"a server answered {group.prompt.key} with weights that are {stale} versions old, and "
                    f"rollout.max_staleness={self._config.max_staleness}; see that nobody else loads weights into it"
                )
        return groups

    def finish(self, *, stopping: Callable[[], bool]) -> None:
        """Wait until no answers are under way. What they raised, the next call of `next_batch` raises.

        A stop ends the wait, and so does a server that waits for weights: answers may need it.
        """
        for group in self._open:
            while not group.arrived.wait(_POLL):
                if stopping() or self._engine.wants_weights():
                    return

    def take_counts(self) -> dict[str, float]:
        """Groups dropped because they were dead, and given up, since the last call; groups running now."""
        counts = {f"rollout/{name}": float(count) for name, count in self._counts.items()}
        self._counts = dict.fromkeys(self._counts, 0)
        return counts | {"rollout/in_flight": float(len(self._open))}

    def close(self) -> None:
        """Give up everything that runs."""
        for group in self._open:
            group.cancel()

    def state(self, *, untrained: bool = False) -> dict[str, Any]:
        """Where the source has to go on so that no prompt is lost or taken twice, and answers that are there; JSON.

        What servers have sampled of the others is theirs, and is sampled again. So is what could not be scored and, if
        `untrained`, the last batch.
        """
        handed = self._handed if untrained else []
        pending = sorted([*handed, *self._open, *self._waiting], key=lambda g: g.place)
        if not pending:
            return {"source": self._source.state(), "pending": [], "taken": 0, "next_id": self._next_id}
        first = pending[0]
        return {
            "source": first.cursor,
            "pending": [
                group.state(again=group in handed) | {"place": group.place - first.place} for group in pending
            ],
            "taken": self._taken - first.place,
            "next_id": self._next_id,
            "sizes": self._sizes(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from `state`: prompts that were under way and are not answered are started again first.

        With other sizes, so are those that are answered: their deadlines were those of the sizes before.
        """
        assert not self._open
        self._source.load(state["source"])
        self._taken, self._next_id = 0, state["next_id"]
        taken = [self._take() for _ in range(state["taken"])]
        for saved in state["pending"]:
            group = taken[saved["place"]]
            if state.get("sizes", self._sizes()) == self._sizes():
                group.restore(saved)
            (self._open if group.done else self._waiting).append(group)
        if again := sum(s["answers"] is not None for s in state["pending"]) - len(self._open):
            logger.warning(
                "%d answered groups are sampled again, as the sizes of `rollout` have changed", again
            )

    def _sizes(self) -> list[float]:
        """What decides how many groups run at once and until when: see the rules above."""
        return [self._batch, self._config.max_staleness, self._config.oversample]

    def _start_groups(self, version: int, count: int) -> None:
        """Until `count` are open."""
        while len(self._open) < count:
            group = self._waiting.pop(0) if self._waiting else self._take()
            group.version = version
            group.future = self._engine.start(group.prompt, self._config.group_size, self._sampling)
            group.future.add_done_callback(lambda answers, group=group: self._answered(group, answers))
            self._open.append(group)

    def _take(self) -> _Group:
        cursor = self._source.state()
        (prompt,) = self._source.take(1)
        group = _Group(id=self._next_id, prompt=prompt, cursor=cursor, place=self._taken)
        self._taken += 1
        self._next_id += 1
        return group

    def _answered(self, group: _Group, answers: Future[list[Completion]]) -> None:
        """Have the answers scored at once: this is called by the engine's thread, while the trainer may train."""
        if answers.cancelled():
            return
        if answers.exception():
            self._arrive(group)
            return
        group.scoring = self._score(group.answered(answers.result()))
        group.scoring.add_done_callback(lambda _: self._arrive(group))

    def _arrive(self, group: _Group) -> None:
        group.arrived.set()
        self._arrived.put(group)

    def _finish(self, group: _Group) -> None:
        if group in self._open:
            assert group.future
            group.future.result()  # raises what sampling raised
            assert group.scoring
            group.done = group.scoring.result()

    def _drop_dead(self) -> None:
        if not self._config.drop_dead_groups:
            return
        limit = MAX_DROPPED * self._batch - self._dropped
        for group in self._open:
            if group.done and group.dead is None:
                group.dead = self._is_dead(group.done)
        dead = [group for group in self._open if group.dead][:limit]
        self._open = _without(self._open, dead)
        self._dropped += len(dead)
        self._counts["dropped"] += len(dead)

    def _settle(self, version: int) -> tuple[list[_Group], list[_Group], list[_Group]] | None:
        """The batch, what goes on running and what is given up; None while more has to be waited for."""
        finished = [group for group in self._open if group.done]
        batch = sorted(finished, key=lambda g: (g.version, not g.kept, g.id))[: self._batch]
        if len(batch) < self._batch:
            return None
        rest = _without(self._open, batch)
        rest.sort(key=lambda g: (not g.kept, g.version, g.id))
        room = self._config.max_staleness * self._batch
        left, tail = rest[:room], rest[room:]
        if any(group.kept for group in tail):
            return None
        # B of those left are trained on at each of the next versions, the earliest deadlines first
        deadlines = sorted(group.version + self._config.max_staleness for group in left)
        if any(deadline < version + 1 + i // self._batch for i, deadline in enumerate(deadlines)):
            return None
        return batch, left, tail

    def _give_up(self, group: _Group) -> None:
        group.cancel()
        self._counts["given_up"] += 1
        self._waiting.append(
            dataclasses.replace(
                group, kept=True, future=None, scoring=None, arrived=Event(), done=None, dead=None
            )
        )
        self._waiting.sort(key=lambda g: g.place)


def _without(groups: list[_Group], others: list[_Group]) -> list[_Group]:
    taken = set(map(id, others))
    return [group for group in groups if id(group) not in taken]


def staleness(group: RolloutGroup, version: int) -> int:
    """How many weight versions before `version` the group's oldest token was sampled with."""
    return version - min(min(completion.versions) for completion in group.completions)


def staleness_metrics(groups: Sequence[RolloutGroup], version: int) -> dict[str, float]:
    """Staleness of a batch trained on at `version`, by the versions of its tokens."""
    values = [
        version - v for group in groups for completion in group.completions for v in completion.versions
    ]
    return {"rollout/staleness_mean": sum(values) / len(values), "rollout/staleness_max": float(max(values))}
