"""Methods that change the layers, on PEFT's tuner classes, and the model class that makes them stand alone."""

from hf_lowrank.adapters.configs import CoLAConfig, SLTrainConfig
from hf_lowrank.adapters.tuners import CoLAModel, SLTrainModel

__all__ = ["CoLAConfig", "CoLAModel", "SLTrainConfig", "SLTrainModel"]
