"""Prompts in the order of a run, samples that are not used counted, resumable at any prompt.

Samples are read, checked and encoded ahead, in a thread; they count, as used or not, when their turn has come.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice, starmap
from pathlib import Path
from typing import Any, Literal

from gspo_mm.config import DataConfig
from gspo_mm.data.faults import BadSample
from gspo_mm.data.filters import Filter
from gspo_mm.data.mixture import Mixture, Position, Source
from gspo_mm.data.places import expand_shards
from gspo_mm.data.prefetch import Prefetch
from gspo_mm.data.processor import Processor
from gspo_mm.data.samples import sample_key, to_prompt
from gspo_mm.data.shards import RawSample
from gspo_mm.data.skips import SkipLog
from gspo_mm.types import DataError, EncodedPrompt, Prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """A sample that was looked at ahead: what became of it."""

    key: str
    position: Position  # in the stream, with this sample read
    size: int  # bytes that it takes while it waits
    encoded: EncodedPrompt | None = None
    fault: BadSample | None = None  # why there is none


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """What a sample goes through, on whatever thread. It does not know the source, which can be forgotten meanwhile."""

    processor: Processor
    filter: Filter
    check: Callable[[Prompt], None]
    unused: Callable[[str, str], None]

    def read(self, raw: RawSample, position: Position) -> _Sample:
        key = sample_key(raw)
        try:
            encoded = self.processor.encode(self.prompt(raw, position))
        except BadSample as fault:
            # without what its frames hold, such as the picture
            return _Sample(key=key, position=position, size=0, fault=fault.with_traceback(None))
        pixels = 0 if encoded.pixel_values is None else encoded.pixel_values.nbytes
        return _Sample(key=key, position=position, size=size_of((raw, position)) + pixels, encoded=encoded)

    def prompt(self, raw: RawSample, position: Position) -> Prompt:
        prompt = to_prompt(raw, partial(self.unused, sample_key(raw)))
        self.filter.check(prompt, position.taken)
        self.check(prompt)
        return prompt


class PromptSource:
    """The training split goes on for ever, mixed and shuffled by seed; the validation split keeps its order.

    Nothing is read before the first prompt is asked for. `quarantine`: the file that lists unusable samples. `check`
    raises BadSample for a prompt whose answer no reward part can judge.
    """

    def __init__(
        self,
        config: DataConfig,
        processor: Processor,
        *,
        seed: int,
        split: Literal["train", "validation"],
        quarantine: Path | None = None,
        check: Callable[[Prompt], None] = lambda prompt: None,
    ) -> None:
        self._config = config
        self._split = split
        self._sources = [
            Source(name=source.name, shards=expand_shards(source.shards), weight=source.weight)
            for source in config.sources(split)
        ]
        self._training = split == "train"
        self._seed = seed
        self._filter = Filter(config, training=self._training)
        self._skips = SkipLog(config.max_bad_fraction, quarantine)
        self._reader = _Reader(
            processor=processor, filter=self._filter, check=check, unused=self._skips.unused
        )
        self._position = Position()
        self._open: Iterator[_Sample] | None = None
        self._told: set[str] = set()

    @property
    def epoch(self) -> int:
        """Epochs done of the source that is furthest behind."""
        return self._position.epoch

    @property
    def skipped(self) -> int:
        """Unusable samples so far."""
        return self._skips.skipped

    @property
    def left_out(self) -> int:
        """Sound samples that the filters and the curriculum did not let through so far."""
        return self._skips.left_out.total()

    def hold_out(self, prompts: Iterable[EncodedPrompt]) -> None:
        """Skip these from now on, under whatever key they come, and count them as unusable ("held out")."""
        self._filter.hold_out(encoded.prompt for encoded in prompts)

    def take(self, count: int) -> list[EncodedPrompt]:
        """The next `count` prompts. Raises DataError when too many samples are unusable, or the data ended."""
        prompts = list(islice(self._prompts(), count))
        if len(prompts) < count:
            raise DataError(
                f"data.{self._split} holds only {len(prompts)} more usable prompts, {count} were asked for; "
                "add shards, or ask for fewer"
            )
        return prompts

    def look(self, count: int) -> Iterator[Prompt]:
        """The sound ones of the next `count` samples, their pictures unread. For a source that nothing is taken from."""
        for raw, position in islice(self._mixture(), count):
            try:
                yield self._reader.prompt(raw, position)
            except BadSample:
                continue  # counted by whoever trains on the others

    def all(self, limit: int) -> list[EncodedPrompt]:
        """The first `limit` prompts of a split that ends, or fewer when it holds fewer. Raises DataError as `take`."""
        assert not self._training
        prompts = list(islice(self._prompts(), limit))
        self._skips.judge()
        self.close()
        return prompts

    def state(self) -> dict[str, Any]:
        """Where `take` stands; JSON."""
        return {"position": self._position.state(), "skips": self._skips.state()}

    def load(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken: the next prompt is the one that would have been next then.

        Raises DataError when the shards that are there now do not allow it.
        """
        if "position" not in state:
            raise DataError(
                "the checkpoint's place in the data is of an older version of this program; start another run.name"
            )
        self.close()
        self._position = Position.of(state["position"])
        self._skips.load(state["skips"])
        self._mixture()

    def close(self) -> None:
        """Stop reading ahead; `take` would begin again where it stands."""
        if isinstance(self._open, Prefetch):
            self._open.close()
        self._open = None

    def _samples(self) -> Iterator[_Sample]:
        if self._open is None:
            self._skips.rewind()
            samples = starmap(self._reader.read, self._mixture())
            limit = self._config.prefetch_mb * 2**20
            self._open = Prefetch(samples, size=_size_of, max_bytes=limit) if limit else samples
        return self._open

    def _mixture(self) -> Mixture:
        """From where the source stands; what is to be said of its shards is said once."""
        mixture = Mixture(
            self._sources,
            shuffle_buffer=self._config.shuffle_buffer if self._training else 0,
            seed=self._seed,
            repeat=self._training,
            position=self._position,
        )
        for note in mixture.notes:
            if note not in self._told:
                logger.warning(note)
        self._told |= set(mixture.notes)
        return mixture

    def _prompts(self) -> Iterator[EncodedPrompt]:
        since = self.epoch  # of the last usable prompt
        for sample in self._samples():
            self._position = position = sample.position
            if position.epoch > since + 1:
                raise DataError(
                    f"no sample of a whole epoch of data.{self._split} is used ({self._skips.summary()}); widen the "
                    "limits of data.curriculum, data.max_prompt_tokens or the image sizes"
                )
            if sample.fault:
                self._skips.bad(sample.key, sample.fault)
                continue
            self._skips.good()
            since = position.epoch
            assert sample.encoded
            yield sample.encoded


def size_of(item: tuple[RawSample, Position]) -> int:
    """Bytes that a sample takes while it waits."""
    return sum(len(value) for value in item[0].values())


def _size_of(sample: _Sample) -> int:
    return sample.size
