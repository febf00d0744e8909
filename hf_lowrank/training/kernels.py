"""How a model is computed: its attention, Liger's kernels, compilation. What cannot work is refused before a run."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import is_liger_kernel_available

from hf_lowrank.adapters.modeling import LowRankForCausalLM
from hf_lowrank.compat import apply_liger_kernels, attention_of, has_liger_kernels
from hf_lowrank.errors import UserError

# The key of `model:` that is no field of the architecture's configuration.
ATTENTION = "attn_implementation"
EVERYWHERE = ("eager", "sdpa")
FLEX = "flex_attention"
FLASH = ("flash_attention_2", "flash_attention_3")


def check_kernels(
    attention: Any, shape: str, args: TrainingArguments, origin: Callable[[str], str], *, here: bool
) -> None:
    """Raises a `UserError` for what the device, the data or another option rules out; names the key.

    Args:
        attention: the recipe's `model.attn_implementation`, None if it has none.
        shape: its `data.shape`.
        origin: where a key was set.
        here: whether the run will train on this machine. A recipe is also read to estimate, plan and compare runs,
            where only what it says itself is checked.
    """
    on_cpu = args.use_cpu or (here and not torch.accelerator.is_available())
    _check_attention(attention, shape, origin, on_cpu=on_cpu)
    if args.use_liger_kernel:
        _check_liger(args, origin, on_cpu=on_cpu, here=here)
    if here and args.torch_compile and args.torch_compile_backend == "inductor" and on_cpu:
        compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
        if not any(map(shutil.which, compilers)):
            raise UserError(
                f"{origin('training.torch_compile')}: training.torch_compile must be left out without a C++ "
                f"compiler, with which inductor compiles for a CPU; install {' or '.join(compilers)}"
            )


def _check_attention(attention: Any, shape: str, origin: Callable[[str], str], *, on_cpu: bool) -> None:
    where = origin(f"model.{ATTENTION}")
    allowed = EVERYWHERE if on_cpu else (*EVERYWHERE, FLEX, *FLASH)
    if attention is not None and attention not in allowed:
        known = attention in (FLEX, *FLASH)
        reason = " on a CPU, where torch cannot train with others" if known else ""
        raise UserError(f"{where}: model.{ATTENTION} must be one of {', '.join(allowed)}{reason}, got {attention!r}")
    if shape == "packed_documents" and attention in FLASH:
        raise UserError(
            f"{where}: model.{ATTENTION} must be eager, sdpa or {FLEX} with data.shape packed_documents, got "
            f"{attention!r}, which does not find the documents in batches of more than one sequence"
        )


def _check_liger(args: TrainingArguments, origin: Callable[[str], str], *, on_cpu: bool, here: bool) -> None:
    where = origin("training.use_liger_kernel")
    if on_cpu:
        raise UserError(
            f"{where}: training.use_liger_kernel must be left out on a CPU: Liger's kernels are Triton code for GPUs"
        )
    if here and not is_liger_kernel_available():
        raise UserError(f"{where}: training.use_liger_kernel needs liger-kernel; pip install liger-kernel")
    if args.label_smoothing_factor and has_fused_loss(args):
        raise UserError(
            f"{origin('training.label_smoothing_factor')}: training.label_smoothing_factor must be left out "
            "with training.use_liger_kernel, whose fused loss has no logits to smooth; or set "
            "training.liger_kernel_config: {fused_linear_cross_entropy: false}"
        )


def has_fused_loss(args: TrainingArguments) -> bool:
    """Whether Liger computes the training loss without logits."""
    options: dict[str, Any] = args.liger_kernel_config or {}
    return bool(args.use_liger_kernel and options.get("fused_linear_cross_entropy", True))


def apply_liger(model: PreTrainedModel, args: TrainingArguments, where: str) -> None:
    """Gives an adapted model Liger's kernels if `args` ask for them; Trainer gives them to any other.

    Trainer goes by a model's `model_type`, and that of an adapted model says nothing to Liger, which then leaves the
    model as it is without a warning. Its kernels call the layers of a block, adapted or not; they read the weight of
    the output head, which no method adapts.

    Raises:
        UserError: Liger has no kernels for the architecture.
    """
    if not args.use_liger_kernel:
        return
    inside: Any = model.lm if isinstance(model, LowRankForCausalLM) else model
    if not has_liger_kernels(inside.config.model_type):
        raise UserError(
            f"{where}: training.use_liger_kernel must be left out: Liger has no kernels for model.architecture "
            f"{inside.config.model_type}"
        )
    if inside is not model:
        apply_liger_kernels(inside, args.liger_kernel_config or {})


@contextmanager
def attention_of_any_device(model: PreTrainedModel) -> Iterator[None]:
    """Lets a model on the CPU compute attention by sdpa if its own implementation needs an accelerator."""
    own = attention_of(model.config)
    if own is None or own in EVERYWHERE or model.device.type != "cpu":
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(own)
