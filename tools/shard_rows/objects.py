"""ms-swift's rows with places: names and boxes of the column `objects`, written where a text has marks for them.

    messages: "<image>Find <ref-object>.", "<bbox>"
    objects: {ref: ["the cat"], bbox: [[10, 20, 60, 80]]}

Each mark takes the next name or box; names and boxes have nothing to do with each other. A box has four numbers,
a point two: pixels of its image (bbox_type real, which is what is meant where none is named; image_id says which image
it is, the first if missing), or shares of it (norm1). They are written as [x1, y1, x2, y2] in the model's unit.

The format is that of "Grounding" in ms-swift's guide to custom data sets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, repeat
from typing import Any

from gspo_mm.data.faults import BadSample
from gspo_mm.data.pictures import measure
from gspo_mm.reward.grounding import Unit

_MARK = re.compile("<ref-object>|<bbox>")


def has_marks(value: Any) -> bool:
    return _MARK.search(str(value)) is not None


def with_objects(
    messages: list[dict[str, Any]],
    response: str | None,
    column: Any,
    images: Sequence[bytes],
    unit: Unit | None,
) -> tuple[list[dict[str, Any]], str | None]:
    """Messages and response with names and boxes in the places of their marks. `column` as JSON has it; raises BadSample."""
    if unit is None:
        raise BadSample(
            "objects in text",
            "<ref-object> or <bbox> stands for what the column objects holds; say in which unit your model gives boxes: "
            "--box-unit thousand (Qwen3-VL), pixels, or one",
        )
    objects = _Objects(column, [measure(data) for data in images], unit)
    messages = [message | {"content": objects.written(message["content"])} for message in messages]
    response = objects.written(response)
    objects.finish()
    return messages, response


class _Objects:
    """Writes what marks stand for, in the order in which texts are given to it."""

    def __init__(self, column: Any, sizes: Sequence[tuple[int, int]], unit: Unit) -> None:
        if not isinstance(column, Mapping):
            raise BadSample("wrong objects", f"{str(column)[:80]!r} is no object with ref and bbox")
        self._unit: Unit = unit
        self._sizes = sizes
        on_images = zip(_listed(column, "bbox"), chain(_listed(column, "image_id"), repeat(0)), strict=False)
        self._left: dict[str, Iterator[str]] = {
            "<ref-object>": iter([str(name) for name in _listed(column, "ref")]),
            "<bbox>": iter(
                [self._box(box, image, column.get("bbox_type") or "real") for box, image in on_images]
            ),
        }
        self._met: set[str] = set()

    def written(self, content: Any) -> Any:
        """A message's content, text or parts, without marks."""
        if isinstance(content, str):
            return _MARK.sub(self._next, content)
        if not isinstance(content, list):
            return content
        return [
            part | {"text": self.written(part["text"])} if part.get("type") == "text" else part
            for part in content
        ]

    def finish(self) -> None:
        """What is left over of a kind that had marks would be lost."""
        for mark in self._met:
            if more := len(list(self._left[mark])):
                raise BadSample("wrong objects", f"objects has {more} more than the texts have {mark}")

    def _next(self, mark: re.Match[str]) -> str:
        self._met.add(mark[0])
        found = next(self._left[mark[0]], None)
        if found is None:
            raise BadSample("wrong objects", f"the texts have more {mark[0]} than objects has")
        return found

    def _box(self, values: Any, image: Any, kind: Any) -> str:
        if not isinstance(values, list) or len(values) not in (2, 4) or not all(map(_is_number, values)):
            raise BadSample("wrong objects", f"{str(values)[:80]} is no box of 4 numbers and no point of 2")
        if not isinstance(image, int) or not 0 <= image < len(self._sizes):
            raise BadSample("wrong objects", f"a box is on image {image}; the row has {len(self._sizes)}")
        if kind not in ("real", "norm1"):
            raise BadSample("wrong objects", f"bbox_type {kind!r} is neither real nor norm1")
        size = self._sizes[image]
        given = size if kind == "real" else (1, 1)
        wanted = {"pixels": size, "thousand": (1000, 1000), "one": (1, 1)}[self._unit]
        digits = 3 if self._unit == "one" else None
        pairs = [(value, place % 2) for place, value in enumerate(values)]
        return str([round(value * wanted[axis] / given[axis], digits) for value, axis in pairs])


def _listed(column: Mapping[str, Any], name: str) -> list[Any]:
    value = column.get(name) or []
    if not isinstance(value, list):
        raise BadSample("wrong objects", f"{name} of objects is {str(value)[:80]!r}, no list")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
