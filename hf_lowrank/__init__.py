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

__version__ = version("hf-lowrank")

__all__ = [
    "METHODS",
    "CoLAConfig",
    "LowRankConfig",
    "LowRankForCausalLM",
    "ReLoraCallback",
    "ReLoraScheduler",
    "SLTrainConfig",
    "__version__",
]
