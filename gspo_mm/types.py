"""What travels between the stages of the pipeline (see the picture in `train.py`).

Every type is frozen and keyword-only: a stage returns a new value (`dataclasses.replace`) and never
edits what it was given. Arrays say their shape, dtype and unit.

Dimension legend, used here and as name suffixes everywhere:

    P  tokens of one prompt, image tokens expanded      S  sequences (completions) in a batch
    T  sampled tokens of one turn or completion         N  packed tokens of a micro-batch (read and trained)
    G  completions of one group                         R  packed *trained* tokens of a micro-batch
    L  tokens of one sequence                           V  vocabulary        D  hidden size
    I  images
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

type Json = bool | int | float | str | list["Json"] | dict[str, "Json"] | None


class GspoError(Exception):
    """A fault that a user can act on; its message is one sentence naming the cause and the fix."""

    status = 2  # that a command ends with
    told_elsewhere = False  # another rank of the job had it and says so
    on_all_ranks = False  # raised on every rank at the same place


class DataError(GspoError):
    """The data cannot be used: shards missing, or more samples unusable than `data.max_bad_fraction` allows."""


class NonFiniteError(GspoError):
    """A NaN or infinity in log-probs, rewards or loss, with the sequence that made it."""


class BlindModelError(GspoError):
    """The model's answer does not depend on its image."""


class DeadRunError(GspoError):
    """Too many steps in a row without a single group whose rewards differ."""


class IllRunError(GspoError):
    """A rule of `train.stop_on` began to hold."""

    status = 4


