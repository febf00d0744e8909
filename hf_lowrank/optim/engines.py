"""Ways of training on several devices that take a parameter's shape away, and so the methods' ground."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from hf_lowrank.errors import UserError

INSTEAD = "use FSDP2 (fully_shard; in accelerate fsdp_version: 2) or DDP"


def flattened_by(param: Tensor) -> str | None:
    """Which engine has put a flat piece in the place of `param`, None where none has."""
    if getattr(param, "_fsdp_flattened", False) or type(param).__name__ == "FlatParameter":
        return "FSDP1 (FullyShardedDataParallel)"
    if hasattr(param, "ds_id"):
        return "DeepSpeed ZeRO-3"
    return None


def flattened(owner: str, name: str, engine: str) -> UserError:
    """The error that names the engine and what to use instead."""
    return UserError(f"{owner} needs parameters in their own shapes, {name} was flattened by {engine}; {INSTEAD}")


def refuse_flattened_model(model: nn.Module) -> None:
    """Raises UserError where `model`, or a part of it, is wrapped or partitioned by an engine that flattens."""
    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            raise flattened("a low-rank method", name or type(module).__name__, "FSDP1 (FullyShardedDataParallel)")
    for name, param in model.named_parameters():
        engine = flattened_by(param)
        if engine is not None:
            raise flattened("a low-rank method", name, engine)


def refuse_engine(state: Any) -> None:
    """Stops before anything is built where accelerate is set to an engine that flattens.

    Args:
        state: accelerate's `AcceleratorState`, as `accelerator.state`.

    Raises:
        UserError: naming the engine and what to use instead.
    """
    deepspeed = getattr(state, "deepspeed_plugin", None)
    if deepspeed is not None:
        raise UserError(f"DeepSpeed ZeRO-{deepspeed.zero_stage} flattens the parameters into pieces; {INSTEAD}")
    fsdp = getattr(state, "fsdp_plugin", None)
    if fsdp is not None and getattr(fsdp, "fsdp_version", 1) == 1:
        raise UserError(f"FSDP1 (fsdp_version: 1) flattens the parameters; {INSTEAD}")
