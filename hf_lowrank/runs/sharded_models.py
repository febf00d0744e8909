"""Models divided among processes as they are loaded: each reads its rows of every tensor, and no other."""

from __future__ import annotations

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
from hf_lowrank.errors import UserError
from hf_lowrank.runs.trajectory import Trajectory

# (names that a tensor has in the model, rows from, up to) -> those rows
Reader = Callable[[list[str], int, int], Tensor]


def sharded_model(
    trajectory: Trajectory, step: int, mesh: DeviceMesh, device: torch.device, *, dense: bool = False
) -> PreTrainedModel:
    """A checkpoint's model in float32 and eval mode, its parameters divided by `fully_shard`, blocks and the rest.

    No process waits for another here, and none ever holds more than its rows and one tensor: parameters begin on the
    meta device. Buffers (the support of SLTrain) are whole on each.

    Args:
        trajectory, step: the checkpoint.
        mesh: the processes, in one dimension.
        device: this process's.
        dense: of an adapted model, the plain architecture with dense weights, each put together from disk.

    Raises:
        UserError: as `Trajectory.model`, or a tensor is not stored under its own name.
    """
    trajectory.checked_folder(step)
    dense = dense and trajectory.adapted
    model = _bare(trajectory, step, dense)
    names = _names(model)
    _divide(model, mesh)
    stored = _stored(trajectory, step, model)
    read = _dense(trajectory, step, model, stored) if dense else stored
    made: dict[int, tuple[Tensor, nn.Parameter]] = {}
    for path, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                aliases = names[f"{path}.{key}".removeprefix(".")]
                made[id(parameter)] = parameter, _filled(parameter, aliases, read, mesh, device)
            module.register_parameter(key, made[id(parameter)][1])
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
    except Exception as error:  # any operation may fail on a size that makes no sense
        said = " ".join(str(error).split())[:300]
        raise UserError(f"{trajectory.where(step)}/config.json: describes no model: {said}") from None
    model.tie_weights()  # which registering on the meta device has undone
    return model.float()


def _names(model: nn.Module) -> dict[str, list[str]]:
    """For every name of a parameter all names that it has, tied ones together."""
    named = list(model.named_parameters(remove_duplicate=False))
    together: dict[int, list[str]] = {}
    for name, parameter in named:
        together.setdefault(id(parameter), []).append(name)
    return {name: together[id(parameter)] for name, parameter in named}


def _divide(model: Any, mesh: DeviceMesh) -> None:
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    for block in reversed([module for module in model.modules() if type(module).__name__ in kinds]):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def _filled(parameter: Tensor, names: list[str], read: Reader, mesh: DeviceMesh, device: torch.device) -> nn.Parameter:
    length = parameter.shape[0]
    chunk = -(-length // mesh.size())
    start, stop = (min((mesh.get_local_rank() + one) * chunk, length) for one in (0, 1))
    rows = read(names, start, stop).to(device, torch.float32).contiguous()
    if rows.shape != (stop - start, *parameter.shape[1:]):
        raise UserError(
            f"{names[0]}: its rows are of shape {list(rows.shape)[1:]}, the model's {list(parameter.shape)[1:]}"
        )
    whole = DTensor.from_local(
        rows, mesh, (Shard(0),), run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)


def _stored(trajectory: Trajectory, step: int, model: Any) -> Reader:
    there = set(trajectory.tensor_names(step))
    prefix = f"{getattr(model, 'base_model_prefix', '')}."

    def read(names: list[str], start: int, stop: int) -> Tensor:
        candidates = [*names, *(name.removeprefix(prefix) for name in names)]
        for name in candidates:
            if name in there:
                return trajectory.tensor(step, name, rows=(start, stop))
        raise UserError(
            f"{trajectory.where(step)}: has no tensor {names[0]} under that name, and a model whose tensors are "
            "stored otherwise cannot be divided; measure it without --sharded, with --device auto"
        )

    return read


def _dense(trajectory: Trajectory, step: int, model: Any, stored: Reader) -> Reader:
    """Rows of the plain architecture: of a target from its dense weight, else as the adapted model has them."""

    def read(names: list[str], start: int, stop: int) -> Tensor:
        module, _, leaf = names[0].rpartition(".")
        if module in trajectory.targets and leaf == "weight":
            weight = trajectory.dense_weight(step, module)
            layer: Any = model.get_submodule(module)
            return (weight.mT if isinstance(layer, Conv1D) else weight)[start:stop].clone()
        return stored([f"{PREFIX}.{name}" for name in names] + [f"{PREFIX}.{module}.base_layer.{leaf}"], start, stop)

    return read
