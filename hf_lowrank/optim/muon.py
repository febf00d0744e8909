"""Muon (arXiv 2502.16982): momentum, orthogonalised, for the target matrices; AdamW for the rest.

All matrices of a shape move in one stack, so that a step launches the same operations for one of them and for a
hundred. NorMuon, Dion and Dion2 are built on the same core.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_lowrank.compat import foreach_copy_
from hf_lowrank.errors import UserError
from hf_lowrank.methods import MethodSettings
from hf_lowrank.optim.base import Declared, Params, TargetedAdamW
from hf_lowrank.optim.batch import Batch
from hf_lowrank.optim.entries import Entry
from hf_lowrank.optim.groups import param_groups
from hf_lowrank.optim.layout import Layout, make_layout
from hf_lowrank.optim.methods import MuonSettings, OptimizerSettings
from hf_lowrank.optim.orthogonal import orthogonalise
from hf_lowrank.optim.state import StateTensor

# torch's name for it.
MOMENTUM = "momentum_buffer"


class MatrixBatch(Batch):
    """A batch whose matrices are stepped in one stack, oriented (k, rows, columns): this process's parts of them.

    Where gradients are not finite, weights and momenta stay as they are.
    """

    def gradients(self) -> Tensor:
        """In the momenta's type; zeros for those that are not finite."""
        return self.stacked_gradients(self.state(MOMENTUM)[0].dtype)

    def momenta(self) -> Tensor:
        return self.stack(self.state(MOMENTUM))

    def write_momenta(self, momenta: Tensor, last: Tensor) -> None:
        """Stores new momenta in place of the last ones."""
        foreach_copy_(self.state(MOMENTUM), self.unstack(self.where_finite(momenta, last)))

    def orthogonalised(self, updates: Tensor) -> Tensor:
        """Each whole matrix orthogonalised, in its own type.

        Sharded ones are sent to one process each, in turn, in the type of the iterations.
        """
        group, layout = self.group, self.entries[0].layout
        wide = torch.promote_types(updates.dtype, torch.float32)
        work = updates.to(torch.bfloat16 if group["ns_dtype"] == "bfloat16" else wide)
        sharding = layout.sharding
        if sharding is None:
            return orthogonalise(work, group["ns_steps"], group["orthogonaliser"]).to(updates.dtype)
        owners = [number % sharding.size for number in range(len(work))]
        shape = (layout.rows, work.shape[-1])
        wholes = sharding.to_owners(work.unbind(), owners, [shape[0]] * len(work))
        if wholes:
            done = orthogonalise(torch.stack(list(wholes.values())), group["ns_steps"], group["orthogonaliser"])
            wholes = dict(zip(wholes, done.contiguous().unbind(), strict=True))
        parts = sharding.from_owners(wholes, owners, [shape] * len(work), work)
        return torch.stack(parts).to(updates.dtype)

    @property
    def adjusted(self) -> float:
        """What `adjust_lr_fn` multiplies the learning rate by."""
        rows, columns = self.entries[0].param.shape
        factors = {
            "original": math.sqrt(max(1, rows / columns)),
            "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns)),
            "spectral": math.sqrt(rows / columns),
        }
        return factors[self.group["adjust_lr_fn"]]


