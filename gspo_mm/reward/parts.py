"""The table of built-in parts."""

from __future__ import annotations

from gspo_mm.reward import choice, grounding, judge, math, ocr, remote, shape, structure, text
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
    "judge": PartType(service=judge.Judge, args=judge.JudgeArgs),
    "http": PartType(service=remote.Http, args=remote.HttpArgs),
}
