"""Trajectories: a run's checkpoints in step order, as models and as dense weights, from disk or from the Hub."""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_lowrank.adapters.dense import PREFIX
from hf_lowrank.errors import UserError, one_line
from hf_lowrank.runs.causality import check_causal
from hf_lowrank.runs.checkpoints import check_files, weight_files
from hf_lowrank.runs.evaluation_set import EvaluationSet
from hf_lowrank.runs.layout import CONFIG, EVALUATION_SET, RECIPE, TRAINER_STATE
from hf_lowrank.runs.loading import load_in_float32
from hf_lowrank.runs.run_files import method_of, parse_recipe, parse_trainer_state, seed_of
from hf_lowrank.runs.sources import open_source
from hf_lowrank.runs.weights import (
    check_checkpoint,
    quantization_of,
    quiet_transformers,
    read_config,
    skeleton,
    unexplained_codes,
)
from hf_lowrank.targets import keeps_codes, target_modules, warn_about_stacks

# A metric compares a step with the one before it and with the first.
KEPT_STEPS = 3
Factors = tuple[Tensor, Tensor, float]


@dataclass(frozen=True)
class RunInfo:
    """What a run says about itself: the name of its directory or repository, and its resolved recipe with method and
    seed; "unknown", None and None without a recipe."""

    name: str
    method: str
    seed: int | None
    recipe: dict[str, Any] | None = field(repr=False)


