"""Models sharded across processes as they are loaded: each process reads only its rows of every tensor."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_lowrank.adapters.dense import PREFIX
from hf_lowrank.adapters.norms import norm_factors
from hf_lowrank.errors import UserError, one_line
from hf_lowrank.runs.layout import CONFIG
from hf_lowrank.runs.trajectory import Trajectory
from hf_lowrank.runs.weights import quantization_of

# (names that a tensor has in the model, rows from, up to) -> those rows
Reader = Callable[[list[str], int, int], Tensor]


def sharded_model(
    trajectory: Trajectory, step: int, mesh: DeviceMesh, device: torch.device, *, dense: bool = False
) -> PreTrainedModel:
    """A checkpoint's model in float32 and eval mode, with its blocks and the rest sharded by `fully_shard`.

    Processes do not wait for each other here, and none holds more than its rows and one tensor: parameters start on
    the meta device. Buffers (the support of SLTrain) are replicated.

    Args:
        trajectory, step: the checkpoint.
        mesh, device: the processes, in one dimension, and the device of this one.
        dense: load an adapted model in its base architecture, with dense weights computed from disk one by one.

    Raises:
        UserError: as `Trajectory.model`, or a tensor is not stored under its own name.
    """
    trajectory.checked_folder(step)
    if quantization_of(trajectory.config_at(step)) is not None:
        raise UserError(f"{trajectory.where(step)}: quantised weights cannot be sharded; measure it without --sharded")
    dense = dense and trajectory.adapted
    model = _bare(trajectory, step, dense)
    names = _names(model)
    folded = norm_factors(model) if dense and trajectory.config_at(step).layernorm_scaling else {}
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    for block in [*reversed([module for module in model.modules() if type(module).__name__ in kinds]), model]:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    stored = _stored(trajectory, step, model)
    read = _dense(trajectory, step, model, stored, folded) if dense else stored
    loaded: dict[int, tuple[Tensor, nn.Parameter]] = {}
    for path, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in loaded:
                aliases = names[f"{path}.{key}".removeprefix(".")]
                loaded[id(parameter)] = parameter, _filled(parameter, aliases, read, mesh, device)
            module.register_parameter(key, loaded[id(parameter)][1])
        for key, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                name = f"{path}.{key}".removeprefix(".")
                value = (
                    stored([name], 0, buffer.shape[0]) if buffer.numel() else torch.empty_like(buffer, device="cpu")
                )
                module._buffers[key] = value.to(device, buffer.dtype)
    return model.eval()


def _bare(trajectory: Trajectory, step: int, dense: bool) -> Any:
    """The architecture with its buffers, and with parameters on the meta device."""
    config = trajectory.config_at(step)
    config = config.base_config if dense else config
    try:
        with init_empty_weights():
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # any operation may fail on a nonsensical size
        raise UserError(f"{trajectory.where(step)}/{CONFIG}: does not describe a model: {one_line(error)}") from None
    model.tie_weights()  # undone by the meta device
    return model.float()


def _names(model: nn.Module) -> dict[str, list[str]]:
    """For every parameter name, all names of that parameter, tied ones together."""
    named = list(model.named_parameters(remove_duplicate=False))
    together: dict[int, list[str]] = {}
    for name, parameter in named:
        together.setdefault(id(parameter), []).append(name)
    return {name: together[id(parameter)] for name, parameter in named}


def _filled(parameter: Tensor, names: list[str], read: Reader, mesh: DeviceMesh, device: torch.device) -> nn.Parameter:
    length = parameter.shape[0]
    chunk = -(-length // mesh.size())
    start, stop = (min((mesh.get_local_rank() + one) * chunk, length) for one in (0, 1))
    rows = read(names, start, stop).to(device, torch.float32).contiguous()
    if rows.shape != (stop - start, *parameter.shape[1:]):
        raise UserError(
            f"{names[0]}: its rows have shape {list(rows.shape)[1:]}, the model expects {list(parameter.shape)[1:]}"
        )
    whole = DTensor.from_local(
        rows, mesh, (Shard(0),), run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)


def _stored(trajectory: Trajectory, step: int, model: Any) -> Reader:
    available = set(trajectory.tensor_names(step))
    prefix = f"{getattr(model, 'base_model_prefix', '')}."

    def read(names: list[str], start: int, stop: int) -> Tensor:
        candidates = [*names, *(name.removeprefix(prefix) for name in names)]
        for name in candidates:
            if name in available:
                return trajectory.tensor(step, name, rows=(start, stop))
        raise UserError(
            f"{trajectory.where(step)}: has no tensor {names[0]}, and a model whose tensors are stored under other "
            "names cannot be sharded; measure it without --sharded, with --device auto"
        )

    return read


def _dense(trajectory: Trajectory, step: int, model: Any, stored: Reader, folded: dict[str, float]) -> Reader:
    """Rows in the base architecture: for targets from the dense weight, else as the adapted model stores them, times
    the factors of `folded` by module."""

    def read(names: list[str], start: int, stop: int) -> Tensor:
        module, _, leaf = names[0].rpartition(".")
        if module in trajectory.targets and leaf == "weight":
            weight = trajectory.dense_weight(step, module)
            layer: Any = model.get_submodule(module)
            return (weight.mT if isinstance(layer, Conv1D) else weight)[start:stop].clone()
        rows = stored([f"{PREFIX}.{name}" for name in names] + [f"{PREFIX}.{module}.base_layer.{leaf}"], start, stop)
        return rows * folded[module] if module in folded else rows

    return read
