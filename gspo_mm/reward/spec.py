"""A YAML reward file -> a function from (prompt, completion) to a Score. `configs/rewards/README.md` explains it.

Each part that covers the prompt's task judges the text; the reward is what `combine` makes of their values. The
*answer* is what `extract` finds in the completion's text. Rules against reward hacking:

- A text that states two different answers states none: every part that reads the extracted answer gives 0.
- So does a text without an answer.
- A part named in `gate` must give 1; else nothing that other parts give counts, and what penalties take does.
- A text that is the data's answer word for word is right to every part that compares the two (PartType.compares).
- A part must judge every text; what it raises is a fault of the part or the data, never of the model. Such a
  completion gets no reward (value NaN, `error` set), is counted and logged, and is left out of training; it is
  not scored 0.

A completion that was cut off at the length limit is judged by its text as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from yaml import YAMLError

from gspo_mm.config.paths import from_here
from gspo_mm.config.unquoted import faults, misread
from gspo_mm.reward.cases import Case
from gspo_mm.reward.faults import first_fault, places_refused
from gspo_mm.reward.part import CONTEXT, Args, PartType, Service, as_json, bare_answer, is_word_for_word
from gspo_mm.reward.parts import COMBINE, PARTS, closed_gate
from gspo_mm.reward.pattern import BOXED, compile_pattern, extract_answer
from gspo_mm.reward.user import user_part
from gspo_mm.types import Completion, Finish, GspoError, Prompt, Score


class RewardFileError(GspoError, ValueError):
    """The reward file cannot be used; the message names the file, the key, its value and the fix."""


class AnswerError(GspoError, ValueError):
    """A part cannot judge the answer that a sample brings; the message names the part, the answer and what it takes."""


# says nothing: what a part raises on it is about the data's answer
_SILENT = Completion(turns=(), finish=Finish.STOP)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class PartSpec(_Section):
    """One entry of `parts:`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]  # names the part in scores and metrics
    type: str = ""  # a key of PARTS; one of this and `python`
    python: str | None = None  # a function of yours, package.module:function; see user.py
    weight: Annotated[float, Field(ge=0.0)] = 1.0  # 0: measured, not rewarded
    tasks: Annotated[list[str], Field(min_length=1)] | None = None  # null: all tasks
    # This part decides Score.accuracy: 1 where its value reaches the threshold (true: 1.0).
    accuracy: bool | float = False
    extract: str | None = None  # overrides the file's
    read: Literal["last", "all"] = "last"  # of an answer's turns
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

    @model_validator(mode="after")
    def _has_one_kind(self) -> PartSpec:
        if bool(self.type) == (self.python is not None):
            raise ValueError("a part has a type or a python function; give it one of them")
        return self

    def covers(self, task: str) -> bool:
        return self.tasks is None or task in self.tasks


