"""Do servers and policy compute the same model? Log-probs of the same tokens on both sides, before the first step.

A rotary table that did not follow a change of length, an image put in at the wrong place, a stale vision tower or a
wrongly merged expert all leave the loss healthy and the answers plausible; here they show at once, and where they
show says what is wrong: differences in plain text accuse the decoder, those that begin after an image the vision
path or the positions, those in the response only the cache or the sampling.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Protocol

import torch

from gspo_mm.batch import Pixels, answered, pack
from gspo_mm.data.odd import describe
from gspo_mm.policy.engine import Policy
from gspo_mm.rollout.engine import ServingEngine, TokenSide
from gspo_mm.types import EncodedPrompt, GspoError, MicroBatch, Prompt, TrainSequence

_RESPONSE_TOKENS = 16
_STANDS_OUT = 4.0  # times the mean gap of text: what one picture's tokens differ by is then not rounding
_NAMED = 3  # samples in an error
PLACES = ("text", "after an image", "response")


class ParityError(GspoError):
    """Servers and policy disagree about the log-probs of the same tokens."""


class PromptEncoder(Pixels, TokenSide, Protocol):
    """What the check needs of `data.Processor`."""

    def encode(self, prompt: Prompt) -> EncodedPrompt: ...


@dataclass(frozen=True, kw_only=True)
class Gap:
    """|log-prob of the server − log-prob of the policy|, in nats, over the tokens of one place."""

    tokens: int
    mean: float
    largest: float


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """One prompt's |log-prob of the server − of the policy|, by place."""

    prompt: Prompt
    differences: dict[str, list[float]]

    @property
    def after_image(self) -> float:
        """Mean over the prompt's tokens after its first image, or over the response where that is more."""
        return max(fmean(self.steady(place) or [0.0]) for place in ("after an image", "response"))

    def steady(self, place: str) -> list[float]:
        """All but the largest: in low precision a single token may get another expert."""
        values = self.differences[place]
        return sorted(values)[:-1] or values

    def named(self) -> str:
        images = ", ".join(describe(image) for image in self.prompt.images)
        return f"{self.prompt.key} ({images}) by {self.after_image:.2g}"


@dataclass(frozen=True, kw_only=True)
class _Answered:
    """A prompt with a server's greedy answer."""

    prompt: Prompt
    sequence: TrainSequence
    logprobs: tuple[float, ...]  # of all tokens but the first, nats, by the server


def check_parity(
    policy: Policy,
    engine: ServingEngine | None,
    processor: PromptEncoder,
    prompts: list[EncodedPrompt],
    *,
    threshold: float,
    times: float = 1.0,
) -> Mapping[str, Gap]:
    """Gaps by place, over `prompts` and those with images without them too. A collective; rank 0 has the engine.

    Raises ParityError with the cause and the table when the mean gap of a place, without the largest of each prompt,
    is above `threshold` x `times` nats, or that of one sample after its image is twice as much, where text agrees.
    """
    asked: list[_Answered] = []
    with policy.ranks.together():
        if engine:
            pictured = [prompt for prompt in prompts if prompt.prompt.images]
            prompts = [*prompts, *(_without_images(prompt, processor) for prompt in pictured)]
            asked = [_ask(engine, prompt) for prompt in prompts]
    asked = policy.ranks.from_main(asked)
    places = [_places(each.sequence, processor.image_token_id) for each in asked]
    batches = [
        _compared(pack([each.sequence], processor), of_sequence)
        for each, of_sequence in zip(asked, places, strict=True)
    ]
    samples = []
    for each, of_sequence, own in zip(asked, places, policy.logprobs(batches), strict=True):
        compared = [(p, lp) for p, lp in zip(of_sequence, each.logprobs, strict=True) if p]
        differences: dict[str, list[float]] = {place: [] for place in PLACES}
        for (place, server), of_policy in zip(compared, own.tolist(), strict=True):
            differences[place].append(abs(server - of_policy))
        samples.append(_Sample(prompt=each.prompt, differences=differences))
    gaps = _gaps(samples)
    if cause := _cause(samples, gaps, threshold, times):
        raise ParityError(f"{cause}\n{table(gaps)}")
    return gaps


def _gaps(samples: list[_Sample]) -> dict[str, Gap]:
    found = {place: [x for sample in samples for x in sample.differences[place]] for place in PLACES}
    return {
        place: Gap(tokens=len(values), mean=fmean(values), largest=max(values))
        for place, values in found.items()
        if values
    }


