"""The names that this package's model class has in lm-eval, and the folder with its tasks."""

from __future__ import annotations

from pathlib import Path

MODEL_NAMES = ("hf-lowrank", "hf_lowrank")
MODEL_CLASS = "hf_lowrank.downstream.lm_eval_model:LowRankLM"
TASK_FOLDER = Path(__file__).parent / "tasks"


def register_models() -> None:
    """Registers the model class with lm-eval; may be called again.

    lm-eval after 0.4.13 finds it by the entry point `lm_eval.models`; 0.4.13 has no such discovery.
    """
    import lm_eval.models  # noqa: F401  (registers lm-eval's own models first)
    from lm_eval.api.registry import model_registry

    for name in MODEL_NAMES:
        if name not in model_registry:
            model_registry.register(name, target=MODEL_CLASS)
