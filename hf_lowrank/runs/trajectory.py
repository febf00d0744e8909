"""Trajectories: a run's checkpoints in step order, as models and as dense weights.

Reads what is on disk or on the Hub and nothing else; knows neither training nor optimizers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_lowrank.runs.sources import open_source, weight_files
from hf_lowrank.runs.weights import check_checkpoint, quiet_transformers, read_config, skeleton
from hf_lowrank.storage.checksums import check_checksums, read_sealed_text
from hf_lowrank.errors import UserError
from hf_lowrank.runs.evaluation_set import FILE_NAME, EvaluationSet
from hf_lowrank.storage.parsing import parse_json, parse_plain_yaml
from hf_lowrank.targets import target_modules, warn_of_stacks

Factors = tuple[Tensor, Tensor, float]


@dataclass(frozen=True)
class RunInfo:
    """What a run says about itself.

    Attributes:
        name: the run directory's name or the repository.
        method: the recipe's method; "unknown" without a recipe.
        seed: the recipe's seed; None without one.
        recipe: the resolved recipe; None for checkpoints that came without one.
    """

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
        UserError: nothing is there, or no checkpoint is whole. Half-written checkpoints are skipped with a warning.
    """

    def __init__(self, path: str | os.PathLike[str], *, revisions: str | None = None) -> None:
        self.path = os.fspath(path)
        self._source = open_source(self.path, revisions)
        self.steps: list[int] = list(self._source.steps)

    def __repr__(self) -> str:
        return f"Trajectory({self.path!r}, steps={self.steps})"

    def __len__(self) -> int:
        return len(self.steps)

    @cached_property
    def run(self) -> RunInfo:
        """Name, method, seed and recipe."""
        file = self._source.extra("recipe.yaml")
        if file is None:
            return RunInfo(self._source.name, "unknown", None, None)
        try:
            recipe = parse_plain_yaml(read_sealed_text(file))
            method = recipe.get("method") or {}
            name = method.get("name", "unknown") if isinstance(method, dict) else str(method)
        except (yaml.YAMLError, AttributeError, OSError, ValueError) as error:
            raise UserError(f"{file}: not a readable recipe: {' '.join(str(error).split())}") from None
        return RunInfo(self._source.name, name, recipe.get("seed"), recipe)

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
        """What tells the checkpoint from another run's of that name and step, by its weights (of a Hub repository, by
        its address): 16 hex digits, None where its files cannot be read."""
        known: dict[int, str | None] = self.__dict__.setdefault("_fingerprints", {})
        if step not in known:
            known[step] = self._source.fingerprint(self._known(step))
        return known[step]

    @property
    def tokenizer_source(self) -> str:
        """What `AutoTokenizer.from_pretrained` takes where the run has no tokenizer folder."""
        return self.path.partition("@")[0] if not os.path.isdir(self.path) else self.where(self.steps[-1])

    def extra(self, file: str) -> Any:
        """The path of a file of the whole run, or None."""
        return self._source.extra(file)

    def model(self, step: int, *, device_map: str | dict[str, Any] | None = None) -> PreTrainedModel:
        """The model in float32 and eval mode, on the CPU.

        Args:
            step: one of `steps`.
            device_map: lays the model over accelerators, as transformers does ("auto"), in place of the CPU.

        Raises:
            UserError: no such step, its files are damaged (the message names the file), or the accelerators are too
                small for `device_map`.
        """
        folder = self.checked_folder(step)
        try:
            with quiet_transformers():
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    folder,
                    dtype=torch.float32,
                    use_safetensors=True,
                    output_loading_info=True,
                    **({} if device_map is None else {"device_map": device_map}),
                )
        except Exception as error:  # transformers raises whatever a broken file leads it to
            raise UserError(f"{self.where(step)}: cannot be loaded: {_one_line(error)}") from None
        model, missing = loaded[0], loaded[1]["missing_keys"]
        if missing:  # transformers would go on with random weights in their place
            raise UserError(f"{self.where(step)}: {min(missing)} is not among its weights")
        left_out = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
        if left_out is not None:
            raise UserError(
                f"{self.where(step)}: is larger in float32 than the memory of the accelerators here ({left_out} was "
                "left to the CPU or the disk); use more of them, or divide it with accelerate launch … --sharded"
            )
        return model.eval()

    def checked_folder(self, step: int) -> Path:
        """The checkpoint's folder, after its weights have been compared with its configuration and checksums.

        Raises:
            UserError: no such step, or its files are damaged; the message names the file.
        """
        folder = self._source.folder(self._known(step), weights=True)
        check_checkpoint(folder)
        return folder

    def dense_model(self, step: int) -> PreTrainedModel:
        """The plain architecture with dense weights, for models whose layers have them.

        Raises:
            UserError: the layers have no dense equivalent (CoLA's are non-linear).
        """
        model = self.model(step)
        dense: Any = getattr(model, "to_dense", None)
        return model if dense is None else dense().eval()

    @cached_property
    def _skeleton(self) -> PreTrainedModel:
        """The architecture without any weights."""
        where = self._source.folder(self.steps[0], weights=False)
        model = skeleton(where, self.config)
        if model is None:
            raise UserError(f"{where}/config.json: {self.config.model_type} is no causal language model known here")
        return model

    @cached_property
    def _targets(self) -> dict[str, Any]:
        """Target modules by the name that they have in the plain architecture."""
        warn_of_stacks(self._skeleton, "have no spectra")
        if self._adapter is None:
            return target_modules(self._skeleton)
        from hf_lowrank.adapters.modeling import target_layers

        return dict(target_layers(self._skeleton))

    @property
    def adapted(self) -> bool:
        """Whether the targets are this package's layers in place of dense ones."""
        return self._adapter is not None

    @property
    def _adapter(self) -> dict[str, Any] | None:
        """What stands in for the linear layers, for this package's own model type."""
        return getattr(self.config, "adapter_config", None) if self.config.model_type == "lowrank" else None

    @property
    def targets(self) -> list[str]:
        """Names of the target modules, in module order, as in the plain architecture."""
        return list(self._targets)

    def tensor_names(self, step: int) -> list[str]:
        """Names of the tensors in a checkpoint."""
        remote = self._source.tensors(self._known(step))
        return list(self._files(step)) if remote is None else remote.names()

    def tensor(self, step: int, name: str, *, rows: tuple[int, int] | None = None) -> Tensor:
        """One tensor as it is stored, read without the rest; of its rows only those from, up to, if given.

        Raises:
            UserError: the checkpoint has no such tensor or the file is damaged.
        """
        names = self.tensor_names(step)
        if name not in names:
            raise UserError(f"{self.where(step)}: has no tensor {name!r}; there are: {', '.join(names[:4])}, …")
        remote = self._source.tensors(step)
        if remote is not None:
            return remote.tensor(name) if rows is None else remote.tensor(name)[slice(*rows)]
        files = self._files(step)
        try:
            with safe_open(files[name], framework="pt") as tensors:
                return tensors.get_tensor(name) if rows is None else tensors.get_slice(name)[slice(*rows)]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{files[name]}: cannot be read: {_one_line(error)}") from None

    def dense_weight(self, step: int, module: str) -> Tensor:
        """The dense weight (out, in) float32 of a target module; for CoLA the product `B A` as a surrogate.

        Raises:
            UserError: no such step or target, or a damaged or unfitting file.
        """
        layer = self._target(module)
        if self._adapter is not None:
            from hf_lowrank.adapters.dense import dense_weight_from_tensors

            return dense_weight_from_tensors(module, self._getter(step), self._adapter).float()
        base = getattr(self._skeleton, "base_model_prefix", "")
        names = (f"{module}.weight", f"{module.removeprefix(base + '.')}.weight")
        name = next((name for name in names if name in self.tensor_names(step)), names[0])
        weight = self.tensor(step, name).float()
        if weight.shape != layer.weight.shape:
            raise UserError(
                f"{self.where(step)}: {name} has shape {tuple(weight.shape)}, "
                f"the configuration says {tuple(layer.weight.shape)}"
            )
        return weight.mT.contiguous() if isinstance(layer, Conv1D) else weight

    def low_rank_factors(self, step: int, module: str) -> Factors | None:
        """(B (out, r), A (r, in), scaling) whose product is the dense weight; None where it is no such product."""
        self._target(module)
        if self._adapter is None or self._adapter["peft_type"] != "COLA":
            return None  # LoRA adds a frozen weight to the product, SLTrain a sparse one
        from hf_lowrank.adapters.dense import low_rank_factors_from_tensors

        b, a, scaling = low_rank_factors_from_tensors(module, self._getter(step), self._adapter)
        return b.float(), a.float(), float(scaling)

    @property
    def dense_weight_kind(self) -> Literal["exact", "surrogate"]:
        """Whether dense weights are what the layers compute with, or stand in for it (CoLA)."""
        if self._adapter is None:
            return "exact"
        from hf_lowrank.adapters.dense import dense_weight_kind

        return dense_weight_kind(self._adapter)

    def _target(self, module: str) -> Any:
        if module not in self._targets:
            raise UserError(f"{self.path}: no target module {module!r}; there are: {', '.join(self.targets[:4])}, …")
        return self._targets[module]

    def _getter(self, step: int) -> Callable[[str], Tensor]:
        def get(name: str) -> Tensor:
            if name not in self.tensor_names(step):
                raise KeyError(name)
            return self.tensor(step, name)

        return get

    def evaluation_set(self) -> EvaluationSet:
        """The held-out sequences that were written with the run."""
        file = self._source.extra(FILE_NAME)
        if file is None:
            raise UserError(f"{self.path}: has no {FILE_NAME}; give sequences with --evaluation-set")
        return EvaluationSet.load(file)

    def log_history(self) -> list[dict[str, Any]]:
        """Trainer's log up to the last checkpoint; empty where there is none."""
        for step in reversed(self.steps):
            state = self._source.file(step, "trainer_state.json")
            if state is not None:
                try:
                    return list(parse_json(state.read_text(encoding="utf-8"))["log_history"])
                except (ValueError, KeyError, TypeError, OSError) as error:
                    raise UserError(f"{state}: not a readable trainer state: {_one_line(error)}") from None
        return []

    def _known(self, step: int) -> int:
        if step not in self.steps:
            raise UserError(f"{self.path}: has no checkpoint of step {step}; there are: {self.steps}")
        return step

    def _files(self, step: int) -> dict[str, Any]:
        cache = self.__dict__.setdefault("_file_cache", {})
        if step not in cache:
            folder = self._source.folder(self._known(step), weights=True)
            files = weight_files(folder)
            check_checksums(folder, {file.name for file in files.values()})
            cache[step] = files
        return cache[step]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
