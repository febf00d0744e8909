"""Low-rank pre-training in the Hugging Face stack, and the measurements that tell which solution it found."""

from typing import TYPE_CHECKING, Any

from hf_lowrank.compat import lazy_names, register_lazily

if TYPE_CHECKING:
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

    __version__: str

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

_load, __dir__ = lazy_names(
    __name__,
    {
        "METHODS": "hf_lowrank.methods",
        "METRICS": "hf_lowrank.metrics",
        "ApolloAdamW": "hf_lowrank.optim",
        "CoLAConfig": "hf_lowrank.adapters",
        "FiraAdamW": "hf_lowrank.optim",
        "FrugalAdamW": "hf_lowrank.optim",
        "GaLoreAdamW": "hf_lowrank.optim",
        "LowRankConfig": "hf_lowrank.adapters",
        "LowRankForCausalLM": "hf_lowrank.adapters",
        "ReLoraCallback": "hf_lowrank.adapters",
        "ReLoraScheduler": "hf_lowrank.adapters",
        "SLTrainConfig": "hf_lowrank.adapters",
        "Trajectory": "hf_lowrank.runs.trajectory",
        "param_groups": "hf_lowrank.optim",
    },
)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("hf-lowrank")
    return _load(name)


register_lazily()
