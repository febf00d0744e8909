"""The table of methods: how each builds a model, an optimizer, a schedule and callbacks.

A method is one entry; nothing else in the package asks for a method by its name. Other packages add theirs by an
entry point of the group `hf_lowrank.methods` that loads to a `Method`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, TrainerCallback, TrainingArguments

from hf_lowrank.adapters.settings import (
    CoLASettings,
    LowRankSettings,
    ReLoraSettings,
    SLTrainSettings,
    build_adapted,
    build_relora,
    build_relora_optimizer,
    build_relora_scheduler,
    relora_callbacks,
)
from hf_lowrank.errors import UserError, nearest
from hf_lowrank.method_settings import MethodSettings
from hf_lowrank.optim.settings import (
    ApolloMiniSettings,
    ApolloSettings,
    FiraSettings,
    FrugalSettings,
    GaLoreSettings,
    MuonSettings,
    build_muon,
    build_projected,
    subspace_callbacks,
)


def dense_model(config: PreTrainedConfig, settings: Any, seed: int) -> PreTrainedModel:
    """The plain causal language model of `config`, freshly initialised from torch's global generator."""
    return AutoModelForCausalLM.from_config(config)


def no_callbacks(settings: Any, args: TrainingArguments) -> Sequence[TrainerCallback]:
    return ()


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way of pre-training.

    Attributes:
        name: what recipes and the `method` column of measurements say.
        title: how tables and pictures spell it.
        summary: one sentence.
        kind: what it changes: nothing, the optimizer, the layers, or the layers by restarts.
        settings: the typed settings of this method.
        source: where it comes from, as `arXiv 2403.03507`.
        build_model: `(config, settings, seed) -> model`; torch's global generator is seeded by the caller, so every
            method draws the same initial weights.
        build_optimizer: `(model, settings, args) -> optimizer`; None leaves Trainer its own AdamW.
        build_scheduler: `(optimizer, settings, args, num_training_steps) -> scheduler`; None leaves Trainer its own.
        callbacks: `(settings, args) -> callbacks`.
    """

    name: str
    title: str
    summary: str
    kind: Literal["baseline", "optimizer", "layers", "restarts"]
    settings: type[MethodSettings]
    source: str = ""
    build_model: Callable[[PreTrainedConfig, Any, int], PreTrainedModel] = dense_model
    build_optimizer: Callable[[nn.Module, Any, TrainingArguments], Optimizer] | None = None
    build_scheduler: Callable[[Optimizer, Any, TrainingArguments, int], LRScheduler] | None = None
    callbacks: Callable[[Any, TrainingArguments], Sequence[TrainerCallback]] = no_callbacks


class MethodTable(Mapping[str, Method]):
    """Methods by name; an unknown name is a `UserError` with the nearest spellings."""

    def __init__(self, methods: Sequence[Method]) -> None:
        self._methods: dict[str, Method] = {}
        for method in methods:
            self.register(method)
        self._plugins_loaded = False

    def register(self, method: Method) -> None:
        if method.name in self._methods:
            raise ValueError(f"method {method.name!r} is registered already")
        self._methods[method.name] = method

    def _load_plugins(self) -> None:
        if not self._plugins_loaded:
            self._plugins_loaded = True
            for point in entry_points(group="hf_lowrank.methods"):
                self.register(point.load())

    def __getitem__(self, name: str) -> Method:
        self._load_plugins()
        try:
            return self._methods[name]
        except KeyError:
            raise UserError(f"unknown method {name!r}; {nearest(name, self._methods)}") from None

    def __contains__(self, name: object) -> bool:
        self._load_plugins()
        return name in self._methods

    def __iter__(self) -> Iterator[str]:
        self._load_plugins()
        return iter(self._methods)

    def __len__(self) -> int:
        self._load_plugins()
        return len(self._methods)


class FullRankSettings(MethodSettings):
    """Full-rank AdamW has none of its own."""


METHODS = MethodTable(
    [
        Method(
            name="full_rank",
            title="Full-rank",
            summary="AdamW on the dense weights: the baseline of everything.",
            kind="baseline",
            settings=FullRankSettings,
        ),
        Method(
            name="galore",
            title="GaLore",
            summary="Adam inside the leading subspace of each gradient, lifted back to the dense weight.",
            kind="optimizer",
            settings=GaLoreSettings,
            source="arXiv 2403.03507",
            build_optimizer=build_projected,
            callbacks=subspace_callbacks,
        ),
        Method(
            name="fira",
            title="Fira",
            summary="GaLore, and outside the subspace the gradient scaled by what Adam did inside.",
            kind="optimizer",
            settings=FiraSettings,
            source="arXiv 2410.01623",
            build_optimizer=build_projected,
            callbacks=subspace_callbacks,
        ),
        Method(
            name="apollo",
            title="APOLLO",
            summary="The gradient, each channel scaled by what Adam does to a random projection of it.",
            kind="optimizer",
            settings=ApolloSettings,
            source="arXiv 2412.05270",
            build_optimizer=build_projected,
            callbacks=subspace_callbacks,
        ),
        Method(
            name="apollo_mini",
            title="APOLLO-Mini",
            summary="APOLLO with rank 1 and one scale for each matrix.",
            kind="optimizer",
            settings=ApolloMiniSettings,
            source="arXiv 2412.05270",
            build_optimizer=build_projected,
            callbacks=subspace_callbacks,
        ),
        Method(
            name="frugal",
            title="FRUGAL",
            summary="Adam inside a subspace, signSGD outside.",
            kind="optimizer",
            settings=FrugalSettings,
            source="arXiv 2411.07837",
            build_optimizer=build_projected,
            callbacks=subspace_callbacks,
        ),
        Method(
            name="muon",
            title="Muon",
            summary="torch's Muon on the target matrices, AdamW on the rest.",
            kind="optimizer",
            settings=MuonSettings,
            source="arXiv 2502.16982",
            build_optimizer=build_muon,
        ),
        Method(
            name="relora",
            title="ReLoRA",
            summary="LoRA from scratch, merged into its dense weight and begun anew every few thousand steps.",
            kind="restarts",
            settings=ReLoraSettings,
            source="arXiv 2307.05695",
            build_model=build_relora,
            build_optimizer=build_relora_optimizer,
            build_scheduler=build_relora_scheduler,
            callbacks=relora_callbacks,
        ),
        Method(
            name="cola",
            title="CoLA",
            summary="Two factors with a non-linearity between them in place of each linear layer.",
            kind="layers",
            settings=CoLASettings,
            source="arXiv 2502.10940",
            build_model=build_adapted,
        ),
        Method(
            name="sltrain",
            title="SLTrain",
            summary="A low-rank product plus a sparse matrix of fixed random support in place of each weight.",
            kind="layers",
            settings=SLTrainSettings,
            source="arXiv 2406.02214",
            build_model=build_adapted,
        ),
        Method(
            name="low_rank",
            title="Low-rank",
            summary="Two factors in place of each weight: the control that the others improve on.",
            kind="layers",
            settings=LowRankSettings,
            build_model=build_adapted,
        ),
    ]
)