class RewardSpec(_Section):
    """A reward file."""

    name: str
    description: str = ""
    # regular expression, at most one group; boxed: what stands in \\boxed{}; null: the whole text is the answer
    extract: str | None = None
    combine: Literal["sum", "product"] = "sum"  # how parts become the reward: see COMBINE
    gate: list[str] = []  # names of parts that must give 1 before anything counts
    parts: Annotated[list[PartSpec], Field(min_length=1)]
    cases: list[Case] = []  # samples and the scores that they must get: `gspo-mm reward check`

    @field_validator("extract")
    @classmethod
    def _extracts(cls, pattern: str | None) -> str | None:
        return _check_extract(pattern)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What parts said of one completion so far."""

    values: Mapping[str, float]  # by part
    error: str | None = None  # why one of them failed


class RewardFunction:
    """What a reward file says. Stateless but for what its services keep."""

    def __init__(self, spec: RewardSpec, *, file: str, asks: bool = True) -> None:
        """`asks` false leaves services out. Raises RewardFileError for parts that do not fit together."""
        self.spec = spec
        self.file = file
        self._kinds = {part.name: _find_kind(part, spec, file) for part in spec.parts}
        self._args = {part.name: _parse_args(part, self._kinds[part.name], file) for part in spec.parts}
        _check_parts(spec, file)
        _check_combination(spec, self._kinds, file)
        self._services = {
            part.name: _make_service(make, self._args[part.name], f"{file}: parts.{part.name}")
            for part in spec.parts
            if asks and (make := self._kinds[part.name].service)
        }

    @property
    def reads_images(self) -> bool:
        """Whether a part that is no service may look at pictures."""
        return any("prompt" in kind.context for kind in self._kinds.values())

    def score(self, prompt: Prompt, completion: Completion) -> Score:
        """Judge one completion in this process. Raises RewardFileError where no part covers the prompt's task."""
        assert not self._services
        return self.combine(prompt, self.judge(prompt, completion))

    def judge(self, prompt: Prompt, completion: Completion) -> Judged:
        """What all parts that are no services say, up to the first that fails; raises as `score`."""
        values: dict[str, float] = {}
        for part in self.parts_of(prompt):
            if self._kinds[part.name].service:
                continue
            try:
                values[part.name] = self._judge(part, prompt, completion)
            except Exception as error:  # any: a part is an extension point, and its failure is no 0
                return Judged(values=values, error=_failure(part, error))
        return Judged(values=values)

    async def ask(self, prompt: Prompt, completion: Completion, judged: Judged) -> Judged:
        """What services say besides. None is asked where a part failed already or a gate is closed: it might cost money."""
        if judged.error is not None or self._gate_is_closed(judged.values):
            return judged
        values = dict(judged.values)
        for part in self.parts_of(prompt):
            if not self._kinds[part.name].service:
                continue
            try:
                stated = self._stated(part, text_of(part, completion))
                value = 0.0
                if stated:
                    asked = self._with_bare_answer(part, prompt)
                    value = await self._services[part.name].judge(stated, asked, completion)
                values[part.name] = self._check(part, value)
            except Exception as error:
                return Judged(values=values, error=_failure(part, error))
        return Judged(values=values)

    def combine(self, prompt: Prompt, judged: Judged) -> Score:
        """The reward. A failed one is NaN, with `error`."""
        parts = self.parts_of(prompt)
        values = {part.name: judged.values[part.name] for part in parts if part.name in judged.values}
        if judged.error is not None:
            return Score(value=math.nan, parts=values, error=judged.error)
        accuracy: float | None = None
        for part in parts:
            if part.accuracy is not False:
                accuracy = float(round(values.get(part.name, 0.0), 9) >= float(part.accuracy))
        combine = COMBINE[self.spec.combine]
        if self._gate_is_closed(values):
            combine = closed_gate
            accuracy = None if accuracy is None else 0.0
        weights = [part.weight for part in parts if part.name in values]
        return Score(value=combine(list(values.values()), weights), parts=values, accuracy=accuracy)

    def parts_of(self, prompt: Prompt) -> list[PartSpec]:
        """Those that cover the prompt's task. Raises RewardFileError where there are none."""
        parts = [part for part in self.spec.parts if part.covers(prompt.task)]
        if not parts:
            known = sorted({task for part in self.spec.parts for task in part.tasks or ()})
            raise RewardFileError(
                f"{self.file}: prompt {prompt.key} has task={prompt.task!r}, which no part covers (tasks "
                f"known here: {', '.join(known)}); add it to the tasks of a part"
            )
        return parts

    def check_answer(self, prompt: Prompt) -> None:
        """Whether all parts can judge the data's answer. Raises AnswerError, or RewardFileError as `parts_of` does."""
        for part in self.parts_of(prompt):
            try:
                self._check_answer(part, prompt)
            except Exception as error:  # any: a part is an extension point
                raise AnswerError(f"part {part.name} of {self.file}: {error}") from None

    def measures(self, task: str) -> bool:
        """Whether a part decides the accuracy of this task, or none does of any."""
        deciding = [part for part in self.spec.parts if part.accuracy is not False]
        return not deciding or any(part.covers(task) for part in deciding)

    async def close(self) -> None:
        for service in self._services.values():
            await service.close()

    def _gate_is_closed(self, values: Mapping[str, float]) -> bool:
        return any(values.get(name, 1.0) < 1.0 for name in self.spec.gate)

    def _stated(self, part: PartSpec, text: str) -> str | None:
        return extract_answer(text, part.extract or self.spec.extract)

    def _judge(self, part: PartSpec, prompt: Prompt, completion: Completion) -> float:
        kind = self._kinds[part.name]
        assert kind.judge
        text = text_of(part, completion)
        stated = text if kind.whole_text else self._stated(part, text)
        prompt = self._with_bare_answer(part, prompt)
        context = {name: CONTEXT[name](prompt, completion) for name in kind.context}
        # Judged even where nothing is stated, so that a fault of the prompt's answer is found at once.
        value = self._check(part, kind.judge(stated or "", prompt.answer, self._args[part.name], **context))
        if kind.compares and stated and is_word_for_word(stated, prompt.answer):
            return 1.0
        return value if stated or kind.whole_text else 0.0

    def _with_bare_answer(self, part: PartSpec, prompt: Prompt) -> Prompt:
        answer = bare_answer(prompt.answer, part.extract or self.spec.extract)
        if self._kinds[part.name].json_answer:
            answer = as_json(answer)
        return replace(prompt, answer=answer)

    def _check_answer(self, part: PartSpec, prompt: Prompt) -> None:
        kind = self._kinds[part.name]
        if kind.check:
            kind.check(self._with_bare_answer(part, prompt))
        elif kind.judge and not kind.whole_text:
            self._judge(part, prompt, _SILENT)

    def _check(self, part: PartSpec, value: float) -> float:
        lowest = 0.0 if self.spec.combine == "product" else self._kinds[part.name].lowest
        if not lowest <= value <= 1.0:  # NaN too
            raise ValueError(f"value {value!r} is outside [{lowest:g}, 1]")
        return value


def text_of(part: PartSpec, completion: Completion) -> str:
    """What the part reads of an answer."""
    last = part.read == "last" and completion.turns
    return completion.turns[-1].text if last else completion.text


