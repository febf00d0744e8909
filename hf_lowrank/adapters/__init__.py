"""Methods that change the layers, on PEFT's tuner classes, and a model class whose checkpoints are self-contained."""

from typing import TYPE_CHECKING

from hf_lowrank.compat import lazy_names

if TYPE_CHECKING:
    from hf_lowrank.adapters.configs import CoLAConfig, SLTrainConfig
    from hf_lowrank.adapters.configuration import LowRankConfig
    from hf_lowrank.adapters.dense import dense_weight_from_tensors, dense_weight_kind, low_rank_factors_from_tensors
    from hf_lowrank.adapters.modeling import LowRankForCausalLM, target_layers
    from hf_lowrank.adapters.relora import ReLoraScheduler, merge_and_reinit, prune_moments, relora_lr_factor
    from hf_lowrank.adapters.relora_callback import ReLoraCallback
    from hf_lowrank.adapters.tuners import CoLAModel, SLTrainModel

__all__ = [
    "CoLAConfig",
    "CoLAModel",
    "LowRankConfig",
    "LowRankForCausalLM",
    "ReLoraCallback",
    "ReLoraScheduler",
    "SLTrainConfig",
    "SLTrainModel",
    "dense_weight_from_tensors",
    "dense_weight_kind",
    "low_rank_factors_from_tensors",
    "merge_and_reinit",
    "prune_moments",
    "relora_lr_factor",
    "target_layers",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "CoLAConfig": "hf_lowrank.adapters.configs",
        "CoLAModel": "hf_lowrank.adapters.tuners",
        "LowRankConfig": "hf_lowrank.adapters.configuration",
        "LowRankForCausalLM": "hf_lowrank.adapters.modeling",
        "ReLoraCallback": "hf_lowrank.adapters.relora_callback",
        "ReLoraScheduler": "hf_lowrank.adapters.relora",
        "SLTrainConfig": "hf_lowrank.adapters.configs",
        "SLTrainModel": "hf_lowrank.adapters.tuners",
        "dense_weight_from_tensors": "hf_lowrank.adapters.dense",
        "dense_weight_kind": "hf_lowrank.adapters.dense",
        "low_rank_factors_from_tensors": "hf_lowrank.adapters.dense",
        "merge_and_reinit": "hf_lowrank.adapters.relora",
        "prune_moments": "hf_lowrank.adapters.relora",
        "relora_lr_factor": "hf_lowrank.adapters.relora",
        "target_layers": "hf_lowrank.adapters.modeling",
    },
)
