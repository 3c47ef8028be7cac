"""Reward parts that judge places in an image: box_iou, point_in_box, grounding_f1. `part.py` has their contract.

Boxes are [x1, y1, x2, y2] or Qwen's {"bbox_2d": [...], "label": ...}, points [x, y] or {"point_2d": [...]}, as JSON,
fenced or not. Coordinates are compared as they are, or converted where `text_unit` and `answer_unit` say what
they are: shares of the image (`one`, 0 to 1), thousandths (`thousand`, 0 to 1000, as Qwen3-VL answers), or
`pixels` of the image as it is in the shard (Qwen2.5-VL answers in pixels of its *resized* image: those have no
unit here).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from gspo_mm.reward.part import Args, parse_json
from gspo_mm.reward.text import normalise
from gspo_mm.types import Json

# x1, y1, x2, y2 in the coordinates of the data, x1 < x2, y1 < y2
type Box = tuple[float, float, float, float]
type Size = tuple[int, int] | None  # of the prompt's image, in pixels
Unit = Literal["one", "thousand", "pixels"]

_LARGEST = 1e6  # coordinates beyond are babble (and some integers that JSON reads fit no float)
_MOST_BOXES = 300  # a text with more is babble


class PlaceArgs(Args):
    text_unit: Unit | None = None  # of the model's coordinates
    answer_unit: Unit | None = None  # of the data's; both or neither
    answer_form: Literal["xyxy", "xywh"] = (
        "xyxy"  # of the data's boxes; xywh: corner, width, height, as in COCO
    )

    @model_validator(mode="after")
    def _both(self) -> PlaceArgs:
        if (self.text_unit is None) != (self.answer_unit is None):
            raise ValueError("text_unit and answer_unit need each other; set both, or neither")
        return self


class BoxArgs(PlaceArgs):
    at_least: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0  # a smaller overlap counts as none


class GroundingArgs(PlaceArgs):
    at_least: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5  # overlap from which two boxes can be one
    labels: bool = False  # true: their labels must be equal too, normalised


@dataclass(frozen=True)
class Labelled:
    box: Box
    label: str | None  # normalised; None where none is given


def box_iou(text: str, answer: Json, args: BoxArgs, *, size: Size = None) -> float:
    """Intersection over union of the text's one box and the answer; 0 where the text is no valid box.

    Without `at_least` a box around the whole picture earns a safe little in every answer, and a policy that is still
    unsure learns to give just that.
    """
    wanted = _wanted_box(answer, args, size)
    given = parse_box(text)
    overlap = 0.0 if given is None else iou(shares(given, args.text_unit, size), wanted)
    return overlap if _reaches(overlap, args.at_least) else 0.0


def point_in_box(text: str, answer: Json, args: PlaceArgs, *, size: Size = None) -> float:
    """1 where the text's one point lies in the answer's box or on its border."""
    wanted = _wanted_box(answer, args, size)
    point = parse_point(text)
    if point is None:
        return 0.0
    x, y, _, _ = shares((*point, *point), args.text_unit, size)
    return float(wanted[0] <= x <= wanted[2] and wanted[1] <= y <= wanted[3])


def grounding_f1(text: str, answer: Json, args: GroundingArgs, *, size: Size = None) -> float:
    """F1 of the text's boxes against the answer's list: 2 matched / (given + wanted).

    Each box matches at most one other of enough overlap, so the same box twice counts as a wrong one. As many as can
    be are matched. No boxes where none are wanted is 1; one box that is no box makes the whole text none.
    """
    wanted = _labelled(answer, args.answer_form) if isinstance(answer, list | dict) else None
    if wanted is None:
        raise ValueError(f"answer {answer!r} is no list of boxes")
    if args.labels and any(box.label is None for box in wanted):
        raise ValueError(f"answer {answer!r} has a box without a label, which labels: true compares")
    try:
        given = _labelled(parse_json(text), "xyxy")
    except ValueError:
        given = None
    if given is None or len(given) > _MOST_BOXES:
        return 0.0
    if not given and not wanted:
        return 1.0
    wanted_boxes = [shares(box.box, args.answer_unit, size) for box in wanted]
    edges = [
        [
            j
            for j, box in enumerate(wanted_boxes)
            if _reaches(iou(shares(one.box, args.text_unit, size), box), args.at_least)
            and (not args.labels or one.label == wanted[j].label)
        ]
        for one in given
    ]
    return 2 * _most_pairs(edges) / (len(given) + len(wanted))


def parse_box(text: str) -> Box | None:
    """The box that the text is: `[x1, y1, x2, y2]` or Qwen's `{"bbox_2d": [...]}`, each also in a list, or fenced.

    None for anything else: several boxes, a box without area, numbers as strings, nan.
    """
    value = _one(text)
    return _box(value.get("bbox_2d") if isinstance(value, dict) else value)


def parse_point(text: str) -> tuple[float, float] | None:
    """The point that the text is: `[x, y]` or `{"point_2d": [x, y]}`, each also in a list, or fenced."""
    value = _one(text)
    if isinstance(value, dict):
        value = value.get("point_2d")
    numbers = _numbers(value, 2)
    return None if numbers is None else (numbers[0], numbers[1])


def wanted_boxes(answer: Json, args: PlaceArgs) -> list[Box]:
    """All boxes of a data's answer, one or several, in its unit; none where it holds no boxes."""
    found = _labelled(answer, args.answer_form) if isinstance(answer, list | dict) else None
    return [box.box for box in found or ()]


