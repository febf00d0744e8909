"""The methods that change the layers: the settings of each, and its entry in the table of methods.

Imports neither torch, transformers nor peft.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from hf_lowrank.adapters.pages import PAGES
from hf_lowrank.compat import LazyObject
from hf_lowrank.methods import (
    DASH_DOTTED,
    DASHED,
    DOTTED,
    SEED,
    TARGET_MODULES,
    Look,
    Method,
    MethodSettings,
    explained,
)

GuideShare = Annotated[
    float, Field(ge=0, le=1, description="share of the optimizer steps that have a dense guide; 0 for none")
]
LoraAlpha = Annotated[float, Field(gt=0, description="α: the product of the factors is scaled by α / r")]
Pruning = Literal["random", "magnitude", "zero"]


class AdapterSettings(MethodSettings):
    """Settings that all methods with adapter layers share."""

    peft_type: ClassVar[str]
    fixed: ClassVar[dict[str, Any]] = {}
    # Settings of the training, which are no fields of the PEFT config.
    of_training: ClassVar[frozenset[str]] = frozenset({"seed"})

    r: int = Field(128, ge=1, description="rank of the factors")
    target_modules: str | list[str] = Field("auto", description=TARGET_MODULES)
    seed: int | None = Field(None, description=SEED)

    def adapter_config(self, seed: int) -> dict[str, Any]:
        """The adapter's entries in `LowRankConfig`."""
        own = self.model_dump(include=self.adapter_fields())
        return {"peft_type": self.peft_type, **self.fixed, **own}

    def adapter_fields(self) -> set[str]:
        """The settings that are fields of the PEFT config, under the same names."""
        return set(type(self).model_fields) - self.of_training

    def seed_or(self, run_seed: int) -> int:
        """The method's own seed, or the run's."""
        return run_seed if self.seed is None else self.seed


class ReplacingSettings(AdapterSettings):
    """Settings that the methods share which replace the dense layer."""

    exclude_modules: str | list[str] | None = Field(None, description="targets to leave dense")
    rank_pattern: dict[str, int] = Field({}, description="other ranks, by name ending or pattern")

    def adapter_config(self, seed: int) -> dict[str, Any]:
        return {**super().adapter_config(seed), "seed": self.seed_or(seed)}


class Refactorised(ReplacingSettings):
    """Settings of a method whose factors can be refactorised."""

    of_training: ClassVar[frozenset[str]] = frozenset({"seed", "refactorise_every", "recovery_steps"})

    refactorise_every: int = Field(
        0, ge=0, description="optimizer steps between refactorisations with a reset of all moments; 0 for never"
    )
    recovery_steps: int = Field(
        10, ge=0, description="steps in which the learning rate climbs back after a refactorisation"
    )


class CoLASettings(ReplacingSettings):
    peft_type = "COLA"

    bottleneck_act: str = Field("silu", description="the non-linearity between the factors")
    checkpoint_activations: Annotated[
        bool,
        Field(description="CoLA-M: store only the r-wide activations and recompute the rest in the backward pass"),
    ] = False


class LowRankSettings(Refactorised):
    """W = B A is CoLA's layer without its non-linearity."""

    peft_type = "COLA"
    fixed: ClassVar[dict[str, Any]] = {"bottleneck_act": "linear"}
    of_training: ClassVar[frozenset[str]] = Refactorised.of_training | {"guide_share"}

    guide_share: GuideShare = 0.0


class SLTrainSettings(Refactorised):
    peft_type = "SLTRAIN"

    lora_alpha: LoraAlpha = 32
    sparsity: float = Field(0.03, gt=0, lt=1, description="share of entries that the sparse part keeps")


class StructuredSettings(ReplacingSettings):
    peft_type = "STRUCTURED"
    of_training: ClassVar[frozenset[str]] = frozenset({"seed", "guide_share"})

    r: int = Field(128, ge=1, description="width between the factors; that of block_shuffle is min(m, n)")
    target_modules: str | list[str] = Field(r".*\.mlp\.(?!act)(?!drop)[^.]+", description=TARGET_MODULES)
    exclude_modules: str | list[str] | None = Field(r".*\.0\.mlp\.[^.]+", description="targets to leave dense")
    structure: Literal["low_rank", "block_dense", "block_shuffle"] = explained(
        "which factors are block-diagonal",
        "block_dense",
        low_rank="none",
        block_dense="the first",
        block_shuffle="both, with a shuffle between them and after",
    )
    blocks: int = Field(4, ge=1, description="blocks of a block-diagonal factor")
    guide_share: GuideShare = 0.5


class SSTSettings(ReplacingSettings):
    peft_type = "SST"
    of_training: ClassVar[frozenset[str]] = frozenset({"seed", "redraw_every", "redraw_warmup_steps", "svd_every"})

    r: int = Field(128, ge=1, description="pairs of singular vectors that train at a time")
    redraw_every: int = Field(200, ge=1, description="optimizer steps between draws of new pairs")
    redraw_warmup_steps: int = Field(
        20, ge=0, description="steps of linear warm-up from 0 back to the schedule after a draw"
    )
    svd_every: int | None = Field(
        None, ge=1, description="draws between new decompositions; None for min(m, n)/r of each layer, rounded up"
    )


