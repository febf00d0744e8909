"""Low-rank pre-training in the Hugging Face stack, and the measurements that tell which solution it found."""

from importlib.metadata import version

from hf_lowrank.adapters import (
    CoLAConfig,
    LowRankConfig,
    LowRankForCausalLM,
    ReLoraCallback,
    ReLoraScheduler,
    SLTrainConfig,
)
from hf_lowrank.methods import METHODS
from hf_lowrank.metrics import METRICS
from hf_lowrank.optim import ApolloAdamW, FiraAdamW, FrugalAdamW, GaLoreAdamW, param_groups
from hf_lowrank.runs.trajectory import Trajectory

__version__ = version("hf-lowrank")

__all__ = [
    "METHODS",
    "METRICS",
    "ApolloAdamW",
    "CoLAConfig",
    "FiraAdamW",
    "FrugalAdamW",
    "GaLoreAdamW",
    "LowRankConfig",
    "LowRankForCausalLM",
    "ReLoraCallback",
    "ReLoraScheduler",
    "SLTrainConfig",
    "Trajectory",
    "__version__",
    "param_groups",
]
