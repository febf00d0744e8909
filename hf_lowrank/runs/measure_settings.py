"""What defines the numbers: sequences, grids, draws, by preset and by the user's own choice."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hf_lowrank.errors import UserError, nearest
from hf_lowrank.storage.parsing import parse_plain_yaml


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def request(self) -> dict[str, Any]:
        """The block as it is stored with a measurement."""
        return self.model_dump(mode="json")


class RandomSettings(_Block):
    radius: float = Field(default=0.3, gt=0, description="Largest offset |t|.")
    relative: bool = Field(default=True, description="The radius is a multiple of the root-mean-square weight.")
    steps: int = Field(default=2, ge=1, description="Offsets on either side of 0.")
    draws: int = Field(default=6, ge=2, description="Random directions.")
    normalize: Literal["none", "tensor", "filter"] = Field(
        default="none", description="See METRICS.md; none is N(0, I)."
    )
    seed: int = Field(default=0, description="Seed of the directions.")


class PcaSettings(_Block):
    radius: float = Field(default=0.1, gt=0, description="Largest offset |t|.")
    steps: int = Field(default=1, ge=1, description="Offsets on either side of 0.")
    count: int = Field(default=10, ge=1, description="Directions K of pcak_sharpness.")
    basis: Literal["weights", "trajectory"] = Field(default="weights", description="What is decomposed.")
    normalize: Literal["none", "tensor", "filter"] = Field(
        default="tensor", description="tensor: an offset of 0.1 changes every tensor by a tenth of its norm."
    )


class PathSettings(_Block):
    points: int = Field(default=3, ge=1, description="Positions strictly between the end points.")
    low: float = Field(default=0.0, le=0, description="Where the path begins; below 0 extrapolates.")
    high: float = Field(default=1.0, ge=1, description="Where the path ends; above 1 extrapolates.")


class PlaneSettings(_Block):
    radius: float = Field(default=0.3, gt=0, description="Largest offset in either direction, times a row's norm.")
    steps: int = Field(default=3, ge=1, description="Offsets on either side of 0, in both directions.")
    seed: int = Field(default=0, description="Seed of the two directions.")


class HessianSettings(_Block):
    iterations: int = Field(default=20, ge=2, description="Lanczos iterations at most.")
    probes: int = Field(default=6, ge=2, description="Hutchinson probes.")
    seed: int = Field(default=0, description="Seed of the start vector and of the probes.")


class OverlapSettings(_Block):
    count: int = Field(default=10, ge=1, description="Dimensions k of the singular subspaces.")


class MeasureSettings(BaseModel):
    """Everything that `measure` can be told about how to measure."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sequences: int | None = Field(
        default=16, ge=1, description="Held-out sequences, the first ones of the run's; null: all."
    )
    steps: int | Literal["all"] = Field(
        default=3, description="How many checkpoints the costly metrics are measured at."
    )
    batch_tokens: int = Field(default=4096, ge=1, description="Tokens a batch; changes no number but by rounding.")
    memory: Literal["copy", "low"] = Field(default="copy", description="low: no second copy of the weights, slower.")
    random: RandomSettings = Field(default_factory=RandomSettings)
    pca: PcaSettings = Field(default_factory=PcaSettings)
    path: PathSettings = Field(default_factory=PathSettings)
    plane: PlaneSettings = Field(default_factory=PlaneSettings)
    hessian: HessianSettings = Field(default_factory=HessianSettings)
    overlap: OverlapSettings = Field(default_factory=OverlapSettings)


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {},
    "paper": {
        "sequences": 1000,
        "steps": "all",
        "random": {"radius": 0.003, "relative": False, "steps": 12, "draws": 100},
        "pca": {"radius": 0.25, "steps": 50, "count": 10, "normalize": "none"},
        "path": {"points": 19},
        "plane": {"steps": 10},
        "hessian": {"iterations": 50, "probes": 30},
    },
}


def resolve_settings(
    preset: str = "fast", own: Mapping[str, Any] | str | os.PathLike[str] | None = None
) -> MeasureSettings:
    """The preset's settings with the user's own laid over them, from a mapping or a YAML file.

    Raises:
        UserError: an unknown preset or key, or a value that is not allowed; names file and key.
    """
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}; {nearest(preset, PRESETS)}")
    where = "settings"
    if own is not None and not isinstance(own, Mapping):
        where = os.fspath(own)
        try:
            own = parse_plain_yaml(Path(where).read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"{where}: not readable as YAML: {' '.join(str(error).split())}") from None
        if not isinstance(own, Mapping):
            raise UserError(f"{where}: must hold a mapping of keys to values, got {type(own).__name__}")
    merged = _merge(PRESETS[preset], own or {})
    try:
        return MeasureSettings(**merged)
    except ValidationError as error:
        raise UserError(f"{where}: {_first_fault(error)}") from None


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _first_fault(error: ValidationError) -> str:
    fault = error.errors()[0]
    path = [str(part) for part in fault["loc"]]
    key = ".".join(path)
    if fault["type"] == "extra_forbidden":
        block = MeasureSettings.model_fields.get(path[0]) if len(path) > 1 else None
        model: Any = block.annotation if block is not None else MeasureSettings
        return f"unknown key {key!r}; {nearest(path[-1], model.model_fields)}"
    return f"{key}: {fault['msg']}, got {fault['input']!r}"
