"""A YAML reward file -> a function from (prompt, completion) to a Score. `configs/rewards/digits.yaml` is an example.

Each part that covers the prompt's task judges the text; the reward is the weighted sum. The *answer* is what
`extract` finds in the completion's text. Rules against reward hacking:

- A text that states two different answers states none: every part that reads the extracted answer gives 0.
- So does a text without an answer.
- A part must judge every text; what it raises is a fault of the part or the data, never of the model. Such a
completion
  gets no reward (value NaN, `error` set), is counted and logged, and is left out of training; it is not
  scored 0.

A completion that was cut off at the length limit is judged by its text as it is.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from yaml import YAMLError

from gspo_mm.reward.grounding import BoxArgs, box_iou
from gspo_mm.reward.text import (
    Args,
    ExactArgs,
    FormatArgs,
    NumberArgs,
    compile_pattern,
    exact,
    format_,
    number,
)
from gspo_mm.types import Completion, GspoError, Json, Prompt, RolloutGroup, Score

log = logging.getLogger(__name__)


class RewardFileError(GspoError, ValueError):
    """The reward file cannot be used; the message names the file, the key, its value and the fix."""


@dataclass(frozen=True, kw_only=True)
class PartType:
    """A kind of reward part."""

    judge: Callable[[str, Json, Any], float]  # (text, prompt's answer, args) -> value in [0, 1]
    args: type[Args]
    whole_text: bool = False  # judges the completion's text as it is, not the extracted answer


# All kinds of parts. A new one is a function beside its siblings and a line here.
PARTS: dict[str, PartType] = {
    "exact": PartType(judge=exact, args=ExactArgs),
    "number": PartType(judge=number, args=NumberArgs),
    "box_iou": PartType(judge=box_iou, args=BoxArgs),
    "format": PartType(judge=format_, args=FormatArgs, whole_text=True),
}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class PartSpec(_Section):
    """One entry of `parts:`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]  # names the part in scores and metrics
    type: str  # a key of PARTS
    weight: Annotated[float, Field(ge=0.0)] = 1.0  # 0: measured, not rewarded
    tasks: Annotated[list[str], Field(min_length=1)] | None = None  # null: all tasks
    # This part decides Score.accuracy: 1 where its value reaches the threshold (true: 1.0).
    accuracy: bool | float = False
    extract: str | None = None  # overrides the file's
    args: dict[str, Any] = {}

    @field_validator("accuracy", mode="plain")
    @classmethod
    def _threshold(cls, value: Any) -> bool | float:
        if not isinstance(value, bool) and not (isinstance(value, int | float) and 0 < value <= 1):
            raise ValueError("use true, false, or a threshold above 0 and up to 1")
        return value

    @field_validator("extract")
    @classmethod
    def _extracts(cls, pattern: str | None) -> str | None:
        return _check_extract(pattern)

    def covers(self, task: str) -> bool:
        return self.tasks is None or task in self.tasks


class RewardSpec(_Section):
    """A reward file."""

    name: str
    description: str = ""
    extract: str | None = None  # regular expression, at most one group; null: the whole text is the answer
    combine: Literal["sum"] = "sum"  # how parts become the reward: see COMBINE
    parts: Annotated[list[PartSpec], Field(min_length=1)]

    @field_validator("extract")
    @classmethod
    def _extracts(cls, pattern: str | None) -> str | None:
        return _check_extract(pattern)


def weighted_sum(values: list[float], weights: list[float]) -> float:
    # Rounded, so that rewards equal on paper (0.1 + 0.2 and 0.3) are equal: else a group of them would look
    # alive, and normalising it would turn a difference of 1e-17 into advantages of 1.
    return round(math.fsum(value * weight for value, weight in zip(values, weights, strict=True)), 12)


# Ways to combine parts (and `RewardSpec.combine` lists their names).
COMBINE: dict[str, Callable[[list[float], list[float]], float]] = {"sum": weighted_sum}


class RewardFunction:
    """What a reward file says. Stateless but for the log."""

    def __init__(self, spec: RewardSpec, *, source: str) -> None:
        """Raises RewardFileError for parts that do not fit together."""
        self.spec = spec
        self.source = source
        self._args = {part.name: _parse_args(part, source) for part in spec.parts}
        _check_parts(spec, source)

    def score(self, prompt: Prompt, completion: Completion) -> Score:
        """Judge one completion. Raises RewardFileError where no part covers the prompt's task."""
        parts = [part for part in self.spec.parts if part.covers(prompt.task)]
        if not parts:
            known = sorted({task for part in self.spec.parts for task in part.tasks or ()})
            raise RewardFileError(
                f"{self.source}: prompt {prompt.key} has task={prompt.task!r}, which no part covers (tasks "
                f"known here: {', '.join(known)}); add it to the tasks of a part"
            )
        values: dict[str, float] = {}
        accuracy: float | None = None
        for part in parts:
            try:
                value = self._judge(part, prompt, completion.text)
            except Exception as error:  # any: a part is an extension point, and its failure is no 0
                reason = f"part {part.name}: {type(error).__name__}: {error}"
                return Score(value=math.nan, parts=values, error=reason)
            values[part.name] = value
            if part.accuracy is not False:
                accuracy = float(value >= float(part.accuracy))
        reward = COMBINE[self.spec.combine](list(values.values()), [part.weight for part in parts])
        return Score(value=reward, parts=values, accuracy=accuracy)

    def score_groups(self, groups: Iterable[RolloutGroup]) -> list[RolloutGroup]:
        """Groups with `scores`; failed completions are logged, their share is `failed_fraction` of the result."""
        scored = [
            replace(
                group, scores=tuple(self.score(group.prompt, completion) for completion in group.completions)
            )
            for group in groups
        ]
        failures = [
            f"group {group.id} completion {i} ({group.prompt.key}): {score.error}"
            for group in scored
            for i, score in enumerate(group.scores)
            if score.error is not None
        ]
        if failures:
            total = sum(len(group.scores) for group in scored)
            log.warning(
                "reward failed for %d of %d completions, first: %s", len(failures), total, failures[0]
            )
        return scored

    def _judge(self, part: PartSpec, prompt: Prompt, text: str) -> float:
        kind = PARTS[part.type]
        stated = text if kind.whole_text else extract_answer(text, part.extract or self.spec.extract)
        # Judged even where nothing is stated, so that a fault of the prompt's answer is found at once.
        value = kind.judge(stated or "", prompt.answer, self._args[part.name])
        if not 0.0 <= value <= 1.0:  # NaN too
            raise ValueError(f"value {value!r} is outside [0, 1]")
        return value if stated or kind.whole_text else 0.0


