"""What pydantic refuses of a reward file, as places and as sentences."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError


def places_refused(model: type[BaseModel], values: Any) -> list[tuple[Any, ...]]:
    """Where the model cannot hold what the values have."""
    try:
        model.model_validate(values)
    except ValidationError as error:
        return [fault["loc"] for fault in error.errors(include_url=False)]
    return []


def first_fault(error: ValidationError, file: str, prefix: str, values: Any) -> str:
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
    return f"{file}: {key}{shown} {fix}"
