"""All rewards of a run: which file judges which prompts, and where it does so.

A prompt is judged by the file of its source in data.train or data.validation, else by reward.file. Parts run in worker
processes (`pool.py`), services are asked from an event loop; the caller gets futures.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

from gspo_mm.config import RewardConfig
from gspo_mm.data.faults import BadSample
from gspo_mm.reward.pool import WorkerPool
from gspo_mm.reward.spec import AnswerError, Judged, RewardFunction, load_reward
from gspo_mm.runtime.background import Background
from gspo_mm.types import Completion, GspoError, Prompt, RolloutGroup, Score

logger = logging.getLogger(__name__)


class Rewards:
    """Reward functions by source. Processes start with the first group, and end with `close`."""

    def __init__(
        self, default: RewardFunction, by_source: Mapping[str, RewardFunction], limits: RewardConfig
    ) -> None:
        """`limits` says how many workers there are, and what each may take."""
        self._default = default
        self._by_source = dict(by_source)
        self._limits = limits
        self._functions = list(dict.fromkeys([default, *self._by_source.values()]))
        self.unmeasured: dict[str, str] = {}  # tasks that no part measures -> the reward file
        self.logged: set[str] = set()  # reasons of failures that the log has in full
        self._pool: WorkerPool | None = None
        self._background: Background | None = None
        self._starting = threading.Lock()

    def check(self, prompt: Prompt) -> None:
        """Raises BadSample where a part cannot judge the data's answer, RewardFileError where none covers the task."""
        function = self._of(prompt)
        try:
            function.check_answer(prompt)
        except AnswerError as error:
            raise BadSample("unusable answer", f"task {prompt.task}: {error}") from None
        if prompt.task not in self.unmeasured and not function.measures(prompt.task):
            self.unmeasured[prompt.task] = function.file
            logger.warning(
                "task %r (first in sample %s) has no part with `accuracy` in %s, though other tasks have one: it counts in "
                "no accuracy; if the name is misspelt, correct it in the shards, or add it to the tasks of a part",
                prompt.task,
                prompt.key,
                function.file,
            )

    def start(self, group: RolloutGroup) -> Future[RolloutGroup]:
        """Score one group. Its future raises RewardFileError where no part covers the prompt's task."""
        with self._starting:  # groups come from the trainer's thread and from the sampler's
            if self._background is None:
                self._background = Background("rewards")
        return self._background.start(self._score(group))

    def score_groups(self, groups: Iterable[RolloutGroup]) -> list[RolloutGroup]:
        """The groups with `scores`; raises as `start`."""
        return [future.result() for future in [self.start(group) for group in groups]]

    def close(self) -> None:
        """Give up what is under way."""
        if self._background:
            self._background.run(self._close_services())
            self._background.close()
            self._background = None
        if self._pool:
            self._pool.close()
            self._pool = None

    async def _score(self, group: RolloutGroup) -> RolloutGroup:
        if self._pool is None:
            limits = self._limits
            self._pool = WorkerPool(
                self._functions,
                workers=limits.workers,
                timeout=limits.timeout,
                memory_gib=limits.memory_gib,
            )
        function, prompt = self._of(group.prompt), group.prompt
        whole = [completion for completion in group.completions if completion.fault is None]
        judged = await self._pool.judge(function, prompt, whole)

        async def finish(completion: Completion, found: Judged) -> Score:
            return function.combine(prompt, await function.ask(prompt, completion, found))

        scores = iter(await asyncio.gather(*map(finish, whole, judged)))
        return replace(
            group,
            scores=tuple(
                Score(value=math.nan, parts={}, error=c.fault) if c.fault else next(scores)
                for c in group.completions
            ),
        )

    def _of(self, prompt: Prompt) -> RewardFunction:
        return self._by_source.get(prompt.source, self._default)

    async def _close_services(self) -> None:
        for function in self._functions:
            await function.close()


def load_rewards(limits: RewardConfig, by_source: Mapping[str, str]) -> Rewards:
    """Read limits.file and the files of sources, each once. Raises RewardFileError as `load_reward` does."""
    loaded = {path: load_reward(path) for path in {limits.file, *by_source.values()}}
    return Rewards(loaded[limits.file], {source: loaded[path] for source, path in by_source.items()}, limits)


def fingerprints(files: Iterable[str]) -> dict[str, str]:
    """A hash of each reward file, and of each Python file with a function that one names; of those that are there."""
    found: dict[str, str] = {}
    for path in files:
        if not Path(path).is_file():
            continue
        modules = [part.python.partition(":")[0] for part in load_reward(path).spec.parts if part.python]
        for file in [path, *(sys.modules[module].__file__ for module in modules)]:
            if file:
                found[os.path.realpath(file)] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return found


def failed_fraction(groups: Iterable[RolloutGroup]) -> float:
    """Completions whose reward failed, as a fraction of all that have one; 0 without completions."""
    failed = [score.error is not None for score in _judged(groups)]
    return sum(failed) / len(failed) if failed else 0.0


def describe_failures(groups: Iterable[RolloutGroup], *, what: str) -> str:
    """How many rewards failed, and why most of them did; empty where none did."""
    groups = list(groups)
    reasons = Counter(score.error for score in _judged(groups) if score.error)
    if not reasons:
        return ""
    total = len(list(_judged(groups)))
    (reason, times), *others = reasons.most_common()
    said = f"{reasons.total()} of {total} rewards of {what} failed, {times} of them so: {reason}"
    return f"{said} (and {len(others)} other reasons)" if others else said


def check_failures(
    groups: Iterable[RolloutGroup], limits: RewardConfig, *, what: str, logged: set[str] | None = None
) -> None:
    """Log failed rewards, a reason in `logged` by its first words. Raises GspoError for more of them than `limits` allows."""
    groups = list(groups)
    if not (said := describe_failures(groups, what=what)):
        return
    if limits.on_failure == "fail":
        raise GspoError(
            f"reward.on_failure=fail, and {said}; fix the reward file, or set reward.on_failure=mask"
        )
    limit = limits.max_failed_fraction
    if failed_fraction(groups) > limit:
        raise GspoError(f"more than reward.max_failed_fraction={limit:g}: {said}; fix the reward file")
    reasons = {score.error for score in _judged(groups) if score.error}
    if logged is not None and reasons <= logged:
        said = f"{failed_fraction(groups):.0%} of the rewards of {what} failed, for reasons that stand above"
    elif logged is not None:
        logged |= reasons
    logger.warning(said)


def _judged(groups: Iterable[RolloutGroup]) -> Iterator[Score]:
    """The scores of answers whose environment did not fail."""
    for group in groups:
        for completion, score in zip(group.completions, group.scores, strict=True):
            if completion.fault is None:
                yield score
