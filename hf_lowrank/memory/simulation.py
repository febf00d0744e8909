"""Runs a recipe's training steps on fake tensors: the real model, loss, backward pass and optimizer, without memory.

What is counted is what their code allocates, so no method is described a second time here. The order is Trainer's:
forward and loss, backward, clipping, optimizer step, gradients freed, and an evaluation.
"""

import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import import_utils

from hf_lowrank.adapters.eight_bit import EightBitLinear, train_weights
from hf_lowrank.adapters.layers import ReplacedLinear
from hf_lowrank.compat import FakeTensorMode, accelerate_unchanged
from hf_lowrank.errors import UserError, first_line
from hf_lowrank.memory.ledger import ACTIVATIONS, GRADIENTS, STATE, WEIGHTS, WORKSPACE, Ledger, Peak, StandIns
from hf_lowrank.optim.refresh import STORED_BASES
from hf_lowrank.optim.state import quantization_levels
from hf_lowrank.storage.codes import coded_layer
from hf_lowrank.targets import decayed_names
from hf_lowrank.training.recipe import Recipe
from hf_lowrank.training.trainer import drop_logits

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass
class Simulation:
    """What a training step holds, in bytes; `estimates.MemoryEstimate` explains the items.

    Attributes:
        weights: of the model, by kind: `embeddings`, `dense`, `factors`, `sparse` and `buffers`, which are all of
            them, and again those that are `frozen`, in `blocks`, and in the `largest_block`.
        phases: the peak of each phase.
    """

    weights: Counter[str]
    gradients: int = 0
    moments: int = 0
    bases: int = 0
    activations: int = 0
    phases: dict[str, Peak] = field(default_factory=dict)


def simulate(
    recipe: Recipe,
    *,
    vocabulary: int | None,
    device: torch.device,
    dtype: torch.dtype | None = None,
    forward_only: bool = False,
) -> Simulation:
    """Simulates training steps of `recipe`, the first one separately from those that find optimizer state.

    Args:
        vocabulary: size of the tokenizer's vocabulary, for a recipe that does not set the model's.
        device: where the fake tensors pretend to be.
        dtype: of the weights, if not the recipe's.
        forward_only: stops after the first forward pass; only `activations` is filled in then.

    Raises:
        UserError: the model cannot be built, or does something that fake tensors do not support.
    """
    args = arguments_of(recipe)
    # An architecture's default special tokens may exceed the vocabulary.
    defaults = {} if vocabulary is None else {"vocab_size": vocabulary, **dict.fromkeys(SPECIAL_TOKENS, 0)}
    packed = recipe.data.shape == "packed"
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = recipe.method.build_model(recipe.config(**defaults), recipe.settings, recipe.seed)
        with _isolated(packed), FakeTensorMode(allow_non_fake_inputs=True), StandIns():
            _replace_tensors(model, device, dtype)
            run = _Run(recipe, args, model, device)
            if forward_only:
                run.forward()
            else:
                run.steps()
    except UserError:
        raise
    except Exception as error:  # models raise any type of error, e.g. for inconsistent sizes
        raise UserError(f"{recipe.path}: no estimate: {type(error).__name__}: {first_line(error)}") from error
    return run.found


def arguments_of(recipe: Recipe) -> TrainingArguments:
    """The recipe's `TrainingArguments`, without resetting accelerate's state, which a Trainer may be using."""
    with accelerate_unchanged():
        return recipe.arguments(recipe.path.parent)


@contextmanager
def _isolated(packed: bool) -> Iterator[None]:
    """Isolates the simulation: it changes no random state, talks to no other process, caches no tensors, and neither
    logs nor warns.

    transformers builds an attention mask for every fake batch, but for a real one only if it has padding.
    """
    maskless = replaced(import_utils, "is_fake_tensor", lambda tensor: False) if packed else nullcontext()
    quantization_levels.cache_clear()
    alone = replaced(torch.distributed, "is_initialized", lambda: False)
    try:
        with torch.random.fork_rng(devices=[]), alone, maskless, quiet_package(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        quantization_levels.cache_clear()


@contextmanager
def quiet_package() -> Iterator[None]:
    """Hides the package's log lines below warnings."""
    package = logging.getLogger("hf_lowrank")
    level = package.level
    package.setLevel(logging.WARNING)
    try:
        yield
    finally:
        package.setLevel(level)


@contextmanager
def replaced(module: ModuleType, name: str, function: Any) -> Iterator[None]:
    """Temporarily replaces a module's function; does nothing if the module has none of that name."""
    known = getattr(module, name, None)
    if known is None:
        yield
        return
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, known)


