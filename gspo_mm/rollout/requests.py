"""What servers are asked for, and that they were asked for what training will use.

A request holds the prompt's token ids with a single image token per image, which the server expands; the expanded ids come back
with the answer and must be the ones that training will use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gspo_mm.data.pictures import data_url
from gspo_mm.rollout.engine import TokenSide
from gspo_mm.rollout.replies import versions_of
from gspo_mm.types import Completion, EncodedPrompt, GspoError, SamplingParams


class PromptMismatchError(GspoError):
    """A server made other token ids of a prompt than training will use."""


class RetokenizedError(GspoError):
    """A server does not read a prompt's ids as they are."""

    def __init__(self, found: str) -> None:
        super().__init__(
            f"{found}: with rollout.environment servers must read what was sampled as it is; start them with the processor of "
            "model.path and SGLANG_MM_AVOID_RETOKENIZE=1 (SGLang 0.5.15 or newer), or set rollout.engine=embedded"
        )


def request_of(
    prompt: EncodedPrompt, processor: TokenSide, sampling: SamplingParams, group_size: int
) -> dict[str, Any]:
    """Body of POST /generate: a batch of one prompt, so that the reply is a list whatever `group_size` is."""
    parameters = {
        "n": group_size,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "max_new_tokens": sampling.max_new_tokens,
        "stop_token_ids": list(processor.stop_token_ids),
    }
    images = [data_url(image.data, lossless=True) for image in prompt.prompt.images]  # what the policy sees
    return {
        "input_ids": [collapse_images(prompt.token_ids, processor.image_token_id, prompt.image_grid_thw)],
        "image_data": [images] if images else None,
        "sampling_params": parameters,
        "return_logprob": True,
        "return_prompt_token_ids": True,
    }


def with_seeds(request: dict[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """`request` as a batch of its prompt once per sample, each with a seed: the samples of one `n` would share it."""
    count, images, parameters = len(seeds), request["image_data"], request["sampling_params"]
    return request | {
        "input_ids": request["input_ids"] * count,
        "image_data": images and images * count,
        "sampling_params": [parameters | {"n": 1, "sampling_seed": seed} for seed in seeds],
    }


def collapse_images(token_ids: Sequence[int], image_token_id: int | None, grids: Any) -> list[int]:
    """The ids with one image token per image, which is what servers expand themselves."""
    if grids is None:
        return list(token_ids)
    assert image_token_id is not None
    collapsed: list[int] = []
    for token in token_ids:
        if token != image_token_id or not collapsed or collapsed[-1] != image_token_id:
            collapsed.append(token)
    assert collapsed.count(image_token_id) == len(grids), "images are set apart by other tokens"
    return collapsed


def completion_of(reply: dict[str, Any], prompt: EncodedPrompt) -> Completion:
    """One of `ask`. Raises PromptMismatchError."""
    check_prompt(reply, prompt)
    meta, tokens = reply["meta_info"], tuple(reply["output_ids"])
    return Completion.of_one_turn(
        token_ids=tokens,
        logprobs=tuple(meta["output_token_logprobs"]),
        versions=versions_of(meta, len(tokens)),
        finish=reply["finish"],
        text=reply["text"],
    )


def check_prompt(reply: dict[str, Any], prompt: EncodedPrompt) -> None:
    """Raise PromptMismatchError unless the server expanded the prompt to the ids that training will use."""
    ids, count = reply.get("prompt_token_ids"), reply["meta_info"]["prompt_tokens"]
    if (ids is None or tuple(ids) == prompt.token_ids) and count == len(prompt.token_ids):
        return
    raise PromptMismatchError(
        f"{prompt.prompt.key}: the server made {count} tokens of a prompt that has {len(prompt.token_ids)} here, or "
        "other ones; give the servers the processor of model.path, and data.min_pixels and data.max_pixels"
    )


def check_kept(reply: dict[str, Any], probe: EncodedPrompt, *, who: str) -> None:
    """Raise RetokenizedError unless a server read the ids of `Processor.probe`."""
    try:
        check_prompt(reply, probe)
    except PromptMismatchError:
        made = reply["meta_info"]["prompt_tokens"]
        raise RetokenizedError(
            f"{who} made {made} tokens of a probe that has {len(probe.token_ids)}, or other ones"
        ) from None
