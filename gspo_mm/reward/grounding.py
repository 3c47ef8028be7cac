"""Reward parts that judge places in an image: box_iou. See `text.py` for the contract of a part."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

from pydantic import Field

from gspo_mm.reward.text import Args
from gspo_mm.types import Json

# x1, y1, x2, y2 in the coordinates of the data, x1 < x2, y1 < y2
type Box = tuple[float, float, float, float]

_FENCE = re.compile(r"```(?:json)?(.*)```", re.DOTALL)
_LARGEST = 1e6  # coordinates beyond are babble (and some integers that JSON reads fit no float)


class BoxArgs(Args):
    at_least: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0  # a smaller overlap counts as none


def box_iou(text: str, answer: Json, args: BoxArgs) -> float:
    """Intersection over union of the text's one box and the answer; 0 where the text is no valid box.

    Without `at_least` a box around the whole picture earns a safe little in every answer, and a policy that is still
    unsure learns to give just that.
    """
    wanted = _box(answer)
    if wanted is None:
        raise ValueError(f"answer {answer!r} is no box [x1, y1, x2, y2] with x1 < x2 and y1 < y2")
    given = parse_box(text)
    overlap = 0.0 if given is None else iou(given, wanted)
    return overlap if overlap >= args.at_least else 0.0


def parse_box(text: str) -> Box | None:
    """The box that the text is: `[x1, y1, x2, y2]` or Qwen's `{"bbox_2d": [...]}`, each also in a list, or fenced.

    None for anything else: several boxes, a box without area, numbers as strings, nan.
    """
    text = text.strip()
    fenced = _FENCE.fullmatch(text)
    try:
        value = json.loads(fenced[1] if fenced else text, object_pairs_hook=_unique)
    except (ValueError, RecursionError):  # not JSON, too many digits, or nested to exhaust the parser
        return None
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        value = value.get("bbox_2d")
    return _box(value)


def iou(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / (_area(a) + _area(b) - shared)


def _box(value: Any) -> Box | None:
    if not isinstance(value, list | tuple) or len(value) != 4:
        return None
    if any(isinstance(v, bool) or not isinstance(v, int | float) or not abs(v) <= _LARGEST for v in value):
        return None
    x1, y1, x2, y2 = map(float, value)
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key is given twice, so two answers are")
    return dict(pairs)
