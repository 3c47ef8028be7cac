"""Reward parts of structured answers: json_schema, set_f1. See `part.py` for the contract of a part."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Annotated, Any

from jsonschema import Draft202012Validator, SchemaError, ValidationError
from jsonschema.validators import extend
from pydantic import Field, field_validator
from referencing import Registry
from referencing.exceptions import Unresolvable

from gspo_mm.reward.part import Args, alternatives, parse_json
from gspo_mm.reward.pattern import SlowPatternError, compile_pattern, search
from gspo_mm.reward.text import normalise
from gspo_mm.types import Json

_LONGEST = 100_000  # characters of JSON, or of a list
_MOST_ITEMS = 1000


class JsonSchemaArgs(Args):
    # JSON Schema, draft 2020-12. `schema` is a name that pydantic keeps for itself
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]

    @field_validator("json_schema")
    @classmethod
    def _is_usable(cls, schema: dict[str, Any]) -> dict[str, Any]:
        try:
            Draft202012Validator.check_schema(schema)
        except SchemaError as error:
            raise ValueError(f"no JSON schema: {error.message}") from None
        for key, value in _keys(schema):
            if key == "patternProperties":
                raise ValueError("patternProperties has no time limit in jsonschema; use properties")
            if key == "$ref" and not str(value).startswith("#"):
                raise ValueError(f"$ref {value!r} is another document; copy it below $defs")
            if key == "pattern" and isinstance(value, str):
                compile_pattern(value)
        return schema


class SetArgs(Args):
    separator: Annotated[str, Field(min_length=1)] = ","  # between the items of a text that is no JSON list


def json_schema(text: str, answer: Json, args: JsonSchemaArgs) -> float:
    """1 where the text is JSON (fenced or not) that the schema allows; the answer is not looked at."""
    if len(text) > _LONGEST:
        return 0.0
    try:
        value = parse_json(text)
        return float(_validator(json.dumps(args.json_schema)).is_valid(value))
    except SlowPatternError:
        raise
    except Unresolvable as error:
        raise ValueError(f"the schema refers to what is not there: {error}") from None
    # no JSON, nested too deeply, or a number beyond a float
    except (
        ValueError,
        RecursionError,
        OverflowError,
    ):
        return 0.0


def set_f1(text: str, answer: Json, args: SetArgs) -> float:
    """F1 of the text's items and the answer's: 2 |both| / (|text's| + |answer's|), each item once, normalised."""
    if isinstance(answer, str) and answer.strip():
        each = answer.split(args.separator)
    else:
        each = alternatives(answer) if answer != [] else []
    wanted = {item for one in each if (item := normalise(one, articles=True))}
    given = _items(text, args.separator)
    if given is None:
        return 0.0
    return 2 * len(given & wanted) / (len(given) + len(wanted)) if given or wanted else 1.0


def _items(text: str, separator: str) -> set[str] | None:
    """The items of a JSON list, or between separators; None where there are too many or the list holds others."""
    if len(text) > _LONGEST:
        return None
    try:
        items = parse_json(text)
    except ValueError:
        items = text.split(separator)
    if not isinstance(items, list):
        items = [items]
    if len(items) > _MOST_ITEMS or not all(
        isinstance(i, str | int | float) and not isinstance(i, bool) for i in items
    ):
        return None
    try:
        return {item for i in items if (item := normalise(str(i), articles=True))}
    except ValueError:  # an integer of so many digits that Python refuses to write it
        return None


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
    """The `pattern` keyword with a time limit."""
    if isinstance(instance, str) and not search(pattern, instance):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


_TimedValidator = extend(Draft202012Validator, {"pattern": _pattern})


@lru_cache(maxsize=64)
def _validator(schema: str) -> Any:
    # an empty registry: jsonschema's own would fetch what a $ref names from the network
    return _TimedValidator(json.loads(schema), registry=Registry())


def _keys(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from _keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _keys(inner)
