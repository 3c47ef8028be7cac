"""The tables of a reward file's words: built-in parts, and ways to make one reward of their values."""

from __future__ import annotations

import math as numbers
from collections.abc import Callable, Sequence

from gspo_mm.reward import choice, grounding, judge, math, ocr, remote, shape, structure, text, tools
from gspo_mm.reward.part import PartType

# All kinds of parts. A new one is a function beside its siblings and a line here.
PARTS: dict[str, PartType] = {
    "exact": PartType(judge=text.exact, args=text.ExactArgs, compares=True),
    "normalised": PartType(judge=text.normalised, args=text.NormalisedArgs, compares=True),
    "number": PartType(judge=text.number, args=text.NumberArgs, compares=True),
    "relaxed": PartType(judge=text.relaxed, args=text.RelaxedArgs, compares=True),
    "count": PartType(judge=text.count, args=text.CountArgs, compares=True),
    "choice": PartType(judge=choice.choice, args=choice.ChoiceArgs, compares=True, context=("meta",)),
    "math": PartType(judge=math.math_, args=math.MathArgs, compares=True),
    "anls": PartType(judge=ocr.anls, args=ocr.AnlsArgs, compares=True),
    "cer": PartType(judge=ocr.cer, args=ocr.ErrorRateArgs, compares=True),
    "wer": PartType(judge=ocr.wer, args=ocr.ErrorRateArgs, compares=True),
    "box_iou": PartType(judge=grounding.box_iou, args=grounding.BoxArgs, json_answer=True, context=("size",)),
    "point_in_box": PartType(
        judge=grounding.point_in_box, args=grounding.PlaceArgs, json_answer=True, context=("size",)
    ),
    "grounding_f1": PartType(
        judge=grounding.grounding_f1,
        args=grounding.GroundingArgs,
        json_answer=True,
        context=("size",),
    ),
    "set_f1": PartType(judge=structure.set_f1, args=structure.SetArgs, json_answer=True),
    "json_schema": PartType(judge=structure.json_schema, args=structure.JsonSchemaArgs),
    "format": PartType(judge=text.format_, args=text.FormatArgs, whole_text=True),
    "repetition": PartType(judge=shape.repetition, args=shape.RepetitionArgs, whole_text=True),
    "language": PartType(judge=shape.language, args=shape.LanguageArgs, whole_text=True),
    "length": PartType(judge=shape.length, args=shape.LengthArgs, whole_text=True, context=("tokens",)),
    "overlong": PartType(
        judge=shape.overlong, args=shape.OverlongArgs, whole_text=True, context=("tokens",), lowest=-1.0
    ),
    "tool_calls": PartType(
        judge=tools.tool_calls, args=tools.ToolCallArgs, whole_text=True, context=("completion",)
    ),
    "judge": PartType(service=judge.Judge, args=judge.JudgeArgs),
    "http": PartType(service=remote.Http, args=remote.HttpArgs),
}


def weighted_sum(values: Sequence[float], weights: Sequence[float]) -> float:
    # Rounded, so that rewards equal on paper (0.1 + 0.2 and 0.3) are equal: else a group of them would look
    # alive, and normalising it would turn a difference of 1e-17 into advantages of 1.
    return round(numbers.fsum(value * weight for value, weight in zip(values, weights, strict=True)), 12)


def weighted_product(values: Sequence[float], weights: Sequence[float]) -> float:
    """Each value to the power of its weight, multiplied: one part at 0 makes all 0, weight 0 only measures."""
    return round(numbers.prod(value**weight for value, weight in zip(values, weights, strict=True)), 12)


def closed_gate(values: Sequence[float], weights: Sequence[float]) -> float:
    """What is left where a gate is closed: penalties only, as breaking the format must not be a way round them."""
    return weighted_sum([min(value, 0.0) for value in values], weights)


# Ways to combine parts: the words of `combine:`.
COMBINE: dict[str, Callable[[Sequence[float], Sequence[float]], float]] = {
    "sum": weighted_sum,
    "product": weighted_product,
}
