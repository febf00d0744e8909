"""The names under which lm-eval knows this package's model class, and the folder with its tasks."""

from __future__ import annotations

from pathlib import Path

MODEL_NAMES = ("hf-lowrank", "hf_lowrank")
MODEL_CLASS = "hf_lowrank.downstream.lm_eval_model:LowRankLM"
TASK_FOLDER = Path(__file__).parent / "tasks"


def register_models() -> None:
    """Makes the model class known to lm-eval; can be repeated.

    lm-eval after 0.4.13 finds it by the entry point `lm_eval.models`; 0.4.13 itself has no such discovery.
    """
    import lm_eval.models  # noqa: F401  (fills the registry with lm-eval's own models first)
    from lm_eval.api.registry import model_registry

    for name in MODEL_NAMES:
        if name not in model_registry:
            model_registry.register(name, target=MODEL_CLASS)
