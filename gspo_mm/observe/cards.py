"""What the report's page shows of a prompt and the answers to it: text, pictures, and the boxes drawn on them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from gspo_mm.data.faults import BadSample
from gspo_mm.data.pictures import data_url
from gspo_mm.observe.boxes import RunBoxes, frame, overlay
from gspo_mm.types import Completion, EncodedImage, Look, RolloutGroup

MAX_COMPLETIONS = 8  # completions of a group shown
SMALL = 128  # pixels; a picture that is narrower is shown larger, pixel by pixel


def sampled_card(group: RolloutGroup, boxes: RunBoxes) -> dict[str, Any]:
    """Of a group that training sampled, with what it can be looked for by."""
    right = {bool(score.accuracy) for score in group.scores}
    correct = "some right" if len(right) > 1 else "all right" if True in right else "none right"
    return card(group, ["live" if group.advantages else "dead", correct], boxes)


def card(
    group: RolloutGroup, signs: list[str], boxes: RunBoxes, weights: Sequence[str] = ()
) -> dict[str, Any]:
    """What the template needs of a prompt and its answers; of held-out ones, the weights that gave each."""
    images = [_picture(image) for image in group.prompt.images]
    zeros = {f"{name} is 0" for score in group.scores for name, value in score.parts.items() if value == 0}
    places = boxes.places(group.prompt)
    return {
        "signs": json.dumps([*signs, *sorted(zeros)]),
        "key": group.prompt.key,
        "task": group.prompt.task,
        "answer": json.dumps(group.prompt.answer, ensure_ascii=False),
        "question": "\n".join(_text(message) for message in group.prompt.messages),
        "images": images,
        "overlay": overlay(places),
        "unit": places.unit if places else None,
        "pages": len(group.prompt.pages),
        "left_out": max(0, len(group.completions) - MAX_COMPLETIONS),
        "completions": [
            {
                "turns": _turns(completion, images),
                "overlay": overlay(boxes.places(group.prompt, completion)),
                "finish": str(completion.finish),
                "value": "failed" if score is None or math.isnan(score.value) else f"{score.value:.2f}",
                "right": bool(score and score.accuracy),
                "parts": {}
                if score is None
                else {name: f"{value:.2f}" for name, value in score.parts.items()},
                "error": score.error if score else None,
                "last": weights[i]
                if weights
                else f"{group.advantages[i]:+.2f}"
                if group.advantages
                else "dead",
            }
            for i, completion in enumerate(group.completions[:MAX_COMPLETIONS])
            for score in [group.scores[i] if group.scores else None]
        ],
    }


def _turns(completion: Completion, of_prompt: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each with what came back after it, and with the box that it asked to see on one of the pictures until then."""
    shown, found = [*of_prompt], []
    for turn in completion.turns:
        came_back = None
        if seen := turn.observation:
            images = [_picture(image) for image in seen.images]
            came_back = {"text": seen.text, "images": images, "look": _look(seen.look, shown)}
            shown += images
        found.append({"text": turn.text, "observation": came_back})
    return found


def _look(look: Look | None, shown: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The picture, and the box on it."""
    if look is None or not 1 <= look.image <= len(shown):
        return None
    return {"of": shown[look.image - 1], "image": look.image, "frame": frame(look.box)}


def _text(message: Any) -> str:
    content = message["content"]
    return (
        content
        if isinstance(content, str)
        else " ".join(p["text"] for p in content if p.get("type") == "text")
    )


def _picture(image: EncodedImage) -> dict[str, Any]:
    """A URL that holds the picture, empty where its file in the run folder is damaged."""
    try:
        url = data_url(image.data)
    except BadSample:
        url = ""
    return {"url": url, "key": image.key, "small": image.width < SMALL}
