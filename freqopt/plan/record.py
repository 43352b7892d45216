"""What all records of a plan share: strict checks, and the types of their fields."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MOST_HEADS = 1 << 16
"""Most heads of a site: a plan from a stranger is given budgets for as many as it says."""

Extent = Annotated[int, Field(ge=1, le=1 << 24)]
"""Extent of a grid, in tokens."""

Count = Annotated[int, Field(ge=0)]


class Record(BaseModel):
    """Base of all: fields are checked strictly, unknown ones refused, and nothing changes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