def _cause(samples: list[_Sample], gaps: Mapping[str, Gap], threshold: float, times: float) -> str | None:
    """A sentence on what differs and what to do about it; None when all agree."""
    limit = threshold * times
    bound = f"{times:g} x " * (times != 1.0) + f"rollout.sglang.max_logprob_gap={threshold:g} nats"
    pictured = [sample for sample in samples if sample.prompt.images]
    steady = {place: [x for sample in samples for x in sample.steady(place)] for place in gaps}
    failing = [place for place, values in steady.items() if not fmean(values) <= limit]
    # One picture among many hardly moves the mean of all. Its own mean is of few tokens, and is allowed twice as much;
    # what text differs by as well is no picture's doing.
    of_text = gaps["text"].mean if "text" in gaps else 0.0
    allowed = max(limit if failing else 2 * limit, _STANDS_OUT * of_text)
    unlike = [sample for sample in pictured if not sample.after_image <= allowed]
    worst = sorted(unlike, key=lambda sample: sample.after_image, reverse=True)
    named = "; ".join(sample.named() for sample in worst[:_NAMED])
    if unlike and "text" not in failing and len(unlike) <= max(1, len(pictured) // 2):
        return (
            f"servers see other pictures than the policy in {len(unlike)} of {len(pictured)} samples: after their image "
            f"tokens differ by more than {bound} in the mean, while text and other pictures agree: {named}; save these "
            "pictures as plain 8-bit RGB PNG or take them out, and see that the servers have the policy's processor"
        )
    if not failing:
        return None
    if "text" in failing:
        what = "plain text differs already: see that rollout.sglang.extra_args change neither precision nor model"
    elif "after an image" in failing:
        what = (
            "text agrees, what follows an image does not, in most samples: the vision tower, its inputs or the positions "
            "differ; see that the servers have the policy's processor, and data.min_pixels and data.max_pixels with it"
            + (f"; furthest apart: {named}" if named else "")
        )
    else:
        what = (
            "prompts agree, responses do not: the cache or the sampling differs; see that rollout.sglang.extra_args choose "
            "neither another attention or sampling backend nor a cache in lower precision"
        )
    return f"servers and policy are not the same model: a mean difference is above {bound}; {what}"


def table(gaps: Mapping[str, Gap]) -> str:
    """The gaps, for people."""
    rows = [f"    {'tokens of':<15} {'number':>7} {'mean |gap|':>11} {'largest':>9}   nats"]
    rows += [f"    {place:<15} {g.tokens:>7} {g.mean:>11.2e} {g.largest:>9.2e}" for place, g in gaps.items()]
    return "\n".join(rows)


def _ask(engine: ServingEngine, prompt: EncodedPrompt) -> _Answered:
    token_ids, logprobs = engine.logprobs_of(prompt, tokens=_RESPONSE_TOKENS)
    return _Answered(prompt=prompt.prompt, sequence=answered(prompt, token_ids), logprobs=logprobs)


def _compared(batch: MicroBatch, places: list[str | None]) -> MicroBatch:
    """A packed sequence of which all tokens that have a place are treated as response: the policy's log-probs of them."""
    mask_N = torch.tensor([False, *(place is not None for place in places)])
    ends = batch.response_cu_seqlens.new_tensor([0, int(mask_N.sum())])
    return dataclasses.replace(batch, response_mask=mask_N, response_cu_seqlens=ends)


def _places(sequence: TrainSequence, image_token_id: int | None) -> list[str | None]:
    """Place of every token but the first; None for image tokens, which are not predicted."""
    places: list[str | None] = []
    seen = False
    for number, token in enumerate(sequence.token_ids[1:], start=1):
        if sequence.trained[number]:
            places.append("response")
        elif token == image_token_id:
            seen = True
            places.append(None)
        else:
            places.append("after an image" if seen else "text")
    return places


def _without_images(prompt: EncodedPrompt, processor: PromptEncoder) -> EncodedPrompt:
    def text_only(message: Mapping[str, Any]) -> Mapping[str, Any]:
        content = message["content"]
        if isinstance(content, str):
            return message
        return {**message, "content": [part for part in content if part.get("type") != "image"]}

    messages = tuple(text_only(message) for message in prompt.prompt.messages)
    return processor.encode(
        dataclasses.replace(prompt.prompt, key=f"{prompt.prompt.key} (text)", messages=messages, images=())
    )
