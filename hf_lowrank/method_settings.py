"""The base of every method's settings; its own module, so that the methods' packages need not import their table."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class MethodSettings(BaseModel):
    """What a recipe's `method:` block may say beside `name`; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)
