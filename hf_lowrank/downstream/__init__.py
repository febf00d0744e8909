"""Downstream evaluation: lm-eval's tasks on every checkpoint of a run, and prediction of their scores."""

from typing import Any

__all__ = ["TASK_FOLDER", "analyse", "compare", "evaluate", "predict", "run_lm_eval"]

_MODULES = {
    "TASK_FOLDER": "catalogue",
    "analyse": "prediction",
    "compare": "paired",
    "evaluate": "runner",
    "predict": "gathering",
    "run_lm_eval": "lm_eval_cli",
}


def __getattr__(name: str) -> Any:
    """Public names, each imported on first use: lm-eval and its data sets are heavy."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