class ReLoraSettings(AdapterSettings):
    peft_type = "LORA"

    lora_alpha: LoraAlpha = 32
    restart_every: int = Field(1000, ge=1, description="optimizer steps between restarts")
    restart_warmup_steps: int = Field(
        100, ge=0, description="steps of linear warm-up from 0 back to the cosine after a restart"
    )
    pruning: Pruning = explained(
        "which entries of the factors' moments a restart sets to zero",
        "random",
        random="a random share",
        magnitude="the smallest",
        zero="all",
    )
    prune_ratio: float = Field(0.99, ge=0, le=1, description="share of entries that pruning sets to zero")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="final learning rate of the cosine, relative to its peak")
    warm_start_steps: int = Field(0, ge=0, description="steps of full-rank training before the factors")

    def adapter_fields(self) -> set[str]:
        return {"r", "target_modules", "lora_alpha"}


ENTRIES = (
    Method(
        name="low_rank",
        title="Low-rank",
        summary="Two factors in place of each weight: the control for the methods that add to them.",
        kind="control",
        settings=LowRankSettings,
        look=Look("#7b766d", "#a39e94", DOTTED, "plus"),
        build_model=LazyObject("hf_lowrank.adapters.modeling:build_adapted"),
        build_optimizer=LazyObject("hf_lowrank.adapters.guide:build_guided_optimizer"),
        build_scheduler=LazyObject("hf_lowrank.adapters.refactorise:build_scheduler"),
        callbacks=LazyObject("hf_lowrank.adapters.refactorise:low_rank_callbacks"),
        page=PAGES["low_rank"],
    ),
    Method(
        name="cola",
        title="CoLA",
        summary="Two factors with a non-linearity between them in place of each linear layer.",
        kind="layers",
        settings=CoLASettings,
        source="arXiv 2502.10940",
        look=Look("#b5307f", "#f08bc6", DASHED, "up"),
        build_model=LazyObject("hf_lowrank.adapters.modeling:build_adapted"),
        page=PAGES["cola"],
    ),
    Method(
        name="sltrain",
        title="SLTrain",
        summary="A low-rank product plus a sparse matrix of fixed random support in place of each weight.",
        kind="layers",
        settings=SLTrainSettings,
        source="arXiv 2406.02214",
        look=Look("#1b8fa3", "#62d0e3", DASHED, "square"),
        build_model=LazyObject("hf_lowrank.adapters.modeling:build_adapted"),
        build_scheduler=LazyObject("hf_lowrank.adapters.refactorise:build_scheduler"),
        callbacks=LazyObject("hf_lowrank.adapters.refactorise:refactorise_callbacks"),
        page=PAGES["sltrain"],
    ),
    Method(
        name="structured",
        title="Structured FFN",
        summary="Factors, in blocks, in place of the weights of all MLPs but the first, guided by a dense weight.",
        kind="layers",
        settings=StructuredSettings,
        source="arXiv 2406.16450",
        look=Look("#9c4221", "#f0a080", DASHED, "diamond"),
        build_model=LazyObject("hf_lowrank.adapters.modeling:build_adapted"),
        build_optimizer=LazyObject("hf_lowrank.adapters.guide:build_guided_optimizer"),
        callbacks=LazyObject("hf_lowrank.adapters.guide:guide_callbacks"),
        page=PAGES["structured"],
    ),
    Method(
        name="sst",
        title="SST",
        summary="The singular value decomposition of each weight, of whose vectors a few drawn pairs train at a time.",
        kind="restarts",
        settings=SSTSettings,
        source="arXiv 2405.15481",
        look=Look("#3f51b5", "#8c9eff", DOTTED, "hexagon"),
        build_model=LazyObject("hf_lowrank.adapters.modeling:build_adapted"),
        build_scheduler=LazyObject("hf_lowrank.adapters.spectral:build_sst_scheduler"),
        callbacks=LazyObject("hf_lowrank.adapters.spectral:sst_callbacks"),
        page=PAGES["sst"],
    ),
    Method(
        name="relora",
        title="ReLoRA",
        summary="LoRA from scratch, merged into its dense weight and restarted every few thousand steps.",
        kind="restarts",
        settings=ReLoraSettings,
        source="arXiv 2307.05695",
        look=Look("#a37800", "#ecc033", DASH_DOTTED, "diamond"),
        build_model=LazyObject("hf_lowrank.adapters.modeling:build_relora"),
        build_optimizer=LazyObject("hf_lowrank.adapters.relora:build_relora_optimizer"),
        build_scheduler=LazyObject("hf_lowrank.adapters.relora:build_relora_scheduler"),
        callbacks=LazyObject("hf_lowrank.adapters.relora:relora_callbacks"),
        page=PAGES["relora"],
    ),
)
