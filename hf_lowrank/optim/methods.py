"""The baseline and the optimizer methods: the settings of each, and its entry in the table of methods.

Imports neither torch nor transformers. A new method adds its settings class and its entry here; the optimizer class
in its own file checks its options against the settings class.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from hf_lowrank.compat import LazyObject
from hf_lowrank.errors import UserError
from hf_lowrank.methods import (
    DASH_DOTTED,
    DASHED,
    DOTTED,
    SEED,
    SOLID,
    TARGET_MODULES,
    Look,
    Method,
    MethodSettings,
    explained,
)
from hf_lowrank.optim.pages import PAGES

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer
    from transformers import TrainerCallback, TrainingArguments

TARGET_PARAMETERS = (
    "further target parameters, by name or name ending, e.g. `experts.down_proj` for the stacked experts of a mixture"
)
Rank = Annotated[int, Field(ge=1, description="rank of the subspaces")]
Scale = Annotated[float, Field(gt=0, description="factor of the update that is lifted back from the subspace")]
ApolloScale = Annotated[float, Field(gt=0, description="the update is multiplied by its square root")]
NormGrowthLimit = Annotated[
    float, Field(ge=1, description="largest factor by which the norm of the scaled gradient may grow in one step")
]
SIDE = explained(
    "side of each matrix that is projected",
    std="the shorter one",
    reverse_std="the longer one",
    right="the columns",
    left="the rows",
    full="both",
)
SUBSPACE = explained(
    "how the subspace is chosen",
    svd="the leading singular vectors of the gradient",
    randomized="nearly that space, by subspace iteration from the last basis; its vectors differ in sign and order",
    random="random and orthonormal",
    columns="random columns",
    dct="the columns of the cosine transform in which the gradient is largest (arXiv 2505.17967)",
    gaussian="a random Gaussian matrix",
    seeded="the same, drawn again from its seed at each step and never stored",
    blocks="whole parameters, a random share of which gets Adam until the next refresh",
)
MOMENTS = explained(
    "what a refresh does to Adam's moments",
    keep="leaves them as they are",
    rotate="turns them into the new basis, variances by LDAdam's rule (arXiv 2410.16103)",
    reset="sets them to zero",
)
StateDtype = Annotated[
    Literal["parameter", "float32", "8bit"],
    explained(
        "storage of optimizer state",
        **{"parameter": "the type of the parameter", "8bit": "quantised blocks, needs torchao"},
    ),
]
Lazy = Annotated[
    bool, Field(description="double the interval between refreshes of a matrix each time its subspace has settled")
]
ProjectionBits = Annotated[
    Literal[4] | None,
    Field(
        description="bits of each stored value of a basis, in groups of 256 with a scale and a zero point; None for "
        "the type of the parameter"
    ),
]
ScaleType = Annotated[
    Literal["channel", "tensor"], explained("scaling factors", channel="one per channel", tensor="one per matrix")
]
AnySubspace = Literal["svd", "randomized", "random", "columns", "dct", "gaussian", "seeded"]
Momentum = Annotated[float, Field(ge=0, lt=1, description="decay of the momentum")]
NsSteps = Annotated[int, Field(ge=1, description="iterations of the orthogonalisation")]
NsDtype = Annotated[
    Literal["bfloat16", "float32"],
    explained(
        "precision of the orthogonalisation",
        bfloat16="torch's own",
        float32="keeps runs on different numbers of processes together; float64 for such weights",
    ),
]
AdjustLr = Annotated[
    Literal["original", "match_rms_adamw", "spectral"],
    explained(
        "how the learning rate depends on the shape of a matrix",
        original="by its aspect ratio if it has more rows than columns",
        match_rms_adamw="so that updates have the RMS of AdamW's and both can share a learning rate",
        spectral="by the square root of rows over columns",
    ),
]
Orthogonaliser = Annotated[
    Literal["newton_schulz", "polar_express"],
    explained(
        "polynomials of the orthogonalisation",
        newton_schulz="torch's one, repeated",
        polar_express="one for each iteration, which brings singular values closer to one",
    ),
]
MatrixLrScale = Annotated[
    float,
    Field(gt=0, description="learning rate of the target matrices relative to that of all other parameters"),
]
FirstSubspace = Annotated[
    Literal["svd", "randomized"],
    explained(
        "how the first subspace is chosen",
        svd="the leading singular vectors of the first gradient",
        randomized="nearly that space, by subspace iteration, much faster for large matrices",
    ),
]
FrugalSubspace = Annotated[Literal["svd", "randomized", "random", "columns", "dct", "blocks"], SUBSPACE]


class FullRankSettings(MethodSettings):
    matrix_lr_scale: float | None = Field(
        None,
        gt=0,
        description="learning rate of the target matrices relative to that of all other parameters; None or 1: one "
        "rate, and Trainer's own AdamW",
    )
    target_modules: str | list[str] = Field("auto", description=TARGET_MODULES)


class OptimizerSettings(MethodSettings):
    """Settings that all optimizer methods share."""

    target_modules: str | list[str] = Field("auto", description=TARGET_MODULES)
    state_dtype: StateDtype = "parameter"
    stochastic_rounding: bool = Field(
        False, description="round updates of bfloat16 weights stochastically, so that small ones are not lost"
    )
    layerwise: bool = Field(
        False, description="update each parameter inside the backward pass and free its gradient at once"
    )
    seed: int | None = Field(None, description=SEED)


class SubspaceSettings(OptimizerSettings):
    """Settings that the subspace methods share.

    The order of the fields is that of `recipe.yaml`, whose digest identifies existing runs: append new ones.
    """

    rank: Rank = 128
    target_parameters: list[str] = Field([], description=TARGET_PARAMETERS)
    update_proj_gap: int = Field(200, ge=1, description="optimizer steps between refreshes of the subspace")
    scale: Scale = 1.0
    proj_type: Annotated[Literal["std", "reverse_std", "right", "left", "full"], SIDE] = "std"
    stagger: bool = Field(False, description="spread the refreshes of different matrices over the steps")
    adam_variant: Literal["official", "torch"] = explained(
        "Adam's formula",
        "official",
        official="that of the methods' own packages: ε before the bias correction, decay of the updated weight",
        torch="that of `torch.optim.AdamW`",
    )
    moments: Annotated[Literal["keep", "rotate", "reset"], MOMENTS] = "keep"
    diagnostics: bool = Field(
        False,
        description="log the captured gradient energy and the overlap of successive bases; with `training.report_to` "
        "they always are",
    )
    subspace: Annotated[AnySubspace, SUBSPACE] = "randomized"
    lazy: Lazy = False
    projection_bits: ProjectionBits = None


class GaLoreSettings(SubspaceSettings):
    scale: Scale = 0.25


class QGaLoreSettings(GaLoreSettings):
    state_dtype: StateDtype = "8bit"
    lazy: Lazy = True
    projection_bits: ProjectionBits = 4
    weight_dtype: Literal["parameter", "8bit"] = explained(
        "storage of the target modules' weights",
        "parameter",
        **{
            "parameter": "the model's type",
            "8bit": "codes in groups of 256, rounded up or down at random, with no other copy",
        },
    )


class FiraSettings(SubspaceSettings):
    scale: Scale = 0.25
    proj_type: Annotated[Literal["std", "reverse_std", "right", "left"], SIDE] = "std"
    subspace: Annotated[Literal["svd", "randomized", "random", "columns", "dct"], SUBSPACE] = "randomized"
    residual: Literal["official", "paper"] = explained(
        "what is left outside the subspace",
        "official",
        official="G − scale · P PᵀG, as in the published package and its results",
        paper="G − P PᵀG, as in the paper's formula",
    )
    norm_growth_limit: NormGrowthLimit = 1.01


class ApolloSettings(SubspaceSettings):
    scale: ApolloScale = 1.0
    proj_type: Annotated[Literal["std", "reverse_std", "right", "left"], SIDE] = "std"
    subspace: Annotated[Literal["svd", "randomized", "random", "columns", "gaussian", "seeded"], SUBSPACE] = "gaussian"
    scale_type: ScaleType = "channel"
    norm_growth_limit: NormGrowthLimit = 1.01


class ApolloMiniSettings(ApolloSettings):
    rank: Rank = 1
    scale: ApolloScale = 128.0
    scale_type: ScaleType = "tensor"


class FrugalSettings(SubspaceSettings):
    subspace: FrugalSubspace = "columns"  # type: ignore[assignment]
    moments: Annotated[Literal["keep", "rotate", "reset"], MOMENTS] = "reset"
    state_free_rule: Literal["sign", "sgd"] = explained(
        "update outside the subspace", "sign", sign="signSGD", sgd="plain SGD"
    )
    state_free_lr_ratio: float = Field(1.0, ge=0, description="learning rate outside the subspace, relative to Adam's")


class MuonSettings(OptimizerSettings):
    momentum: Momentum = 0.95
    nesterov: bool = Field(True, description="use Nesterov momentum")
    ns_steps: NsSteps = 5
    ns_dtype: NsDtype = "bfloat16"
    adjust_lr_fn: AdjustLr = "match_rms_adamw"
    orthogonaliser: Orthogonaliser = "newton_schulz"
    matrix_lr_scale: MatrixLrScale = 1.0


class NorMuonSettings(MuonSettings):
    nesterov: bool = Field(False, description="use Nesterov momentum")
    adjust_lr_fn: AdjustLr = "spectral"
    orthogonaliser: Orthogonaliser = "polar_express"
    muon_beta2: float = Field(0.95, ge=0, lt=1, description="decay of the running mean of each row's squares")


class DionSettings(OptimizerSettings):
    rank: Rank = 128
    momentum: Momentum = 0.95
    adjust_lr_fn: AdjustLr = "spectral"
    matrix_lr_scale: MatrixLrScale = 1.0


class Dion2Settings(OptimizerSettings):
    fraction: float = Field(
        0.25, gt=0, le=1, description="share of a matrix's rows or columns, whichever are fewer, that move in a step"
    )
    momentum: Momentum = 0.95
    ns_steps: NsSteps = 5
    ns_dtype: NsDtype = "bfloat16"
    adjust_lr_fn: AdjustLr = "spectral"
    orthogonaliser: Orthogonaliser = "polar_express"
    matrix_lr_scale: MatrixLrScale = 1.0


class LDAdamSettings(OptimizerSettings):
    rank: Rank = 16
    target_parameters: list[str] = Field([], description=TARGET_PARAMETERS)
    subspace: FirstSubspace = "svd"
    rho: float = Field(0.908, ge=0, le=1, description="weight of the momentum in what the subspace follows")
    error_feedback: bool = Field(
        True,
        description="keep what the subspace cannot hold, which takes the size of the weight, for the next gradient",
    )


class CosmosSettings(OptimizerSettings):
    rank: Rank = 64
    lr_ratio: float = Field(
        0.1, gt=0, description="root mean square of an update of a target matrix, in units of the learning rate"
    )
    gamma: float = Field(0.2, ge=0, description="weight of the orthogonalised part outside the subspace")
    subspace: FirstSubspace = "svd"
    nesterov: bool = Field(True, description="use Nesterov momentum")
    ns_steps: NsSteps = 5
    ns_dtype: NsDtype = "bfloat16"
    orthogonaliser: Orthogonaliser = "newton_schulz"


def build_optimizer(
    optimizer: str, *, without: Collection[str] = ()
) -> Callable[[nn.Module, Any, TrainingArguments], Optimizer]:
    """A `Method.build_optimizer` for the class `optimizer`, given as `module:name` and imported when it is called.

    The class is called with the model, the learning rate, betas, ε and weight decay of the training arguments, and
    each setting under its own name, `without` those that are the model's.

    Raises (when called):
        UserError: the target pattern matches nothing, the rank is too large for a target, or the training arguments
            are incompatible with `layerwise`.
    """

    def build(model: nn.Module, settings: OptimizerSettings, args: TrainingArguments) -> Optimizer:
        from hf_lowrank.optim.layerwise import check_layerwise
        from hf_lowrank.targets import adam_arguments

        if settings.layerwise:
            check_layerwise(max_grad_norm=args.max_grad_norm, fp16=args.fp16)
        seed = args.seed if settings.seed is None else settings.seed
        options = settings.model_dump(exclude={"seed", *without})
        if isinstance(settings, SubspaceSettings):
            options["diagnostics"] = _has_diagnostics(settings, args)
        cls: Callable[..., Optimizer] = resolve_name(optimizer)
        return cls(model, **adam_arguments(args), **options, seed=seed)

    return build


def build_q_galore(model: nn.Module, settings: QGaLoreSettings, args: TrainingArguments) -> Optimizer:
    """Q-GaLore's optimizer.

    Raises:
        UserError: as other optimizers, or weights in eight bits are to be sharded.
    """
    from accelerate.utils import parse_flag_from_env

    if settings.weight_dtype == "8bit" and (getattr(args, "fsdp", None) or parse_flag_from_env("ACCELERATE_USE_FSDP")):
        raise UserError(
            "weight_dtype must be parameter under FSDP2, got '8bit'; a group of 256 values could be split between two "
            "processes"
        )
    build = build_optimizer("hf_lowrank.optim.q_galore:QGaLoreAdamW", without=["weight_dtype"])
    return build(model, settings, args)


def _has_diagnostics(settings: SubspaceSettings, args: TrainingArguments) -> bool:
    return settings.diagnostics or bool(args.report_to)


def subspace_callbacks(settings: SubspaceSettings, args: TrainingArguments) -> Sequence[TrainerCallback]:
    """Logs the subspace diagnostics where the settings ask for them, or a tracker could show them."""
    if not _has_diagnostics(settings, args):
        return []
    from hf_lowrank.optim.diagnostics import SubspaceLogCallback

    return [SubspaceLogCallback()]


_subspace_method = partial(Method, kind="optimizer", callbacks=subspace_callbacks)

ENTRIES = (
    Method(
        name="full_rank",
        title="Full-rank",
        summary="AdamW on the dense weights: the baseline.",
        kind="baseline",
        settings=FullRankSettings,
        look=Look("#1f1d1a", "#f3f0e8", SOLID, "circle"),
        build_optimizer=LazyObject("hf_lowrank.optim.full_rank:build_optimizer"),
        page=PAGES["full_rank"],
    ),
    _subspace_method(
        name="galore",
        title="GaLore",
        summary="Adam inside the leading subspace of each gradient, lifted back to the dense weight.",
        settings=GaLoreSettings,
        source="arXiv 2403.03507",
        look=Look("#0a6fb5", "#5fb0ee", SOLID, "square"),
        build_optimizer=build_optimizer("hf_lowrank.optim.galore:GaLoreAdamW"),
        page=PAGES["galore"],
    ),
    _subspace_method(
        name="q_galore",
        title="Q-GaLore",
        summary="GaLore with bases in four bits, moments in eight, and a lazy interval between refreshes.",
        settings=QGaLoreSettings,
        source="arXiv 2407.08296",
        look=Look("#3a1fc8", "#8f6bff", DASHED, "down"),
        build_model=LazyObject("hf_lowrank.adapters.modeling:build_with_weight_dtype"),
        build_optimizer=build_q_galore,
        page=PAGES["q_galore"],
    ),
    _subspace_method(
        name="fira",
        title="Fira",
        summary="GaLore plus the gradient outside the subspace, scaled by Adam's effect inside.",
        settings=FiraSettings,
        source="arXiv 2410.01623",
        look=Look("#cf4a0c", "#ff9159", SOLID, "up"),
        build_optimizer=build_optimizer("hf_lowrank.optim.fira:FiraAdamW"),
        page=PAGES["fira"],
    ),
    _subspace_method(
        name="apollo",
        title="APOLLO",
        summary="The gradient, with each channel scaled by Adam's effect on a random projection of it.",
        settings=ApolloSettings,
        source="arXiv 2412.05270",
        look=Look("#11803f", "#35c79b", SOLID, "diamond"),
        build_optimizer=build_optimizer("hf_lowrank.optim.apollo:ApolloAdamW"),
        page=PAGES["apollo"],
    ),
    _subspace_method(
        name="apollo_mini",
        title="APOLLO-Mini",
        summary="APOLLO with rank 1 and one scale per matrix.",
        settings=ApolloMiniSettings,
        source="arXiv 2412.05270",
        look=Look("#4d9a2a", "#9bd85e", SOLID, "down"),
        build_optimizer=build_optimizer("hf_lowrank.optim.apollo:ApolloAdamW"),
        page=PAGES["apollo_mini"],
    ),
    _subspace_method(
        name="frugal",
        title="FRUGAL",
        summary="Adam inside a subspace, signSGD outside.",
        settings=FrugalSettings,
        source="arXiv 2411.07837",
        look=Look("#6d4bb8", "#b79cf2", SOLID, "hexagon"),
        build_optimizer=build_optimizer("hf_lowrank.optim.frugal:FrugalAdamW"),
        page=PAGES["frugal"],
    ),
    Method(
        name="muon",
        title="Muon",
        summary="Momentum, orthogonalised, on the target matrices; AdamW on the rest.",
        kind="optimizer",
        settings=MuonSettings,
        source="arXiv 2502.16982",
        look=Look("#8a5a2b", "#d3a273", SOLID, "pentagon"),
        build_optimizer=build_optimizer("hf_lowrank.optim.muon:MuonAdamW"),
        page=PAGES["muon"],
    ),
    Method(
        name="normuon",
        title="NorMuon",
        summary="Muon, with the rows of each update brought to one size by their own running means.",
        kind="optimizer",
        settings=NorMuonSettings,
        source="arXiv 2510.05491",
        look=Look("#9900e6", "#c042ff", DASH_DOTTED, "pentagon"),
        build_optimizer=build_optimizer("hf_lowrank.optim.normuon:NorMuonAdamW"),
        page=PAGES["normuon"],
    ),
    Method(
        name="dion",
        title="Dion",
        summary="Orthogonalised momentum of low rank, by one power iteration per step.",
        kind="optimizer",
        settings=DionSettings,
        source="arXiv 2504.05295",
        look=Look("#59260d", "#e64c00", DASHED, "star"),
        build_optimizer=build_optimizer("hf_lowrank.optim.dion:DionAdamW"),
        page=PAGES["dion"],
    ),
    Method(
        name="dion2",
        title="Dion2",
        summary="Muon of the largest rows or columns of each momentum, while the others gather.",
        kind="optimizer",
        settings=Dion2Settings,
        source="arXiv 2512.16928",
        look=Look("#80006a", "#bd65af", DASH_DOTTED, "cross"),
        build_optimizer=build_optimizer("hf_lowrank.optim.dion2:Dion2AdamW"),
        page=PAGES["dion2"],
    ),
    Method(
        name="ldadam",
        title="LDAdam",
        summary="Adam in a subspace that follows the gradient at each step, with feedback of what it cannot hold.",
        kind="optimizer",
        settings=LDAdamSettings,
        source="arXiv 2410.16103",
        look=Look("#e16400", "#fa7d19", DOTTED, "down"),
        build_optimizer=build_optimizer("hf_lowrank.optim.ldadam:LDAdamW"),
        page=PAGES["ldadam"],
    ),
    Method(
        name="cosmos",
        title="COSMOS",
        summary="Adam in the leading subspace of the gradients, orthogonalised momentum outside it.",
        kind="optimizer",
        settings=CosmosSettings,
        source="arXiv 2502.17410",
        look=Look("#254d00", "#4bfaaf", DASH_DOTTED, "hexagon"),
        build_optimizer=build_optimizer("hf_lowrank.optim.cosmos:CosmosAdamW"),
        page=PAGES["cosmos"],
    ),
)
