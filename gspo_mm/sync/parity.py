"""Do servers and policy compute the same model? Log-probs of the same tokens on both sides, before the first step.

A rotary table that did not follow a change of length, an image put in at the wrong place, a stale vision tower or a
wrongly merged expert all leave the loss healthy and the answers plausible; here they show at once, and where they
show tells what is wrong: differences in plain text accuse the decoder, those that begin after an image the vision
path or the positions, those in the response only the cache or the sampling.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Protocol

import torch

from gspo_mm.batch import Pixels, pack
from gspo_mm.policy.engine import Policy
from gspo_mm.rollout.sglang import SGLangEngine, check_prompt, request_of
from gspo_mm.types import EncodedPrompt, GspoError, MicroBatch, Prompt, SamplingParams, Sequence

_RESPONSE_TOKENS = 16
PLACES = ("text", "after an image", "response")


class ParityError(GspoError):
    """Servers and policy disagree about the log-probs of the same tokens."""


class PromptEncoder(Pixels, Protocol):
    """What the check needs of `data.Processor`."""

    stop_token_ids: tuple[int, ...]
    image_token_id: int

    def encode(self, prompt: Prompt) -> EncodedPrompt: ...
    def decode(self, token_ids: Iterable[int]) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Gap:
    """|log-prob of the server − log-prob of the policy|, in nats, over the tokens of one place."""

    tokens: int
    mean: float
    largest: float


@dataclass(frozen=True, kw_only=True)
class _Answered:
    """A prompt with a server's greedy answer."""

    sequence: Sequence
    logprobs: tuple[float, ...]  # of all tokens but the first, nats, by the server


def check_parity(
    policy: Policy,
    engine: SGLangEngine | None,
    processor: PromptEncoder,
    prompts: list[EncodedPrompt],
    *,
    threshold: float,
) -> Mapping[str, Gap]:
    """Gaps by place, over `prompts` and the same ones without their images. A collective; rank 0 has the engine.

    Raises ParityError with the table when the mean gap of a place is above `threshold` nats.
    """
    asked: list[_Answered] = []
    with policy.ranks.together():
        if engine:
            prompts = [*prompts, *(_without_images(prompt, processor) for prompt in prompts)]
            asked = [engine.run(_ask(engine, prompt, processor)) for prompt in prompts]
    asked = policy.ranks.from_main(asked)
    places = [_places(answered, processor.image_token_id) for answered in asked]
    batches = [
        _compared(pack([answered.sequence], processor), of_sequence)
        for answered, of_sequence in zip(asked, places, strict=True)
    ]
    found: dict[str, list[float]] = {place: [] for place in PLACES}
    for answered, of_sequence, own in zip(asked, places, policy.logprobs(batches), strict=True):
        compared = [(p, lp) for p, lp in zip(of_sequence, answered.logprobs, strict=True) if p]
        for (place, server), of_policy in zip(compared, own.tolist(), strict=True):
            found[place].append(abs(server - of_policy))
    gaps = {
        place: Gap(tokens=len(values), mean=fmean(values), largest=max(values))
        for place, values in found.items()
        if values
    }
    if any(not gap.mean <= threshold for gap in gaps.values()):
        raise ParityError(
            f"servers and policy are not the same model: a mean difference is above rollout.sglang.max_logprob_gap="
            f"{threshold:g} nats; see that rollout.sglang.extra_args change neither precision nor model\n{table(gaps)}"
        )
    return gaps


def table(gaps: Mapping[str, Gap]) -> str:
    """The gaps, for people."""
    rows = [f"    {'tokens of':<15} {'number':>7} {'mean |gap|':>11} {'largest':>9}   nats"]
    rows += [f"    {place:<15} {g.tokens:>7} {g.mean:>11.2e} {g.largest:>9.2e}" for place, g in gaps.items()]
    return "\n".join(rows)


async def _ask(engine: SGLangEngine, prompt: EncodedPrompt, processor: PromptEncoder) -> _Answered:
    sampling = SamplingParams(temperature=0.0, max_new_tokens=_RESPONSE_TOKENS)
    request = request_of(prompt, processor, sampling, 1) | {"logprob_start_len": 0}
    (reply,) = await engine.ask(request)
    check_prompt(reply, prompt)
    meta: dict[str, Any] = reply["meta_info"]
    of_prompt = [entry[0] for entry in meta["input_token_logprobs"][1:]]
    return _Answered(
        sequence=Sequence(
            name=prompt.prompt.key,
            prompt=prompt.prompt,
            token_ids=prompt.token_ids + tuple(reply["output_ids"]),
            prompt_length=len(prompt.token_ids),
        ),
        logprobs=(*of_prompt, *meta["output_token_logprobs"]),
    )


def _compared(batch: MicroBatch, places: list[str | None]) -> MicroBatch:
    """A packed sequence of which all tokens that have a place are treated as response: the policy's log-probs of them."""
    mask_N = torch.tensor([False, *(place is not None for place in places)])
    ends = batch.response_cu_seqlens.new_tensor([0, int(mask_N.sum())])
    return dataclasses.replace(batch, response_mask=mask_N, response_cu_seqlens=ends)


def _places(answered: _Answered, image_token_id: int) -> list[str | None]:
    """Place of every token but the first; None for image tokens, which are not predicted."""
    places: list[str | None] = []
    seen = False
    for number, token in enumerate(answered.sequence.token_ids[1:], start=1):
        if number >= answered.sequence.prompt_length:
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