def load_reward(path: str | Path) -> RewardFunction:
    """Read and check a reward file; raises RewardFileError: one sentence naming file, key, value and fix."""
    path = Path(path)
    if not path.is_file():
        raise RewardFileError(f"reward.file={path} does not exist; try configs/rewards/digits.yaml")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, OSError) as error:
        raise RewardFileError(f"{path} is not a valid YAML file: {' '.join(str(error).split())}") from None
    return parse_reward(values, source=str(path))


def parse_reward(values: Any, *, source: str) -> RewardFunction:
    """Build from plain values; raises RewardFileError as `load_reward` does."""
    if not values:
        raise RewardFileError(
            f"{source} is empty; give it a name and parts, as in configs/rewards/digits.yaml"
        )
    if not isinstance(values, dict):
        raise RewardFileError(f"{source} holds no mapping of keys; start from configs/rewards/digits.yaml")
    try:
        spec = RewardSpec.model_validate(values)
    except ValidationError as error:
        raise RewardFileError(_sentence(error, source, "", values)) from None
    return RewardFunction(spec, source=source)


def extract_answer(text: str, pattern: str | None) -> str | None:
    """The answer stated in the text, stripped; None where none is stated, or two different ones are."""
    if pattern is None:
        return text.strip()
    answers = {(match[match.re.groups] or "").strip() for match in compile_pattern(pattern).finditer(text)}
    return answers.pop() if len(answers) == 1 else None


def failed_fraction(groups: Iterable[RolloutGroup]) -> float:
    """Completions whose reward failed, as a fraction of all; 0 without completions."""
    failed = [score.error is not None for group in groups for score in group.scores]
    return sum(failed) / len(failed) if failed else 0.0


def _parse_args(part: PartSpec, source: str) -> Args:
    where = f"parts.{part.name}"
    if part.type not in PARTS:
        raise RewardFileError(
            f"{source}: {where}.type={part.type!r} is unknown; use one of {', '.join(PARTS)}"
        )
    kind = PARTS[part.type]
    if kind.whole_text and part.extract is not None:
        raise RewardFileError(
            f"{source}: {where}.extract={part.extract!r} has no effect, as type {part.type} judges the whole "
            "text; remove it"
        )
    try:
        return kind.args.model_validate(part.args)
    except ValidationError as error:
        raise RewardFileError(_sentence(error, source, f"{where}.args.", part.args)) from None


def _check_parts(spec: RewardSpec, source: str) -> None:
    names = [part.name for part in spec.parts]
    for name in names:
        if names.count(name) > 1:
            raise RewardFileError(
                f"{source}: parts.{name} is there {names.count(name)} times; give each part its own name"
            )
    if all(part.weight == 0 for part in spec.parts):
        raise RewardFileError(
            f"{source}: parts.*.weight=0, so every reward is 0; give at least one part a weight above 0"
        )
    deciding = [part for part in spec.parts if part.accuracy is not False]
    for i, one in enumerate(deciding):
        for other in deciding[i + 1 :]:
            if one.tasks is None or other.tasks is None or set(one.tasks) & set(other.tasks):
                raise RewardFileError(
                    f"{source}: parts.{one.name}.accuracy and parts.{other.name}.accuracy are both set for "
                    "the same task; keep one per task"
                )


def _check_extract(pattern: str | None) -> str | None:
    if pattern is not None and compile_pattern(pattern).groups > 1:
        raise ValueError(
            "it has more than one group; mark the answer with one, and write (?:...) for the others"
        )
    return pattern


def _sentence(error: ValidationError, source: str, prefix: str, values: Any) -> str:
    """The first fault, as one sentence."""
    fault = error.errors(include_url=False)[0]
    location = list(fault["loc"])
    if len(location) > 1 and location[0] == "parts" and isinstance(values["parts"][location[1]], dict):
        location[1] = values["parts"][location[1]].get("name", location[1])
    key = prefix + ".".join(str(part) for part in location)
    value = fault["input"]
    match fault["type"]:
        case "missing":
            fix = "is missing; add it"
        case "extra_forbidden":
            fix = "is unknown; correct its spelling or remove it"
        case "model_type":
            fix = "is refused: write a mapping of keys here"
        case _:
            message = fault["msg"].removeprefix("Value error, ")
            fix = f"is refused: {message[0].lower()}{message[1:]}"
    shown = "" if fault["type"] == "missing" else f"={value!r}"
    return f"{source}: {key}{shown} {fix}"
