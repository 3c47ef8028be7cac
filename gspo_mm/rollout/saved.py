"""Answers and their scores as JSON: in saved rollouts, and in checkpoints for groups that are not trained on yet."""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gspo_mm.types import Completion, EncodedImage, Finish, Observation, RolloutGroup, Score, Turn

type PutImage = Callable[[EncodedImage], dict[str, Any]]
type TakeImage = Callable[[dict[str, Any]], EncodedImage]


def image_in_place(image: EncodedImage) -> dict[str, Any]:
    """With its bytes, for what has no folder of images."""
    return image_by_key(image) | {"data": base64.b64encode(image.data).decode()}


def image_by_key(image: EncodedImage) -> dict[str, Any]:
    """Without its bytes, which are kept elsewhere."""
    return {"key": image.key, "width": image.width, "height": image.height}


def image_from_place(saved: dict[str, Any]) -> EncodedImage:
    known: dict[str, Any] = saved | {"data": base64.b64decode(saved["data"])}
    return EncodedImage(**known)


def encode_answers(group: RolloutGroup, put_image: PutImage = image_in_place) -> dict[str, Any]:
    """{"completions": [...], "scores": [...]}, exact numbers."""
    scores = [
        dataclasses.asdict(s) | {"value": None if math.isnan(s.value) else s.value} for s in group.scores
    ]
    completions = [
        {"turns": [_encode_turn(turn, put_image) for turn in c.turns], "finish": c.finish}
        for c in group.completions
    ]
    return {"completions": completions, "scores": scores}


def decode_answers(
    group: RolloutGroup, saved: dict[str, Any], take_image: TakeImage = image_from_place
) -> RolloutGroup:
    """`group` with the answers of `encode_answers`, or of an earlier version, which knew one turn only."""
    completions = [
        Completion(
            turns=tuple(_decode_turn(turn, take_image) for turn in c.get("turns", [c])),
            finish=Finish(c["finish"]),
        )
        for c in saved["completions"]
    ]
    scores = [Score(**s | {"value": math.nan if s["value"] is None else s["value"]}) for s in saved["scores"]]
    return replace(group, completions=tuple(completions), scores=tuple(scores))


def _encode_turn(turn: Turn, put_image: PutImage) -> dict[str, Any]:
    saved = {name: getattr(turn, name) for name in ("token_ids", "logprobs", "versions", "text")}
    if turn.observation is None:
        return saved
    seen = turn.observation
    images = [put_image(image) for image in seen.images]
    return saved | {"observation": {"token_ids": seen.token_ids, "images": images, "text": seen.text}}


def _decode_turn(saved: dict[str, Any], take_image: TakeImage) -> Turn:
    observation = None
    if seen := saved.get("observation"):
        observation = Observation(
            token_ids=tuple(seen["token_ids"]),
            images=tuple(map(take_image, seen["images"])),
            text=seen["text"],
        )
    return Turn(
        token_ids=tuple(saved["token_ids"]),
        logprobs=tuple(saved["logprobs"]),
        versions=tuple(saved["versions"]),
        text=saved["text"],
        observation=observation,
    )