class Finish(StrEnum):
    """Why a completion ended."""

    STOP = "stop"  # it sampled a stop token
    LENGTH = "length"  # it reached `rollout.sampling.max_new_tokens`, or wanted more than `rollout.environment.max_turns`
    IMAGE_TOKEN = "image_token"  # in a turn that was to go on it sampled a token that stands for an image


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """An image as it came: encoded bytes, known by their hash. Pixels never travel between stages."""

    data: bytes  # PNG, JPEG, WebP ... bytes as found in the shard
    key: str  # SHA-256 of `data`, hexadecimal: equal content is one image
    width: int  # pixels, upright: see data/pictures.py
    height: int  # pixels, upright

    @staticmethod
    def key_of(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One sample of a shard: a question with its images, and what the reward needs to judge an answer."""

    key: str  # "<shard file name>/<sample key>" with "<source>/" before it in a mixture, unique in a data set
    # chat messages in Hugging Face's form; images are {"type": "image"} parts
    messages: tuple[Mapping[str, Any], ...]
    images: tuple[EncodedImage, ...]  # [I] in the order of the image parts
    answer: Json  # what rewards compare with
    task: str  # routes to reward parts
    response: str | None = None  # a reference answer in the wanted format, for the supervised warm start only
    first_turns: tuple[
        str, ...
    ] = ()  # of a reference answer in turns those before `response`, each with a call
    meta: Mapping[str, Json] = field(default_factory=dict)
    pages: tuple[EncodedImage, ...] = ()  # pictures of no message, which an environment shows one by one
    source: str = ""  # name of the source in data.train or data.validation; "" where that is a plain list

    @property
    def pictures(self) -> tuple[EncodedImage, ...]:
        """Those of its messages, and its pages."""
        return (*self.images, *self.pages)


@dataclass(frozen=True, kw_only=True)
class EncodedPrompt:
    """A prompt after the one processor call whose token ids serve rollout and training alike."""

    prompt: Prompt
    token_ids: tuple[int, ...]  # [P] image tokens expanded
    pixel_values: torch.Tensor | None  # [sum of t*h*w, patch dim] float32, all images in order
    image_grid_thw: torch.Tensor | None  # [I, 3] int64, patches as their family counts them


@dataclass(frozen=True, kw_only=True)
class EncodedTurn:
    """What follows a turn of the model: the end of it but for its stop token, a message, the beginning of the next turn."""

    token_ids: tuple[int, ...]  # image tokens expanded
    pixel_values: torch.Tensor | None  # as of an EncodedPrompt, of its own images
    image_grid_thw: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class Look:
    """The part of a picture that a turn asked for."""

    image: int  # which of the pictures so far, from 1: those of the prompt, and those that came back
    # left, upper, right and lower edge in shares of the picture's width and height, as asked for: it may reach out of it
    box: tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What came back to the model after a turn: it is read, and never trained on."""

    token_ids: tuple[int, ...]  # image tokens expanded
    images: tuple[EncodedImage, ...] = ()  # in the order of their tokens
    text: str = ""  # for people
    look: Look | None = None  # for people, too


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What the policy sampled in one go."""

    token_ids: tuple[int, ...]  # [T] the stop token included where it ended the turn
    # [T] nats, from the engine that sampled them, at the sampling temperature, before top-k/p
    logprobs: tuple[float, ...]
    versions: tuple[int, ...]  # [T] weight version that sampled each token
    text: str  # decoded, special tokens left out
    observation: Observation | None = None  # what came back after it, if anything


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled answer to a prompt: a turn, or several with observations between them.

    `token_ids`, `logprobs` and `versions` are those of all that was sampled; observations are in none of them.
    """

    turns: tuple[Turn, ...]
    finish: Finish  # of the last turn
    fault: str | None = None  # how its environment failed: such a completion is never trained on

    @classmethod
    def of_one_turn(
        cls,
        *,
        token_ids: tuple[int, ...],
        logprobs: tuple[float, ...],
        versions: tuple[int, ...],
        finish: Finish,
        text: str,
    ) -> Completion:
        turn = Turn(token_ids=token_ids, logprobs=logprobs, versions=versions, text=text)
        return cls(turns=(turn,), finish=finish)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """[T]"""
        return tuple(token for turn in self.turns for token in turn.token_ids)

    @property
    def logprobs(self) -> tuple[float, ...]:
        """[T] nats"""
        return tuple(logprob for turn in self.turns for logprob in turn.logprobs)

    @property
    def versions(self) -> tuple[int, ...]:
        """[T]"""
        return tuple(version for turn in self.turns for version in turn.versions)

    @property
    def text(self) -> str:
        """What was sampled, turn by turn."""
        return "\n".join(turn.text for turn in self.turns)

    @property
    def observations(self) -> tuple[Observation, ...]:
        return tuple(turn.observation for turn in self.turns if turn.observation)


@dataclass(frozen=True, kw_only=True)
class Score:
    """What the reward file says of one completion."""

    value: float  # the scalar reward
    parts: Mapping[str, float]  # unweighted value of each part that applied, by name
    accuracy: float | None = None  # 0 or 1 from the part marked `accuracy`; None where none applies
    error: str | None = (
        None  # set when a part failed: such a completion is never trained on as if it scored 0
    )


@dataclass(frozen=True, kw_only=True)
class RolloutGroup:
    """One prompt with its G completions; scores and advantages are filled in on the way."""

    id: int  # unique in a run, increasing
    prompt: Prompt
    prompt_ids: tuple[int, ...]  # [P] image tokens expanded; the training side uses these very ids
    completions: tuple[Completion, ...]  # [G]
    scores: tuple[Score, ...] = ()  # [G] after reward/
    advantages: tuple[float, ...] = ()  # [G] after advantage.py


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How completions are drawn. Greedy is temperature 0."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    max_new_tokens: int = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainSequence:
    """One sequence to train on: what `batch/` packs. Arrays, since a batch of them is sent over the ranks."""

    name: str  # "group 12 completion 3 (digits-000001.tar/000042)", for error messages
    token_ids: NDArray[
        np.int32
    ]  # [L] what is read, such as the prompt, and what was sampled, as they followed
    # [L] whether the policy sampled the token; all else conditions, and is in no loss
    trained: NDArray[np.bool_]
    images: tuple[EncodedImage, ...]  # [I] in the order of their tokens, all of which are read
    advantage: float = 0.0
    rollout_logprobs: NDArray[np.float32] | None = None  # [trained tokens] nats

    @property
    def num_trained(self) -> int:
        """|y_i|"""
        return int(self.trained.sum())


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Sequences laid end to end, with each distinct image once.

    Answers to one prompt may share its tokens: they stand behind it as the branches of a tree, each of which goes on from the
    prompt and sees nothing of the others. A sequence by itself is a tree without branches.

    A response token's log-prob is predicted from the token before it; `response_mask` marks the predicted
    tokens, so packed response tensors [R] follow `token_ids[response_mask]`.
    """

    names: tuple[str, ...]  # [S] see TrainSequence.name
    token_ids: torch.Tensor  # [N] int64
    cu_seqlens: torch.Tensor  # [T+1] int32, offsets of trees in N
    # [A, N] int64, rotary positions on the family's axes, such as time, height, width
    positions: torch.Tensor
    # [N] bool, tokens that are trained on, in one run or in several of a sequence
    response_mask: torch.Tensor
    response_cu_seqlens: torch.Tensor  # [S+1] int32, offsets of sequences in R
    advantages: torch.Tensor  # [S] float32
    rollout_logprobs: torch.Tensor | None  # [R] float32 nats
    # [patches, patch dim] float32, distinct images only; None without images, and where `make_pixels` makes them
    pixel_values: torch.Tensor | None
    image_grid_thw: torch.Tensor | None  # [I, 3] int64, distinct images only
    image_keys: tuple[str, ...]  # [I] content hash of each distinct image
    # [occurrences] int64: distinct image shown by each image occurrence, in token order
    image_index: torch.Tensor
    make_pixels: Callable[[], torch.Tensor] | None = None
    # [T] of each tree: tokens of the sequence, or of what its branches share, then of every branch; empty: none has branches
    trees: tuple[tuple[int, ...], ...] = ()

    def pixels(self) -> torch.Tensor:
        """`pixel_values` of a batch with images, made now where they are not there."""
        if self.pixel_values is None and self.make_pixels:
            return self.make_pixels()
        assert self.pixel_values is not None
        return self.pixel_values

    @property
    def num_sequences(self) -> int:
        return len(self.names)

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.numel())

    @property
    def num_response_tokens(self) -> int:
        return int(self.response_cu_seqlens[-1])


@dataclass(frozen=True, kw_only=True)
class Work:
    """What all ranks together have to compute for a step."""

    tokens: int = 0  # of the sequences that are trained on, prompts included
    forward: int = 0  # FLOPs of one pass over them, as for old log-probs
    update: int = 0  # FLOPs of forward and backward passes, recomputation not counted


@dataclass(frozen=True, kw_only=True)
class Share:
    """One data-parallel rank's part of one optimizer step, with the denominators of the whole step."""

    # equally many on every rank; some may hold no sequence
    micro_batches: tuple[tuple[TrainSequence, ...], ...]
    num_sequences: int  # on all ranks together
    num_tokens: int  # trained response tokens on all ranks together
