"""The settings that define measurements: sequences, grids and draws, from a preset and the user's overrides."""

import os
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from hf_lowrank.errors import UserError, nearest
from hf_lowrank.storage.layers import Layers, read_mapping, validated

Space = Literal["dense", "parameters"]


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def request(self) -> dict[str, Any]:
        """The block as rows record it."""
        return self.model_dump(mode="json")


class RandomSettings(_Block):
    radius: float = Field(default=0.3, gt=0, description="Largest offset |t|.")
    relative: bool = Field(default=True, description="The radius is a multiple of the root-mean-square weight.")
    steps: int = Field(default=5, ge=1, description="Offsets on either side of 0.")
    draws: int = Field(default=5, ge=2, description="Random directions.")
    normalize: Literal["none", "tensor", "filter"] = Field(default="none", description="none: unnormalised N(0, I).")
    seed: int = Field(default=0, description="Seed of the directions.")


class PcaSettings(_Block):
    radius: float = Field(default=0.1, gt=0, description="Largest offset |t|.")
    steps: int = Field(default=5, ge=1, description="Offsets on either side of 0.")
    count: int = Field(default=5, ge=1, description="Directions K of pcak_sharpness.")
    basis: Literal["weights", "trajectory"] = Field(default="weights", description="What the PCA decomposes.")
    normalize: Literal["none", "tensor", "filter"] = Field(
        default="tensor", description="tensor: an offset of 0.1 changes every tensor by a tenth of its norm."
    )


class PathSettings(_Block):
    points: int = Field(
        default=9, ge=1, description="Even positions strictly between the end points; up to 4 more refine the highest."
    )
    low: float = Field(default=0.0, le=0, description="Start of the path; below 0 extrapolates.")
    high: float = Field(default=1.0, ge=1, description="End of the path; above 1 extrapolates.")


class PlaneSettings(_Block):
    radius: float = Field(default=0.3, gt=0, description="Largest offset in either direction, times a row's norm.")
    steps: int = Field(default=5, ge=1, description="Offsets on either side of 0, in both directions.")
    seed: int = Field(default=0, description="Seed of the two directions.")


class HessianSettings(_Block):
    iterations: int = Field(default=20, ge=2, description="Lanczos iterations at most.")
    probes: int = Field(default=6, ge=2, description="Hutchinson probes.")
    seed: int = Field(default=0, description="Seed of the start vector and of the probes.")


class CurveSettings(_Block):
    steps: int = Field(default=40, ge=1, description="Adam steps that train the middle point.")
    lr: float = Field(default=3e-3, gt=0, description="Peak learning rate of the middle point.")
    batch: int = Field(default=8, ge=1, description="Sequences per step, none of those that are measured.")
    points: int = Field(default=9, ge=1, description="As for path.")
    seed: int = Field(default=0, description="Seed of the positions.")


class NoiseSettings(_Block):
    batches: int = Field(default=8, ge=3, description="Equal batches that the sequences are split into.")


class DimensionSettings(_Block):
    points: int = Field(default=2000, ge=20, description="Positions at most, drawn without replacement.")
    discard: float = Field(default=0.1, ge=0, lt=1, description="Share of the largest ratios that is left out.")
    seed: int = Field(default=0, description="Seed of the choice of positions.")


class OverlapSettings(_Block):
    count: int = Field(default=10, ge=1, description="Dimensions k of the singular subspaces.")


class MeasureSettings(BaseModel):
    """How to measure."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sequences: int | None = Field(
        default=16, ge=1, description="Held-out sequences, the first ones of the run; null: all."
    )
    steps: int | Literal["all"] = Field(
        default=2, description="Number of checkpoints at which costly metrics are measured."
    )
    batch_tokens: int = Field(default=4096, ge=1, description="Tokens per batch; changes numbers by rounding only.")
    memory: Literal["copy", "low"] = Field(
        default="copy", description="low: no second copy of the weights, but slower."
    )
    space: Space = Field(
        default="dense",
        description="Whose weights landscapes and interpolation move. dense: those of the plain model with dense "
        "weights, where there is one. parameters: what the model stores, factors included, as the study's own code "
        "does.",
    )
    random: RandomSettings = Field(default_factory=RandomSettings)
    pca: PcaSettings = Field(default_factory=PcaSettings)
    path: PathSettings = Field(default_factory=PathSettings)
    plane: PlaneSettings = Field(default_factory=PlaneSettings)
    hessian: HessianSettings = Field(default_factory=HessianSettings)
    curve: CurveSettings = Field(default_factory=CurveSettings)
    noise: NoiseSettings = Field(default_factory=NoiseSettings)
    dimension: DimensionSettings = Field(default_factory=DimensionSettings)
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
        "curve": {"steps": 1000, "batch": 32, "points": 19},
        "noise": {"batches": 20},
    },
}


def resolve_settings(
    preset: str = "fast", own: Mapping[str, Any] | str | os.PathLike[str] | None = None
) -> MeasureSettings:
    """The preset's settings, overridden by a mapping or a YAML file.

    Raises:
        UserError: an unknown preset or key, or a value that is not allowed; the message names file and key.
    """
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}; {nearest(preset, PRESETS)}")
    layers = Layers(Path("settings"))
    layers.lay(deepcopy(PRESETS[preset]), f"preset {preset}")
    if own is None or isinstance(own, Mapping):
        layers.lay(deepcopy(dict(own or {})), "settings")
    else:
        layers.path = Path(own)
        layers.lay(read_mapping(Path(own), "settings"), os.fspath(own))
    return validated(MeasureSettings, layers.data, layers)
