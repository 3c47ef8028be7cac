"""Prompts in the order of a run, unusable samples skipped and counted, resumable at any prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Literal

from gspo_mm.config import DataConfig
from gspo_mm.data.processor import Processor
from gspo_mm.data.samples import BadSample, SkipLog, sample_key, to_prompt
from gspo_mm.data.shards import Cursor, SampleStream, expand_shards
from gspo_mm.types import DataError, EncodedPrompt


class PromptSource:
    """The training split goes on for ever, shuffled by (seed, epoch); the validation split keeps its order."""

    def __init__(
        self, config: DataConfig, processor: Processor, *, seed: int, split: Literal["train", "validation"]
    ) -> None:
        self._processor = processor
        self._shards = expand_shards(config.train if split == "train" else config.validation)
        self._training = split == "train"
        self._shuffle_buffer = config.shuffle_buffer if self._training else 0
        self._seed = seed
        self._skips = SkipLog(config.max_bad_fraction)
        self._stream = self._open(Cursor())

    @property
    def epoch(self) -> int:
        return self._stream.cursor.epoch

    @property
    def skipped(self) -> int:
        """Samples left out so far."""
        return self._skips.skipped

    def take(self, count: int) -> list[EncodedPrompt]:
        """The next `count` prompts. Raises DataError when too many samples are unusable, or the data ended."""
        prompts = []
        for prompt in self._prompts():
            prompts.append(prompt)
            if len(prompts) == count:
                return prompts
        raise DataError(
            f"{self._shards[0]} ... holds only {len(prompts)} more usable prompts, {count} were asked for"
        )

    def all(self, limit: int) -> list[EncodedPrompt]:
        """The first `limit` prompts of a split that ends, or fewer when it holds fewer. Raises DataError as `take`."""
        assert not self._training
        prompts = []
        for prompt in self._prompts():
            prompts.append(prompt)
            if len(prompts) == limit:
                break
        self._skips.judge()
        return prompts

    def state(self) -> dict[str, Any]:
        """Where `take` stands; JSON."""
        return {"cursor": asdict(self._stream.cursor), "skips": self._skips.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken: the next prompt is the one that would have been next then."""
        self._stream = self._open(Cursor(**state["cursor"]))
        self._skips.load(state["skips"])

    def _open(self, cursor: Cursor) -> SampleStream:
        return SampleStream(
            self._shards,
            shuffle_buffer=self._shuffle_buffer,
            seed=self._seed,
            repeat=self._training,
            cursor=cursor,
        )

    def _prompts(self) -> Iterator[EncodedPrompt]:
        for raw in self._stream:
            try:
                encoded = self._processor.encode(to_prompt(raw))
            except BadSample as fault:
                self._skips.bad(sample_key(raw), fault)
                continue
            self._skips.good()
            yield encoded
