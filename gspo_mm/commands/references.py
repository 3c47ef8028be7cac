"""What the reward file says of the data's own reference answers: a part of `gspo-mm preflight --all`."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gspo_mm.config import Config
from gspo_mm.data.processor import Processor
from gspo_mm.reward.rewards import Rewards
from gspo_mm.types import Completion, Finish, Prompt, RolloutGroup, Score, Turn

_TOGETHER = 256  # answers scored at once: their pictures are in memory
_NAMED = 10  # answers in the message
_SHOWN = 60  # characters of one


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A reference answer, and what it is worth."""

    prompt: Prompt  # without its pictures
    score: Score

    def __str__(self) -> str:
        values = [f"reward {self.score.value:g}", *(f"{name} {v:g}" for name, v in self.score.parts.items())]
        said = self.score.error or ", ".join(values)
        answer, response = (
            text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
            for text in (json.dumps(self.prompt.answer, ensure_ascii=False), repr(self.prompt.response))
        )
        return f"{self.prompt.key}: task {self.prompt.task}, answer {answer}, response {response}: {said}"


class References:
    """Scores the reference answers of prompts as they come."""

    def __init__(self, config: Config, rewards: Rewards, processor: Processor) -> None:
        self._limit = config.rollout.sampling.max_new_tokens
        self._rewards, self._processor = rewards, processor
        self._waiting: list[RolloutGroup] = []
        self._scored: list[Reference] = []
        self._prompts, self._longest = 0, 0

    def add(self, prompt: Prompt) -> None:
        """Judge its reference answer, if it has one."""
        self._prompts += 1
        if prompt.response is None:
            return
        ids = [
            (text, self._processor.encode_response(text)) for text in (*prompt.first_turns, prompt.response)
        ]
        self._longest = max(self._longest, sum(len(each) for _, each in ids))
        turns = [Turn(token_ids=tuple(each), logprobs=(), versions=(), text=text) for text, each in ids]
        answer = Completion(turns=tuple(turns), finish=Finish.STOP)
        self._waiting.append(RolloutGroup(id=0, prompt=prompt, prompt_ids=(), completions=(answer,)))
        if len(self._waiting) == _TOGETHER:
            self._score()

    def describe(self) -> str:
        """How many there are, and which of them are wrong or earn less than the best one of their task."""
        self._score()
        if not self._scored:
            return "no sample has a reference answer (response): a warm start has nothing to train on"
        short = falling_short(self._scored)
        named = "".join(f"\n    {each}" for each in short[:_NAMED])
        more = f"\n    and {len(short) - _NAMED} more" if len(short) > _NAMED else ""
        return (
            f"reference answers: {len(self._scored)} of {self._prompts} samples have one, with up to {self._longest} tokens "
            f"(rollout.sampling.max_new_tokens={self._limit}); {len(short)} of them are wrong, or earn less than the best "
            f"of their task{':' if short else ''}{named}{more}"
        )

    def _score(self) -> None:
        for group in self._rewards.score_groups(self._waiting):
            prompt = replace(group.prompt, images=(), pages=(), messages=())
            self._scored.append(Reference(prompt=prompt, score=group.scores[0]))
        self._waiting = []


def falling_short(references: Sequence[Reference]) -> list[Reference]:
    """Those that could not be judged, are wrong, or earn less than the best of their task."""
    best: dict[str, float] = defaultdict(lambda: float("-inf"))
    for each in references:
        if each.score.error is None:
            best[each.prompt.task] = max(best[each.prompt.task], each.score.value)
    return [
        each
        for each in references
        if each.score.error or each.score.accuracy == 0 or each.score.value < best[each.prompt.task]
    ]
