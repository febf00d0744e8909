"""Ways of training on several devices that take a parameter's shape away, and so the methods' ground."""

from __future__ import annotations

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


def refuse_engines(args: TrainingArguments) -> None:
    """Stops before anything is built where Trainer or `accelerate launch` is set to an engine that flattens.

    Raises:
        UserError: naming the engine and what to use instead; or FSDP is asked for in a single process.
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