class Trajectory:
    """The checkpoints of one run, in step order.

    Args:
        path: a run directory, a folder of `checkpoint-N` folders, one checkpoint, `user/repo` or
            `user/repo@revision` on the Hub.
        revisions: for a repository, which branches and tags are its checkpoints, as a pattern (`"step*"`); the last
            number in a name is its step.

    Attributes:
        path: as given.
        steps: ascending optimizer steps.

    Raises:
        UserError: `path` does not exist, or no checkpoint in it is complete. Incomplete checkpoints are skipped with a
            warning.
    """

    def __init__(self, path: str | os.PathLike[str], *, revisions: str | None = None) -> None:
        self.path = os.fspath(path)
        self._source = open_source(self.path, revisions)
        self.steps: list[int] = list(self._source.steps)
        self._fingerprints: dict[int, str | None] = {}
        self._weight_files: dict[int, dict[str, Path]] = {}
        self._known_to_be_causal = False
        self._loading = threading.Lock()
        self._loaded: dict[int, dict[str, Tensor] | UserError] = {}
        self._quantized: dict[int, bool] = {}

    def __repr__(self) -> str:
        return f"Trajectory({self.path!r}, steps={self.steps})"

    def __len__(self) -> int:
        return len(self.steps)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself, as it only reads; lm-eval copies the configuration of a task together with the run that it names."""
        return self

    @cached_property
    def run(self) -> RunInfo:
        """Name, method, seed and recipe."""
        file = self._source.extra(RECIPE)
        recipe = parse_recipe(file) if file is not None else None
        return RunInfo(self._source.name, method_of(recipe or {}), seed_of(recipe or {}), recipe)

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The configuration of the first checkpoint."""
        return self.config_at(self.steps[0])

    def config_at(self, step: int) -> PreTrainedConfig:
        """The configuration of one checkpoint."""
        return read_config(self._source.folder(self._known(step), weights=False))

    def where(self, step: int) -> str:
        """The checkpoint's folder, or `user/repo@revision`."""
        return self._source.where(self._known(step))

    def fingerprint(self, step: int) -> str | None:
        """Distinguishes the checkpoint from that of another run with the same name, by its weights (on the Hub, by its
        address): 16 hex digits, None where its files cannot be read."""
        if step not in self._fingerprints:
            self._fingerprints[step] = self._source.fingerprint(self._known(step))
        return self._fingerprints[step]

    @property
    def tokenizer_source(self) -> str:
        """What `AutoTokenizer.from_pretrained` takes where the run has no tokenizer folder."""
        if not os.path.isdir(self.path):
            return self.path.partition("@")[0]
        return str(self._source.folder(self.steps[-1], weights=False))

    def extra(self, file: str) -> Path | None:
        """The path of a file of the whole run, or None."""
        return self._source.extra(file)

    def model(self, step: int, *, device_map: str | dict[str, Any] | None = None) -> PreTrainedModel:
        """The model in float32 and eval mode, on the CPU.

        `device_map` places it on accelerators instead, as in transformers ("auto").

        Raises:
            UserError: no such step, damaged files, accelerators that are too small for `device_map`, or an
                architecture that is not causal.
        """
        folder = self.checked_folder(step)
        quantization = quantization_of(self.config_at(step))
        try:
            with quiet_transformers():
                model = load_in_float32(folder, self.config_at(step), device_map=device_map)
        except Exception as error:  # transformers raises whatever a broken file leads it to
            what = "" if quantization is None else f", its weights ({quantization.get('quant_method')}) dequantised"
            raise UserError(f"{self.where(step)}: cannot be loaded{what}: {one_line(error)}") from None
        left_out = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
        if left_out is not None:
            raise UserError(
                f"{self.where(step)}: in float32 it does not fit into the memory of the accelerators ({left_out} was "
                "left to the CPU or the disk); use more of them, or shard it with accelerate launch … --sharded"
            )
        self.require_causal(model, step)
        return model.eval()

    def require_causal(self, model: PreTrainedModel, step: int) -> None:
        """Raises a `UserError` if `model`, that of `step`, is not causal; tried once per run."""
        if not self._known_to_be_causal:
            check_causal(model, self.where(step))
            self._known_to_be_causal = True

    def checked_folder(self, step: int) -> Path:
        """The checkpoint's folder, once its weights are known to match its configuration and checksums."""
        folder = self._source.folder(self._known(step), weights=True)
        check_checkpoint(folder)
        return folder

    def dense_model(self, step: int, *, device_map: str | dict[str, Any] | None = None) -> PreTrainedModel:
        """`model` in the base architecture, with dense weights.

        Raises:
            UserError: as `model`, or the layers have no dense equivalent (CoLA's are non-linear).
        """
        model: Any = self.model(step, device_map=device_map)
        if not hasattr(model, "to_dense"):
            return model
        dense: PreTrainedModel = model.to_dense(in_place=True).eval()
        del model
        for parameter in dense.parameters():
            if parameter.device.type == "cpu":  # as loaded it keeps the whole file mapped, factors included
                parameter.data = parameter.data.clone()
        return dense

    @cached_property
    def _skeleton(self) -> PreTrainedModel:
        """The architecture without any weights."""
        where = self._source.folder(self.steps[0], weights=False)
        model = skeleton(where, self.config)
        if model is None:
            raise UserError(f"{where}/{CONFIG}: {self.config.model_type} is not a known causal language model")
        return model

    @cached_property
    def _targets(self) -> dict[str, Any]:
        """Target modules by their name in the base architecture."""
        warn_about_stacks(self._skeleton, "have no spectra")
        if not self.adapted:
            return target_modules(self._skeleton)
        from hf_lowrank.adapters.modeling import target_layers

        if self._adapter is None:
            return target_modules(self._skeleton.get_submodule(PREFIX))
        return dict(target_layers(self._skeleton))

    @property
    def adapted(self) -> bool:
        """Whether the checkpoints are of this package's own model class instead of a plain architecture."""
        return bool(self.config.model_type == "lowrank")

    @property
    def in_eight_bits(self) -> bool:
        """Whether the checkpoints hold weights as codes of eight bits."""
        return self.adapted and bool(getattr(self.config, "eight_bit_modules", None))

    @property
    def _adapter(self) -> dict[str, Any] | None:
        """The adapter's configuration; None where the target modules are dense."""
        return getattr(self.config, "adapter_config", None) if self.adapted else None

    @property
    def targets(self) -> list[str]:
        """Names of the target modules in the base architecture, in module order."""
        return list(self._targets)

    def tensor_names(self, step: int) -> list[str]:
        """Names of the tensors in a checkpoint."""
        remote = self._source.tensors(self._known(step))
        return list(self._files(step)) if remote is None else remote.names()

    def tensor(self, step: int, name: str, *, rows: tuple[int, int] | None = None) -> Tensor:
        """One tensor as stored, read without the others; only its `rows` (start, stop) where they are given.

        Raises:
            UserError: the checkpoint has no such tensor, or the file is damaged.
        """
        names = self.tensor_names(step)
        if name not in names:
            raise UserError(f"{self.where(step)}: has no tensor {name!r}; it has {', '.join(names[:4])}, …")
        remote = self._source.tensors(step)
        if remote is not None:
            return remote.tensor(name) if rows is None else remote.tensor(name)[slice(*rows)]
        files = self._files(step)
        try:
            with safe_open(files[name], framework="pt") as tensors:
                return tensors.get_tensor(name) if rows is None else tensors.get_slice(name)[slice(*rows)]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{files[name]}: cannot be read: {one_line(error)}") from None

    def dense_weight(self, step: int, module: str) -> Tensor:
        """The dense weight (out, in) of a target module in float32; for CoLA the product `B A` as a surrogate.

        Raises:
            UserError: no such step or target, or a damaged or mismatched file.
        """
        layer = self._target(module)
        if self._adapter is not None:
            from hf_lowrank.adapters.dense import dense_weight_from_tensors

            if not self._stores(step, module):
                return self._loaded_weights(step)[module]
            return dense_weight_from_tensors(module, self._getter(step), self._adapter).float()
        if keeps_codes(layer):
            from hf_lowrank.adapters.dense import eight_bit_weight_from_tensors

            if not self._stores(step, module):
                return self._loaded_weights(step)[module]
            return eight_bit_weight_from_tensors(module, self._getter(step))
        base = getattr(self._skeleton, "base_model_prefix", "")
        prefix = f"{base}." if self.adapted else ""
        names = (f"{prefix}{module}.weight", f"{module.removeprefix(base + '.')}.weight")
        name = next((name for name in names if name in self.tensor_names(step)), None)
        if name is None or self._is_quantized(step):
            name = names[0]
            weight = self._loaded_weights(step)[module]
        else:
            weight = self.tensor(step, name)
            if not weight.is_floating_point() or weight.itemsize < 2:
                raise unexplained_codes(self.where(step), name, str(weight.dtype).removeprefix("torch."))
            weight = weight.float()
        if weight.shape != layer.weight.shape:
            raise UserError(
                f"{self.where(step)}: {name} has shape {tuple(weight.shape)}, "
                f"the configuration says {tuple(layer.weight.shape)}"
            )
        return weight.mT.contiguous() if isinstance(layer, Conv1D) else weight

    def _stores(self, step: int, module: str) -> bool:
        """Whether an adapted checkpoint stores a target's tensors under its own name."""
        return any(name.startswith(f"{PREFIX}.{module}.") for name in self.tensor_names(step))

    def _is_quantized(self, step: int) -> bool:
        if step not in self._quantized:
            self._quantized[step] = quantization_of(self.config_at(step)) is not None
        return self._quantized[step]

    def _loaded_weights(self, step: int) -> dict[str, Tensor]:
        """The targets' weights of a step by the module's name, for which transformers loads the model: architectures
        may store them under other names, and quantised."""
        from hf_lowrank.adapters.modeling import dense_weights_of

        with self._loading:
            if step not in self._loaded:
                try:
                    self._loaded[step] = dense_weights_of(self.model(step), self.targets)
                except UserError as error:  # the next module would load everything again only to be told the same
                    self._loaded[step] = error
                while len(self._loaded) > KEPT_STEPS:
                    del self._loaded[next(iter(self._loaded))]
            found = self._loaded[step]
        if isinstance(found, UserError):
            raise found
        return found

    def low_rank_factors(self, step: int, module: str) -> Factors | None:
        """(B (out, r), A (r, in), scaling) whose product is the dense weight; None where it is not such a product."""
        self._target(module)
        if self._adapter is None or self._adapter["peft_type"] != "COLA" or not self._stores(step, module):
            return None  # LoRA adds a frozen weight to the product, SLTrain a sparse one
        from hf_lowrank.adapters.dense import low_rank_factors_from_tensors

        b, a, scaling = low_rank_factors_from_tensors(module, self._getter(step), self._adapter)
        return b.float(), a.float(), float(scaling)

    @property
    def dense_weight_kind(self) -> Literal["exact", "surrogate"]:
        """Whether the layers compute with dense weights (exact), or these only approximate them (CoLA's surrogate)."""
        if self._adapter is None:
            return "exact"
        from hf_lowrank.adapters.dense import dense_weight_kind

        return dense_weight_kind(self._adapter)

    def _target(self, module: str) -> Any:
        if module not in self._targets:
            raise UserError(f"{self.path}: no target module {module!r}; it has {', '.join(self.targets[:4])}, …")
        return self._targets[module]

    def _getter(self, step: int) -> Callable[[str], Tensor]:
        def get(name: str) -> Tensor:
            if name not in self.tensor_names(step):
                raise KeyError(name)
            return self.tensor(step, name)

        return get

    def evaluation_set(self) -> EvaluationSet:
        """The held-out sequences of the run."""
        file = self._source.extra(EVALUATION_SET)
        if file is None:
            raise UserError(f"{self.path}: has no {EVALUATION_SET}; give sequences with --evaluation-set")
        return EvaluationSet.load(file)

    def log_history(self) -> list[dict[str, Any]]:
        """Trainer's log up to the last checkpoint that has one; empty without any."""
        for step in reversed(self.steps):
            file = self._source.file(step, TRAINER_STATE)
            if file is not None:
                return [dict(entry) for entry in parse_trainer_state(file).log]
        return []

    def _known(self, step: int) -> int:
        if step not in self.steps:
            raise UserError(f"{self.path}: has no checkpoint of step {step}; there are: {self.steps}")
        return step

    def _files(self, step: int) -> dict[str, Path]:
        if step not in self._weight_files:
            folder = self._source.folder(self._known(step), weights=True)
            files = weight_files(folder)
            check_files(folder, {file.name for file in files.values()})
            self._weight_files[step] = files
        return self._weight_files[step]
