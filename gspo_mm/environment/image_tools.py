"""`type: image_tools`: the model looks again at a picture that it was shown, larger or turned, or at the next one of its sample.

A call that cannot be done is answered with a sentence, which the model reads; a turn without a call ends the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, validate_call

from gspo_mm.data.pictures import decode_image
from gspo_mm.environment.base import Feedback, size_seen
from gspo_mm.environment.calls import Call, CallError, read_calls
from gspo_mm.types import EncodedImage, Look, Prompt, Turn

_UNITS = {"thousand": "thousandths", "one": "shares (0 to 1)", "pixels": "pixels"}


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _OfPicture(_Arguments):
    image: int | None = None


class _Zoom(_OfPicture):
    box: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]


class _Rotate(_OfPicture):
    degrees: Literal[90, 180, 270]


_ARGUMENTS = {"zoom_in": _Zoom, "rotate": _Rotate, "next_image": _Arguments}


class ImageTools:
    """Pictures are decoded as everywhere here, and sent as PNG; those of `Prompt.pages` as they are."""

    @validate_call
    def __init__(
        self,
        unit: Literal["thousand", "one", "pixels"] | None,
        least_side: Annotated[int, Field(ge=1)] = 336,
        most_zoom: float = 16.0,
        pages: bool = False,
    ) -> None:
        """`unit` of boxes: thousandths of the picture; shares of it; pixels of it as it was resized for the model.

        What is cut out is enlarged until its shorter side has `least_side` pixels, at most `most_zoom` times. With `pages`
        `next_image` shows a sample's pages one by one.
        """
        if unit is None:
            raise ValueError("models of this family have no unit for places in pictures; set args.unit")
        self._unit, self._least, self._most, self.shows_pages = unit, least_side, most_zoom, pages
        box = {
            "type": "array",
            "items": {"type": "number"},
            "minItems": 4,
            "maxItems": 4,
            "description": f"x1, y1, x2, y2 in {_UNITS[unit]} of the picture, from its upper left corner",
        }
        turn = {"type": "integer", "enum": [90, 180, 270], "description": "degrees, clockwise"}
        number = {
            "type": "integer",
            "description": "which of the pictures so far, from 1; the last one if left out",
        }
        self.tools = [
            _schema("zoom_in", "Shows a part of a picture, enlarged.", ["box"], box=box, image=number),
            _schema("rotate", "Shows a picture turned.", ["degrees"], degrees=turn, image=number),
            *([_schema("next_image", "Shows the next picture, if there is one.", [])] if pages else []),
        ]

    async def step(self, prompt: Prompt, turns: Sequence[Turn]) -> Feedback | None:
        try:
            calls = read_calls(turns[-1].text)
            if not calls:
                return None
            if len(calls) > 1:
                raise CallError("one call at a time")
            return self._do(calls[0], prompt, turns)
        except CallError as error:
            return Feedback(text=f"Error: {error}")

    def _do(self, call: Call, prompt: Prompt, turns: Sequence[Turn]) -> Feedback:
        asked = self._read(call)
        if not isinstance(asked, _OfPicture):
            return self._next(prompt, turns)
        shown = [*prompt.images, *(i for turn in turns if turn.observation for i in turn.observation.images)]
        number = len(shown) if asked.image is None else asked.image
        if not 1 <= number <= len(shown):
            raise CallError(f"there is no picture {number}, only 1 to {len(shown)}")
        if isinstance(asked, _Zoom):
            return self._zoom(shown[number - 1], number, asked.box)
        assert isinstance(asked, _Rotate)
        return Feedback(images=[decode_image(shown[number - 1].data).rotate(-asked.degrees, expand=True)])

    def _read(self, call: Call) -> _Arguments:
        offered = [tool["function"]["name"] for tool in self.tools]
        if call.name not in offered:
            raise CallError(f"there is no tool {call.name!r}, only {' and '.join(offered)}")
        try:
            return _ARGUMENTS[call.name].model_validate(dict(call.arguments))
        except ValidationError as error:
            first = error.errors()[0]
            raise CallError(f"{call.name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None

    def _next(self, prompt: Prompt, turns: Sequence[Turn]) -> Feedback:
        shown = sum(
            read_calls(turn.text)[0].name == "next_image"
            for turn in turns[:-1]
            if turn.observation and turn.observation.images
        )
        if shown == len(prompt.pages):
            raise CallError("there is no further picture")
        return Feedback(images=[prompt.pages[shown].data])

    def _zoom(self, image: EncodedImage, number: int, box: tuple[float, float, float, float]) -> Feedback:
        across, down = {"thousand": (1000, 1000), "one": (1, 1)}.get(self._unit) or size_seen(image)
        look = Look(image=number, box=(box[0] / across, box[1] / down, box[2] / across, box[3] / down))
        picture = decode_image(image.data)
        (width, height), (x1, y1, x2, y2) = picture.size, box
        left, right = max(x1 * width / across, 0), min(x2 * width / across, width)
        top, bottom = max(y1 * height / down, 0), min(y2 * height / down, height)
        if not (left < right and top < bottom):
            return Feedback(text=f"Error: the box {list(box)} holds nothing of the picture", look=look)
        cut = picture.crop(
            (int(left), int(top), max(int(left) + 1, round(right)), max(int(top) + 1, round(bottom)))
        )
        times = min(max(self._least / min(cut.size), 1.0), self._most)
        size = round(cut.width * times), round(cut.height * times)
        return Feedback(images=[cut.resize(size, Image.Resampling.BICUBIC)], look=look)


def _schema(name: str, description: str, required: list[str], **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }
