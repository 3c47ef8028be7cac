"""`type: image_tools`: the model looks again at a picture that it was shown, larger or turned.

A call that cannot be done is answered with a sentence, which the model reads; a turn without a call ends the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, validate_call

from gspo_mm.data.pictures import decode_image
from gspo_mm.environment.base import Feedback
from gspo_mm.environment.calls import CallError, read_calls
from gspo_mm.types import EncodedImage, Prompt, Turn

_NUMBER = {"type": "integer", "description": "which of the pictures so far, from 1; the last one if left out"}
_UNITS = {"thousand": "thousandths of", "one": "shares (0 to 1) of", "pixels": "pixels of"}


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid")

    image: int | None = None


class _Zoom(_Arguments):
    box: tuple[float, float, float, float]


class _Rotate(_Arguments):
    degrees: Literal[90, 180, 270]


class ImageTools:
    """Pictures are decoded as everywhere here, and sent as PNG."""

    @validate_call
    def __init__(
        self,
        unit: Literal["thousand", "one", "pixels"] = "thousand",
        least_side: Annotated[int, Field(ge=1)] = 336,
        most_zoom: float = 16.0,
    ) -> None:
        """`unit` of boxes: thousandths of the picture, as Qwen3-VL and GLM-4.5V point; shares of it; pixels of it.

        What is cut out is enlarged until its shorter side has `least_side` pixels, at most `most_zoom` times.
        """
        self._unit, self._least, self._most = unit, least_side, most_zoom
        named = _UNITS[unit]
        box = {
            "type": "array",
            "items": {"type": "number"},
            "minItems": 4,
            "maxItems": 4,
            "description": f"x1, y1, x2, y2 in {named} the picture, from its upper left corner",
        }
        turn = {"type": "integer", "enum": [90, 180, 270], "description": "degrees, clockwise"}
        self.tools = [
            _schema("zoom_in", "Shows a part of a picture, enlarged.", box=box),
            _schema("rotate", "Shows a picture turned.", degrees=turn),
        ]

    async def step(self, prompt: Prompt, turns: Sequence[Turn]) -> Feedback | None:
        try:
            calls = read_calls(turns[-1].text)
            if not calls:
                return None
            if len(calls) > 1:
                raise CallError("one call at a time")
            shown = [
                *prompt.images,
                *(i for turn in turns if turn.observation for i in turn.observation.images),
            ]
            return Feedback(images=[self._do(calls[0].name, dict(calls[0].arguments), shown)])
        except CallError as error:
            return Feedback(text=f"Error: {error}")

    def _do(self, name: str, arguments: dict[str, Any], shown: Sequence[EncodedImage]) -> Image.Image:
        if name not in ("zoom_in", "rotate"):
            raise CallError(f"there is no tool {name!r}, only zoom_in and rotate")
        try:
            asked = (_Zoom if name == "zoom_in" else _Rotate).model_validate(arguments)
        except ValidationError as error:
            first = error.errors()[0]
            raise CallError(f"{name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        number = len(shown) if asked.image is None else asked.image
        if not 1 <= number <= len(shown):
            raise CallError(f"there is no picture {number}, only 1 to {len(shown)}")
        picture = decode_image(shown[number - 1].data)
        if isinstance(asked, _Rotate):
            return picture.rotate(-asked.degrees, expand=True)
        return self._zoomed(picture, asked.box)

    def _zoomed(self, picture: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
        width, height = picture.size
        scale_x, scale_y = {
            "thousand": (width / 1000, height / 1000),
            "one": (width, height),
            "pixels": (1, 1),
        }[self._unit]
        x1, y1, x2, y2 = box[0] * scale_x, box[1] * scale_y, box[2] * scale_x, box[3] * scale_y
        left, top, right, bottom = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
        if not (left < right and top < bottom):  # not a number, too
            raise CallError(f"the box {list(box)} holds nothing of the picture")
        cut = picture.crop(
            (int(left), int(top), max(int(left) + 1, round(right)), max(int(top) + 1, round(bottom)))
        )
        times = min(max(self._least / min(cut.size), 1.0), self._most)
        return cut.resize((round(cut.width * times), round(cut.height * times)), Image.Resampling.BICUBIC)


def _schema(name: str, description: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {**properties, "image": _NUMBER},
                "required": list(properties),
            },
        },
    }
