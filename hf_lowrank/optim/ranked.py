"""AdamW whose targets are the groups with a rank: base of the methods whose moments have that rank."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from hf_lowrank.errors import UserError
from hf_lowrank.methods import MethodSettings
from hf_lowrank.optim.base import Params, TargetedAdamW
from hf_lowrank.optim.groups import param_groups
from hf_lowrank.optim.layout import Layout, make_layout
from hf_lowrank.optim.methods import OptimizerSettings


class RankedAdamW(TargetedAdamW):
    """A method's optimizer whose target groups are those with a `rank`; those with `rank=None` get plain AdamW.

    Args:
        params: a model (split by `param_groups` with `rank` and `target_modules`), groups, or parameters.
        options: settings of the method.
        rank: for groups without their own; None for plain AdamW.
        target_modules, target_parameters: which linear layers, and which further parameters, are targets when
            `params` is a model, see `param_groups`.
        defaults: the other values that groups have by default, see `TargetedAdamW`.

    Raises:
        UserError: an option is out of range, a rank does not fit a matrix, or a target is a vector; names it.
    """

    settings: ClassVar[type[MethodSettings]] = OptimizerSettings

    def __init__(
        self,
        params: Params,
        options: Mapping[str, Any],
        *,
        rank: int | None,
        weight_decay: float,
        target_modules: str | Sequence[str],
        target_parameters: Sequence[str],
        **defaults: Any,
    ) -> None:
        if isinstance(params, nn.Module):
            if rank is None:
                raise UserError(f"{type(self).__name__} of a model needs rank, an integer of at least 1")
            params = param_groups(
                params,
                rank=rank,
                target_modules=target_modules,
                target_parameters=target_parameters,
                weight_decay=weight_decay,
            )
        super().__init__(params, options, rank=rank, weight_decay=weight_decay, **defaults)
        if not any(group["rank"] is not None for group in self.param_groups):
            raise UserError(
                f"{type(self).__name__} needs at least one group with a rank; pass the model itself with rank=, "
                "or groups made by hf_lowrank.param_groups (under Trainer as the key 'model' or 'params')"
            )

    def is_target(self, group: Mapping[str, Any]) -> bool:
        return group["rank"] is not None

    def side(self, group: Mapping[str, Any]) -> str:
        """The `proj_type` by which a target's side is chosen, see `make_layout`."""
        raise NotImplementedError

    def make_layout(self, group: dict[str, Any], param: Tensor, name: str) -> Layout:
        return make_layout(
            param,
            name,
            rank=group["rank"],
            proj_type=self.side(group),
            matrix=group["matrix"],
            first_index=self.matrix_count,
        )
