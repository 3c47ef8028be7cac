"""What all sections share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from gspo_mm.types import GspoError

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
# names of what one key may hold; faults have them in their location, though they are no part of the key
ALTERNATIVES = ("list of patterns", "list of sources")
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class ConfigError(GspoError, ValueError):
    """The configuration cannot run; the message names the key, its value and the fix."""


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are not silently converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