class OrthogonalAdamW(TargetedAdamW):
    """AdamW whose target matrices move by orthogonalised momentum; base of Muon and its kin.

    A method defines `update`; it may add state and orient matrices.

    Args:
        params: a model (its target modules become targets), groups, or parameters. Groups with `muon=True` are
            targets.
        lr: of both; `adjust_lr_fn` makes one rate fit both, or `matrix_lr_scale` sets that of the targets apart.
        betas, eps: of AdamW.
        weight_decay: decoupled, of both.
        target_modules: which linear layers are targets when `params` is a model, see `param_groups`.
        matrix_lr_scale: what the learning rate of the targets is multiplied by when `params` is a model.

    The other arguments are those of `ProjectedAdamW`.

    Raises:
        UserError: an option is out of range, or a target is not a matrix; names it.
    """

    settings: ClassVar[type[MethodSettings]] = OptimizerSettings
    settings_of_model = TargetedAdamW.settings_of_model | {"matrix_lr_scale"}
    heeds_flags = True

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        target_modules: str | Sequence[str] = "auto",
        matrix_lr_scale: float = 1.0,
        seed: int = 0,
        layerwise: bool = False,
        **options: Any,
    ) -> None:
        if isinstance(params, nn.Module):
            params = muon_groups(params, target_modules=target_modules, weight_decay=weight_decay)
            if matrix_lr_scale != 1:
                for group in params:
                    group["lr"] = lr * matrix_lr_scale if group["muon"] else lr
                params.reverse()  # Trainer logs the learning rate of the first group, which should be the recipe's
        super().__init__(
            params,
            options,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            muon=False,
            adam_variant="torch",
            seed=seed,
            layerwise=layerwise,
        )
        if not any(group["muon"] for group in self.param_groups):
            raise UserError(f"{type(self).__name__} needs at least one group with muon=True; pass the model itself")

    def is_target(self, group: Mapping[str, Any]) -> bool:
        return bool(group["muon"])

    def make_layout(self, group: dict[str, Any], param: Tensor, name: str) -> Layout:
        if param.ndim != 2:
            raise UserError(f"{name} of shape {tuple(param.shape)} is not a matrix; put it into a group without muon")
        rank, proj_type = group.get("rank", 1), self.orientation(param)
        return make_layout(param, name, rank=rank, proj_type=proj_type, first_index=self.matrix_count)

    def orientation(self, param: Tensor) -> str:
        """The `proj_type` that orients a matrix, as for a projection: `right` as it is stored, `left` transposed."""
        return "right"

    def declare_state(self, group: dict[str, Any], layout: Layout) -> Declared:
        return {MOMENTUM: StateTensor(shape=layout.stored_shape, quantized="signed")}

    def make_batch(self, entries: Sequence[Entry]) -> MatrixBatch:
        return MatrixBatch(entries)

    def describe(self, group: Mapping[str, Any], layout: Layout) -> str:
        return type(self).__name__.removesuffix("AdamW")

    def batch_size(self, entry: Entry) -> int:
        """At least one sharded matrix for each process."""
        sharding = entry.layout.sharding
        return max(super().batch_size(entry), 1 if sharding is None else sharding.size)


class MuonAdamW(OrthogonalAdamW):
    """Muon: `M ← μM + (1−μ)G`, `W ← (1 − η·wd) W − η_adjusted · orthogonalise(M)`, as in `torch.optim.Muon`.

    Args:
        momentum, nesterov, ns_steps: as in `torch.optim.Muon`.
        ns_dtype: precision of the orthogonalisation. In torch's "bfloat16" a difference in a gradient's last digit
            becomes one of a percent, so that runs on different numbers of processes visibly differ; "float32" keeps
            them together.
        adjust_lr_fn: `original` and `match_rms_adamw` as in `torch.optim.Muon`, or `spectral`.
        orthogonaliser: `newton_schulz` as in `torch.optim.Muon`, or `polar_express` (arXiv 2505.16932).

    The other arguments are those of `OrthogonalAdamW`.
    """

    settings: ClassVar[type[MethodSettings]] = MuonSettings

    def update(self, batch: MatrixBatch) -> None:
        group, G, last = batch.group, batch.gradients(), batch.momenta()
        M = torch.lerp(last, G, 1 - group["momentum"])
        updates = torch.lerp(G, M, group["momentum"]) if group["nesterov"] else M
        batch.move_(self.rescaled(batch, batch.orthogonalised(updates)), batch.adjusted)
        batch.write_momenta(M, last)

    def rescaled(self, batch: MatrixBatch, directions: Tensor) -> Tensor:
        """What a method makes of the orthogonalised momentum, (k, rows, columns)."""
        return directions


def muon_groups(
    model: nn.Module, *, target_modules: str | Sequence[str] = "auto", weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """`param_groups` with `muon=True` instead of a rank."""
    groups = param_groups(model, rank=1, target_modules=target_modules, weight_decay=weight_decay)
    for group in groups:
        group["muon"] = group.pop("rank") is not None
    return groups
