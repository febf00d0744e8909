"""Estimates of the memory that training by a recipe takes, before it starts."""

from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from hf_lowrank.errors import UserError
from hf_lowrank.memory.ledger import ACTIVATIONS, GRADIENTS, STATE, WEIGHTS
from hf_lowrank.memory.simulation import Simulation, arguments_of, checkpoints, simulate
from hf_lowrank.runs.weights import positions_of
from hf_lowrank.training.recipe import Recipe, load_recipe

SHARDINGS = ("ddp", "fsdp2")
DTYPES = ("float32", "bfloat16", "float16")
# transformers is renaming the second to the first.
CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")
WEIGHT_KINDS = ("embeddings", "dense", "factors", "sparse", "buffers")
# Phases in which the model computes, so that sharded weights are gathered.
COMPUTING = ("forward", "backward", "evaluation")
# Bytes that a cuBLAS handle takes from torch's allocator by default, on GPUs from sm_90 on and on older ones. Forward
# and backward passes run in two threads, each with a handle.
CUBLAS_HANDLES = 2
CUBLAS_LARGE, CUBLAS_SMALL = 32 * 2**20, 4096 * 1024 * 2 + 16 * 1024 * 8


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """What one process of a training holds, in bytes.

    The items do not add up to the peak, since gradients appear as activations are freed. The peak is that of the
    largest phase.

    Attributes:
        batch_size, sequence_length: of one process's forward pass.
        weights: parameters and buffers: `embeddings` (with the head), `dense` (linear layers and norms), `factors`,
            `sparse` (values and their positions) and `buffers`.
        frozen: the part of the weights without gradients.
        gradients: all that exist at the same time; with layerwise updates the largest one.
        optimizer_state: `moments` (with their scales and counters) and `bases`.
        activations: what autograd keeps from the forward to the backward pass, including the batch.
        activations_plain, activations_checkpointed: the same without and with gradient checkpointing, or None if not
            asked for.
        workspace: temporary tensors at the peak: logits and their gradient, intermediate results of a layer, the
            optimizer's batches, the choice of subspaces.
        communication: what several processes need in addition: DDP's buckets, FSDP2's gathered blocks.
        phases: the peak of each phase: forward (with the loss), backward, optimizer step, refresh of subspaces, first
            step, evaluation.
    """

    recipe: str
    method: str
    device: str
    world_size: int
    sharding: str | None
    batch_size: int
    sequence_length: int
    gradient_checkpointing: bool
    weights: int
    embeddings: int
    dense: int
    factors: int
    sparse: int
    buffers: int
    frozen: int
    gradients: int
    moments: int
    bases: int
    activations: int
    activations_plain: int | None
    activations_checkpointed: int | None
    workspace: int
    communication: int
    phases: dict[str, int]

    @property
    def optimizer_state(self) -> int:
        """Moments and bases together."""
        return self.moments + self.bases

    @property
    def peak(self) -> int:
        """The most that is held at any time."""
        return max(self.phases.values())

    @property
    def peak_phase(self) -> str:
        """The phase that holds the most."""
        return max(self.phases, key=self.phases.__getitem__)

    def plain(self) -> dict[str, Any]:
        """All attributes, the state and the peak as plain data."""
        return {**asdict(self), "optimizer_state": self.optimizer_state, "peak": self.peak}

    def facts(self) -> dict[str, int | None]:
        """The `memory` entry of a run's `facts.json`, before the peak is measured."""
        names = ("weights", "gradients", "optimizer_state", "activations", "workspace")
        return {**{name: getattr(self, name) for name in names}, "estimated_peak": self.peak, "measured_peak": None}


