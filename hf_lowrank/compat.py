"""Where this package meets the libraries that it builds on: registration, lazy loading, and their private interfaces.

Other modules use public interfaces directly and private ones only through functions of this module, so that a new
release of torch, transformers or peft that changes one is handled here. The module imports none of them until a
function needs it.
"""

from __future__ import annotations

import ast
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from pkgutil import get_data, resolve_name
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

    import torch
    from peft.utils import PeftType
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from transformers import PreTrainedConfig, PreTrainedModel, Trainer


# Lazy loading


def lazy_imports(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """A package's `__getattr__`, `__dir__` and `__all__`, for the imports under `if TYPE_CHECKING:` in its source.

    Type checkers read these imports; at run time each name is imported when it is first used.
    """
    tree = ast.parse(get_data(package, "__init__.py") or b"")
    blocks = (node.body for node in tree.body if isinstance(node, ast.If))
    modules = {
        alias.name: str(node.module)
        for block in blocks
        for node in block
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(modules[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return load, lambda: sorted({*vars(sys.modules[package]), *modules}), sorted(modules)


class LazyObject:
    """Stands for a class or function in a table and imports it when it is called or an attribute is read.

    Args:
        path: the object as `module:name`.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return resolve_name(self.path)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if "path" not in vars(self):  # while it is unpickled
            raise AttributeError(name)
        return getattr(resolve_name(self.path), name)


def silence_torchao() -> None:
    """Drops two warnings of torchao's import, which peft and transformers trigger wherever it is installed.

    One is about extensions built for other GPUs or Python versions, the other about torchao's own use of torch.
    """
    for logger, text in (("torchao", "Failed to load "), ("torch.utils._pytree", " is an Enum subclass ")):
        logging.getLogger(logger).addFilter(lambda record, text=text: text not in str(record.msg))  # type: ignore[misc]


# Registration with transformers and peft


def register_lazily() -> None:
    """Makes `AutoConfig`, `AutoModelForCausalLM` and PEFT know this package's types without importing anything.

    Each registry gets `LazyObject` entries: at once where its module is loaded already, otherwise as soon as it is.
    """
    for name, register in _REGISTRIES.items():
        if name in sys.modules:
            register(sys.modules[name])
    if not any(isinstance(finder, _PostImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PostImport())


class _PostImport:
    """Finds no module itself; calls the functions of `_REGISTRIES` after their modules were executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _REGISTRIES:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next(filter(None, specs), None)
        loader: Any = spec.loader if spec is not None else None
        if loader is not None:
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                loader.exec_module = execute
                execute(module)
                _REGISTRIES[fullname](module)

            loader.exec_module = execute_and_register
        return spec


def _register_with_transformers(configuration_auto: Any) -> None:
    if "lowrank" not in configuration_auto.CONFIG_MAPPING:
        path = "hf_lowrank.adapters.configuration:LowRankConfig"
        configuration_auto.CONFIG_MAPPING.register("lowrank", LazyObject(path))


def _register_causal_model(modeling_auto: Any) -> None:
    # By this table of names Trainer decides whether to shift labels that it smooths.
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["lowrank"] = "LowRankForCausalLM"


def _register_with_peft(mapping: Any) -> None:
    for name, title in (("cola", "CoLA"), ("sltrain", "SLTrain"), ("sst", "SST"), ("structured", "Structured")):
        if peft_type_of(name) not in mapping.PEFT_TYPE_TO_TUNER_MAPPING:
            config, model = (LazyObject(f"hf_lowrank.adapters.tuners:{title}{kind}") for kind in ("Config", "Model"))
            register_with_peft(name, config, model)


_REGISTRIES: dict[str, Callable[[Any], None]] = {
    "transformers.models.auto.configuration_auto": _register_with_transformers,
    "transformers.models.auto.modeling_auto": _register_causal_model,
    "peft.mapping": _register_with_peft,
}


def register_model(config_cls: type[PreTrainedConfig], path: str) -> None:
    """Makes `AutoModelForCausalLM` know the model class `module:name` of a config class, without importing it."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    stand_in: Any = LazyObject(path)
    MODEL_FOR_CAUSAL_LM_MAPPING.register(config_cls, stand_in)


def peft_type_of(name: str) -> PeftType:
    """The member of `PeftType` for a tuner, added where PEFT lacks it.

    PEFT keys its tables by this enum and its `register_peft_method` refuses names outside it; the enum is closed, and
    there is no hook for packages outside PEFT. So the member is added the way the enum module itself adds one. A test
    fails when a new PEFT changes what this relies on.
    """
    from peft.utils.peft_types import PeftType

    key = name.upper()
    if key not in PeftType.__members__:
        member = str.__new__(PeftType, key)
        member._name_ = member._value_ = key
        member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
        PeftType._member_names_.append(key)
        PeftType._member_map_[key] = member
        PeftType._value2member_map_[key] = member
        type.__setattr__(PeftType, key, member)
    return PeftType(key)


def register_with_peft(name: str, config_cls: Any, model_cls: Any) -> None:
    """Registers a tuner's classes with PEFT, or stand-ins that load them."""
    from peft import mapping

    peft_type = peft_type_of(name)
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = f"{name}_"
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_cls


# Private interfaces of transformers, peft and accelerate


@contextmanager
def hide_worker() -> Iterator[None]:
    """Lets a worker of a DataLoader appear as a process without workers."""
    from torch.utils.data._utils import worker

    before = worker._worker_info
    worker._worker_info = None
    try:
        yield
    finally:
        worker._worker_info = before


@contextmanager
def targets_unchanged() -> Iterator[None]:
    """Keeps PEFT from translating LoRA's targets for mixtures from the names of transformers 4.

    By a table of model types it takes `gate_proj`, `up_proj` and `down_proj` for experts wherever they are, and drops
    the shared experts and dense layers of these names.
    """
    from peft.utils import transformers_weight_conversion as conversion

    convert = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *args, **kwargs: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = convert


def is_initialized(config: PreTrainedConfig) -> bool:
    """Whether a config is past its `__post_init__`."""
    return bool(vars(config).get("_post_init_done"))


def enable_checkpointing(model: nn.Module, checkpoint: Callable[..., Any]) -> bool:
    """Turns on a transformers model's activation checkpointing by `checkpoint`; False if the model has none."""
    enable = getattr(model, "_set_gradient_checkpointing", None)
    if enable is None or not getattr(model, "supports_gradient_checkpointing", False):
        return False
    enable(enable=True, gradient_checkpointing_func=checkpoint)
    return True


def exclude_from_ddp(model: nn.Module, names: Iterable[str]) -> None:
    """Names parameters and buffers that DistributedDataParallel neither broadcasts nor reduces."""
    model._ddp_params_and_buffers_to_ignore = list(names)  # type: ignore[assignment]


def offload_hook(module: nn.Module) -> Any:
    """The hook by which accelerate brings offloaded weights back for a forward pass; None without one."""
    return getattr(module, "_hf_hook", None)


@contextmanager
def accelerate_unchanged() -> Iterator[None]:
    """Restores accelerate's state, which all of a process's Trainers share, as it was before the body."""
    from accelerate.state import AcceleratorState

    before = dict(AcceleratorState._shared_state)
    try:
        yield
    finally:
        AcceleratorState._shared_state.clear()
        AcceleratorState._shared_state.update(before)


def attention_of(config: PreTrainedConfig) -> str | None:
    """The attention implementation that a config is for; None until a model is built, if it asks for none."""
    return getattr(config, "_attn_implementation", None)


def has_liger_kernels(architecture: str) -> bool:
    """Whether Liger has kernels for a model type of transformers."""
    return architecture in import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN


def apply_liger_kernels(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """Gives a model Liger's kernels, as Trainer does."""
    import_module("liger_kernel.transformers.monkey_patch")._apply_liger_kernel_to_instance(model=model, **options)


def unlogged_loss(trainer: Trainer) -> tuple[Tensor, int]:
    """The loss that a Trainer has summed up since its last log, and the step of that log."""
    return trainer._tr_loss, trainer._globalstep_last_logged


def set_unlogged_loss(trainer: Trainer, loss: Tensor, last_logged: int) -> None:
    """Sets what `unlogged_loss` returns."""
    trainer._tr_loss, trainer._globalstep_last_logged = loss, last_logged


@cache
def onednn_linear() -> Callable[[Tensor, Tensor], Tensor] | None:
    """oneDNN's product `x @ w.mT` of float32 matrices on a CPU; None where torch is built or run without it.

    torch itself calls it in compiled code only, and multiplies by MKL elsewhere.
    """
    import torch

    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if operator is None or not torch.backends.mkldnn.is_available():
        return None
    return lambda x, w: operator(x, w, None, "none", [], "")


@cache
def fast_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices faster than float32 ones."""
    import torch

    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_bf16_supported(False)


# Private interfaces of torch and peft, which other modules import from here by these names; each as `module:name`,
# with alternatives where versions differ.
_PRIVATE = {
    "BufferDict": ("peft.tuners._buffer_dict:BufferDict",),
    "FakeTensor": ("torch._subclasses.fake_tensor:FakeTensor",),
    "FakeTensorMode": ("torch._subclasses.fake_tensor:FakeTensorMode",),
    "TorchDispatchMode": ("torch.utils._python_dispatch:TorchDispatchMode",),
    "active_fake_mode": ("torch._guards:detect_fake_mode",),
    "all_gather_into_tensor": ("torch.distributed:all_gather_single", "torch.distributed:all_gather_into_tensor"),
    "foreach_add_": ("torch:_foreach_add_",),
    "foreach_copy_": ("torch:_foreach_copy_",),
    "foreach_mul_": ("torch:_foreach_mul_",),
    "foreach_norm": ("torch:_foreach_norm",),
    "fused_adamw_": ("torch:_fused_adamw_",),
    "fused_kernel_devices": ("torch.utils._foreach_utils:_get_fused_kernels_supported_devices",),
    "is_view": ("torch:Tensor._is_view",),
    "profiled_allocation": ("torch._C._profiler:_EventType.Allocation",),
    "profiler_enabled": ("torch.autograd:_profiler_enabled",),
    "reduce_scatter_tensor": ("torch.distributed:reduce_scatter_single", "torch.distributed:reduce_scatter_tensor"),
    "tree_leaves": ("torch.utils._pytree:tree_leaves",),
}


def __getattr__(name: str) -> Any:
    for path in _PRIVATE.get(name, ()):
        with suppress(AttributeError):
            return resolve_name(path)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def inner(optimizer: Any) -> Optimizer:
    """The optimizer itself, without accelerate's wrapper."""
    found: Optimizer = getattr(optimizer, "optimizer", optimizer)
    return found
