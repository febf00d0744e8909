"""Optimizers that keep their moments in low-rank subspaces of the gradients."""

from hf_lowrank.optim.core import ProjectedAdamW
from hf_lowrank.optim.fira import FiraAdamW
from hf_lowrank.optim.galore import GaLoreAdamW
from hf_lowrank.optim.groups import adam_arguments, check_coverage, param_groups

__all__ = ["FiraAdamW", "GaLoreAdamW", "ProjectedAdamW", "adam_arguments", "check_coverage", "param_groups"]
