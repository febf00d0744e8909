"""Parameter groups: which parameters are targets, and which decay."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from hf_lowrank.errors import UserError
from hf_lowrank.optim.layout import check_rank
from hf_lowrank.targets import decayed_names, warn_about_stacks
from hf_lowrank.targets import target_modules as select_target_modules
from hf_lowrank.targets import target_parameters as select_target_parameters


def param_groups(
    model: nn.Module,
    *,
    rank: int,
    target_modules: str | Sequence[str] = "auto",
    target_parameters: Sequence[str] = (),
    weight_decay: float = 0.0,
    **group_options: Any,
) -> list[dict[str, Any]]:
    """Splits `model`'s trainable parameters into target matrices and the rest, each with and without weight decay.

    The target groups carry `rank` and `group_options` (`update_proj_gap`, `scale`, `proj_type`, …); the others have
    `rank=None` and get plain AdamW. Weight decay spares what Trainer spares: biases and norms.
    Empty groups are left out.

    Args:
        target_modules: which linear layers are targets, see `hf_lowrank.targets.target_modules`.
        target_parameters: names or name endings of further targets, such as the stacks that hold a mixture's experts
            in transformers (`"experts.gate_up_proj"`). A warning names such stacks if they are left to AdamW.

    Raises:
        UserError: `target_modules` or `target_parameters` match nothing, or nothing trainable; `rank` is too large
            for a target; or an engine has flattened the parameters (FSDP1, DeepSpeed ZeRO-3).
    """
    refuse_flattened_model(model)
    modules = select_target_modules(model, target_modules)
    targets = {id(module.weight) for module in modules.values()}
    targets.update(map(id, select_target_parameters(model, target_parameters).values()))
    if target_modules == "auto":
        warn_about_stacks(model, "get plain AdamW; methods with a rank take them by target_parameters", targets)
    decayed = decayed_names(model)
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        key = (id(param) in targets, name in decayed)
        if key not in groups:
            groups[key] = {"params": [], "weight_decay": weight_decay if key[1] else 0.0, "rank": None}
            if key[0]:
                groups[key].update(group_options, rank=rank)
        if key[0]:
            stacked = param.ndim == 3 and group_options.get("matrix") != "flatten"
            rows, columns = param.shape[1:] if stacked else (param.shape[0], param[0].numel())
            check_rank(rank, name, param.shape, rows, columns)
        groups[key]["params"].append((name, param))
    if not any(target for target, _ in groups):
        raise UserError(
            f"target_modules {target_modules!r} matches only frozen parameters; unfreeze some or change it"
        )
    ordered = [groups[key] for key in sorted(groups, reverse=True)]
    check_coverage(model, ordered)
    return ordered


def check_coverage(model: nn.Module, groups: Iterable[Mapping[str, Any]]) -> None:
    """Checks that each trainable parameter of `model` is in exactly one group.

    Raises:
        UserError: naming the first such parameters.
    """
    seen: Counter[int] = Counter()
    for group in groups:
        params = group["params"]
        named = [params] if isinstance(params, Tensor) else params
        seen.update(id(param[1] if isinstance(param, tuple) else param) for param in named)
    trainable = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    missing = [name for name, param in trainable if not seen[id(param)]]
    if missing:
        raise UserError(
            f"every trainable parameter must be in a group, {len(missing)} are in none: {', '.join(missing[:3])}; "
            "freeze them or add a group"
        )
    twice = [name for name, param in trainable if seen[id(param)] > 1]
    if twice:
        raise UserError(f"a parameter must be in one group, {len(twice)} are in several: {', '.join(twice[:3])}")


def parameter_table(title: str, rows: Iterable[tuple[str, Tensor, str]]) -> str:
    """A table for the log, with one line for all parameters that differ only in the numbers of their names.

    Args:
        title: of the first line.
        rows: each parameter's name, the parameter, and how it is handled.
    """
    alike: Counter[tuple[str, str, str]] = Counter()
    values: Counter[str] = Counter()
    for name, param, how in rows:
        shape = " × ".join(map(str, param.shape))
        alike[re.sub(r"(?<=\.)\d+(?=\.)", "*", name), shape, how] += 1
        values[how.partition(",")[0]] += param.numel()
    shapes = {key: f"{count} of {key[1]}" if count > 1 else key[1] for key, count in alike.items()}
    widths = max(len(name) for name, _, _ in alike), max(map(len, shapes.values()))
    lines = [f"{title}: " + ", ".join(f"{count:,} values with {kind}" for kind, count in values.items())]
    lines += [f"  {key[0]:<{widths[0]}}  {shape:<{widths[1]}}  {key[2]}" for key, shape in shapes.items()]
    return "\n".join(lines)


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
