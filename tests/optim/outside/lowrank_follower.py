"""A method from outside the package, with a state and a refresh of its own: LDAdam by a loop over matrices.

The tests install this one file with an entry point of the group `hf_lowrank.methods` that names `METHOD`.
"""

from typing import Annotated, Any

import torch
from pydantic import Field

from hf_lowrank.errors import UserError
from hf_lowrank.methods import Look, Method
from hf_lowrank.optim.methods import SubspaceSettings, build_optimizer, subspace_callbacks


class FollowerSettings(SubspaceSettings):
    rho: Annotated[float, Field(ge=0, le=1, description="share of the momentum in what the subspace follows")] = 0.908


METHOD = Method(
    name="follower",
    title="Follower from outside",
    summary="Adam in a subspace that follows the gradient at each step, with error feedback.",
    kind="optimizer",
    settings=FollowerSettings,
    source="arXiv 2410.16103",
    look=Look("#7a1f5c", "#d98cc0", (1.0, 1.0), "star"),
    build_optimizer=build_optimizer("lowrank_follower:FollowerAdamW"),
    callbacks=subspace_callbacks,
)


def __getattr__(name: str) -> Any:
    if name == "FollowerAdamW":  # listing methods must not import torch's optimizers
        return optimizer_class()
    raise AttributeError(name)


def optimizer_class() -> type:
    from hf_lowrank.optim.core import ProjectedAdamW
    from hf_lowrank.optim.state import StateTensor

    class FollowerAdamW(ProjectedAdamW):
        settings = FollowerSettings

        def __init__(self, params, lr=1e-3, **options):
            super().__init__(params, lr, **{**options, "adam_variant": "torch"})

        def make_layout(self, group, param, name):
            layout = super().make_layout(group, param, name)
            if layout.sharding is not None:
                raise UserError(f"FollowerAdamW cannot shard {name}; train on one device or with DDP")
            return layout

        def declare_state(self, group, layout):
            return {**super().declare_state(group, layout), "error": StateTensor(shape=None)}

        def refresh(self, entries):
            for entry in entries:
                first, layout, state = not entry.state["refreshes"], entry.layout, entry.state
                entry.grad = entry.grad + entry.read("error")
                moments = [layout.parts(entry.read(key)) for key in ("exp_avg", "exp_avg_sq")]
                errors = layout.matrices(entry.read("error"))
                bases = [] if first else layout.parts(state["basis"])
                new = []
                for number, A in enumerate(layout.matrices(entry.grad)):
                    M, V = (of_all[number] for of_all in moments)
                    if first:
                        Q = torch.linalg.svd(A, full_matrices=False)[2][: layout.rank].mT.contiguous()
                        errors[number].copy_(A - A @ Q @ Q.mT)
                    else:
                        Q, *turned, lost = follow(A, bases[number], M, V, entry.age, entry.group)
                        errors[number].copy_(A - A @ Q @ Q.mT + lost)
                        M.copy_(turned[0])
                        V.copy_(turned[1])
                    new.append(Q)
                state["basis"] = torch.stack(new) if layout.stacked else new[0]
                state["refreshes"] += 1

        def update(self, batch):
            low = batch.project()
            direction = batch.adam(low)
            batch.lift_and_add_(direction, -batch.lr * batch.group["scale"])

    return FollowerAdamW


def follow(A, Q, M, V, age, group):
    """The next basis, the moments in it, and what of the momentum it cannot hold."""
    (beta1, beta2), rho = group["betas"], group["rho"]
    mean, square = M / (1 - beta1**age), V / (1 - beta2**age)
    B = rho * mean @ Q.mT + (1 - rho) * A
    new = torch.linalg.qr(B.mT @ (B @ Q))[0]
    R = Q.mT @ new
    turned = M @ R
    variance = ((square - mean.square()) @ R.square() + (mean @ R).square()).abs() * (1 - beta2**age)
    return new, turned, variance, beta1 / (1 - beta1) * (M @ Q.mT - turned @ new.mT)
