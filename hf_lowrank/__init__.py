"""Low-rank pre-training in the Hugging Face stack, and the measurements that tell which solution it found."""

from typing import TYPE_CHECKING, Any

from hf_lowrank.compat import lazy_imports, register_lazily

if TYPE_CHECKING:
    from hf_lowrank.adapters import CoLAConfig as CoLAConfig
    from hf_lowrank.adapters import LowRankConfig as LowRankConfig
    from hf_lowrank.adapters import LowRankForCausalLM as LowRankForCausalLM
    from hf_lowrank.adapters import ReLoraCallback as ReLoraCallback
    from hf_lowrank.adapters import ReLoraScheduler as ReLoraScheduler
    from hf_lowrank.adapters import SLTrainConfig as SLTrainConfig
    from hf_lowrank.methods import METHODS as METHODS
    from hf_lowrank.metrics import METRICS as METRICS
    from hf_lowrank.optim import ApolloAdamW as ApolloAdamW
    from hf_lowrank.optim import FiraAdamW as FiraAdamW
    from hf_lowrank.optim import FrugalAdamW as FrugalAdamW
    from hf_lowrank.optim import GaLoreAdamW as GaLoreAdamW
    from hf_lowrank.optim import param_groups as param_groups
    from hf_lowrank.runs.trajectory import Trajectory as Trajectory

    __version__: str

_load, __dir__, __all__ = lazy_imports(__name__)
__all__ += ["__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("hf-lowrank")
    return _load(name)


register_lazily()
