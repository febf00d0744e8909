"""Trainer callbacks that watch a run: non-finite numbers stop it, its losses are shown, its costs are recorded."""

import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from tqdm import tqdm
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lowrank.compat import inner
from hf_lowrank.errors import DivergedError
from hf_lowrank.runs.run_files import write_facts

logger = logging.getLogger(__name__)


class KeepPadding(TrainerCallback):
    """Keeps the padding token of a model's configuration, which Trainer would replace by the tokenizer's.

    A model loaded from such a checkpoint would not train that token, which may be the end of text.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._config = model.config.get_text_config()
        self._padding = getattr(self._config, "pad_token_id", None)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._config.pad_token_id = self._padding


class StopOnNonFinite(TrainerCallback):
    """Stops a run whose logged training or evaluation loss is NaN or Inf."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        for name in ("loss", "eval_loss"):
            value = kw["logs"].get(name, 0.0)
            if not math.isfinite(value):
                raise _diverged(args, state, f"{name} is {value}")


def check_finite(model: torch.nn.Module, optimizer: Any, args: TrainingArguments, state: TrainerState) -> None:
    """Stops a run before it saves weights that are not finite, or that were trained with skipped gradients.

    The package's optimizers skip a non-finite gradient with a warning. A run that continues after that follows another
    algorithm than its recipe says, and must not be compared as if it did not. All processes must call this together.

    Raises:
        DivergedError: in every process, if it is true of any.
    """
    if in_any_process(not _all_finite(model), args.device):
        raise _diverged(args, state, "the weights contain NaN or Inf")
    skipped = sorted(getattr(inner(optimizer), "skipped", ()))
    if in_any_process(bool(skipped), args.device):
        names = f" ({skipped[0]})" if skipped else ""
        raise _diverged(args, state, f"the optimizer skipped a non-finite gradient{names}")


def in_any_process(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set in any process of the launch; all processes must call this together."""
    if not (dist.is_available() and dist.is_initialized()):
        return flag
    found = torch.tensor(int(flag), device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


def _all_finite(model: torch.nn.Module) -> bool:
    """Whether every parameter, of a sharded model every local shard, is finite."""
    parameters = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return all(bool(torch.isfinite(parameter).all()) for parameter in parameters)


def _diverged(args: TrainingArguments, state: TrainerState, what: str) -> DivergedError:
    return DivergedError(
        f"{args.output_dir}: {what} at step {state.global_step}, which is not saved; lower training.learning_rate or "
        "training.max_grad_norm, or lengthen the warm-up"
    )


class Progress(TrainerCallback):
    """A bar in a terminal once training takes more than two seconds; losses as log lines."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self._bar = tqdm(
                desc="training", total=state.max_steps, initial=state.global_step, delay=2, disable=None, leave=False
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        logs = kw["logs"]
        if not state.is_world_process_zero:
            return
        shown = {key: logs[key] for key in ("loss", "eval_loss", "learning_rate") if key in logs}
        if shown:
            text = ", ".join(f"{key} {value:.4g}" for key, value in shown.items())
            logger.info("step %d of %d: %s", state.global_step, state.max_steps, text)
        if self._bar is not None and "loss" in logs:
            self._bar.set_postfix(loss=f"{logs['loss']:.3f}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._bar is not None:
            self._bar.close()


def peak_memory_bytes() -> int | None:
    """Peak memory of this process: of the accelerator if there is one, else resident main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def optimizer_state_bytes(optimizer: Optimizer) -> int:
    """Total size of the tensors in the optimizer state."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class FactsRecorder(TrainerCallback):
    """Adds up seconds and tokens; `write` records them with each checkpoint, so that a resumed run keeps counting.

    `training_seconds` covers the optimizer steps with their forward and backward passes; `wall_seconds` covers
    everything from start to end of training, including evaluation, saving and data loading. `cpu_seconds` is the CPU
    time of the optimizer steps over all threads, which hardly depends on other load on the machine. `tokens_seen`
    counts positions, padding included. Work lost to an interruption is not counted.

    Args:
        facts: the run's facts so far; they are updated in place and written.
        tokens_per_step: positions in one optimizer step.
        resumed_step: the step of the checkpoint that training resumes from, 0 for a new run.
        keep_resumed: whether that checkpoint stays in the recorded progress (an interim one does not).
    """

    def __init__(
        self, run: Path, facts: dict[str, Any], tokens_per_step: int, resumed_step: int, keep_resumed: bool = True
    ) -> None:
        history = {int(step): costs for step, costs in facts.get("progress", {}).items() if int(step) <= resumed_step}
        before = history.get(resumed_step, {}) if keep_resumed else history.pop(resumed_step, {})
        self._run, self._facts, self._history, self._tokens_per_step = run, facts, history, tokens_per_step
        self._training, self._wall, self._cpu = (
            float(before.get(f"{kind}_seconds", 0.0)) for kind in ("training", "wall", "cpu")
        )
        self._peak = before.get("peak_memory_bytes") or 0
        self._began = self._step_began = time.perf_counter()
        self._cpu_began = time.process_time()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._step_began = time.perf_counter()
        self._cpu_began = time.process_time()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        due = control.should_save or control.should_log
        if due and torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self._training += time.perf_counter() - self._step_began
        self._cpu += time.process_time() - self._cpu_began

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        """Gives trackers, which come after it, the memory that facts record."""
        if not args.report_to:
            return
        self._peak = max(self._peak, peak_memory_bytes() or 0)
        kw["logs"]["memory/peak_bytes"] = self._peak
        optimizer = kw.get("optimizer")
        if optimizer is not None:
            kw["logs"]["memory/optimizer_state_bytes"] = optimizer_state_bytes(inner(optimizer))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if state.is_world_process_zero:
            self.write(state.global_step, kw.get("optimizer"))

    def write(self, step: int, optimizer: Any) -> None:
        """Writes the costs up to `step` to `facts.json`."""
        self._peak = max(self._peak, peak_memory_bytes() or 0)
        costs = {
            "training_seconds": round(self._training, 3),
            "wall_seconds": round(self._wall + time.perf_counter() - self._began, 3),
            "cpu_seconds": round(self._cpu, 3),
            "peak_memory_bytes": self._peak or None,
            "tokens_seen": step * self._tokens_per_step,
        }
        self._history[step] = costs
        now = {"step": step, **costs}
        if optimizer is not None:
            now["optimizer_state_bytes"] = optimizer_state_bytes(inner(optimizer))
        self._facts.update(now, progress={str(step): costs for step, costs in sorted(self._history.items())})
        write_facts(self._run, self._facts)
