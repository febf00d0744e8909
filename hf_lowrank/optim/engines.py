"""Refuses engines that flatten parameters, since low-rank methods need matrices."""

import os
from typing import Any

from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from hf_lowrank.errors import UserError

INSTEAD = "use FSDP2 (fully_shard; in accelerate fsdp_version: 2) or DDP"


def flattened_by(param: Tensor) -> str | None:
    """The engine that has replaced `param` by a flat tensor, or None."""
    if getattr(param, "_fsdp_flattened", False) or type(param).__name__ == "FlatParameter":
        return "FSDP1 (FullyShardedDataParallel)"
    if hasattr(param, "ds_id"):
        return "DeepSpeed ZeRO-3"
    return None


def flattened(owner: str, name: str, engine: str) -> UserError:
    """The error for a flattened parameter, naming the engine and the alternatives."""
    return UserError(f"{owner} needs parameters in their original shapes, {name} was flattened by {engine}; {INSTEAD}")


def refuse_flattened_model(model: nn.Module) -> None:
    """Raises UserError if an engine that flattens has wrapped or partitioned `model` or a part of it."""
    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            raise flattened("a low-rank method", name or type(module).__name__, "FSDP1 (FullyShardedDataParallel)")
    for name, param in model.named_parameters():
        engine = flattened_by(param)
        if engine is not None:
            raise flattened("a low-rank method", name, engine)


def refuse_engines(args: TrainingArguments) -> None:
    """Refuses settings of Trainer or `accelerate launch` for an engine that flattens, before anything is built.

    Raises:
        UserError: naming the engine and the alternatives; or FSDP is asked for in a single process.
    """
    if args.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise UserError(f"training.deepspeed must be left out: DeepSpeed ZeRO-2 and ZeRO-3 flatten weights; {INSTEAD}")
    version = None
    if args.fsdp:
        config: Any = args.fsdp_config or {}
        version = int(config.get("version", 2))
    elif parse_flag_from_env("ACCELERATE_USE_FSDP"):
        version = int(os.environ.get("FSDP_VERSION", "1"))
    if version == 1:
        raise UserError(f"training.fsdp_config.version must be 2: FSDP1 flattens weights; {INSTEAD}")
    if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise UserError("training.fsdp needs processes to shard over; start with accelerate launch or torchrun")
