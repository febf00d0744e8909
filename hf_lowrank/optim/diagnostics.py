"""Diagnostics of the subspaces in Trainer's log."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


def summarize(diagnostics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Means over the parameters of an optimizer's `diagnostics`: the captured share of the gradient's energy and the
    overlap of successive bases, as `subspace/captured_energy` and `subspace/subspace_overlap`, and lazy intervals.
    """
    summary = {}
    for key in ("captured_energy", "subspace_overlap", "interval"):
        values = [found[key] for found in diagnostics.values() if key in found]
        if values:
            summary[f"subspace/{key}"] = fmean(values)
    return summary


class SubspaceLogCallback(TrainerCallback):
    """Adds a summary of the last refreshes to Trainer's log; the optimizer needs `diagnostics=True`."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        logs, optimizer = kw.get("logs"), kw.get("optimizer")
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        diagnostics = getattr(inner, "diagnostics", None)
        if not diagnostics or logs is None:
            return
        summary = summarize(diagnostics)
        logs.update(summary)
        if state.log_history:
            state.log_history[-1].update(summary)