def estimate(
    recipe: Recipe | str | Path,
    *,
    world_size: int = 1,
    sharding: Literal["ddp", "fsdp2"] | None = None,
    batch_size: int | None = None,
    sequence_length: int | None = None,
    gradient_checkpointing: bool | None = None,
    dtype: str | None = None,
    device: str | torch.device | None = None,
    vocabulary_size: int | None = None,
    both_activations: bool = False,
) -> MemoryEstimate:
    """What training by `recipe` holds in one process, from running its steps on fake tensors.

    Model, loss, backward pass and optimizer are the real ones, so that their tensors are counted rather than guessed.
    The peak is exact except for what kernels allocate internally.

    Args:
        recipe: a recipe or recipe file.
        world_size: number of processes; `sharding` is how they share (default: "ddp"). Under DDP, gradients exist
            twice (in buckets). Under FSDP2, each process holds its share of weights, gradients and optimizer state,
            and in full the parameters outside the blocks and two blocks.
        batch_size: sequences in one process's forward pass; evaluation batches get no larger. Default: the recipe's,
            as for the following.
        sequence_length: tokens per sequence.
        gradient_checkpointing: whether blocks are recomputed.
        dtype: of the weights: "float32", "bfloat16" or "float16".
        device: "cpu" or "cuda"; default: the accelerator if there is one.
        vocabulary_size: of the model, if the recipe leaves it to the tokenizer; default: the size that the recipe
            trains.
        both_activations: fills in `activations_plain` and `activations_checkpointed`, with one more forward pass.

    Raises:
        UserError: an argument is out of range, or the recipe cannot be built.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    for name, value in (("world size", world_size), ("batch size", batch_size)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UserError(f"{name} must be at least 1, got {value}")
    for name, word, words in (("sharding", sharding, SHARDINGS), ("dtype", dtype, DTYPES)):
        if word is not None and word not in words:
            raise UserError(f"{name} must be one of {', '.join(words)}, got {word!r}")
    if world_size > 1 and getattr(recipe.settings, "layerwise", False):
        raise UserError(
            f"{recipe.path}: world size must be 1 with method.layerwise, got {world_size}: gradients would be used "
            "before they are averaged; leave out layerwise"
        )
    if sequence_length is not None:
        positions = positions_of(recipe.config())
        if not 2 <= sequence_length <= (positions or sequence_length):
            raise UserError(
                f"sequence length must be from 2 to model.max_position_embeddings ({positions}), got {sequence_length}"
            )
    if world_size > 1 and sharding is None:
        sharding = "ddp"
    target = _device(device)
    changed = _changed(recipe, batch_size, sequence_length, gradient_checkpointing)
    weight_dtype: torch.dtype | None = getattr(torch, dtype) if dtype is not None else None
    given = "vocab_size" in changed.model or changed.data.tokenizer is not None  # by the model's configuration
    vocabulary = vocabulary_size if vocabulary_size is not None or given else changed.data.vocabulary_size
    found = simulate(changed, vocabulary=vocabulary, device=target, dtype=weight_dtype)
    args = arguments_of(changed)
    kept: list[int | None] = [None, None]  # without and with gradient checkpointing
    if both_activations:
        other = _changed(changed, None, None, not checkpoints(args))
        opposite = simulate(other, vocabulary=vocabulary, device=target, dtype=weight_dtype, forward_only=True)
        kept = [found.activations, opposite.activations]
        if checkpoints(args):
            kept.reverse()
    share = world_size if sharding == "fsdp2" else 1
    half = share > 1 and (args.bf16 or args.fp16)
    phases, communication = _phases(found, world_size, sharding, 2 if half else 1)
    peak = found.phases[max(phases, key=phases.__getitem__)]
    held = sum(peak.kinds.get(kind, 0) for kind in (WEIGHTS, GRADIENTS, STATE))
    library = _library(target)
    return MemoryEstimate(
        recipe=recipe.name,
        method=recipe.method.name,
        device=target.type,
        world_size=world_size,
        sharding=sharding,
        batch_size=args.per_device_train_batch_size,
        sequence_length=changed.data.sequence_length,
        gradient_checkpointing=checkpoints(args),
        weights=_total(found.weights) // share,
        **{name: found.weights[name] // share for name in (*WEIGHT_KINDS, "frozen")},
        **{name: getattr(found, name) // share for name in ("gradients", "moments", "bases")},
        activations=found.activations,
        activations_plain=kept[0],
        activations_checkpointed=kept[1],
        workspace=peak.total - held - min(peak.kinds.get(ACTIVATIONS, 0), found.activations) + library,
        communication=communication,
        phases={name: size + library for name, size in phases.items()},
    )


def _total(weights: Counter[str]) -> int:
    return sum(weights[name] for name in WEIGHT_KINDS)


def _phases(found: Simulation, world_size: int, sharding: str | None, narrower: int) -> tuple[dict[str, int], int]:
    """The peak of each phase in one process, and the share of communication in the largest."""
    alone = {name: peak.total for name, peak in found.phases.items()}
    if world_size == 1 or sharding is None:
        return alone, 0
    if sharding == "ddp":
        return {name: size + found.gradients for name, size in alone.items()}, found.gradients
    total, block = _total(found.weights), found.weights["largest_block"]
    outside = total - found.weights["blocks"]
    gathered = (outside + 2 * block) // narrower
    # The gradients outside the blocks and those of one block are unsharded until they are scattered.
    unsharded = found.gradients * (outside + block) // max(1, total)
    phases, communication = {}, {}
    for name, peak in found.phases.items():
        kept = sum(peak.kinds.get(kind, 0) for kind in (WEIGHTS, GRADIENTS, STATE))
        rest = peak.total - kept
        communication[name] = 0
        if name in COMPUTING:
            communication[name] = gathered + (unsharded if name == "backward" else 0)
        else:
            rest //= world_size
        phases[name] = kept // world_size + rest + communication[name]
    return phases, communication[max(phases, key=phases.__getitem__)]


def _library(device: torch.device) -> int:
    """Bytes of cuBLAS handles."""
    if device.type != "cuda":
        return 0
    if not torch.cuda.is_available():
        return CUBLAS_HANDLES * CUBLAS_SMALL
    large = torch.cuda.get_device_capability(device) >= (9, 0)
    return CUBLAS_HANDLES * (CUBLAS_LARGE if large else CUBLAS_SMALL)


def _device(device: str | torch.device | None) -> torch.device:
    available = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    kind = available[-1] if device is None else str(device).partition(":")[0]
    if kind not in available:
        raise UserError(f"device must be {' or '.join(available)} on this machine, got {str(device)!r}")
    return torch.device(kind)


def _changed(recipe: Recipe, batch_size: int | None, length: int | None, checkpointing: bool | None) -> Recipe:
    training = dict(recipe.training)
    if batch_size is not None:
        training["per_device_train_batch_size"] = batch_size
        training["per_device_eval_batch_size"] = min(batch_size, arguments_of(recipe).per_device_eval_batch_size)
    if checkpointing is not None:
        for name in CHECKPOINTING:
            training.pop(name, None)
        training[next(name for name in CHECKPOINTING if hasattr(TrainingArguments, name))] = checkpointing
    data = recipe.data if length is None else recipe.data.model_copy(update={"sequence_length": length})
    return replace(recipe, training=training, data=data)
