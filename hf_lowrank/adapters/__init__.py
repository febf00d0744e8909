"""Methods that change the layers, on PEFT's tuner classes, and the model class that makes them stand alone."""

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