def load_reward(path: str | Path) -> RewardFunction:
    """Read and check a reward file; raises RewardFileError: one sentence naming file, key, value and fix."""
    return RewardFunction(read_spec(path), file=str(path))


def read_spec(path: str | Path) -> RewardSpec:
    """What a reward file says; nothing that it names is imported or asked. Raises as `load_reward`."""
    path = Path(path)
    if not path.is_file():
        raise RewardFileError(
            f"reward.file={path} does not exist{from_here(path)}; try configs/rewards/digits.yaml"
        )
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        unquoted = misread(path.read_text())
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, OSError) as error:
        raise RewardFileError(f"{path} is not a valid YAML file: {' '.join(str(error).split())}") from None
    if found := faults(unquoted, values, _refused):
        raise RewardFileError(f"{path}: {found[0]}")
    return _spec(values, file=str(path))


def parse_reward(values: Any, *, file: str) -> RewardFunction:
    """Build from plain values; raises RewardFileError as `load_reward` does."""
    return RewardFunction(_spec(values, file=file), file=file)


def _spec(values: Any, *, file: str) -> RewardSpec:
    if not values:
        raise RewardFileError(f"{file} is empty; give it a name and parts, as in configs/rewards/digits.yaml")
    if not isinstance(values, dict):
        raise RewardFileError(f"{file} holds no mapping of keys; start from configs/rewards/digits.yaml")
    try:
        return RewardSpec.model_validate(values)
    except ValidationError as error:
        raise RewardFileError(first_fault(error, file, "", values)) from None


def _refused(values: Any) -> list[tuple[Any, ...]]:
    """Places of a reward file that cannot hold what they have, `args` of our own parts included."""
    places = places_refused(RewardSpec, values)
    for number, part in enumerate(values.get("parts") or ()):
        if isinstance(part, dict) and (kind := PARTS.get(str(part.get("type")))):
            args = places_refused(kind.args, part.get("args") or {})
            places += [("parts", number, "args", *place) for place in args]
    return places


def _find_kind(part: PartSpec, spec: RewardSpec, file: str) -> PartType:
    where = f"parts.{part.name}"
    if part.python is not None:
        try:
            return user_part(part.python, part.args, part.extract or spec.extract)
        except ValueError as error:
            raise RewardFileError(f"{file}: {where}.python={part.python!r} is refused: {error}") from None
    if part.type not in PARTS:
        raise RewardFileError(f"{file}: {where}.type={part.type!r} is unknown; use one of {', '.join(PARTS)}")
    if PARTS[part.type].whole_text and part.extract is not None:
        raise RewardFileError(
            f"{file}: {where}.extract={part.extract!r} has no effect, as type {part.type} judges the whole "
            "text; remove it"
        )
    return PARTS[part.type]


def _parse_args(part: PartSpec, kind: PartType, file: str) -> Args:
    try:
        return kind.args.model_validate(part.args)
    except ValidationError as error:
        raise RewardFileError(first_fault(error, file, f"parts.{part.name}.args.", part.args)) from None


def _make_service(make: Callable[..., Service], args: Args, where: str) -> Service:
    try:
        return make(args)
    except ValueError as error:
        raise RewardFileError(f"{where}.args.{error}") from None


def _failure(part: PartSpec, error: Exception) -> str:
    return f"part {part.name}: {type(error).__name__}: {error}"


def _check_parts(spec: RewardSpec, file: str) -> None:
    names = [part.name for part in spec.parts]
    for name in names:
        if names.count(name) > 1:
            raise RewardFileError(
                f"{file}: parts.{name} is there {names.count(name)} times; give each part its own name"
            )
    if all(part.weight == 0 for part in spec.parts):
        raise RewardFileError(
            f"{file}: parts.*.weight=0, so every reward is 0; give at least one part a weight above 0"
        )
    deciding = [part for part in spec.parts if part.accuracy is not False]
    for i, one in enumerate(deciding):
        for other in deciding[i + 1 :]:
            if one.tasks is None or other.tasks is None or set(one.tasks) & set(other.tasks):
                raise RewardFileError(
                    f"{file}: parts.{one.name}.accuracy and parts.{other.name}.accuracy are both set for "
                    "the same task; keep one per task"
                )


def _check_combination(spec: RewardSpec, kinds: dict[str, PartType], file: str) -> None:
    for name in spec.gate:
        if name not in kinds:
            raise RewardFileError(
                f"{file}: gate={name!r} names no part; use one of {', '.join(kinds)}, or remove it"
            )
    for part in spec.parts:
        if spec.combine == "product" and part.type and kinds[part.name].lowest < 0:
            raise RewardFileError(
                f"{file}: parts.{part.name}.type={part.type} is a penalty, which a product cannot hold; "
                "use combine: sum"
            )


def _check_extract(pattern: str | None) -> str | None:
    if pattern not in (None, BOXED) and compile_pattern(pattern).groups > 1:
        raise ValueError(
            "it has more than one group; mark the answer with one, and write (?:...) for the others"
        )
    return pattern
