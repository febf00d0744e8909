"""Optimizers that keep their moments in low-rank subspaces of the gradients."""

from hf_lowrank.optim.apollo import ApolloAdamW
from hf_lowrank.optim.core import ProjectedAdamW
from hf_lowrank.optim.diagnostics import SubspaceLogCallback
from hf_lowrank.optim.fira import FiraAdamW
from hf_lowrank.optim.frugal import FrugalAdamW
from hf_lowrank.optim.galore import GaLoreAdamW
from hf_lowrank.optim.groups import adam_arguments, check_coverage, param_groups
from hf_lowrank.optim.muon import MuonAdamW

__all__ = [
    "ApolloAdamW",
    "FiraAdamW",
    "FrugalAdamW",
    "GaLoreAdamW",
    "MuonAdamW",
    "ProjectedAdamW",
    "SubspaceLogCallback",
    "adam_arguments",
    "check_coverage",
    "param_groups",
]
