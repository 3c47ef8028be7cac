"""Saved rollouts, to look at and to train on again (`rollout.replay`), and answers of a checkpoint not yet trained on.

RUN/rollouts/step-00000010.jsonl.gz       one group a line, exact numbers
RUN/rollouts/held-out-00000010.jsonl.gz   the same of an evaluation: one answer a group
RUN/rollouts/images/<sha256>              encoded bytes, once per distinct image
"""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import orjson

from gspo_mm.runtime.disk import written_whole
from gspo_mm.types import (
    Completion,
    EncodedImage,
    Finish,
    Look,
    Observation,
    Prompt,
    RolloutGroup,
    Score,
    Turn,
)

type Kind = Literal["step", "held-out"]
type PutImage = Callable[[EncodedImage], dict[str, Any]]
type TakeImage = Callable[[dict[str, Any]], EncodedImage]


def save_rollouts(run_dir: Path, step: int, groups: list[RolloutGroup], *, kind: Kind = "step") -> Path:
    """Write the groups of a step; the file appears when it is whole."""
    folder = run_dir / "rollouts"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for image in {image.key: image for group in groups for image in images_of(group)}.values():
        path = folder / "images" / image.key  # a SHA-256 in hexadecimal: no name from outside
        if not path.exists():
            with written_whole(path) as file:
                file.write_bytes(image.data)
    final = folder / f"{kind}-{step:08d}.jsonl.gz"
    with written_whole(final) as temporary, gzip.open(temporary, "wb", 1) as file:
        for group in groups:
            file.write(_as_json(_encode(group)) + b"\n")
    return final


def load_rollouts(run_dir: Path, step: int, kind: Kind = "step") -> list[RolloutGroup]:
    """The groups as they were saved: equal token ids, log-probs, scores and images."""
    folder = Path(run_dir) / "rollouts"
    with gzip.open(folder / f"{kind}-{step:08d}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [
            decode_group(json.loads(line), lambda key: (folder / "images" / key).read_bytes())
            for line in file
        ]


def list_steps(run_dir: Path, kind: Kind = "step") -> list[int]:
    """Steps whose rollouts were saved, in order."""
    files = (Path(run_dir) / "rollouts").glob(f"{kind}-*.jsonl.gz")
    return sorted(int(path.name.removesuffix(".jsonl.gz").removeprefix(f"{kind}-")) for path in files)


def _as_json(value: Any) -> bytes:
    """orjson is ten times as fast, and keeps other threads waiting as much less; numbers beyond 64 bits it does not take."""
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:
        return json.dumps(value).encode()


def _encode(group: RolloutGroup) -> dict[str, Any]:
    prompt = {f.name: getattr(group.prompt, f.name) for f in dataclasses.fields(Prompt)}
    prompt |= {name: list(map(image_by_key, prompt[name])) for name in ("images", "pages")}
    return {
        "id": group.id,
        "prompt": prompt,
        "prompt_ids": group.prompt_ids,
        **encode_answers(group, image_by_key),
        "advantages": group.advantages,
    }


def decode_group(line: dict[str, Any], read_image: Callable[[str], bytes]) -> RolloutGroup:
    """One saved line, with images as they are read by their keys."""

    def take(saved: dict[str, Any]) -> EncodedImage:
        return EncodedImage(data=read_image(saved["key"]), **saved)

    prompt = line["prompt"]
    prompt |= {name: tuple(map(take, prompt.get(name, ()))) for name in ("images", "pages")}
    prompt |= {name: tuple(prompt.get(name, ())) for name in ("messages", "first_turns")}
    group = RolloutGroup(
        id=line["id"],
        prompt=Prompt(**prompt),
        prompt_ids=tuple(line["prompt_ids"]),
        completions=(),
        advantages=tuple(line["advantages"]),
    )
    return decode_answers(group, line, take)


def images_of(group: RolloutGroup) -> list[EncodedImage]:
    """Those of the sample and those that came back, as often as they were shown."""
    seen = [image for c in group.completions for o in c.observations for image in o.images]
    return [*group.prompt.pictures, *seen]


def image_with_bytes(image: EncodedImage) -> dict[str, Any]:
    """With its bytes, for what has no folder of images."""
    return image_by_key(image) | {"data": base64.b64encode(image.data).decode()}


def image_by_key(image: EncodedImage) -> dict[str, Any]:
    """Without its bytes, which are kept elsewhere."""
    return {"key": image.key, "width": image.width, "height": image.height}


def image_from_bytes(saved: dict[str, Any]) -> EncodedImage:
    known: dict[str, Any] = saved | {"data": base64.b64decode(saved["data"])}
    return EncodedImage(**known)


def encode_answers(group: RolloutGroup, put_image: PutImage = image_with_bytes) -> dict[str, Any]:
    """{"completions": [...], "scores": [...]}, exact numbers."""
    scores = [
        dataclasses.asdict(s) | {"value": None if math.isnan(s.value) else s.value} for s in group.scores
    ]
    completions = [
        {"turns": [_encode_turn(turn, put_image) for turn in c.turns], "finish": c.finish}
        | ({"fault": c.fault} if c.fault else {})
        for c in group.completions
    ]
    return {"completions": completions, "scores": scores}


def decode_answers(
    group: RolloutGroup, saved: dict[str, Any], take_image: TakeImage = image_from_bytes
) -> RolloutGroup:
    """`group` with the answers of `encode_answers`, or of an earlier version, which knew one turn only."""
    completions = [
        Completion(
            turns=tuple(_decode_turn(turn, take_image) for turn in c.get("turns", [c])),
            finish=Finish(c["finish"]),
            fault=c.get("fault"),
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
    look = {"look": dataclasses.asdict(seen.look)} if seen.look else {}
    return saved | {"observation": {"token_ids": seen.token_ids, "images": images, "text": seen.text, **look}}


def _decode_turn(saved: dict[str, Any], take_image: TakeImage) -> Turn:
    observation = None
    if seen := saved.get("observation"):
        observation = Observation(
            token_ids=tuple(seen["token_ids"]),
            images=tuple(map(take_image, seen["images"])),
            text=seen["text"],
            look=_decode_look(seen.get("look")),
        )
    return Turn(
        token_ids=tuple(saved["token_ids"]),
        logprobs=tuple(saved["logprobs"]),
        versions=tuple(saved["versions"]),
        text=saved["text"],
        observation=observation,
    )


def _decode_look(saved: dict[str, Any] | None) -> Look | None:
    return Look(image=saved["image"], box=tuple(saved["box"])) if saved else None
