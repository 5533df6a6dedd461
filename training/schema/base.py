"""What every section of a config is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


Positive = Annotated[int, Field(gt=0)]
AboveZero = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


def or_kind(default: str) -> BeforeValidator:
    """Of a section of several kinds, told apart by their ``name``: without one it is the default kind."""
    return BeforeValidator(lambda given: {"name": default, **given} if isinstance(given, dict) else given)