def stated_boxes(text: str) -> list[Box]:
    """All boxes that a text states, in its unit, a point as a box without area; none where it states no place."""
    if (point := parse_point(text)) is not None:
        return [(*point, *point)]
    try:
        found = _labelled(parse_json(text), "xyxy")
    except ValueError:
        found = None
    return [box.box for box in found or ()][:_MOST_BOXES]


def iou(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / (_area(a) + _area(b) - shared)


def _reaches(overlap: float, bound: float) -> bool:
    return round(overlap, 9) >= bound  # a half that converting coordinates made 0.4999999999999999 is a half


def _most_pairs(edges: list[list[int]]) -> int:
    """Size of the largest matching of a bipartite graph, by augmenting paths (Kuhn)."""
    partner: dict[int, int] = {}

    def place(i: int, tried: set[int]) -> bool:
        for j in edges[i]:
            if j not in tried:
                tried.add(j)
                if j not in partner or place(partner[j], tried):
                    partner[j] = i
                    return True
        return False

    return sum(place(i, set()) for i in range(len(edges)))


def _wanted_box(answer: Json, args: PlaceArgs, size: Size) -> Box:
    wanted = _box(answer, args.answer_form)
    if wanted is None:
        raise ValueError(f"answer {answer!r} is no box [x1, y1, x2, y2] with x1 < x2 and y1 < y2")
    return shares(wanted, args.answer_unit, size)


def shares(box: Box, unit: Unit | None, size: Size) -> Box:
    """The box as shares of the image; without a unit as it is."""
    if unit in (None, "one"):
        return box
    if unit == "thousand":
        width = height = 1000
    elif size is None:
        raise ValueError("a box in pixels needs the size of the one image that it is in")
    else:
        width, height = size
    return (box[0] / width, box[1] / height, box[2] / width, box[3] / height)


def _one(text: str) -> Json:
    """The JSON value of the text, taken out of a list of one; None where it is no JSON."""
    try:
        value = parse_json(text)
    except ValueError:
        return None
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _labelled(value: Json, form: str) -> list[Labelled] | None:
    """The boxes of a list, or the one box; None where one of them is none."""
    if not isinstance(value, list) or (value and isinstance(value[0], int | float)):
        value = [value]
    boxes = []
    for each in value:
        entry = each if isinstance(each, dict) else {"bbox_2d": each}
        box, label = _box(entry.get("bbox_2d"), form), entry.get("label")
        if box is None:
            return None
        boxes.append(Labelled(box, normalise(label) if isinstance(label, str) else None))
    return boxes


def _box(value: Any, form: str = "xyxy") -> Box | None:
    numbers = _numbers(value, 4)
    if numbers is None:
        return None
    x1, y1, x2, y2 = numbers
    if form == "xywh":
        x2, y2 = x1 + x2, y1 + y2
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def _numbers(value: Any, count: int) -> list[float] | None:
    if not isinstance(value, list | tuple) or len(value) != count:
        return None
    if any(isinstance(v, bool) or not isinstance(v, int | float) or not abs(v) <= _LARGEST for v in value):
        return None
    return [float(v) for v in value]


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
