"""What loading a state adds to torch's own loading: options that old states lack, and the type of each tensor."""

from collections.abc import Mapping, MutableMapping, Sequence
from itertools import chain, repeat
from typing import Any

from torch import Tensor

from hf_lowrank.errors import UserError
from hf_lowrank.optim.entries import ParameterInfo
from hf_lowrank.optim.refresh import STORED_BASES
from hf_lowrank.optim.state import StateTensor


def fill_options(
    groups: Sequence[dict[str, Any]],
    last: Sequence[Mapping[str, Any]],
    defaults: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> None:
    """Gives groups the options that they lack, which were saved before there were such options.

    Args:
        last: the groups that these replace, if they replace any.
        defaults: the optimizer's value of every option, for groups that replace none.
        settings: the options that are settings of the method, with their defaults, which hold whatever the optimizer
            was made with: they are what the saved run did.
    """
    for group, known in zip(groups, chain(last, repeat(defaults)), strict=False):
        for key in defaults.keys() - group.keys():
            group[key] = settings[key] if key in settings else known[key]


def restore(
    states: MutableMapping[Any, Any],
    saved: Mapping[str, Any],
    info: ParameterInfo,
    group: Mapping[str, Any],
    param: Tensor,
) -> None:
    """Puts a parameter's saved state into `states`, each tensor in the type in which the optimizer holds it.

    Raises:
        UserError: a tensor of another shape than this optimizer's, or one that is missing, by name.
    """
    if not saved:
        return
    state = states[param]
    for key, declared in info.declared.items():
        if key in state:
            continue
        if isinstance(declared, int):
            state[key] = declared
        elif declared.initial is not None:
            raise missing(key, info)
    for key in STORED_BASES if state.get("refreshes") else ():
        if key in info.declared and key not in state:  # one that is chosen anew would be taken in its place
            raise missing(key, info)
    if "step" not in saved:
        raise missing("step", info)
    for key, value in saved.items():
        if not isinstance(value, Tensor):
            continue
        dtype, known = value.dtype, info.declared.get(key)
        if key == "step":  # as torch's own optimizers count
            state[key] = int(value)
            continue
        if isinstance(known, StateTensor):
            expected = known.full_shape(param, info.layout)
            if value.shape != expected:
                raise UserError(
                    f"{key} of {info.name} must have shape {expected}, got {tuple(value.shape)}; "
                    "the loaded state belongs to other parameters, or to another rank"
                )
            if value.is_floating_point() or value.is_complex():
                dtype = known.dtype_for(param, group["state_dtype"])
        loaded = value.to(device=param.device, dtype=dtype)
        state[key] = loaded.clone() if loaded is value else loaded


def missing(key: str, info: ParameterInfo) -> UserError:
    """The error for a loaded state without a tensor."""
    return UserError(
        f"the loaded state of {info.name} must have {key!r}; it was saved by another optimizer, or with other options"
    )
