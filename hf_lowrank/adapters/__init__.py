"""Methods that change the layers, on PEFT's tuner classes, and a model class whose checkpoints are self-contained."""

from typing import TYPE_CHECKING

from hf_lowrank.compat import lazy_imports

if TYPE_CHECKING:
    from hf_lowrank.adapters.configuration import LowRankConfig as LowRankConfig
    from hf_lowrank.adapters.dense import dense_weight_from_tensors as dense_weight_from_tensors
    from hf_lowrank.adapters.dense import dense_weight_kind as dense_weight_kind
    from hf_lowrank.adapters.dense import low_rank_factors_from_tensors as low_rank_factors_from_tensors
    from hf_lowrank.adapters.modeling import LowRankForCausalLM as LowRankForCausalLM
    from hf_lowrank.adapters.modeling import target_layers as target_layers
    from hf_lowrank.adapters.relora import ReLoraCallback as ReLoraCallback
    from hf_lowrank.adapters.relora import ReLoraScheduler as ReLoraScheduler
    from hf_lowrank.adapters.relora import merge_and_reinit as merge_and_reinit
    from hf_lowrank.adapters.relora import prune_moments as prune_moments
    from hf_lowrank.adapters.relora import relora_lr_factor as relora_lr_factor
    from hf_lowrank.adapters.spectral import SSTCallback as SSTCallback
    from hf_lowrank.adapters.tuners import CoLAConfig as CoLAConfig
    from hf_lowrank.adapters.tuners import CoLAModel as CoLAModel
    from hf_lowrank.adapters.tuners import SLTrainConfig as SLTrainConfig
    from hf_lowrank.adapters.tuners import SLTrainModel as SLTrainModel
    from hf_lowrank.adapters.tuners import SSTConfig as SSTConfig
    from hf_lowrank.adapters.tuners import SSTModel as SSTModel
    from hf_lowrank.adapters.tuners import StructuredConfig as StructuredConfig
    from hf_lowrank.adapters.tuners import StructuredModel as StructuredModel

__getattr__, __dir__, __all__ = lazy_imports(__name__)
