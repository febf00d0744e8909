"""Downstream evaluation: lm-eval's tasks on every checkpoint of a run, and prediction of their scores."""

from typing import TYPE_CHECKING

from hf_lowrank.compat import lazy_imports

if TYPE_CHECKING:
    from hf_lowrank.downstream.catalogue import TASK_FOLDER as TASK_FOLDER
    from hf_lowrank.downstream.catalogue import run_lm_eval as run_lm_eval
    from hf_lowrank.downstream.gathering import predict as predict
    from hf_lowrank.downstream.paired import compare as compare
    from hf_lowrank.downstream.prediction import analyse as analyse
    from hf_lowrank.downstream.runner import evaluate as evaluate

__getattr__, __dir__, __all__ = lazy_imports(__name__)
