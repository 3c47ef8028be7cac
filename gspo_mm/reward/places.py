"""Where on a prompt's picture the wanted and the answered boxes lie, for people to look at; no reward comes from here.

Parts that judge places say in which unit the data's boxes and the model's are. Where a part names none, all wanted
boxes of a task show it together: none above 1 are shares, all within their pictures are pixels, up to 1000 thousandths.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

from gspo_mm.reward.grounding import Box, PlaceArgs, Size, Unit, iou, shares, stated_boxes, wanted_boxes
from gspo_mm.reward.part import as_json, bare_answer
from gspo_mm.reward.parts import PARTS
from gspo_mm.reward.pattern import SlowPatternError, extract_answer
from gspo_mm.reward.spec import PartSpec, RewardSpec, text_of
from gspo_mm.types import Completion, Prompt

_KINDS = tuple(name for name, kind in PARTS.items() if issubclass(kind.args, PlaceArgs))


@dataclass(frozen=True, kw_only=True)
class Places:
    """Boxes on a prompt's one picture, in shares of its width and height; a point is a box without area."""

    wanted: tuple[Box, ...]
    answered: tuple[Box, ...]  # they may reach out of the picture
    overlap: float | None  # intersection over union, where one box is wanted and one is answered
    unit: str  # of the answered ones, and whether it is a guess


class PlaceReader:
    """Finds the boxes of some prompts and of the answers to them, as a reward file's parts read both."""

    def __init__(self, spec: RewardSpec, prompts: Iterable[Prompt]) -> None:
        self._spec = spec
        self._args = {
            part.name: cast(PlaceArgs, PARTS[part.type].args.model_validate(part.args))
            for part in spec.parts
            if part.type in _KINDS
        }
        of_tasks: dict[str, list[Prompt]] = {}
        for prompt in prompts:
            of_tasks.setdefault(prompt.task, []).append(prompt)
        self._guesses: dict[str, Unit | None] = {
            task: self._guess(together) for task, together in of_tasks.items()
        }

    def read(self, prompt: Prompt, completion: Completion | None = None) -> Places | None:
        """None for a prompt whose answer is no place, with several pictures, or whose unit is not known."""
        part, size = self._part(prompt), _size(prompt)
        if part is None or size is None:
            return None
        args, guess = self._args[part.name], self._guesses.get(prompt.task)
        if args.answer_unit is None and guess is None:
            return None
        wanted = [shares(box, args.answer_unit or guess, size) for box in self._wanted(part, prompt)]
        stated = self._stated(part, completion) if completion else []
        answered = [shares(box, args.text_unit or guess, size) for box in stated]
        known = len(wanted) == len(answered) == 1 and answered[0][:2] != answered[0][2:]
        return Places(
            wanted=tuple(wanted),
            answered=tuple(answered),
            overlap=iou(wanted[0], answered[0]) if known else None,
            unit=args.text_unit or f"{guess}, as the numbers suggest; the reward file names none",
        )

    def _part(self, prompt: Prompt) -> PartSpec | None:
        """The part that judges places for this task."""
        return next((p for p in self._spec.parts if p.name in self._args and p.covers(prompt.task)), None)

    def _wanted(self, part: PartSpec, prompt: Prompt) -> list[Box]:
        try:
            answer = as_json(bare_answer(prompt.answer, part.extract or self._spec.extract))
        except ValueError:
            return []
        return wanted_boxes(answer, self._args[part.name])

    def _stated(self, part: PartSpec, completion: Completion) -> list[Box]:
        try:
            stated = extract_answer(text_of(part, completion), part.extract or self._spec.extract)
        except SlowPatternError:
            return []
        return stated_boxes(stated) if stated else []

    def _guess(self, prompts: Sequence[Prompt]) -> Unit | None:
        """The unit of a task's boxes where its part names none."""
        found = [
            (box, size)
            for prompt in prompts
            if (part := self._part(prompt)) and (size := _size(prompt))
            for box in self._wanted(part, prompt)
        ]
        return guess_unit(found)


def _size(prompt: Prompt) -> Size:
    """Width and height in pixels of the prompt's one picture."""
    return (prompt.images[0].width, prompt.images[0].height) if len(prompt.images) == 1 else None


def guess_unit(boxes: Sequence[tuple[Box, Size]]) -> Unit | None:
    """The narrowest unit that all boxes fit, each with the size of its picture in pixels; None where none does."""
    if not boxes:
        return None
    if all(max(box) <= 1 for box, _ in boxes):
        return "one"
    if all(size and box[2] <= size[0] and box[3] <= size[1] for box, size in boxes):
        return "pixels"
    return "thousand" if all(max(box) <= 1000 for box, _ in boxes) else None
