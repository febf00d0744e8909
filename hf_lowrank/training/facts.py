"""Training costs (seconds, memory, tokens), added up over interruptions and recorded in `facts.json`."""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lowrank.runs.run_files import write_facts


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
        run: the run directory.
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
        self._run, self._facts, self._history = run, facts, history
        self._tokens_per_step = tokens_per_step
        self._training = float(before.get("training_seconds", 0.0))
        self._wall = float(before.get("wall_seconds", 0.0))
        self._cpu = float(before.get("cpu_seconds", 0.0))
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
        optimizer = getattr(optimizer, "optimizer", optimizer)
        now = {"step": step, **costs}
        if optimizer is not None:
            now["optimizer_state_bytes"] = optimizer_state_bytes(optimizer)
        self._facts.update(now, progress={str(step): costs for step, costs in sorted(self._history.items())})
        write_facts(self._run, self._facts)