def _replace_tensors(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
    """Replaces the model's tensors by fake ones; tied ones stay tied."""
    fresh: dict[int, Any] = {}
    for module in model.modules():
        own: Any = {"recurse": False, "remove_duplicate": False}
        for name, tensor in [*module.named_parameters(**own), *module.named_buffers(**own)]:
            if coded_layer(tensor) is not None:
                continue
            if id(tensor) not in fresh:
                kept = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
                empty = torch.empty(tensor.shape, dtype=kept, device=device)
                if isinstance(tensor, nn.Parameter):
                    empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                fresh[id(tensor)] = empty
            setattr(module, name, fresh[id(tensor)])
    train_weights(model)


class _Run:
    def __init__(self, recipe: Recipe, args: TrainingArguments, model: PreTrainedModel, device: torch.device) -> None:
        self._recipe, self._args, self._model, self._device = recipe, args, model, device
        self._ledger = Ledger()
        self.found = Simulation(_weigh(model, self._ledger))
        model.train()
        _set_checkpointing(model, args)
        self._call: Any = self._mixed(model)

    def _mixed(self, model: nn.Module) -> Any:
        """Calls the model as accelerate does: under autocast, with outputs converted to float32."""
        kind = torch.bfloat16 if self._args.bf16 else torch.float16 if self._args.fp16 else None
        if kind is None:
            return model

        def call(**batch: Tensor) -> Any:
            with torch.autocast(self._device.type, dtype=kind):
                return model(**batch)

        return convert_outputs_to_fp32(call)

    def _batch(self, size: int) -> dict[str, Tensor]:
        shape = (size, self._recipe.data.sequence_length)
        further = {"packed": [], "packed_documents": ["position_ids"], "documents": ["attention_mask"]}
        names = ["input_ids", "labels", *further[self._recipe.data.shape]]
        return {name: torch.zeros(shape, dtype=torch.long, device=self._device) for name in names}

    def forward(self) -> Tensor:
        """The forward pass with the loss; what stays allocated is what autograd keeps."""
        before = self._ledger.held(ACTIVATIONS)
        with self._ledger, self._ledger.phase(ACTIVATIONS) as peak:
            loss: Tensor = self._call(**self._batch(self._args.per_device_train_batch_size)).loss
        self.found.phases["forward"] = peak
        self.found.activations = self._ledger.held(ACTIVATIONS) - before
        return loss

    def _backward(self, optimizer: Optimizer, *, last: bool = True) -> None:
        loss = self.forward()
        between = nullcontext() if last else getattr(optimizer, "accumulating", nullcontext)()
        with between, self._ledger, self._ledger.phase(WORKSPACE) as peak:
            loss.backward()
            del loss
        self.found.phases["backward"] = peak

    def steps(self) -> None:
        args, model, ledger = self._args, self._model, self._ledger
        optimizer = self._optimizer()
        callbacks = self._recipe.method.callbacks(self._recipe.settings, args)
        given = {"model": model, "optimizer": optimizer}
        state, control = TrainerState(), TrainerControl()
        for callback in callbacks:
            callback.on_train_begin(args, state, control, **given)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(self._claim_gradient)
        updates_inside = getattr(optimizer, "_layerwise", None) is not None
        # The first step creates the optimizer state, the second finds it, the third chooses new subspaces.
        for phase in ("first step", "optimizer step", "refresh"):
            if phase == "refresh":
                subspaces = [group for group in optimizer.param_groups if "update_proj_gap" in group]
                if not subspaces:
                    break
                for group in subspaces:
                    group["update_proj_gap"] = 1
            if phase == "optimizer step" or updates_inside:
                for left in range(min(args.gradient_accumulation_steps, 2), 0, -1):
                    self._backward(optimizer, last=left == 1)
            else:
                for parameter in trained:
                    parameter.grad = torch.empty_like(parameter)
                    ledger.claim([parameter.grad], GRADIENTS)
            self.found.gradients = max(self.found.gradients, ledger.held(GRADIENTS))
            with ledger, ledger.phase(WORKSPACE) as peak:
                if args.max_grad_norm:
                    nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                for callback in callbacks:
                    callback.on_pre_optimizer_step(args, state, control, **given)
                optimizer.step()
            self.found.phases[phase] = peak
            self._claim_state(optimizer)
            model.zero_grad()
        if not self.found.gradients:  # each is freed during the backward pass
            self.found.gradients = max(p.numel() * p.element_size() for p in trained)
        self._evaluate()

    def _claim_gradient(self, parameter: Tensor) -> None:
        self._ledger.claim([parameter.grad], GRADIENTS)

    def _claim_state(self, optimizer: Optimizer) -> None:
        kept: dict[bool, list[Tensor]] = {True: [], False: []}
        for entries in optimizer.state.values():
            for name, value in entries.items():
                if isinstance(value, Tensor):
                    kept[name in STORED_BASES].append(value)
        self.found.bases = self._ledger.claim(kept[True], STATE)
        self.found.moments = self._ledger.claim(kept[False], STATE)

    def _evaluate(self) -> None:
        """Up to two batches: during the second, Trainer keeps what `drop_logits` leaves of the first."""
        data, size = self._recipe.data, self._args.per_device_eval_batch_size
        sequences = data.evaluation_sequences_in_training or data.evaluation_sequences
        kept = []
        with self._ledger, self._ledger.phase(WORKSPACE) as peak, torch.no_grad():
            self._model.eval()
            for start in range(0, min(sequences, 2 * size), size):
                batch = self._batch(min(size, sequences - start))
                kept.append(drop_logits(self._call(**batch).logits, batch["labels"]))
        self.found.phases["evaluation"] = peak

    def _optimizer(self) -> Optimizer:
        recipe, args, model = self._recipe, self._args, self._model
        optimizer = recipe.method.optimizer(model, recipe.settings, args)
        if optimizer is not None:
            return optimizer
        decayed = decayed_names(model)
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for name, p in trained if (name in decayed) is decays], "weight_decay": decay}
            for decays, decay in ((True, args.weight_decay), (False, 0.0))
        ]
        try:
            kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
            return kind([group for group in groups if group["params"]], **options)
        except (ValueError, TypeError, ImportError) as error:
            raise UserError(
                f"{recipe.path}: training.optim {args.optim} cannot be built: {first_line(error)}"
            ) from None


