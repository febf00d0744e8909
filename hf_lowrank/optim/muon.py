"""torch's Muon for the target matrices and AdamW for the rest, as one optimizer, for comparison."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_lowrank.compat import adjust_lr, zeropower_via_newtonschulz
from hf_lowrank.errors import UserError
from hf_lowrank.optim.base import Declared, Params, TargetedAdamW
from hf_lowrank.optim.batch import Batch
from hf_lowrank.optim.entries import Entry
from hf_lowrank.optim.groups import param_groups
from hf_lowrank.optim.layout import Layout, make_layout
from hf_lowrank.optim.methods import MuonSettings
from hf_lowrank.optim.state import StateTensor

A, B, C = COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SMALLEST_NORM = 1e-7


def orthogonalise(matrix: Tensor, steps: int, dtype: str = "bfloat16") -> Tensor:
    """Newton–Schulz: the matrix with its singular values brought close to one, in `dtype`; torch's own in bfloat16."""
    if dtype == "bfloat16":
        found: Tensor = zeropower_via_newtonschulz(matrix, COEFFICIENTS, steps, SMALLEST_NORM)
        return found
    tall = matrix.shape[0] > matrix.shape[1]
    work = matrix.float().T if tall else matrix.float()
    work = work / work.norm().clamp(min=SMALLEST_NORM)
    for _ in range(steps):
        gram = work @ work.T
        work = torch.addmm(work, torch.addmm(gram, gram, gram, beta=B, alpha=C), work, beta=A)
    return work.T if tall else work


class MuonAdamW(TargetedAdamW):
    """The update of `torch.optim.Muon` for the groups with `muon=True`, AdamW for the others.

    Args:
        params: a model (its target modules get Muon), groups, or parameters.
        lr: of both; `adjust_lr_fn="match_rms_adamw"` makes one rate fit both (arXiv 2502.16982).
        momentum, nesterov, ns_steps, adjust_lr_fn: as in `torch.optim.Muon`.
        ns_dtype: precision of Newton–Schulz. In torch's "bfloat16" a difference in a gradient's last digit becomes
            one of a percent, so that runs on different numbers of processes visibly differ; "float32" keeps them
            together.

    The other arguments are those of `ProjectedAdamW`.
    """

    settings = MuonSettings

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        target_modules: str | Sequence[str] = "auto",
        seed: int = 0,
        layerwise: bool = False,
        **options: Any,
    ) -> None:
        if isinstance(params, nn.Module):
            params = muon_groups(params, target_modules=target_modules, weight_decay=weight_decay)
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
            raise UserError("MuonAdamW needs at least one group with muon=True; pass the model itself")

    def is_target(self, group: Mapping[str, Any]) -> bool:
        return bool(group["muon"])

    def make_layout(self, group: dict[str, Any], param: Tensor, name: str) -> Layout:
        if param.ndim != 2:
            raise UserError(f"{name} of shape {tuple(param.shape)} is not a matrix; put it into a group without muon")
        return make_layout(param, name, rank=1, proj_type="right", first_index=self.matrix_count)

    def declare_state(self, group: dict[str, Any], layout: Layout) -> Declared:
        return {"momentum_buffer": StateTensor(shape=None, dtype="parameter")}

    def describe(self, group: Mapping[str, Any], layout: Layout) -> str:
        return "Muon"

    def batch_size(self, entry: Entry) -> int:
        """One matrix, or one per process of those that shard it."""
        return 1 if entry.layout.sharding is None else entry.layout.sharding.size

    def update(self, batch: Batch) -> None:
        group = batch.group
        updates = []
        for mean, grad in zip(batch.state("momentum_buffer"), batch.grads, strict=True):
            mean.lerp_(grad, 1 - group["momentum"])
            updates.append(grad.lerp(mean, group["momentum"]) if group["nesterov"] else mean)
        rate = adjust_lr(batch.lr, group["adjust_lr_fn"], batch.entries[0].param.shape)
        for weight, direction in zip(batch.weights, _orthogonalised(batch, updates), strict=True):
            weight.mul_(batch.keep).add_(direction, alpha=-rate)


def _orthogonalised(batch: Batch, updates: list[Tensor]) -> list[Tensor]:
    """Newton–Schulz of whole matrices; each sharded one by one process, which returns everyone's rows."""
    group, layout = batch.group, batch.entries[0].layout

    def direction(matrix: Tensor) -> Tensor:
        return orthogonalise(matrix, group["ns_steps"], group["ns_dtype"])

    if layout.sharding is None:
        return list(map(direction, updates))
    owners = list(range(len(updates)))
    shapes = [(layout.rows, layout.columns) for _ in updates]
    wholes = layout.sharding.to_owners(updates, owners, [rows for rows, _ in shapes])
    done = {i: direction(whole).to(whole.dtype).contiguous() for i, whole in wholes.items()}
    return layout.sharding.from_owners(done, owners, shapes, updates[0])


def muon_groups(
    model: nn.Module, *, target_modules: str | Sequence[str] = "auto", weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """`param_groups` with `muon=True` instead of a rank."""
    groups = param_groups(model, rank=1, target_modules=target_modules, weight_decay=weight_decay)
    for group in groups:
        group["muon"] = group.pop("rank") is not None
    return groups