def checkpoints(args: TrainingArguments) -> bool:
    """Whether blocks are recomputed in the backward pass, under either of transformers' names."""
    return bool(getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing)


def _set_checkpointing(model: PreTrainedModel, args: TrainingArguments) -> None:
    if not checkpoints(args):
        return
    if hasattr(model, "activation_checkpointing_enable"):
        given: Any = args.activation_checkpointing_kwargs
        options = dict(given or {})
        separate = {key: options.pop(key) for key in ("every_n_layers", "offload") if key in options}
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options or None, **separate)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs)


def _weigh(model: PreTrainedModel, ledger: Ledger) -> Counter[str]:
    """Counts the model's tensors by kind, each storage once, and claims them in `ledger`."""
    weights: Counter[str] = Counter()
    kinds: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, ReplacedLinear):
            for name in module.tensor_names:
                kind = "sparse" if name in module.sparse_names else "factors"
                kinds.update((id(tensor), kind) for tensor in getattr(module, name).values())
        elif isinstance(module, EightBitLinear):
            kinds.update((id(tensor), "dense") for tensor in (module.codes, module.grid))
        elif isinstance(module, LoraLayer):
            for part in (module.lora_A, module.lora_B):
                kinds.update((id(tensor), "factors") for tensor in part.parameters())
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        if embedding is not None:
            kinds.update((id(tensor), "embeddings") for tensor in embedding.parameters())
    named = [(tensor, "dense") for tensor in model.parameters()] + [(tensor, "buffers") for tensor in model.buffers()]
    for tensor, default in named:
        size = ledger.claim([tensor], WEIGHTS)
        weights[kinds.get(id(tensor), default)] += size
        if default == "dense" and not tensor.requires_grad:
            weights["frozen"] += size
    sizes = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in _blocks(model)]
    weights["blocks"], weights["largest_block"] = sum(sizes), max(sizes, default=0)
    return weights


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The entries of the outermost module lists: a transformer's layers."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)
